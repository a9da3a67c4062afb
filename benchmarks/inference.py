"""Encoder inference: the same weights and token ids for everybody, at lengths of real texts.

Tokens come at random from the vocabulary: what a step costs does not depend on them. Batches keep the order of the
draw, as a data loader that shuffles has them; peers pad each to its longest.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minibert.config import BertConfig

from . import lengths, peers
from .gate import judge
from .measure import Case, Work
from .peers import Encoder, Place

GATE_LENGTHS = (1, 7, 23, 16, 12)  # uneven, so that a wrong mask is seen
# what a name in the tables means: how an encoder is made at a place
PROVIDERS: dict[str, Callable[[Place], Encoder]] = {
    "minibert": peers.minibert,
    "minibert, padded call": peers.minibert_padded,
    "transformers eager": partial(peers.transformers, attention="eager"),
    "transformers sdpa": peers.transformers,
    "transformers sdpa, compiled": partial(peers.transformers, dynamic=True),
}
CUDA_PROVIDERS = {
    "transformers sdpa, reduce-overhead": partial(peers.transformers, mode="reduce-overhead", dynamic=False)
}
CPU_PROVIDERS = {"onnxruntime": peers.onnx_runtime}
BASELINE = "transformers sdpa"


def forward_flops(config: BertConfig, sizes: np.ndarray) -> float:
    """Multiplications and additions of the encoder's matrix products over sequences of these lengths."""
    d, f = config.hidden_size, config.intermediate_size
    token = 2 * (4 * d * d + 2 * d * f)
    return float(config.num_hidden_layers * (token * sizes.sum() + 4 * d * (sizes.astype(float) ** 2).sum()))


def random_ids(sizes, vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, size) for size in sizes]


class Reference:
    """What every encoder is judged by: transformers eager, in float64 and in the precision of the case."""

    def __init__(self, place: Place, vocab_size: int):
        self.ids = random_ids(GATE_LENGTHS, vocab_size, seed=1)
        self.truth = {"states": self._states(place, torch.float64)}
        self.same = None if place.dtype == torch.float32 else {"states": self._states(place, place.dtype)}

    def _states(self, place, dtype):
        place = Place(weights=place.weights, device=place.device, dtype=dtype)
        return states(peers.transformers(place, attention="eager"), self.ids).cpu()


@torch.inference_mode()
def states(encoder: Encoder, ids: list[np.ndarray]) -> torch.Tensor:
    inputs = encoder.prepare(ids)
    return encoder.states(encoder.run(inputs), inputs).cpu()


def build(
    name: str, make: Callable[[Place], Encoder], place: Place, reference: Reference, batches
) -> Callable[[], None]:
    """Judge an encoder, then the call that runs all batches.

    In lower precision its float32 twin is judged first: rounding would hide a wrong formula.
    Raises:
        Refused: its states differ.
    """
    encoder = make(place)
    if place.dtype != torch.float32:
        exact = Place(weights=place.weights, device=place.device, threads=place.threads)
        judge(f"{name} in float32", {"states": states(make(exact), reference.ids)}, reference.truth)
    judge(name, {"states": states(encoder, reference.ids)}, reference.truth, reference.same)
    inputs = [encoder.prepare(batch) for batch in batches]

    @torch.inference_mode()
    def run():
        for batch in inputs:
            encoder.run(batch)

    return run


def cases(
    weights: Path, config: BertConfig, *, names, dtypes, threads, batch_size: int, num_batches: int, longest: int,
    device: str = "cpu", only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Case]:  # fmt: skip
    """A case for every distribution of lengths, precision and number of threads."""
    providers = PROVIDERS | (CUDA_PROVIDERS if device == "cuda" else CPU_PROVIDERS)
    for dtype in dtypes:
        for count in threads:
            place = Place(weights=weights, dtype=dtype, device=device, threads=count)
            torch.set_num_threads(count)
            reference = Reference(place, config.vocab_size)
            for name in names:
                sizes = lengths.sample(name, batch_size * num_batches, longest)
                ids = random_ids(sizes, config.vocab_size)
                batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
                yield Case(
                    suite="infer", name=f"{name}, batch {batch_size}",
                    labels={
                        "dtype": str(dtype).removeprefix("torch."), "threads": count,
                        "fill": round(float(sizes.sum() / padded_tokens(sizes, batch_size)), 3),
                    },
                    work=Work(tokens=int(sizes.sum()), sequences=len(sizes), flops=forward_flops(config, sizes)),
                    providers={
                        provider: partial(build, provider, make, place, reference, batches)
                        for provider, make in providers.items() if only(provider)
                    },
                    baseline=BASELINE,
                )  # fmt: skip


def padded_tokens(sizes: np.ndarray, batch_size: int) -> int:
    """Tokens of the batches, each padded to its longest."""
    parts = [sizes[i : i + batch_size] for i in range(0, len(sizes), batch_size)]
    return sum(len(part) * part.max() for part in parts)
