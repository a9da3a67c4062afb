"""A pretraining step (masked tokens and next sentence): forward, backward, AdamW; the same weights, tokens and masks.

Weights are float32, and below that precision the step runs under autocast, as minibert's trainer has it. The gate
compares loss and gradients without dropout, also on a timed batch; what is timed has BERT's 0.1, and the gate looks
that it acts, and that every parameter has a gradient.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minibert import BertForPreTraining
from minibert.batch import Batch, pack
from minibert.config import BertConfig
from minibert.hub import load_config
from minibert.model.graphs import LAUNCHED
from minibert.train import TrainConfig
from minibert.train.graph import GraphedStep
from minibert.train.optim import adamw, cut_by_depth

from . import lengths, peers
from .gate import Once, Refused, grouped, judge
from .inference import forward_flops, gate_lengths, padded_tokens, random_ids
from .measure import Case, Work
from .peers import Place, Trainee

MASK_RATE, DROPOUT = 0.15, 0.1
STEP_TOKENS = (16384, 65536)  # of a step on a GPU: at 8,192 the host is as slow as the device
PART_TOKENS = 8192  # of a batch whose true gradients are summed up
MOVED = (
    0.05  # of a layer's gradient, at least, by dropout, which moves it by 25 to 50 %; rounding to bfloat16 by under 1 %
)
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
GRAPHS = "minibert, graphs"
CUDA_PROVIDERS = {
    GRAPHS: peers.minibert_trainee,  # see `graphed_steps`
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
    ids = random_ids(sizes, vocab_size, seed)
    return pack(ids, peers.pair_types(ids), **targets)


def step_flops(config: BertConfig, sizes, predicted: int) -> float:
    """Matrix products of forward and of backward, each twice, as MFU counts them; the head on predicted tokens alone.

    `minibert_kernels.roofline.model_flops` is the same a token, of sequences of one length.
    """
    d = config.hidden_size
    head = 2 * predicted * d * (d + config.vocab_size) + 2 * len(sizes) * d * d
    return 3 * (forward_flops(config, np.asarray(sizes)) + head)


def results(trainee: Trainee, batch: Batch, dtype: torch.dtype, name: str = "the reference") -> dict[str, torch.Tensor]:
    """Loss and gradients of one batch.

    Raises:
        Refused: a parameter has no gradient.
    """
    device = next(trainee.model.parameters()).device.type
    loss = _loss(trainee.loss, trainee.prepare(batch), Place(weights=Path(), dtype=dtype, device=device))
    loss.backward()
    return _taken(trainee, loss, name)


def _taken(trainee: Trainee, loss: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    for parameter_name, parameter in trainee.model.named_parameters():
        # vectors may have a gradient of zero: a bias of keys has no other but for rounding
        if parameter.grad is None or (parameter.ndim > 1 and not parameter.grad.any()):
            raise Refused(f"{name}: {parameter_name} has no gradient")
    found = {"loss": loss.detach()[None]} | grouped(trainee.gradients())
    trainee.model.zero_grad(set_to_none=True)
    return found


def accumulated(trainee: Trainee, batch: Batch) -> dict[str, torch.Tensor]:
    """`results` of transformers' model with masked rows in float32, some thousand tokens at a time."""
    model, total = trainee.model, 0.0
    for part in batch.split(batch.num_tokens // PART_TOKENS + 1):
        inputs = trainee.prepare(part)
        ids = (inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
        states, pooled = model.bert(*ids, return_dict=False)[:2]
        logits, pairs = model.cls(states.flatten(0, 1)[inputs["rows"]], pooled)
        sums = (
            nn.functional.cross_entropy(values, labels, reduction="sum") / count
            for values, labels, count in (
                (logits, inputs["targets"], len(batch.mlm_rows)),
                (pairs, inputs["next_sentence_label"], batch.num_sequences),
            )
        )
        loss = sum(sums)
        loss.backward()
        total += loss.detach()
    return _taken(trainee, total, "the reference")


def _loss(loss, inputs, place):
    with torch.autocast(place.device, place.dtype, enabled=place.dtype in (torch.bfloat16, torch.float16)):
        return loss(inputs)


class Reference:
    """transformers without dropout: eager in float64 on a few uneven sequences; on a timed batch, which may be too
    large for that, sdpa in float32, a part at a time, once it was judged itself. Both in the precision of the case too.
    """

    def __init__(self, place: Place):
        config = load_config(place.weights)
        self.place, self.once = place, Once()
        self.batch = random_batch(np.array(gate_lengths(config)), config.vocab_size, seed=1)
        exact = _theirs(replace(place, dtype=torch.float64), 0.0, attention="eager")
        self.truth = results(exact, self.batch, torch.float64)
        self.same = None
        if place.dtype != torch.float32:
            yardstick = _theirs(replace(place, dtype=torch.float32), 0.0, attention="eager")
            self.same = self._lower(yardstick, self.batch)

    def _lower(self, trainee: Trainee, batch: Batch) -> dict[str, torch.Tensor]:
        found = results(trainee, batch, self.place.dtype)
        return found | {"loss": found["loss"].to(self.place.dtype)}  # what it was computed in

    def _large(self) -> Trainee:
        trainee = _theirs(replace(self.place, dtype=torch.float32), 0.0, masked_rows=True)
        judge("transformers sdpa, masked rows", results(trainee, self.batch, torch.float32), self.truth)
        return trainee

    def timed(self, batch: Batch) -> tuple[dict, dict | None]:
        """True results of a timed batch, and in the case's precision where that is lower."""

        def both():
            trainee = self.once("large", self._large)
            return accumulated(trainee, batch), None if self.same is None else self._lower(trainee, batch)

        return self.once(batch.lengths, both)


def check(name: str, make: Callable[..., Trainee], place: Place, reference: Reference, batch: Batch) -> dict:
    """Judge loss and gradients in float32, in the case's precision, and there on a timed batch; a part of the last."""
    trainee = make(replace(place, dtype=torch.float32), 0.0)  # autocast lowers the precision, not the weights
    judge(f"{name} in float32", results(trainee, reference.batch, torch.float32, name), reference.truth)
    if reference.same is not None:
        judge(name, results(trainee, reference.batch, place.dtype, name), reference.truth, reference.same)
    found = results(trainee, batch, place.dtype, name)
    judge(f"{name}, as timed", found, *reference.timed(batch))
    return _part(found)


def _part(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some thousand elements of each layer's gradient."""
    return {name: values[:: max(len(values) >> 12, 1)].clone() for name, values in gradients.items() if name != "loss"}


def check_dropout(name: str, trainee: Trainee, place: Place, batch: Batch, exact: dict) -> None:
    """Raise Refused where a parameter of the timed model has no gradient, or a layer's is that without dropout."""
    for layer, found in _part(results(trainee, batch, place.dtype, f"{name}, as timed")).items():
        moved = float((found.double() - exact[layer].double()).norm() / exact[layer].double().norm())
        if not moved > MOVED:
            raise Refused(f"{name}: dropout moves {layer} by {moved:.1%} of its size: it does not act")


def with_dropout(make: Callable[..., Trainee], place: Place) -> Trainee:
    """What is timed."""
    return make(replace(place, dtype=torch.float32), DROPOUT)


def steps(trainee: Trainee, place: Place, batches, wrap: Callable = lambda module: module):
    """The call that makes a step on each batch; `wrap` gets a module from inputs to the loss."""
    loss = wrap(Loss(trainee))
    optimizer, inputs = adamw(trainee.model, lr=1e-5), [trainee.prepare(batch) for batch in batches]

    def run():
        for batch in inputs:
            _loss(loss, batch, place).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def graphed_steps(trainee: Trainee, place: Place, batches):
    """`steps` from CUDA graphs, as `--cuda-graph` has them: with padding, the copy to the GPU and the gradient's norm.

    Raises:
        Refused: a replay differs from what was captured.
    """
    optimizer, share = adamw(trainee.model, lr=1e-5), {"mlm_loss": 1.0, "nsp_loss": 1.0}
    cut_by_depth(trainee.model, optimizer, layer_decay=1.0, unfreeze=0.0)
    config = TrainConfig(steps=1, clip=None, dtype=str(place.dtype).removeprefix("torch."), device=place.device)
    step, numbers = GraphedStep(trainee.model, optimizer, config, {}), itertools.count()
    step.begin(batches[0], share)
    for batch in batches:
        launched, *_, replayed = (step.gradients(0, [batch], [share]) for _ in range(LAUNCHED + 1))
        if not torch.allclose(launched, replayed, rtol=1e-3):
            raise Refused(f"{GRAPHS}: norm and losses {replayed.tolist()}, as launched {launched.tolist()}")

    def run():
        for batch in batches:
            step.gradients(next(numbers), [batch], [share])
            step.update(1e-5)

    return run


def warm(config: BertConfig, sizes: np.ndarray, dtype: torch.dtype, device: str) -> None:
    """minibert's calls of a step and of inference on sequences of these lengths, for their compilations."""
    batch = random_batch(sizes, config.vocab_size).to(device)
    for precision, dropout in ((torch.float32, 0.0), (dtype, 0.0), (dtype, DROPOUT)):
        model = BertForPreTraining(config.replace(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout),
                                   backend="triton").to(device)  # fmt: skip
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            model(batch, seed=1).loss.backward()
        with torch.inference_mode():
            model.bert.to(precision).eval()(batch)


class Loss(nn.Module):
    """A trainee's loss as a module of its parameters, which torch's DistributedDataParallel takes."""

    def __init__(self, trainee: Trainee):
        super().__init__()
        self.model, self.forward = trainee.model, trainee.loss


def build(name: str, make: Callable[..., Trainee], place: Place, reference: Reference, batches, once: Once):
    """Judge a trainee, then the call that trains on all batches."""
    exact = once((name, place, batches[0].lengths), lambda: check(name, make, place, reference, batches[0]))
    trainee = with_dropout(make, place)
    check_dropout(name, trainee, place, batches[0], exact)
    return (graphed_steps if name == GRAPHS else steps)(trainee, place, batches)


def batches_of(name: str, config: BertConfig, longest: int, batch_size: int, num_batches: int) -> list[Batch]:
    sizes = lengths.sample(name, batch_size * num_batches, longest)
    parts = [sizes[i : i + batch_size] for i in range(0, len(sizes), batch_size)]
    return [random_batch(part, config.vocab_size, seed) for seed, part in enumerate(parts)]


def size_for(name: str, tokens: int, longest: int) -> int:
    """Sequences of a batch that has about so many tokens."""
    return max(round(tokens / lengths.sample(name, 1000, longest).mean()), 1)


def cases(
    weights: Path, config: BertConfig, *, names, dtypes, threads, batch_size: int, num_batches: int, longest: int,
    step_tokens=(), device: str = "cpu", backend: str = "auto", only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Case]:  # fmt: skip
    """A case for every distribution of lengths, precision and number of threads; with step_tokens, for every number of
    tokens a step, in place of batch_size."""
    providers, once = PROVIDERS | (CUDA_PROVIDERS if device == "cuda" else {}), Once()
    for dtype in dtypes:
        for count in threads:
            torch.set_num_threads(count)
            place = Place(weights=weights, dtype=dtype, device=device, threads=count, backend=backend)
            reference = Reference(place)
            for name in names:
                for size in [size_for(name, tokens, longest) for tokens in step_tokens] or [batch_size]:
                    batches = batches_of(name, config, longest, size, num_batches)
                    sizes = np.concatenate([np.array(batch.lengths) for batch in batches])
                    flops = sum(step_flops(config, batch.lengths, len(batch.mlm_rows)) for batch in batches)
                    yield Case(
                        suite="train", name=f"{name}, batch {size}",
                        labels={
                            "dtype": str(dtype).removeprefix("torch."), "threads": count,
                            "fill": round(float(sizes.sum() / padded_tokens(sizes, size)), 3),
                            "step_tokens": round(float(sizes.sum()) / len(batches)),
                        },
                        work=Work(tokens=int(sizes.sum()), sequences=len(sizes), flops=flops),
                        providers={
                            provider: partial(build, provider, make, place, reference, batches, once)
                            for provider, make in providers.items() if only(provider)
                        },
                        baseline=BASELINE,
                    )  # fmt: skip
