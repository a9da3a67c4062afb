"""minibert and transformers timed side by side: same weights, same texts, turn by turn."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ..batch import pack
from ..data.tokenizer import Tokenizer

AGREE = 1e-4  # states in float32 may differ by this much, else nothing is timed


@dataclass(frozen=True)
class Timing:
    """Median seconds of one pass over all batches, and how the two compare."""

    sequences: int
    tokens: int
    threads: int
    load: float
    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def to_dict(self) -> dict:
        return asdict(self)


def time_inference(
    ours: nn.Module,
    theirs: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    rounds: int = 7,
) -> Timing:
    """Encode `texts` in batches with both models, interleaved; tokenised beforehand, theirs padded to the longest.

    ratio is the median over the rounds of theirs / ours; ratio_low and ratio_high are the 20th and 80th percentiles.
    Raises:
        ValueError: the last hidden states differ by more than `AGREE`: what is not equal is not timed.
    """
    device = next(ours.parameters()).device
    parts = [list(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    padded = [tokenizer(part, padding=True, return_tensors="pt").to(device) for part in parts]
    packed = [pack(tokenizer(part).input_ids).to(device) for part in parts]
    with torch.inference_mode():
        for left, right in zip(packed, padded, strict=True):
            mask = right["attention_mask"].bool()
            error = float((ours(left).last_hidden_state - theirs(**right).last_hidden_state[mask]).abs().max())
            if not error <= AGREE:
                raise ValueError(f"the two models differ by {error:.1e} on these texts: not timed")
        pairs = [(_seconds(ours, packed), _seconds(lambda b: theirs(**b), padded)) for _ in range(rounds)]
    ratios = sorted(right / left for left, right in pairs)
    return Timing(
        sequences=len(texts),
        tokens=sum(batch.num_tokens for batch in packed),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        ours=statistics.median(left for left, _ in pairs),
        theirs=statistics.median(right for _, right in pairs),
        ratio=statistics.median(ratios),
        ratio_low=ratios[round(0.2 * (rounds - 1))],
        ratio_high=ratios[round(0.8 * (rounds - 1))],
    )


def _seconds(call: Callable, batches: Sequence) -> float:
    start = time.perf_counter()
    for batch in batches:
        call(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
