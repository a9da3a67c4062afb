"""A record: the fields that a labelled example has in a file, or in memory, and how a task reads them."""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .text import unknown_column

Bad = Callable[[ValueError], None]
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what UTF-8 cannot hold, and what no text does
SHOWN = reprlib.Repr()  # values in messages, cut to a line
SHOWN.maxstring = 80


@dataclass(frozen=True)
class Record:
    """One labelled thing as a file has it, and where it stands: "file:line", for errors.

    kinds: of which types the labels in a field are; the records of a jsonl file, or of one call, share it.
    """

    where: str
    fields: dict[str, Any]
    kinds: dict[str, str] = field(default_factory=dict, compare=False, repr=False)


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
