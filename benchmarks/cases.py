"""One table of what the kernels are timed at: inputs, the least bytes and FLOPs a run takes, and the specification.

Bytes read each input and write each output once, in the precision of the case; FLOPs are those of matrix products,
two for a multiplication and an addition. Attention's backward has five products, as in the literature, whatever a
kernel computes again. `sizes` are lengths of sequences; row ops see their sum as rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minibert_kernels.lamb import least_bytes

from . import lengths
from .measure import Work

VOCAB, POSITIONS = 30522, 512
BOTH = "fwd + bwd"
LAMB = ("params", "grads", "exp_avgs", "exp_avg_sqs")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A call of an op.

    Args:
        tensors: by the op's own argument names; floating ones in float32, still to be cast.
        wanted: those that get a gradient.
        options: further arguments of the op. dropout: what is timed; the gate compares without.
        single: those that stay float32 in every case.
        works: least work of a run, by direction: "fwd", "bwd", or "fwd + bwd" in one call.
    """

    op: str
    tensors: Tensors
    wanted: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    dropout: float = 0.0
    single: tuple[str, ...] = ()
    works: dict[str, Work]

    def cast(self, dtype: torch.dtype) -> Tensors:
        """The tensors in a precision, as leaves that ask for the gradients that are wanted."""
        found, tensors = {}, self.tensors
        if self.op == "attention":  # as the projection writes them, whatever the precision
            fused = torch.stack([tensors[name] for name in "qkv"], dim=1).to(dtype)
            tensors = dict(zip("qkv", fused.unbind(1), strict=True)) | {"cu_seqlens": tensors["cu_seqlens"]}
        for name, tensor in tensors.items():
            own = dtype if tensor.is_floating_point() and name not in self.single else tensor.dtype
            found[name] = tensor.detach().to(own).requires_grad_(name in self.wanted)
        return found

    def call(self, ops: Any, tensors: Tensors, **options: Any) -> Tensor:
        """The output of the op as `ops` has it: `minibert_kernels`, or its `reference`."""
        options = self.options | options
        if self.op == "lamb_step":  # lists of tensors, in place
            ops.lamb_step(*([tensors[name]] for name in LAMB), **options)
            return tensors["params"]
        result = getattr(ops, self.op)(**tensors, **options)
        if self.op == "mlm_mask":
            return torch.stack(result)  # ids and labels
        return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """A line of the table. make: lengths of sequences, bytes of an element, a generator's draw → a Problem."""

    op: str
    name: str
    make: Callable[[np.ndarray, int, "Draw"], Problem]
    longest: int = 128
    fill: str = "full"
    quick: bool = True


class Draw:
    """Random tensors on a device, the same for the same seed there."""

    def __init__(self, device: str, seed: int = 0):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def borders(self, sizes: np.ndarray) -> Tensor:
        return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device=self.device)


def works(fwd: float, bwd: float, flops: tuple[float, float] = (0, 0), rows: int = 0) -> dict[str, Work]:
    return {
        "fwd": Work(bytes=fwd, flops=flops[0], tokens=rows),
        "bwd": Work(bytes=bwd, flops=flops[1], tokens=rows),
    }


def attention(heads: int, head_size: int, dropout: float = 0.0):
    def make(sizes, element, draw):
        total, longest = int(sizes.sum()), int(sizes.max())
        row = total * heads * head_size * element
        qkv = draw.normal(total, 3, heads, head_size).unbind(1)
        product = 2.0 * heads * head_size * float((sizes.astype(float) ** 2).sum())
        return Problem(
            op="attention", tensors=dict(zip("qkv", qkv, strict=True)) | {"cu_seqlens": draw.borders(sizes)},
            wanted=("q", "k", "v"), options={"max_seqlen": longest}, dropout=dropout,
            works=works(4 * row, 8 * row, (2 * product, 5 * product), total),
        )  # fmt: skip

    return make


def norm(width: int, dropout: float = 0.0, residual: bool = True):
    def make(sizes, element, draw):
        rows = int(sizes.sum())
        row, names = rows * width * element, ("x", "residual", "weight", "bias")
        tensors = dict(zip(names, (draw.normal(rows, width), draw.normal(rows, width), draw.normal(width),
                                   draw.normal(width)), strict=True))  # fmt: skip
        options = {}
        if not residual:
            tensors.pop("residual")
            options["residual"] = None
        # the sum is written for backward; its gradient serves x and residual unless x was dropped
        forward, backward = (4, 4 if dropout else 3) if residual else (2, 3)
        return Problem(
            op="dropout_add_norm", tensors=tensors, wanted=tuple(tensors), options=options, dropout=dropout,
            works=works(forward * row, backward * row, rows=rows),
        )  # fmt: skip

    return make


def activation(op: str, width: int):
    def make(sizes, element, draw):
        rows, gated = int(sizes.sum()), 1 if op == "bias_gelu" else 2
        row = rows * width * element
        return Problem(
            op=op, tensors={"x": draw.normal(rows, gated * width), "bias": draw.normal(gated * width)},
            wanted=("x", "bias"), works=works((gated + 1) * row, (2 * gated + 1) * row, rows=rows),
        )  # fmt: skip

    return make


def embeddings(width: int, dropout: float = 0.0):
    def make(sizes, element, draw):
        rows = int(sizes.sum())
        tensors = {
            "ids": draw.ids(VOCAB, rows), "type_ids": draw.ids(2, rows), "positions": draw.ids(POSITIONS, rows),
            "word": draw.normal(VOCAB, width), "position": draw.normal(POSITIONS, width), "type": draw.normal(2, width),
            "weight": draw.normal(width), "bias": draw.normal(width),
        }  # fmt: skip
        wanted = ("word", "position", "type", "weight", "bias")
        row, read = rows * width * element, len(tensors["ids"].unique()) + POSITIONS + 2
        tables = (VOCAB + POSITIONS + 2) * width * element  # their gradients are dense
        return Problem(
            op="embed_norm", tensors=tensors, wanted=wanted, dropout=dropout,
            works=works(row + read * width * element, row + tables, rows=rows),
        )  # fmt: skip

    return make


def cross_entropy(width: int, vocab: int = VOCAB):
    """Of the 15 % of the rows that have a label, already selected: forward and backward in one call."""

    def make(sizes, element, draw):
        rows = max(int(0.15 * sizes.sum()), 1)
        tensors = {
            "hidden": draw.normal(rows, width), "weight": draw.normal(vocab, width) / width**0.5,
            "bias": draw.normal(vocab), "labels": draw.ids(vocab, rows),
        }  # fmt: skip
        moved = 2 * (rows * width + vocab * width + vocab) * element
        return Problem(
            op="linear_cross_entropy", tensors=tensors, wanted=("hidden", "weight", "bias"),
            options={"max_labels": rows},
            works={BOTH: Work(bytes=moved, flops=3 * 2.0 * rows * width * vocab, tokens=rows)},
        )  # fmt: skip

    return make


def moves(op: str, width: int):
    def make(sizes, element, draw):
        total, longest = int(sizes.sum()), int(sizes.max())
        packed, borders = total * width * element, draw.borders(sizes)
        # a padded place that holds no token is written, or not read
        padded = len(sizes) * longest * width * element
        if op == "select_rows":
            rows = torch.sort(draw.ids(total, max(total // 7, 1))).values
            tensors, moved = {"x": draw.normal(total, width), "rows": rows}, len(rows) * width * element
            forward, backward, options = 2 * moved, moved + packed, {}
        elif op == "unpack":
            tensors, options = {"x": draw.normal(total, width), "cu_seqlens": borders}, {"max_seqlen": longest}
            forward, backward = packed + padded, 2 * packed
        else:
            mask = torch.arange(longest, device=draw.device) < borders.diff()[:, None]
            tensors, options = {"x": draw.normal(len(sizes), longest, width), "mask": mask}, {"num_tokens": total}
            forward, backward = 2 * packed, packed + padded
        return Problem(op=op, tensors=tensors, wanted=("x",), options=options,
                       works=works(forward, backward, rows=total))  # fmt: skip

    return make


def masking(sizes, element, draw):
    total = int(sizes.sum())
    tensors = {"ids": draw.ids(VOCAB, total), "cu_seqlens": draw.borders(sizes),
               "special": torch.arange(VOCAB, device=draw.device) < 5,
               "ordinary": torch.arange(5, VOCAB, device=draw.device)}  # fmt: skip
    return Problem(
        op="mlm_mask", tensors=tensors, options={"max_seqlen": int(sizes.max()), "mask_id": 4},
        works={"fwd": Work(bytes=3 * 8.0 * total, tokens=total)},
    )  # fmt: skip


def lamb(numel):
    def make(sizes, element, draw):
        """A layer's largest matrix, in float32; a token is a parameter here."""
        tensors = {name: draw.normal(numel) for name in LAMB} | {"exp_avg_sqs": draw.normal(numel).square()}
        return Problem(
            op="lamb_step", tensors=tensors, options={"lr": 1e-6, "step": 5}, single=LAMB,
            works={"fwd": Work(bytes=float(least_bytes(4) * numel), tokens=numel)},
        )  # fmt: skip

    return make


TABLE = (
    # many lengths, with dropout: what a BERT is trained on
    OpCase(op="attention", name="varlen, SQuAD lengths, d=64 dropout", make=attention(12, 64, 0.1), longest=512,
           fill="squad_v1.1_dev_question_context_pairs"),
    OpCase(op="attention", name="varlen, half full, S=512 d=64 dropout", make=attention(12, 64, 0.1), longest=512,
           fill="half"),
    OpCase(op="attention", name="varlen, SST-2 lengths, d=64 dropout", make=attention(12, 64, 0.1), fill="sst2_train"),
    OpCase(op="attention", name="S=128 d=64", make=attention(12, 64)),
    OpCase(op="attention", name="S=128 d=64 dropout", make=attention(12, 64, 0.1)),
    OpCase(op="attention", name="S=512 d=64", make=attention(12, 64), longest=512),
    OpCase(op="attention", name="S=512 d=64 dropout", make=attention(12, 64, 0.1), longest=512),
    OpCase(op="attention", name="S=512 d=64, half full", make=attention(12, 64), longest=512, fill="half"),
    OpCase(op="attention", name="S=4096 d=64", make=attention(12, 64), longest=4096, quick=False),
    OpCase(op="attention", name="S=512 d=128", make=attention(6, 128), longest=512, quick=False),
    OpCase(op="dropout_add_norm", name="D=768 dropout", make=norm(768, 0.1)),
    OpCase(op="dropout_add_norm", name="D=1024 dropout", make=norm(1024, 0.1), quick=False),
    OpCase(op="dropout_add_norm", name="D=768, LayerNorm alone", make=norm(768, residual=False)),
    OpCase(op="bias_gelu", name="D=3072", make=activation("bias_gelu", 3072)),
    OpCase(op="bias_geglu", name="D=2048", make=activation("bias_geglu", 2048), quick=False),
    OpCase(op="bias_swiglu", name="D=2048", make=activation("bias_swiglu", 2048), quick=False),
    OpCase(op="embed_norm", name="D=768 dropout", make=embeddings(768, 0.1)),
    OpCase(op="linear_cross_entropy", name="D=768 V=30522", make=cross_entropy(768)),
    OpCase(op="select_rows", name="D=768", make=moves("select_rows", 768), quick=False),
    OpCase(op="pack", name="D=768, half full", make=moves("pack", 768), fill="half", quick=False),
    OpCase(op="unpack", name="D=768, half full", make=moves("unpack", 768), fill="half"),
    OpCase(op="mlm_mask", name="S=128", make=masking),
    OpCase(op="lamb_step", name="a parameter of 31 M", make=lamb(30522 * 1024)),
)  # fmt: skip
# for a dry run in the interpreter: an op of each family, so small that it takes seconds
TINY = (
    OpCase(op="attention", name="S=16 d=16, half full", make=attention(1, 16), longest=16, fill="half"),
    OpCase(op="dropout_add_norm", name="D=32", make=norm(32)),
    OpCase(op="bias_gelu", name="D=32", make=activation("bias_gelu", 32)),
    OpCase(op="linear_cross_entropy", name="D=16 V=50", make=cross_entropy(16, 50)),
    OpCase(op="unpack", name="D=32, half full", make=moves("unpack", 32), longest=16, fill="half"),
    OpCase(op="mlm_mask", name="S=16", make=masking, longest=16),
    OpCase(op="lamb_step", name="a parameter of 999", make=lamb(999), longest=16),
)


def sizes_of(case: OpCase, tokens: int) -> np.ndarray:
    """Lengths of as many sequences as would fill `tokens` places, or, where they are a data set's, have as many."""
    length = lengths.DATASETS[case.fill][1] if case.fill in lengths.DATASETS else case.longest
    return lengths.sample(case.fill, max(int(tokens / length), 1), case.longest)


def gate_sizes(case: OpCase) -> np.ndarray:
    """A few sequences with the same longest, so that the same plan runs; uneven where those of the case are."""
    longest = case.longest
    return np.array([longest, longest] if case.fill == "full" else [longest, longest // 3, 1])
