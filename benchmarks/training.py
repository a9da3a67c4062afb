"""A pretraining step (masked tokens and next sentence): forward, backward, AdamW; the same weights, tokens and masks.

Weights are float32, and below that precision the step runs under autocast, as minibert's trainer has it. The gate
compares loss and gradients without dropout; what is timed has BERT's 0.1.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minibert.batch import Batch, pack
from minibert.config import BertConfig
from minibert.hub import load_config
from minibert.train.optim import adamw

from . import lengths, peers
from .gate import Once, grouped, judge
from .inference import forward_flops, gate_lengths, padded_tokens, random_ids
from .measure import Case, Work
from .peers import Place, Trainee

MASK_RATE, DROPOUT = 0.15, 0.1
_theirs = peers.transformers_trainee
PROVIDERS: dict[str, Callable[..., Trainee]] = {
    "minibert": peers.minibert_trainee,
    "transformers eager": partial(_theirs, attention="eager"),
    "transformers eager, masked rows": partial(_theirs, attention="eager", masked_rows=True),
    "transformers sdpa": _theirs,
    "transformers sdpa, masked rows": partial(_theirs, masked_rows=True),
    "transformers sdpa, compiled": partial(_theirs, dynamic=True),
    "transformers sdpa, masked rows, compiled": partial(_theirs, masked_rows=True, dynamic=True),
}
_graphs = {"mode": "reduce-overhead", "dynamic": False}
CUDA_PROVIDERS = {
    "minibert, compiled": partial(peers.minibert_trainee, dynamic=True),
    "transformers sdpa, reduce-overhead": partial(_theirs, **_graphs),
    "transformers sdpa, masked rows, reduce-overhead": partial(_theirs, masked_rows=True, **_graphs),
}
BASELINE = "transformers sdpa"


def random_batch(sizes: np.ndarray, vocab_size: int, seed: int = 0) -> Batch:
    """Random tokens of which about MASK_RATE are to be predicted, at least one, and a label a sequence."""
    rng = np.random.default_rng(seed)
    total = int(sizes.sum())
    rows = np.sort(rng.choice(total, max(int(MASK_RATE * total), 1), replace=False))
    targets = {
        "mlm_rows": torch.from_numpy(rows),
        "mlm_labels": torch.from_numpy(rng.integers(0, vocab_size, len(rows))),
        "nsp_labels": torch.from_numpy(rng.integers(0, 2, len(sizes))),
    }
    return pack(random_ids(sizes, vocab_size, seed), **targets)


def step_flops(config: BertConfig, sizes, predicted: int) -> float:
    """Matrix products of forward and backward (twice forward), the head on predicted tokens alone."""
    d = config.hidden_size
    head = 2 * predicted * d * (d + config.vocab_size) + 2 * len(sizes) * d * d
    return 3 * (forward_flops(config, np.asarray(sizes)) + head)


def results(trainee: Trainee, batch: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss and gradients of one batch, on the CPU."""
    device = next(trainee.model.parameters()).device.type
    loss = _loss(trainee.loss, trainee.prepare(batch), Place(weights=Path(), dtype=dtype, device=device))
    loss.backward()
    found = {"loss": loss.detach()[None].cpu()} | grouped({n: g.cpu() for n, g in trainee.gradients().items()})
    trainee.model.zero_grad(set_to_none=True)
    return found


def _loss(loss, inputs, place):
    with torch.autocast(place.device, place.dtype, enabled=place.dtype in (torch.bfloat16, torch.float16)):
        return loss(inputs)


class Reference:
    """transformers eager without dropout: in float64, and in the precision of the case."""

    def __init__(self, place: Place):
        config = load_config(place.weights)
        self.batch = random_batch(np.array(gate_lengths(config)), config.vocab_size, seed=1)
        exact = _theirs(replace(place, dtype=torch.float64), 0.0, attention="eager")
        self.truth = results(exact, self.batch, torch.float64)
        self.same = None
        if place.dtype != torch.float32:
            yardstick = _theirs(replace(place, dtype=torch.float32), 0.0, attention="eager")
            self.same = results(yardstick, self.batch, place.dtype)
            self.same["loss"] = self.same["loss"].to(place.dtype)  # what it was computed in


def check(name: str, make: Callable[..., Trainee], place: Place, reference: Reference) -> None:
    """Judge loss and gradients in float32, and in the case's precision."""
    trainee = make(replace(place, dtype=torch.float32), 0.0)  # autocast lowers the precision, not the weights
    judge(f"{name} in float32", results(trainee, reference.batch, torch.float32), reference.truth)
    if reference.same is not None:
        judge(name, results(trainee, reference.batch, place.dtype), reference.truth, reference.same)


def steps(make: Callable[..., Trainee], place: Place, batches, wrap: Callable = lambda module: module):
    """The call that makes a step on each batch; `wrap` gets a module from inputs to the loss."""
    trainee = make(replace(place, dtype=torch.float32), DROPOUT)
    loss = wrap(Loss(trainee))
    optimizer, inputs = adamw(trainee.model, lr=1e-5), [trainee.prepare(batch) for batch in batches]

    def run():
        for batch in inputs:
            _loss(loss, batch, place).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


class Loss(nn.Module):
    """A trainee's loss as a module of its parameters, which torch's DistributedDataParallel takes."""

    def __init__(self, trainee: Trainee):
        super().__init__()
        self.model, self.forward = trainee.model, trainee.loss


def build(name: str, make: Callable[..., Trainee], place: Place, reference: Reference, batches, once: Once):
    """Judge a trainee, then the call that trains on all batches."""
    once((name, place), lambda: check(name, make, place, reference))
    return steps(make, place, batches)


def cases(
    weights: Path, config: BertConfig, *, names, dtypes, threads, batch_size: int, num_batches: int, longest: int,
    device: str = "cpu", backend: str = "auto", only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Case]:  # fmt: skip
    """A case for every distribution of lengths, precision and number of threads."""
    providers, once = PROVIDERS | (CUDA_PROVIDERS if device == "cuda" else {}), Once()
    for dtype in dtypes:
        for count in threads:
            torch.set_num_threads(count)
            place = Place(weights=weights, dtype=dtype, device=device, threads=count, backend=backend)
            reference = Reference(place)
            for name in names:
                sizes = lengths.sample(name, batch_size * num_batches, longest)
                parts = [sizes[i : i + batch_size] for i in range(0, len(sizes), batch_size)]
                batches = [random_batch(part, config.vocab_size, seed) for seed, part in enumerate(parts)]
                flops = sum(step_flops(config, part, len(b.mlm_rows)) for part, b in zip(parts, batches, strict=True))
                yield Case(
                    suite="train", name=f"{name}, batch {batch_size}",
                    labels={
                        "dtype": str(dtype).removeprefix("torch."), "threads": count,
                        "fill": round(float(sizes.sum() / padded_tokens(sizes, batch_size)), 3),
                    },
                    work=Work(tokens=int(sizes.sum()), sequences=len(sizes), flops=flops),
                    providers={
                        provider: partial(build, provider, make, place, reference, batches, once)
                        for provider, make in providers.items() if only(provider)
                    },
                    baseline=BASELINE,
                )  # fmt: skip
