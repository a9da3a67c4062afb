"""Rows of tokens for fine-tuning, and the stream of packed batches that is made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, pack
from .packing import permute

POOL = 64  # batches whose units are drawn at once


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence for the model.

    ids, types: token ids and their types, of one length.
    at: positions of the tokens whose states a head reads: words, entities, sentences. tags: one class for each of them.
    label: of the sequence, in the form that its head's labels have.
    example: the number of the example that it was made of. extra: what a prediction needs beside the scores.
    """

    ids: Sequence[int]
    types: Sequence[int]
    at: Sequence[int] = ()
    label: Any = None
    tags: Sequence[int] = ()
    example: int = 0
    extra: Any = None


class RowData:
    """An endless stream of shuffled, packed batches; its state is one integer, the number of units drawn.

    Args:
        rows: N rows; `together` neighbours are a unit, drawn as one: the choices of a question, the texts of a pair.
        batch_size: units of a batch.
        dtype: of the labels; float32 for numbers.
        group_by_length: the units of `POOL` batches are sorted by their tokens, cut, and the batches shuffled: less
            work where attention pads, which it does without the kernels.
    Raises:
        ValueError: batch_size is not positive.
    """

    def __init__(
        self, rows: Sequence[Row], *, batch_size: int, seed: int, together: int = 1, dtype=torch.int64,
        group_by_length: bool = False,
    ):  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        self.rows, self.batch_size, self.seed, self.together, self.dtype = rows, batch_size, seed, together, dtype
        self.sizes = None
        if group_by_length:
            self.sizes = np.array([len(row.ids) for row in rows], np.int64).reshape(-1, together).sum(1)
        self.pool: tuple[tuple[int, int] | None, np.ndarray] = None, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.rows) // self.together

    def next_batch(self, cursor: int) -> tuple[Batch, int]:
        """The batch at `cursor` and the cursor after it; the last batch of an epoch may be smaller."""
        epoch, start = divmod(cursor, len(self))
        end, k = self.skip(cursor), self.together
        number, first = divmod(start, POOL * self.batch_size)
        if self.pool[0] != (epoch, number):
            self.pool = (epoch, number), self.draw(epoch, number)
        units = self.pool[1][first : first + end - cursor]
        rows = [self.rows[unit * k + i] for unit in units.tolist() for i in range(k)]
        return collate(rows, range(cursor * k, end * k), self.dtype), end

    def draw(self, epoch: int, number: int) -> np.ndarray:
        """The units of one pool, in the order of its batches."""
        size = POOL * self.batch_size
        index = np.arange(number * size, min((number + 1) * size, len(self)))
        units = permute(self.seed, epoch, index, len(self))
        if self.sizes is None:
            return units
        units = units[np.argsort(self.sizes[units], kind="stable")]
        whole = len(units) // self.batch_size  # a smaller batch, where there is one, stays the last
        if not whole:
            return units
        cut = whole * self.batch_size
        pools = -(-len(self) // size)
        order = permute(self.seed, epoch * pools + number, np.arange(whole), whole)
        return np.concatenate((units[:cut].reshape(whole, -1)[order].ravel(), units[cut:]))

    def skip(self, cursor: int) -> int:
        """The cursor behind the batch that begins at `cursor`, without making it."""
        return min(cursor + self.batch_size, cursor - cursor % len(self) + len(self))


def in_order(rows: Sequence[Row], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Every row once, unlabelled: (row numbers, batch). Shortest first, as many as have `batch_tokens` tokens."""
    batch, tokens = [], 0
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number].ids)):
        size = len(rows[number].ids)
        if batch and tokens + size > batch_tokens:
            yield batch, collate([rows[i] for i in batch], batch, labelled=False)
            batch, tokens = [], 0
        batch.append(number)
        tokens += size
    if batch:
        yield batch, collate([rows[i] for i in batch], batch, labelled=False)


def collate(rows: Sequence[Row], seq_ids: Sequence[int], dtype=torch.int64, *, labelled: bool = True) -> Batch:
    """Lay rows end to end, with what their heads read and learn. Rows without a label among those with one have none
    in the batch either: the first choice stands for its question."""
    targets: dict[str, Tensor] = {}
    if any(len(row.at) for row in rows):
        starts = np.cumsum([0, *(len(row.ids) for row in rows)])
        at = [np.asarray(row.at, dtype=np.int64) + start for row, start in zip(rows, starts, strict=False)]
        targets["token_rows"] = torch.from_numpy(np.concatenate(at))
    if labelled and (labels := [row.label for row in rows if row.label is not None]):
        targets["labels"] = torch.as_tensor(np.asarray(labels), dtype=dtype)
    if labelled and any(len(row.tags) for row in rows):
        tags = np.concatenate([np.asarray(row.tags, dtype=np.int64) for row in rows])
        targets["token_labels"] = torch.from_numpy(tags)
    return pack([row.ids for row in rows], [row.types for row in rows], seq_ids=seq_ids, **targets)
