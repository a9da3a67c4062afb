"""The host's time of a call: Python, torch and Triton up to the launch, which is not made. Needs no GPU.

Launches are recorded in place of being made (`minibert_kernels.launches`), and the sizes are so small that torch's own
ops compute next to nothing on a CPU. On a GPU all is launched and not waited for. Nothing is judged here: no kernel
computes anything. A sample is the process's CPU time, which a busy machine changes less than a clock on the wall.

As in a training step, one backward pass runs the gradients of several calls: what `torch.autograd.grad` itself costs is
shared by them. An `autograd.Function` that does nothing stands beside the ops: what is left to them is the rest.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

import minibert_kernels
from minibert.config import BertConfig
from minibert.model import MODELS
from minibert.profile import Step, synthetic_batch
from minibert.profile.launches import GPU
from minibert_kernels.launches import recorded

from .measure import Case, Sample, Timer, Work, synchronize

TOKENS, HEADS, HEAD_SIZE, INNER, VOCAB = 16, 2, 32, 128, 128
WIDTH = HEADS * HEAD_SIZE
LENGTH = 128  # the longest sequence that kernels are told of
CAPABILITY = 90  # of the GPU that launches are recorded for
SAMPLE = 0.01  # seconds that a sample lasts at least
CALLS = 8  # of an op in one backward pass
BARE, EMPTY = "x + r", "empty Function"
NARROW = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": INNER, "vocab_size": VOCAB,
}  # fmt: skip


def on_host(call: Callable[[], object], *, calls: int = 1) -> Timer:
    """CPU seconds that this process spends on a call; a GPU is not waited for.

    Args:
        call: makes `calls` calls, and is repeated until a sample lasts SAMPLE.
    """
    count = 1

    def sample() -> Sample:
        nonlocal count
        while True:
            synchronize()
            start = time.process_time()
            for _ in range(count):
                call()
            taken = time.process_time() - start
            if taken >= SAMPLE:
                return Sample(taken / (count * calls))
            count *= 2

    return Timer("CPU time", sample)


def leaf(device: str, *shape: int, dtype=torch.bfloat16):
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


class Nothing(torch.autograd.Function):
    """An empty tensor like x, and the gradient as it comes: what autograd takes for an op of four inputs in Python."""

    @staticmethod
    def forward(ctx, x, *others):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dout):
        return dout, None, None, None


def op_calls(device: str, backend: str) -> dict[str, dict[str, tuple[Callable, tuple]]]:
    """By op and provider: a function, and its arguments, of which the gradients are taken."""
    x, r = leaf(device, TOKENS, WIDTH), leaf(device, TOKENS, WIDTH)
    weight, bias = (leaf(device, WIDTH, dtype=torch.float32) for _ in range(2))
    half_weight, half_bias = (t.detach().bfloat16().requires_grad_() for t in (weight, bias))
    wide, wide_bias = leaf(device, TOKENS, INNER), leaf(device, INNER, dtype=torch.float32)
    half_wide_bias = wide_bias.detach().bfloat16().requires_grad_()
    qkv = leaf(device, TOKENS, 3, HEADS, HEAD_SIZE)
    q, k, v = (leaf(device, 2, HEADS, TOKENS // 2, HEAD_SIZE) for _ in range(3))
    cuts = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32, device=device)
    ids, positions = (torch.arange(TOKENS, device=device) % n for n in (VOCAB, TOKENS))
    types, labels = torch.zeros_like(ids), ids.clone()
    tables = tuple(leaf(device, n, WIDTH, dtype=torch.float32) for n in (VOCAB, LENGTH, 2))
    half_table = tables[0].detach().bfloat16().requires_grad_()
    vocab_bias = leaf(device, VOCAB)
    seed, ops = torch.zeros((), dtype=torch.int64, device=device), minibert_kernels
    dropped = {"dropout": 0.1, "seed": seed, "backend": backend}

    def cross_entropy(x, table, bias):
        return ops.linear_cross_entropy(x, table, bias, labels, max_labels=TOKENS, backend=backend)[0]

    def liger_norm(x, weight, bias):
        from liger_kernel.transformers.functional import liger_layer_norm

        return liger_layer_norm(x, weight, bias, 1e-12)

    own, torchs = "minibert", "torch"
    return {
        "attention": {
            own: (lambda qkv: ops.attention(*qkv.unbind(1), cuts, LENGTH, **dropped), (qkv,)),
            f"{torchs} sdpa": (F.scaled_dot_product_attention, (q, k, v)),
        },
        "dropout_add_norm": {
            own: (lambda *args: ops.dropout_add_norm(*args, **dropped), (x, r, weight, bias)),
            f"{torchs} layer_norm": (
                lambda x, r, weight, bias: F.layer_norm(x + r, (WIDTH,), weight, bias), (x, r, half_weight, half_bias)),
            "liger layer_norm": (liger_norm, (x, half_weight, half_bias)),
        },
        "bias_gelu": {
            own: (lambda *args: ops.bias_gelu(*args, backend=backend), (wide, wide_bias)),
            f"{torchs} gelu": (lambda x, bias: F.gelu(x + bias), (wide, half_wide_bias)),
        },
        "embed_norm": {
            own: (lambda *args: ops.embed_norm(ids, types, positions, *args, **dropped), (*tables, weight, bias)),
        },
        "linear_cross_entropy": {
            own: (cross_entropy, (x, half_table, vocab_bias)),
            f"{torchs} cross_entropy": (
                lambda *args: F.cross_entropy(F.linear(*args).float(), labels), (x, half_table, vocab_bias)),
        },
        BARE: {
            BARE: (torch.add, (x, r)),
            EMPTY: (lambda x: Nothing.apply(x, r, weight, bias), (x,)),
        },
    }  # fmt: skip


def build(function: Callable, arguments: tuple, direction: str) -> Callable[[], object]:
    """CALLS calls, forward as in training or backward alone, each with arguments of its own: no gradients are added."""
    copies = [[x.detach().clone().requires_grad_() for x in arguments] for _ in range(CALLS)]
    if direction == "fwd":
        return lambda: [function(*args) for args in copies]
    outputs = [function(*args) for args in copies]
    slopes = [torch.ones_like(out) for out in outputs]
    leaves = [x for args in copies for x in args]
    return lambda: torch.autograd.grad(outputs, leaves, slopes, retain_graph=True)


def step_call(mode: str, device: str, backend: str, layers: int) -> Callable[[], object]:
    """A whole step of a BERT that is deep and narrow: the host does the same at any width."""
    config = BertConfig.preset("bert-base", num_hidden_layers=layers, **NARROW)
    objective = {"train": "BertForPreTraining", "infer": "BertModel"}[mode]
    sizes = {"batch_size": 2, "length": 8} if mode == "train" else {"batch_size": 1, "length": 16}
    batch = synthetic_batch(config, objective, labels=mode == "train", **sizes)
    model = MODELS[objective](config, backend=backend).to(device)
    return Step(model, batch.to(device), mode=mode, dtype="bfloat16")


def cases(
    *, device: str = "cpu", backend: str = "auto", layers: int = 12, op: Callable[[str], bool] = lambda name: True,
    only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Case]:  # fmt: skip
    """A case for each op and direction, and for a step of training and of inference; launches are stubbed meanwhile.

    Raises:
        ValueError: on a CPU, Triton is missing or runs its interpreter.
    """
    backend = "triton" if backend == "auto" else backend
    torch.set_num_threads(1)  # another thread's spinning is no work of the host
    torch.set_flush_denormal(True)  # what kernels would have written is whatever lay in memory
    common = {"suite": "host", "work": Work(), "baseline": BARE}
    with nullcontext() if device == "cuda" else recorded(CAPABILITY, GPU[CAPABILITY]):
        table = op_calls(device, backend)
        beside = table.pop(BARE)
        for name, providers in table.items():
            for direction in ("fwd", "bwd"):
                found = {n: partial(build, *made, direction) for n, made in providers.items() if only(n)}
                if op(name) and found:
                    found[EMPTY] = partial(build, *beside[EMPTY], direction)
                    found[BARE] = partial(build, *beside[BARE], "fwd")
                    labels, clock = {"dtype": "bfloat16", "direction": direction}, partial(on_host, calls=CALLS)
                    yield Case(name=name, labels=labels, providers=found, clock=clock, **common)
        for mode, name in (("train", "training step"), ("infer", "inference, batch 1")):
            found = {
                "minibert": partial(step_call, mode, device, backend, layers),
                "minibert's reference": partial(step_call, mode, device, "reference", layers),
            }
            found = {n: made for n, made in found.items() if only(n)}
            if op(name) and found:
                found[BARE] = lambda: partial(torch.add, *beside[BARE][1])
                labels = {"dtype": "bfloat16"}
                yield Case(name=f"{name}, {layers} layers", labels=labels, providers=found, clock=on_host, **common)
