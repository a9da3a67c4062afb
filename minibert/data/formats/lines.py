"""A record a line: JSON objects, CoLA's columns, and sentences with 0 or 1."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ..records import SHOWN, Bad, Record
from ..text import number_lines


def split_columns(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def by_line(fields_of: Callable[[str], dict]):
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


def cola_fields(line: str) -> dict:
    columns = split_columns(line)
    if len(columns) != 4:
        raise ValueError(f"{len(columns)} fields, expected source, label, mark and sentence")
    return dict(zip(("source", "label", "mark", "text"), columns, strict=True))


def uci_fields(line: str) -> dict:
    text, _, label = line.rstrip("\r\n").rpartition("\t")
    if label.strip() not in ("0", "1"):
        raise ValueError(f"expected a sentence, a tab and 0 or 1, got {SHOWN.repr(line)}")
    return {"text": text, "label": label.strip()}
