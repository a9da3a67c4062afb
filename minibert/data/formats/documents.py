"""Files that are one JSON object: SQuAD, and CLINC150, which holds all splits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..records import SHOWN, Bad, Record
from ..text import json_reason, read_lines, unknown_column

CLINC_PARTS = {"train": ("train", "oos_train"), "valid": ("val", "oos_val"), "test": ("test", "oos_test")}


def read_document(path: Path) -> dict:
    """A file that is one JSON object."""
    text = "".join(read_lines(path))
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: broken JSON: {json_reason(error)}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def _field(value, name: str, kind: type, where: str, *default):
    """A key's value of an object that a document has to hold, of one type."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    if name not in value and default:
        return default[0]
    if name not in value:
        raise unknown_column(where, name, value)
    if type(value[name]) is not kind:
        raise ValueError(f"{where}: {name}={SHOWN.repr(value[name])} is not of type {kind.__name__}")
    return value[name]


def read_squad(path: Path, bad: Bad) -> Iterator[Record]:
    seen: set[str] = set()

    def items(value, name, where) -> Iterator[tuple[str, Any]]:
        try:
            found = _field(value, name, list, where)
        except ValueError as error:
            return bad(error)
        yield from ((f"{where}, {name} {i}", item) for i, item in enumerate(found, 1))

    articles = _field(read_document(path), "data", list, str(path))
    for i, article in enumerate(articles, 1):
        for place, paragraph in items(article, "paragraphs", f"{path}: article {i}"):
            for where, question in items(paragraph, "qas", place):
                try:
                    record = _question(path, article, paragraph, question, where, seen)
                except ValueError as error:
                    bad(error)
                else:
                    yield record


def _question(path: Path, article: dict, paragraph: dict, question: dict, where: str, seen: set[str]) -> Record:
    name = _field(question, "id", str, where)
    if name in seen:
        raise ValueError(f"{where}: id={SHOWN.repr(name)} is the id of an earlier question, too")
    seen.add(name)
    where = f"{path}: question {SHOWN.repr(name)}"
    impossible = _field(question, "is_impossible", bool, where, False)
    answers = _field(question, "answers", list, where, [] if impossible else None)
    fields = {
        "id": name,
        "title": _field(article, "title", str, where, ""),
        "context": _field(paragraph, "context", str, where),
        "question": _field(question, "question", str, where),
        "is_impossible": impossible,
    }
    if answers is not None:  # a question that is to be answered has none
        fields["answers"] = [_answer(answer, f"{where}, answer {i}") for i, answer in enumerate(answers, 1)]
    return Record(where, fields)


def _answer(answer: dict, where: str) -> dict:
    return {"text": _field(answer, "text", str, where), "answer_start": _field(answer, "answer_start", int, where)}


def read_clinc(path: Path, bad: Bad, part: tuple[str, ...] | None = None) -> Iterator[Record]:
    document = read_document(path)
    for key in part or document:
        for i, item in enumerate(_field(document, key, list, str(path)), 1):
            where = f"{path}: {key} {i}"
            if isinstance(item, list) and len(item) == 2 and all(isinstance(value, str) for value in item):
                yield Record(where, {"text": item[0], "label": item[1]})
            else:
                bad(ValueError(f"{where}: expected [text, intent], got {SHOWN.repr(item)}"))
