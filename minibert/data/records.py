"""Published files and folders of labelled text -> records; what a record means is for the tasks to say."""

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from ..config import one_of
from .text import (
    PACKED_SUFFIXES,
    as_paths,
    json_reason,
    need_pyarrow,
    number_lines,
    read_lines,
    refuse,
    table_rows,
    unknown_column,
)

Bad = Callable[[ValueError], None]
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what UTF-8 cannot hold, and what no text does
SHARD = re.compile(r"-\d+-of-\d+$")
SHOWN = reprlib.Repr()  # values in messages, cut to a line
SHOWN.maxstring = 80
# the names that files of a split have; the last two are those of SemEval-2010 task 8
STEMS = {
    "train": ("train", "train_file"),
    "valid": ("valid", "dev", "validation", "val"),
    "test": ("test", "test_file_full"),
}
CLINC_PARTS = {"train": ("train", "oos_train"), "valid": ("val", "oos_val"), "test": ("test", "oos_test")}
SNIPS_FILES = ("seq.in", "seq.out", "label")
TAG = re.compile(r"O|[BIES]-\S+")
LINES = "lines"  # the form of plain text, of which no label is known


@dataclass(frozen=True)
class Record:
    """One labelled thing as a file has it, and where it stands: "file:line", for errors.

    kinds: of which types the labels in a field are; the records of a jsonl file, or of one call, share it.
    """

    where: str
    fields: dict[str, Any]
    kinds: dict[str, str] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Source:
    """The files of one split, read anew each time; `part` has the keys of that split where a file holds several."""

    paths: tuple[Path, ...]
    part: tuple[str, ...] | None = None

    def records(
        self, bad: Bad = refuse, fields_of: Callable[[str], dict] | None = None, plain: bool = False
    ) -> Iterator[Record]:
        """The records of every file; `bad` gets the error of each broken one and may let it pass.

        `fields_of` makes a record's fields of a line of plain text; such files are refused where it is None. `plain`
        takes every .txt for one, whatever its lines look like.

        Raises:
            ValueError: a file is missing, of no known form, without records, or broken as a whole.
        """
        for path in self.paths:
            kind, found = LINES if plain and _suffix(path) == ".txt" else format_of(path), False
            if kind == LINES and fields_of is None:
                raise ValueError(
                    f"{path}: no labelled text: expected sentence TAB 0/1, token and tag columns, or SemEval's "
                    "<e1>, <e2>"
                )
            read = _by_line(fields_of) if kind == LINES else READERS[kind]
            for record in read(path, bad) if self.part is None else read(path, bad, self.part):
                found = True
                yield record
            if not found:
                raise ValueError(f"{path}: it holds no records")


def text_of(record: Record, name: str) -> str:
    """The text in a field; ValueError if it is missing, blank, no string, or has NUL or half a surrogate pair."""
    value = _value(record, name)
    if not isinstance(value, str) or not value.strip() or NO_TEXT.search(value):
        raise ValueError(f"{record.where}: {name}={SHOWN.repr(value)} is not a text")
    return value


def texts_in(record: Record, name: str, least: int = 1) -> tuple[str, ...]:
    """The texts in a field that is a list of `least` or more; ValueError if it is not, or one of them is no text."""
    values = _value(record, name)
    if not isinstance(values, list | tuple) or len(values) < least:
        raise ValueError(f"{record.where}: {name}={SHOWN.repr(values)} is not a list of {least} or more texts")
    return tuple(text_of(Record(record.where, {f"{name}[{i}]": one}), f"{name}[{i}]") for i, one in enumerate(values))


def label_of(record: Record, name: str) -> str:
    """The label in a field, a finite number or a string, without surrounding blanks; ValueError if it is neither or
    blank, or not of the type that this field of the same file had before: 1 and 1.0 would be two labels."""
    value = _value(record, name)
    is_label = isinstance(value, str | int | float) and not isinstance(value, bool)
    is_float = isinstance(value, float)
    label = str(value).strip() if is_label and (not is_float or math.isfinite(value)) else ""
    if not label or NO_TEXT.search(label):
        raise ValueError(f"{record.where}: {name}={SHOWN.repr(value)} is not a label")
    kinds = {name: "text" if isinstance(value, str) else "number"}
    if isinstance(value, int) or (is_float and value.is_integer()):
        kinds[f"{name}, whole"] = "decimal" if is_float else "whole number"
    for key, kind in kinds.items():
        before = record.kinds.setdefault(key, kind)
        if kind != before:
            raise ValueError(f"{record.where}: {name}={SHOWN.repr(value)} is a {kind}, those before are {before}s")
    return label


def _value(record: Record, name: str) -> Any:
    if name not in record.fields:
        raise unknown_column(record.where, name, record.fields)
    return record.fields[name]


def as_records(rows: Iterable[Mapping[str, Any]], name: str = "records") -> Iterator[Record]:
    """Records made in memory; errors call them `name`:1, `name`:2 and so on.

    Raises:
        ValueError: a row has no keys, as a text or a list.
    """
    kinds: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if not hasattr(row, "keys"):
            raise ValueError(f"{name}:{number}: expected a dictionary, got {type(row).__name__}")
        yield Record(f"{name}:{number}", dict(row), kinds)


def find_splits(path) -> dict[str, Source]:
    """The sources of "train", "valid" and "test" that a path holds.

    Args:
        path: a folder with files, or SNIPS folders, called train, valid (dev, validation, val) and test, at most one
            level down; a file of CLINC150, which holds all three; any other file, or a list of files, is "train".
    Raises:
        ValueError: the path is missing, or a folder has no train file or two of one split; the message lists them.
    """
    path, *others = as_paths(path)
    if others:
        return {"train": Source((path, *others))}
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir() or _is_snips(path):
        return _clinc_splits(path) if format_of(path) == "clinc150" else {"train": Source((path,))}
    shown = [place for place in sorted(path.iterdir()) if not place.name.startswith(".")]
    places = [shown, [file for place in shown if place.is_dir() for file in sorted(place.iterdir())]]
    for level in places:
        found = {split: _only(path, split, level) for split in STEMS}
        if found["train"]:
            return {split: Source(files) for split, files in found.items() if files}
    labelled = ", ".join(str(file.relative_to(path)) for level in places for file in level if _is_labelled(file))
    raise ValueError(f"{path}: it has no train file" + (f"; name one with --train: {labelled}" if labelled else ""))


def _only(folder: Path, split: str, places: Sequence[Path]) -> tuple[Path, ...]:
    """The one file, or the shards of it, that a split is called after."""
    files = [place for place in places if _base(place) in STEMS[split] and _may_be_labelled(place)]
    if len({(file.parent, _base(file), _suffix(file)) for file in files}) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise ValueError(f"{folder}: several files are called {split}, name one with --{split}: {names}")
    return tuple(files)


def _may_be_labelled(place: Path) -> bool:
    return _is_snips(place) if place.is_dir() else _suffix(place) in FORMATS


def _is_labelled(place: Path) -> bool:
    try:
        return format_of(place) != LINES
    except ValueError:
        return False


def _is_snips(place: Path) -> bool:
    return (place / "seq.in").is_file()


def _clinc_splits(path: Path) -> dict[str, Source]:
    keys = _document(path)
    parts = {split: tuple(key for key in names if key in keys) for split, names in CLINC_PARTS.items()}
    return {split: Source((path,), part) for split, part in parts.items() if part}


def format_of(path: Path) -> str:
    """The container that a file or folder is, a key of `READERS` or `LINES`: by its suffix and, where needed, its first
    lines.

    Raises:
        ValueError: it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        if not _is_snips(path):
            raise ValueError(f"{path}: a folder without {SNIPS_FILES[0]}, expected a file")
        return "snips"
    suffix = _suffix(path)
    one_of(f"{path}: file type", suffix, FORMATS)
    if suffix == ".parquet" and path.suffix.lower() != suffix:
        raise ValueError(f"{path}: parquet is compressed inside: unpack the file")
    known = FORMATS[suffix]
    return known if isinstance(known, str) else known(path)


def _suffix(path: Path) -> str:
    """The last suffix beside .gz and .zst."""
    name = path.name.lower()
    return Path(name.removesuffix(path.suffix.lower()) if path.suffix.lower() in PACKED_SUFFIXES else name).suffix


def _base(path: Path) -> str:
    """The name without suffixes, and without the number that one file of several has."""
    return SHARD.sub("", path.name.lower().partition(_suffix(path) or "\0")[0])


def _start(path: Path) -> list[str]:
    """The first few lines that are not blank."""
    return list(islice((line for line in read_lines(path, bad=lambda error: None) if line.strip()), 9))


def _tsv_format(path: Path) -> str:
    start = [_columns(line) for line in _start(path)[:1]]
    return "cola" if start and len(start[0]) == 4 and start[0][1] in ("0", "1") and start[0][2] in ("", "*") else "tsv"


# the first key of an object, behind others that hold a string or a number, and the bracket that it opens
FIRST_LIST = re.compile(r'\s*\{\s*(?:"\w+"\s*:\s*(?:"[^"]*"|[\d.]+)\s*,\s*)*"(\w+)"\s*:\s*\[')


def _json_format(path: Path) -> str:
    match = FIRST_LIST.match("".join(_start(path)))
    key = match[1] if match else None
    return "squad" if key == "data" else "clinc150" if key in sum(CLINC_PARTS.values(), ()) else "jsonl"


def _txt_format(path: Path) -> str:
    start = _start(path)
    if not start:
        raise ValueError(f"{path}: it holds no records")
    if re.match(r'\d+\t"', start[0]):
        return "semeval"
    if re.search(r"\t[01]\s*$", start[0]):
        return "uci"
    rows = [_words(line) for line in start if not line.startswith("-DOCSTART-")][:2]
    # two of one width: a single line may be a text that ends as a tag does
    columns = [len(row) for row in rows if len(row) > 1 and TAG.fullmatch(row[-1])]
    return "conll" if len(columns) == 2 and columns[0] == columns[1] else LINES


def _words(line: str) -> list[str]:
    """What stands between blanks and tabs; other white space, as published sets have it, is part of a word."""
    return re.findall(r"[^ \t\r\n]+", line)


def _columns(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def _by_line(fields_of: Callable[[str], dict]):
    """The reader of a container with a record a line; `fields_of` a line raises what is wrong with it."""

    def read(path: Path, bad: Bad) -> Iterator[Record]:
        kinds: dict[str, str] = {}
        for number, line in number_lines(path, bad):
            if line is None or not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = Record(where, fields_of(line), kinds)
            except ValueError as error:
                bad(ValueError(f"{where}: {error}"))
            else:
                yield record

    return read


def _jsonl_fields(line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON, expected one object a line: {json_reason(error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _cola_fields(line: str) -> dict:
    columns = _columns(line)
    if len(columns) != 4:
        raise ValueError(f"{len(columns)} fields, expected source, label, mark and sentence")
    return dict(zip(("source", "label", "mark", "text"), columns, strict=True))


def _uci_fields(line: str) -> dict:
    text, _, label = line.rstrip("\r\n").rpartition("\t")
    if label.strip() not in ("0", "1"):
        raise ValueError(f"expected a sentence, a tab and 0 or 1, got {SHOWN.repr(line)}")
    return {"text": text, "label": label.strip()}


def _read_table(path: Path, bad: Bad) -> Iterator[Record]:
    header = None
    for where, row in table_rows(path, _suffix(path), bad):
        if header is None:
            header = _header(row, where)
        else:
            yield Record(where, dict(zip(header, row, strict=True)))


def _header(row: list[str], where: str) -> list[str]:
    twice = next((name for i, name in enumerate(row) if name and name in row[:i]), None)
    if twice is not None:
        raise ValueError(f"{where}: two columns are called {SHOWN.repr(twice)}")
    return row


def _read_parquet(path: Path, bad: Bad) -> Iterator[Record]:
    pyarrow = need_pyarrow(path)
    try:
        row = 0
        with pyarrow.parquet.ParquetFile(path) as table:
            _header(table.schema_arrow.names, str(path))
            for batch in table.iter_batches(batch_size=64):
                for fields in batch.to_pylist():
                    row += 1
                    yield Record(f"{path}: row {row}", fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {str(error).partition(chr(10))[0]}") from None


def _read_snips(path: Path, bad: Bad) -> Iterator[Record]:
    """The files of tags and labels may be missing, as where they are to be predicted."""
    names = [name for name in SNIPS_FILES if (path / name).exists()]
    files = [path / name for name in names]
    for number, lines in enumerate(zip_longest(*(number_lines(file, bad) for file in files)), 1):
        ended = [file for file, line in zip(files, lines, strict=True) if line is None]
        texts = [line[1] for line in lines if line is not None]
        if None in texts or not any(text.strip() for text in texts):
            continue
        if ended:
            raise ValueError(f"{ended[0]}:{number}: no such line, which {', '.join(names)} need for each sentence")
        found = dict(zip(names, texts, strict=True))
        fields: dict[str, Any] = {"tokens": (tokens := _words(found["seq.in"]))}
        if "label" in found:
            fields["label"] = found["label"].strip()
        if "seq.out" in found:
            fields["tags"] = tags = _words(found["seq.out"])
            if len(tags) != len(tokens):
                bad(ValueError(f"{path / 'seq.out'}:{number}: {len(tags)} tags, seq.in has {len(tokens)} tokens"))
                continue
        yield Record(f"{files[0]}:{number}", fields)


def _read_conll(path: Path, bad: Bad) -> Iterator[Record]:
    """Of a token, or of columns of which the first is a token and the last its tag."""
    width = 0
    for sentence in _sentences(number_lines(path, bad)):
        rows = [(number, _words(line)) for number, line in sentence if line is not None]
        width = width or max((len(words) for _, words in rows[:1]), default=0)
        wrong = next(((number, words) for number, words in rows if len(words) != width), None)
        if wrong:
            bad(ValueError(f"{path}:{wrong[0]}: columns={len(wrong[1])}, the lines before have {width}"))
        elif len(rows) == len(sentence):
            columns = {"tokens": 0, "tags": -1} if width > 1 else {"tokens": 0}
            fields = {name: [words[i] for _, words in rows] for name, i in columns.items()}
            yield Record(f"{path}:{rows[0][0]}", fields)


def _sentences(lines: Iterator[tuple[int, str | None]]) -> Iterator[list[tuple[int, str | None]]]:
    """The numbered lines between blank ones and the marks of a document's start."""
    sentence = []
    for number, line in lines:
        if line is None or (_words(line) and not line.startswith("-DOCSTART-")):
            sentence.append((number, line))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


MARKERS = (["<e1>", "</e1>", "<e2>", "</e2>"], ["<e2>", "</e2>", "<e1>", "</e1>"])


def _read_semeval(path: Path, bad: Bad) -> Iterator[Record]:
    for number, lines in _blocks(number_lines(path, bad), path, bad):
        try:
            record = _marked(f"{path}:{number}", *lines)
        except ValueError as error:
            bad(error)
        else:
            yield record


def _blocks(lines, path: Path, bad: Bad) -> Iterator[tuple[int, list[str]]]:
    """(line number, [sentence, relation…]) without comments; one with a line that is no text is left out."""
    block, start = None, 0
    for number, line in lines:
        if line is None:
            block = None
        elif re.match(r"\d+\t", line):
            if block:
                yield start, block
            block, start = [line], number
        elif line.strip() and not line.startswith("Comment"):
            if block is None:
                bad(ValueError(f"{path}:{number}: a relation without a sentence: {SHOWN.repr(line.strip())}"))
            else:
                block.append(line)
    if block:
        yield start, block


def _marked(where: str, sentence: str, *relations: str) -> Record:
    number, _, text = sentence.strip().partition("\t")
    if len(text) < 2 or not text[0] == text[-1] == '"':
        raise ValueError(f"{where}: text={SHOWN.repr(text)} is not in quotation marks")
    if re.findall("</?e[12]>", text) not in MARKERS:
        raise ValueError(f"{where}: text={SHOWN.repr(text)} needs one <e1>…</e1> and one <e2>…</e2>")
    if len(relations) > 1:
        raise ValueError(f"{where}: {len(relations)} relations, expected one below the sentence")
    label = {"label": relations[0].strip()} if relations else {}
    return Record(where, {"id": number, "text": text[1:-1]} | label)


def _document(path: Path) -> dict:
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


def _read_squad(path: Path, bad: Bad) -> Iterator[Record]:
    seen: set[str] = set()

    def items(value, name, where) -> Iterator[tuple[str, Any]]:
        try:
            found = _field(value, name, list, where)
        except ValueError as error:
            return bad(error)
        yield from ((f"{where}, {name} {i}", item) for i, item in enumerate(found, 1))

    articles = _field(_document(path), "data", list, str(path))
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


def _read_clinc(path: Path, bad: Bad, part: tuple[str, ...] | None = None) -> Iterator[Record]:
    document = _document(path)
    for key in part or document:
        for i, item in enumerate(_field(document, key, list, str(path)), 1):
            where = f"{path}: {key} {i}"
            if isinstance(item, list) and len(item) == 2 and all(isinstance(value, str) for value in item):
                yield Record(where, {"text": item[0], "label": item[1]})
            else:
                bad(ValueError(f"{where}: expected [text, intent], got {SHOWN.repr(item)}"))


# what a suffix stands for, or the function that looks into the file
FORMATS = {
    ".csv": "csv",
    ".tsv": _tsv_format,
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": _json_format,
    ".parquet": "parquet",
    ".txt": _txt_format,
    ".conll": "conll",
    ".iob": "conll",
    ".bio": "conll",
    ".train": "conll",  # as in eng.train, eng.testa and eng.testb of CoNLL-2003
    ".testa": "conll",
    ".testb": "conll",
}
# every container: a file or folder, and what gets the error of each broken record -> records
READERS = {
    "csv": _read_table,
    "tsv": _read_table,
    "jsonl": _by_line(_jsonl_fields),
    "parquet": _read_parquet,
    "cola": _by_line(_cola_fields),
    "uci": _by_line(_uci_fields),
    "snips": _read_snips,
    "conll": _read_conll,
    "semeval": _read_semeval,
    "squad": _read_squad,
    "clinc150": _read_clinc,
}
