"""Which tokens a masked language model must predict (Devlin et al., 2019, 3.1), as a pure function of counters.

Of each sample a fixed share of the tokens is chosen, or of a batch a fixed number: those with the smallest random keys.
80 % of them become [MASK], 10 % a random token, 10 % stay; or all become [MASK]. Every draw is keyed on (seed, epoch,
sample, position), so it is the same in whatever batch the sample sits. `minibert_kernels.mlm_mask` does the same on the
device, bit for bit, except that it has no `all_mask`.
"""

from collections.abc import Sequence

import numpy as np

from minibert_kernels.philox import fold, philox

from ..batch import IGNORE
from ..config import one_of

UNITS = ("token", "word", "span")
MASKED, RANDOM = round(0.8 * 2**32), round(0.9 * 2**32)  # below the first: [MASK]; below the second: a random token
NEVER = 2**63 - 1  # the key of a special token


def check_masking(rate: float, unit: str, max_span: int, count: int | None) -> None:
    """Refuse options of `Masker` that no text can satisfy."""
    one_of("mask_unit", unit, UNITS)
    if not 0 < rate <= 1:
        raise ValueError(f"mask_rate={rate} is not in (0, 1]")
    for name, value in (("max_span", max_span), ("mask_count", count)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not positive")


class Masker:
    """Masks packed batches of samples.

    Args:
        rate: share of the tokens of a sample that are chosen, special tokens aside; at least one is.
        mask_id: the id of [MASK].
        special_ids: ids that are neither chosen nor drawn as random tokens.
        is_continuation: bool [vocab_size], the pieces that continue a word; units are then words by default.
        unit: "token"; "word": a piece goes with the word it continues; "span": neighbours are chosen together, up to
            max_span of them (Joshi et al., 2020). The last word may exceed the number, the last span is cut there.
        count: choose exactly so many tokens of a batch instead (Geiping and Goldstein, 2023): first one of every
            sample, then those that come first in theirs, relative to its length. The last word or span may be cut;
            where there are fewer tokens, the surplus is row 0 with an ignored label.
        all_mask: every chosen token becomes [MASK].
    """

    def __init__(
        self,
        seed: int,
        *,
        mask_id: int,
        vocab_size: int,
        special_ids: Sequence[int],
        rate: float = 0.15,
        is_continuation: np.ndarray | None = None,
        unit: str | None = None,
        max_span: int = 10,
        count: int | None = None,
        all_mask: bool = False,
    ):
        self.unit = unit or ("token" if is_continuation is None else "word")
        check_masking(rate, self.unit, max_span, count)
        if self.unit == "word" and is_continuation is None:
            raise ValueError("unit='word' needs is_continuation: the pieces that continue a word")
        self.seed, self.rate, self.mask_id, self.is_continuation = fold(seed, 0x3A5C), rate, mask_id, is_continuation
        self.count, self.masked = count, 2**32 if all_mask else MASKED
        # a span goes d tokens on where its word is at least the d-th: geometric with p = 0.2 among 1 .. longest
        longest = max_span if self.unit == "span" else 1
        self.reach = [round(2**32 * (1 - 0.8**d) / (1 - 0.8**longest)) for d in range(longest)]
        self.is_special = np.zeros(vocab_size, dtype=bool)
        self.is_special[list(special_ids)] = True
        self.ordinary = np.flatnonzero(~self.is_special)
        if not len(self.ordinary):
            raise ValueError(f"vocab_size={vocab_size} leaves no token beside the special ones")

    def __call__(self, ids: np.ndarray, lengths: np.ndarray, epoch: np.ndarray, sample: np.ndarray):
        """Mask B samples of T tokens that lie end to end.

        Args:
            ids: [T] int64. lengths, epoch, sample: [B] int64, the length and the name of each sample.
        Returns:
            ids with masks [T]; the rows that were chosen [M], ascending; what stood there [M].
        """
        position = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        segment = np.repeat(np.arange(len(lengths)), lengths)
        draw, action, replacement, stretch = philox(
            self.seed, position, sample[segment], sample[segment] >> 32, epoch[segment]
        )
        key = self._keys(draw << 31 | position, stretch, ids, position)
        rows = self._choose(key, segment, len(lengths))
        labels, masked, action = ids[rows], ids.copy(), action[rows]
        drawn = self.ordinary[(replacement[rows] * len(self.ordinary)) >> 32]
        masked[rows] = np.where(action < self.masked, self.mask_id, np.where(action < RANDOM, drawn, labels))
        if self.count is not None:
            missing = (self.count - len(rows), 0)
            rows, labels = np.pad(rows, missing), np.pad(labels, missing, constant_values=IGNORE)
        return masked, rows, labels

    def _keys(self, key, stretch, ids, position) -> np.ndarray:
        """The order in which the tokens of a sample are chosen; NEVER for special ones."""
        row, special = np.arange(len(ids)), self.is_special[ids]
        # where the run of ordinary tokens, or the word, of each row begins
        first = np.where(special, row + 1, np.where(position == 0, row, 0))
        if self.unit == "word":
            first = np.where(special | self.is_continuation[ids], first, row)
        first = np.maximum.accumulate(first)
        earliest = np.full_like(key, NEVER)
        for distance, least in enumerate(self.reach):
            start = (first if self.unit == "word" else row) - distance
            reached = np.flatnonzero(~special & (start >= first))
            reached = reached[stretch[start[reached]] >= least]
            earliest[reached] = np.minimum(earliest[reached], key[start[reached]])
        return earliest

    def _choose(self, key, segment, num_segments: int) -> np.ndarray:
        """The rows up to the last that is wanted, a word whole; or the `count` that come first in turn; ascending."""
        rows = np.flatnonzero(key != NEVER)
        key, segment = key[rows], segment[rows]
        candidates = np.bincount(segment, minlength=num_segments)
        first = np.cumsum(candidates) - candidates
        # starts with one draw lie as their tokens do, so a stable order by draw is the order of the keys
        order = np.argsort(segment << 32 | key >> 31, kind="stable")
        wanted = np.maximum(np.rint(self.rate * candidates).astype(np.int64), 1)
        if self.count is None and self.unit != "span":
            return rows[key <= key[order[(first + wanted - 1)[segment]]]]
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - first[segment[order]]
        if self.count is None:
            return rows[rank < wanted[segment]]
        turns = np.argsort(rank / candidates[segment], kind="stable")
        return np.sort(rows[turns[: self.count]])
