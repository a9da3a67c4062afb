"""Which tokens a masked language model must predict (Devlin et al., 2019, 3.1), as a pure function of counters.

Of each sample a fixed number of tokens is chosen: those with the smallest random keys. 80 % of them become [MASK], 10
% a random token, 10 % stay. Every draw is keyed on (seed, epoch, sample, position), so it is the same in whatever
batch the sample sits.
"""

from collections.abc import Sequence

import numpy as np

from minibert_kernels.philox import fold, philox

MASKED, RANDOM = round(0.8 * 2**32), round(0.9 * 2**32)  # below the first: [MASK]; below the second: a random token


class Masker:
    """Masks packed batches of samples.

    Args:
        rate: share of the tokens of a sample that are chosen, special tokens aside; at least one is.
        mask_id: the id of [MASK].
        special_ids: ids that are neither chosen nor drawn as random tokens.
        is_continuation: bool [vocab_size], or None. With it whole words are chosen: a piece goes with the word it
            continues, and the last word may exceed the number.
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
    ):
        if not 0 < rate <= 1:
            raise ValueError(f"mask_rate={rate} is not in (0, 1]")
        self.seed, self.rate, self.mask_id, self.is_continuation = fold(seed, 0x3A5C), rate, mask_id, is_continuation
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
        words = philox(self.seed, position, sample[segment], sample[segment] >> 32, epoch[segment])
        rows = np.flatnonzero(~self.is_special[ids])
        key, action, replacement = (word[rows] for word in words[:3])
        chosen = np.sort(self._choose(rows, ids, segment[rows], key, len(lengths)))
        rows, action, replacement = rows[chosen], action[chosen], replacement[chosen]
        labels, masked = ids[rows], ids.copy()
        drawn = self.ordinary[(replacement * len(self.ordinary)) >> 32]
        masked[rows] = np.where(action < MASKED, self.mask_id, np.where(action < RANDOM, drawn, labels))
        return masked, rows, labels

    def _choose(self, rows, ids, segment, key, num_segments: int) -> np.ndarray:
        """Which of the candidates are chosen: indices into `rows`."""
        candidates = np.bincount(segment, minlength=num_segments)
        wanted = np.maximum(np.rint(self.rate * candidates).astype(np.int64), 1)
        if self.is_continuation is not None:
            # a word begins where a piece does not continue one, or where the token before is special
            begins = ~self.is_continuation[ids[rows]] | (np.diff(rows, prepend=-2) > 1)
            key = key[np.flatnonzero(begins)][np.cumsum(begins) - 1]
        order = np.argsort(segment << 32 | key, kind="stable")
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(candidates) - candidates, candidates)
        if self.is_continuation is not None:  # the pieces of a word share its rank
            new = begins[order]
            rank = rank[np.flatnonzero(new)][np.cumsum(new) - 1]
        return order[rank < wanted[segment[order]]]


def mask_tokens(
    ids: np.ndarray,
    seed: int,
    epoch: int,
    sample: int,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
    rate: float = 0.15,
    whole_word: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask one sample: ids with masks [n], the chosen positions [m], what stood there [m].

    `whole_word` is a bool table [vocab_size] that is true for the pieces that continue a word. A sample of special
    tokens alone is returned as it is.
    """
    options = {"mask_id": mask_id, "vocab_size": vocab_size, "special_ids": special_ids, "rate": rate}
    ids = np.asarray(ids, dtype=np.int64)
    masker = Masker(seed, **options, is_continuation=whole_word)
    return masker(ids, np.array([len(ids)]), np.array([epoch]), np.array([sample]))
