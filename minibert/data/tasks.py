"""Labelled text: csv, tsv and jsonl with named columns to examples, splits and packed batches."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minibert_kernels.philox import fold, uniform

from ..batch import Batch, pack
from ..config import one_of
from .packing import permute
from .tokenizer import Tokenizer

Kind = Literal["classification", "regression"]
# the names that published sets give their columns, tried in this order
TEXTS = (("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("sentence",))
LABELS = ("label", "score", "gold_label", "category", "intent")
SPLITS = {"train": ("train",), "valid": ("valid", "dev", "validation"), "test": ("test",)}
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns hold what; `pair` is the second text, or None."""

    text: str = "text"
    pair: str | None = None
    label: str | None = "label"

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.pair is None else (self.text, self.pair)


@dataclass(frozen=True)
class Example:
    """One row: its texts (one or two), its label as written (None where unlabelled), and where it stands."""

    texts: tuple[str, ...]
    label: str | None
    where: str


def find_columns(path, text: str | None = None, pair: str | None = None, label: str | None = None) -> Columns:
    """The columns that were named, and for the others those that the file has under a usual name.

    `label` of the result is None where the file has no such column.
    Raises:
        ValueError: no text column was named and none has a usual name; or see `read_examples`.
    """
    path = Path(path)
    row = next(_read_rows(path), None) if path.is_file() else None
    if row is None:
        raise ValueError(f"{path}: {'it holds no rows' if path.is_file() else 'no such file'}")
    header = list(row[1])
    if text is None:
        usual = next((names for names in TEXTS if all(name in header for name in names)), None)
        if usual is None:
            raise ValueError(f"{path}: its columns are {', '.join(header)}: name the text with --text-column")
        text, pair = usual[0], pair or (usual[1] if len(usual) > 1 else None)
    return Columns(text=text, pair=pair, label=label or next((name for name in LABELS if name in header), None))


def find_splits(path) -> dict[str, Path]:
    """A folder's files called train, valid (or dev, validation) and test; `path` itself, as train, if it is a file."""
    path = Path(path)
    if not path.is_dir():
        return {"train": path}
    found = {
        split: file
        for split, stems in SPLITS.items()
        for file in (path / (stem + suffix) for stem in reversed(stems) for suffix in SUFFIXES)
        if file.is_file()
    }
    if "train" not in found:
        raise ValueError(f"{path}: it has no train file ({', '.join('train' + suffix for suffix in SUFFIXES)})")
    return found


def read_examples(path, columns: Columns) -> list[Example]:
    """Read a labelled file; `columns.label=None` reads texts alone.

    Raises:
        ValueError: no such file, nothing in it, not UTF-8, an unknown column, broken JSON, or a field that is missing
            or no text; the message names file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    rows = list(_read_rows(path))
    if not rows:
        raise ValueError(f"{path}: it holds no rows")
    wanted = [*columns.texts, *([columns.label] if columns.label else [])]
    examples = []
    for line, row in rows:
        for name in wanted:
            if name not in row:
                one_of(f"{path}:{line}: column", name, row)
        texts = tuple(_text(row[name], path, line, name) for name in columns.texts)
        label = _label(row[columns.label], path, line, columns.label) if columns.label else None
        examples.append(Example(texts, label, f"{path}:{line}"))
    return examples


def _read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a csv, tsv or jsonl file."""
    separators = {".csv": ",", ".tsv": "\t"}
    one_of(f"{path}: file type", path.suffix, SUFFIXES)
    try:
        file = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    separator = separators.get(path.suffix)
    yield from _read_jsonl(file, path) if separator is None else _read_csv(file, separator, path)


def _read_csv(file, separator: str, path: Path) -> Iterator[tuple[int, dict]]:
    # published tsv files do not quote: a quotation mark there is a character of the text
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
    csv.field_size_limit(2**31 - 1)
    try:
        header = next(reader, [])
        if len(set(filter(None, header))) < len(list(filter(None, header))):
            raise ValueError(f"{path}:1: two columns have one name: {', '.join(header)}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: {len(row)} fields, the header has {len(header)}")
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _read_jsonl(file, path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: broken JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{line}: expected a JSON object, got {type(row).__name__}")
        yield line, row


def _text(value, path: Path, line: int, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path}:{line}: {name}={value!r} is not a text")
    return value


def _label(value, path: Path, line: int, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{path}:{line}: {name}={value!r} is not a label")
    return str(value).strip()


def split_examples(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Two disjoint parts, the second with `fraction` of every label's rows ; a pure function of the seed.

    Each label that has two rows has one in both parts; a single row stays in the first.
    """
    by_label: dict[str | None, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(index)
    held = set()
    few = len(by_label) > len(examples) // 4  # as many labels as a regression target has: draw over all rows
    groups = [list(range(len(examples)))] if few else list(by_label.values())
    for group in groups:
        order = np.argsort(uniform(fold(seed, 0x59117), np.asarray(group, dtype=np.int64)), kind="stable")
        held.update(group[i] for i in order[: min(max(1, round(fraction * len(group))), len(group) - 1)])
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]


def label_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """The distinct labels, numbers in their order, else alphabetical.

    Raises:
        ValueError: fewer than two.
    """
    names = {example.label for example in examples}
    if len(names) < 2:
        raise ValueError(
            f"{examples[0].where.rpartition(':')[0]}: every label is {names.pop()!r}: two classes are needed"
        )
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


def encode_labels(examples: Sequence[Example], kind: Kind, names: Sequence[str]) -> np.ndarray:
    """Labels as int64 classes or float32 numbers.

    Raises:
        ValueError: a label that is no number, or is not among `names`; the message names file and line.
    """
    if kind == "classification":
        known = {name: i for i, name in enumerate(names)}
        for example in examples:
            if example.label not in known:
                one_of(f"{example.where}: label", example.label, known)
        return np.array([known[example.label] for example in examples], dtype=np.int64)
    values = np.array([_number(example) for example in examples], dtype=np.float32)
    return values


def _number(example: Example) -> float:
    try:
        value = float(example.label)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(f"{example.where}: label={example.label!r} is not a number, which regression needs")
    return value


def encode_texts(
    tokenizer: Tokenizer, examples: Sequence[Example], max_length: int, truncate: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and types of each example.

    Raises:
        ValueError: a text has more than `max_length` tokens and `truncate` is false; the message names file and line.
    """
    texts = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
    encoded = tokenizer(*texts, truncation=truncate, max_length=max_length if truncate else None)
    for example, ids in zip(examples, encoded.input_ids, strict=True):
        if len(ids) > max_length:
            raise ValueError(
                f"{example.where}: the text has {len(ids)} tokens, the model takes {max_length}: use --truncate"
            )
    return encoded.input_ids, encoded.token_type_ids


class LabelledData:
    """An endless stream of shuffled, packed batches; its state is one integer, the number of examples drawn."""

    def __init__(self, ids, types, labels: np.ndarray, *, batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        self.ids, self.types, self.labels = ids, types, labels
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return len(self.ids)

    def next_batch(self, cursor: int) -> tuple[Batch, int]:
        """The batch at `cursor` and the cursor after it; the last batch of an epoch may be smaller."""
        epoch, start = divmod(cursor, len(self))
        end = self.skip(cursor)
        rows = [int(permute(self.seed, epoch, index, len(self))) for index in range(start, start + end - cursor)]
        return self._pack(rows, range(cursor, end)), end

    def skip(self, cursor: int) -> int:
        """The cursor behind the batch that begins at `cursor`, without making it."""
        return min(cursor + self.batch_size, cursor - cursor % len(self) + len(self))

    def in_order(self) -> Iterator[tuple[list[int], Batch]]:
        """Every example once, shortest first so that batches are even: (row numbers, batch)."""
        order = sorted(range(len(self)), key=lambda row: len(self.ids[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield rows, self._pack(rows, rows)

    def _pack(self, rows: Sequence[int], seq_ids: Sequence[int]) -> Batch:
        labels = None if self.labels is None else torch.from_numpy(self.labels[list(rows)])
        return pack([self.ids[row] for row in rows], [self.types[row] for row in rows], seq_ids=seq_ids, labels=labels)
