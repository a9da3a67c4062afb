"""A call of every op with so many rows that each kernel runs in several programs, and each strip has several tiles."""

from dataclasses import dataclass
from functools import partial

import torch
from harness import SEED, judge
from test_every_op import Call

import minibert_kernels as kernels

ROWS, COLS = 1031, 21  # a program of a persistent grid has at least two tiles


@dataclass(frozen=True)
class Wide(Call):
    """A call, and the names of the kernels that it launches."""

    launches: frozenset = frozenset()

    def draw(self, dtype, parameters=None):
        """Tensors, and gradients of the outputs; `parameters`, if given, is the dtype of what has one axis."""
        tensors = self.tensors(dtype)
        for name in self.shapes:
            if parameters is not None and tensors[name].ndim == 1:
                tensors[name] = tensors[name].to(parameters)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            outs = self.op(**tensors, **self.options, backend="reference")
        outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out.is_floating_point()]
        return tensors, [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]

    def floating(self, backend, **tensors):
        """The floating outputs."""
        outs = self.op(**tensors, **self.options, backend=backend)
        return tuple(out for out in outs if out.is_floating_point()) if isinstance(outs, tuple) else outs

    def check(self, dtype):
        """Hold the kernel's values and gradients to those of the reference, in this dtype and in float64."""
        kernel, reference = (partial(self.floating, backend) for backend in ("triton", "reference"))
        judge(kernel, reference, reference, [self.draw(dtype)])


def wide(op, shapes, fixed=None, *, launches, **options):
    return Wide(op, shapes, fixed or {}, options, frozenset(launches))


def cuts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def qkv(lengths, heads, size, group=1):
    return {name: (sum(lengths), heads // (1 if name == "q" else group), size) for name in "qkv"}


def ids(count, size):
    return torch.arange(count) * 7 % size


SHORT = [i * 5 % 17 for i in range(12)]
LONG = [131, 0, 3]
MASK = torch.arange(40 * 33).view(40, 33) % 33 < (torch.arange(40) * 7 % 34)[:, None]
NORM = {"weight": (COLS,), "bias": (COLS,)}
LONG_KERNELS = "_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkdv_kernel"
SHORT_KERNELS = "_attention_short_fwd_kernel", "_attention_short_bwd_kernel"
ACTIVATION_KERNELS = "_bias_act_fwd_kernel", "_bias_act_bwd_kernel"
SEGMENT_KERNELS = "_keys_kernel", "_segment_sum_kernel", "_crossing_runs_kernel"
WIDE = {
    "dropout_add_norm": wide(
        kernels.dropout_add_norm, {"x": (ROWS, COLS), "residual": (ROWS, COLS)} | NORM, dropout=0.3, seed=SEED,
        prenorm=True, launches=["_dropout_add_norm_fwd_kernel", "_dropout_add_norm_bwd_kernel"],
    ),
    "bias_gelu": wide(kernels.bias_gelu, {"x": (ROWS, COLS), "bias": (COLS,)}, launches=ACTIVATION_KERNELS),
    "bias_geglu": wide(
        kernels.bias_geglu, {"x": (ROWS, 2 * COLS), "bias": (2 * COLS,)}, approximate="tanh",
        launches=ACTIVATION_KERNELS,
    ),
    "bias_swiglu columns": wide(
        kernels.bias_swiglu, {"x": (70, 1060), "bias": (1060,)}, launches=ACTIVATION_KERNELS
    ),
    "embed_norm": wide(
        kernels.embed_norm, {"word": (41, COLS), "position": (64, COLS), "type": (2, COLS)} | NORM,
        {"ids": ids(ROWS, 41), "type_ids": ids(ROWS, 2), "positions": ids(ROWS, 64)}, dropout=0.3, seed=SEED,
        launches=["_embed_norm_fwd_kernel", "_embed_norm_bwd_kernel", *SEGMENT_KERNELS],
    ),
    "linear_cross_entropy": wide(
        kernels.linear_cross_entropy, {"hidden": (131, 16), "weight": (41, 16), "bias": (41,)},
        {"labels": ids(131, 41)}, label_smoothing=0.1, launches=["_cross_entropy_kernel"],
    ),
    "attention": wide(
        kernels.attention, qkv(SHORT, 2, 16), {"cu_seqlens": cuts(SHORT)}, max_seqlen=16, dropout=0.3, seed=SEED,
        launches=SHORT_KERNELS,
    ),
    "attention bias": wide(
        kernels.attention, qkv(SHORT, 2, 16) | {"score_bias": (1, 2, 16, 16)}, {"cu_seqlens": cuts(SHORT)},
        max_seqlen=16, dropout=0.3, seed=SEED, return_lse=True,
        launches=[*SHORT_KERNELS, "_attention_bwd_dbias_kernel"],
    ),
    "attention long": wide(
        kernels.attention, qkv(LONG, 2, 16) | {"score_bias": (1, 2, 131, 131)}, {"cu_seqlens": cuts(LONG)},
        max_seqlen=131, dropout=0.3, seed=SEED, window=90, return_lse=True,
        launches=[*LONG_KERNELS, "_attention_bwd_dbias_kernel"],
    ),
    "attention schedule": wide(
        kernels.attention, qkv(LONG, 2, 16, group=2),
        {"cu_seqlens": cuts(LONG), "schedule": kernels.attention_schedule(cuts(LONG), sum(LONG))},
        max_seqlen=131, launches=LONG_KERNELS,
    ),
    "select_rows": wide(
        kernels.select_rows, {"x": (41, COLS)}, {"rows": ids(ROWS, 41)},
        launches=["_gather_rows_kernel", *SEGMENT_KERNELS],
    ),
    "pack": wide(kernels.pack, {"x": (40, 33, COLS)}, {"mask": MASK}, launches=["_gather_rows_kernel"]),
    "unpack": wide(
        kernels.unpack, {"x": (int(MASK.sum()), COLS)}, {"cu_seqlens": cuts(MASK.sum(1).tolist())}, max_seqlen=33,
        launches=["_gather_rows_kernel"],
    ),
}  # fmt: skip


def lamb():
    """A step of three tensors of several chunks, in place."""
    generator = torch.Generator().manual_seed(0)
    sizes = 40_000, 3, 17_000
    lists = [[torch.rand(size, generator=generator) for size in sizes] for _ in range(4)]
    return lists, partial(kernels.lamb_step, *lists, lr=0.1, step=2)


def mlm(unit):
    """Masks of a few short sequences."""
    special = torch.arange(50) < 5
    tables = {"special": special, "ordinary": torch.arange(5, 50), "continues": torch.arange(50) % 4 == 0}
    lengths = SHORT[1:5]
    return partial(
        kernels.mlm_mask, ids(sum(lengths), 50), cuts(lengths), 16, mask_id=4, unit=unit, seed=SEED, **tables
    )
