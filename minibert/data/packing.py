"""Packed pretraining batches by token budget. The state of the loader is one integer: how many samples were taken."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from minibert_kernels.philox import fold, philox

from ..batch import Batch, pack
from .objectives import check_objectives
from .pairs import PairSampler, Plan
from .store import TokenStore
from .tokenizer import Tokenizer

WINDOW = 4096  # samples planned at once: of fewer, a call costs more than its work; of more, the cache is too small
FEISTEL_ROUNDS = 4  # pseudo-random from three on (Luby and Rackoff, 1988)


def permute(seed: int, epoch, index, n: int):
    """Where `index` lands in the epoch's permutation of range(n).

    A Feistel network permutes the next power of four; it is walked until the value is below n.

    Args:
        epoch, index: ints, or int64 arrays of one shape; 0 <= index < n.
    Returns:
        an int, or an int64 array.
    """
    half = max(((n - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    epoch, index = np.broadcast_arrays(np.asarray(epoch, np.int64), np.asarray(index, np.int64))
    key, value = fold(seed, 0xFE15), index.reshape(-1).copy()
    epoch, walking = epoch.reshape(-1), np.arange(value.size)
    while len(walking):
        left, right = value[walking] >> half, value[walking] & mask
        for round_ in range(FEISTEL_ROUNDS):
            word = philox(key, right, epoch[walking], epoch[walking] >> 32, round_)[0]
            left, right = right, left ^ (word & mask)
        value[walking] = left << half | right
        walking = walking[value[walking] >= n]
    return value.reshape(index.shape) if index.shape else int(value[0])


class PretrainingData:
    """The endless stream of samples of a store, masked and packed; each is a pure function of (seed, cursor).

    Args:
        tokenizer: the one that the store was built with.
        documents: ids of the documents to use, all by default (see `split_documents`).
        max_length: the most tokens of a sample. batch_tokens: the most of a batch, which always has a sample.
        objectives: keys of `OBJECTIVES` that go together. nsp: leave nsp out of them, where it is false.
        mask_rate, mask_unit, max_span, mask_count, all_mask: see `Masker`. whole_word: short for mask_unit="word".
        short_prob: see `PairSampler`.
    Raises:
        ValueError: the store was built with another tokenizer, or an option out of range.
    """

    def __init__(
        self,
        store: TokenStore,
        tokenizer: Tokenizer,
        *,
        documents: Sequence[int] | None = None,
        seed: int = 0,
        max_length: int = 128,
        batch_tokens: int = 4096,
        objectives: Sequence[str] = ("mlm", "nsp"),
        nsp: bool = True,
        mask_rate: float = 0.15,
        mask_unit: str = "token",
        whole_word: bool = False,
        max_span: int = 10,
        mask_count: int | None = None,
        all_mask: bool = False,
        short_prob: float = 0.1,
    ):
        if store.meta["tokenizer_hash"] != tokenizer.hash:
            raise ValueError(f"{store.path} was built with another tokenizer: build the store again")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} is not positive")
        self.seed, self.batch_tokens = seed, batch_tokens
        kinds = check_objectives([name for name in objectives if nsp or name != "nsp"])
        pairs = next((kind.pairs for kind in kinds if kind.pairs), None)
        self.sampler = PairSampler(store, seed, max_length, pairs, short_prob, documents, tokenizer)
        unit = "word" if whole_word else mask_unit
        masking = {"rate": mask_rate, "unit": unit, "max_span": max_span, "count": mask_count, "all_mask": all_mask}
        self.objectives = [kind(seed, tokenizer, masking) for kind in kinds]
        self._window = (0, 0, None)  # planned stretch of the stream: first and last cursor, and its rows

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.sampler)

    def parts(self, batch: Batch) -> dict[str, int]:
        """The losses of a batch, and over how many labels each is a mean; for `minibert.train.train`."""
        return {f"{objective.name}_loss": objective.count(batch) for objective in self.objectives}

    def next_batch(self, cursor: int) -> tuple[Batch, int]:
        """The batch that begins at sample `cursor` of the stream, and the cursor behind it."""
        (epoch, index, plan), end = self._take(cursor)
        return self._build(epoch, index, plan, np.arange(cursor, end)), end

    def skip(self, cursor: int) -> int:
        """The cursor behind the batch that begins at `cursor`, without making it."""
        return self._take(cursor)[1]

    def batches(self, cursor: int = 0) -> Iterator[tuple[Batch, int]]:
        """`next_batch` without end, for a loop of your own: (batch, cursor behind it)."""
        while True:
            batch, cursor = self.next_batch(cursor)
            yield batch, cursor

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """One pass over the samples in their order, with the draws of epoch 0; at most `limit` batches."""
        index = self._evaluation_order()
        plan = self.sampler.plan(np.zeros_like(index), index)
        start, count = 0, 0
        while start < len(index) and (limit is None or count < limit):
            end = start + self._fill(plan.sizes[start:])
            rows = slice(start, end)
            yield self._build(np.zeros_like(index[rows]), index[rows], plan[rows], index[rows])
            start, count = end, count + 1

    def _take(self, cursor: int):
        """(epoch, index, plan) of the samples that fit one batch, and the cursor behind them."""
        first, last, rows = self._window
        size = WINDOW
        while True:
            if first <= cursor < last:
                epoch, index, plan = rows
                here = slice(cursor - first, None)
                count = self._fill(plan.sizes[here])
                if cursor + count < last:  # a batch that ends with the window might have taken more
                    here = slice(cursor - first, cursor - first + count)
                    return (epoch[here], index[here], plan[here]), cursor + count
            first, last = cursor, cursor + size
            rows = self._rows(np.arange(first, last))
            self._window = (first, last, rows)
            size *= 4

    def _rows(self, cursors: np.ndarray) -> tuple[np.ndarray, np.ndarray, Plan]:
        epoch, index = self._order(cursors)
        return epoch, index, self.sampler.plan(epoch, index)

    def _order(self, cursors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epoch and the index of the sample at each cursor."""
        epoch = cursors // len(self)
        return epoch, permute(self.seed, epoch, cursors % len(self), len(self))

    def _evaluation_order(self) -> np.ndarray:
        return np.arange(len(self))

    def _fill(self, sizes: np.ndarray) -> int:
        """How many of these samples fit the budget: one at least."""
        return max(int(np.searchsorted(np.cumsum(sizes), self.batch_tokens, side="right")), 1)

    def _build(self, epoch, index, plan: Plan, seq_ids: np.ndarray) -> Batch:
        ids, types = self.sampler.gather(plan)
        targets = {}
        for objective in self.objectives:
            ids, made = objective(ids, plan, epoch, index)
            targets |= {name: torch.from_numpy(values) for name, values in made.items()}
        borders = np.cumsum(plan.sizes)[:-1]
        return pack(np.split(ids, borders), np.split(types, borders), seq_ids=seq_ids, **targets)
