"""Several stores as one stream, each with a weight; which sample comes from which store is a function of the cursor.

The stream is cut into blocks of BLOCK samples. In a block every store has its exact share of the positions, in an order
drawn from (seed, block); so the sample behind a cursor is found without looking at any other.
"""

from collections.abc import Sequence

import numpy as np

from minibert_kernels.philox import fold

from .packing import PretrainingData, permute
from .pairs import Plan, frame

BLOCK = 1000


class Mixture(PretrainingData):
    """The streams of several stores mixed by weight: over and over each for itself, at its own pace.

    Args:
        parts: made with the same options and tokenizer.
        weights: the share of the samples from each, to a thousandth; they need not add up to one.
    Raises:
        ValueError: other numbers than parts, a weight that is not positive or too small for a block.
    """

    def __init__(self, parts: Sequence[PretrainingData], weights: Sequence[float]):
        if len(parts) != len(weights):
            raise ValueError(f"there are {len(parts)} stores and {len(weights)} weights")
        self.streams, self.sampler = list(parts), _Samplers([part.sampler for part in parts])
        self.quota = _quota(weights)
        first = self.streams[0]
        self.seed, self.batch_tokens, self.objectives = first.seed, first.batch_tokens, first.objectives
        self._window = (0, 0, None)

    def _order(self, cursors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        block, place = np.divmod(cursors, BLOCK)
        seat = permute(fold(self.seed, 0x317), block, place, BLOCK)
        ends = np.cumsum(self.quota)
        owner = np.searchsorted(ends, seat, side="right")
        own = block * self.quota[owner] + seat - (ends - self.quota)[owner]
        epoch, index = np.empty_like(own), np.empty_like(own)
        for number, part in enumerate(self.streams):
            here = owner == number
            epoch[here], index[here] = part._order(own[here])
        return epoch, index + self.sampler.first[owner]

    def _evaluation_order(self) -> np.ndarray:
        """The stream up to where a store would begin anew, but at least a block of what is new."""
        blocks = min(len(part) // quota for part, quota in zip(self.streams, self.quota, strict=True))
        epoch, index = self._order(np.arange(max(int(blocks), 1) * BLOCK))
        return index[epoch == 0]


class _Samplers:
    """Samplers side by side: indices and token offsets of each begin where those of the one before end."""

    def __init__(self, samplers: list):
        self.samplers = samplers
        self.last = np.cumsum([len(sampler) for sampler in samplers])
        self.first = self.last - [len(sampler) for sampler in samplers]
        self._last_token = np.cumsum([sampler.store.num_tokens for sampler in samplers])

    def __len__(self) -> int:
        return int(self.last[-1])

    def plan(self, epoch: np.ndarray, index: np.ndarray) -> Plan:
        owner = np.searchsorted(self.last, index, side="right")
        plans = []
        for number, sampler in enumerate(self.samplers):
            plan = sampler.plan(epoch[owner == number], index[owner == number] - self.first[number])
            moved = self._last_token[number] - sampler.store.num_tokens
            plans.append(Plan(plan.start + moved, plan.length, plan.label))
        joined = [np.concatenate(column) for column in zip(*map(Plan.columns, plans), strict=True)]
        # rows lie store by store: back to where they were asked for
        return Plan(*joined)[np.argsort(np.argsort(owner, kind="stable"))]

    def gather(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        return frame(plan, self._read, self.samplers[0].cls_id, self.samplers[0].sep_id)

    def _read(self, offsets: np.ndarray) -> np.ndarray:
        owner = np.searchsorted(self._last_token, offsets, side="right")
        ids = np.empty(len(offsets), dtype=np.int64)
        for number, sampler in enumerate(self.samplers):
            here = owner == number
            ids[here] = sampler.store.tokens[offsets[here] - (self._last_token[number] - sampler.store.num_tokens)]
        return ids


def _quota(weights: Sequence[float]) -> np.ndarray:
    """Positions of a block for each weight: rounded down, the rest to the largest remainders."""
    weights = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(weights).all() or (weights <= 0).any():
        raise ValueError(f"weights {weights.tolist()} are not all positive")
    exact = BLOCK * weights / weights.sum()
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: BLOCK - quota.sum()]] += 1
    if (quota == 0).any():
        raise ValueError(f"weights {weights.tolist()}: one is less than a thousandth of the whole")
    return quota
