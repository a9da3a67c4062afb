"""Tokens with tags: CoNLL's columns, and SNIPS's folders of three files."""

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..records import Bad, Record
from ..text import number_lines

SNIPS_FILES = ("seq.in", "seq.out", "label")


def split_words(line: str) -> list[str]:
    """What stands between blanks and tabs; other white space, as published sets have it, is part of a word."""
    return re.findall(r"[^ \t\r\n]+", line)


def read_snips(path: Path, bad: Bad) -> Iterator[Record]:
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
        fields: dict[str, Any] = {"tokens": (tokens := split_words(found["seq.in"]))}
        if "label" in found:
            fields["label"] = found["label"].strip()
        if "seq.out" in found:
            fields["tags"] = tags = split_words(found["seq.out"])
            if len(tags) != len(tokens):
                bad(ValueError(f"{path / 'seq.out'}:{number}: {len(tags)} tags, seq.in has {len(tokens)} tokens"))
                continue
        yield Record(f"{files[0]}:{number}", fields)


def read_conll(path: Path, bad: Bad) -> Iterator[Record]:
    """Of a token, or of columns of which the first is a token and the last its tag."""
    width = 0
    for sentence in _sentences(number_lines(path, bad)):
        rows = [(number, split_words(line)) for number, line in sentence if line is not None]
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
        if line is None or (split_words(line) and not line.startswith("-DOCSTART-")):
            sentence.append((number, line))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence
