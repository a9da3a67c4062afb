"""Launch plans: how a kernel is cut into programs, as pure functions of (shape, dtype, architecture).

A plan is frozen and depends on nothing else, so that one call always runs the same code; tuning is a benchmark that
prints the table to paste here, with the GPU and the date. `xray` compiles what the plans name, without a GPU.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch

from ._triton import tl

# Triton 3.10 changes the default: every launch and every compilation ahead of time says it
FP_FUSION = True
# sizes that change from batch to batch: one kernel for all of them, or new ones would be compiled in mid-run
VARYING_ROWS = ("n_rows",)


@dataclass(frozen=True)
class Pose:
    """The GPU that CPU tensors are taken to lie on, where launches are recorded and none is made (`launches`)."""

    capability: int
    multiprocessors: int


_pose: Pose | None = None


def pose(gpu: Pose | None) -> None:
    """From now on CPU tensors stand for tensors of this GPU; None: they do not."""
    global _pose
    _pose = gpu
    capability.cache_clear()
    multiprocessors.cache_clear()


def posing() -> bool:
    """Whether CPU tensors stand for tensors of a GPU: no value of theirs means anything."""
    return _pose is not None


@cache
def capability(device: torch.device) -> int:
    """The GPU's, e.g. 90; the interpreter takes the plans of one."""
    if device.type != "cuda":
        return _pose.capability if _pose else 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a persistent grid fills; two in the interpreter, so that the loop over tiles is seen there."""
    if device.type != "cuda":
        return _pose.multiprocessors if _pose else 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(a, b):
    """a / b, rounded up. On the host, where `triton.cdiv` would inspect its own signature for 5 us."""
    return -(-a // b)


def on_device(x):
    """A context in which launches go to the GPU of x; none is entered where it is the current one, for 3 us."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def as_matrix(x, cols):
    """[..., cols] as [rows, cols] and its two strides; one stride between rows is needed to do so without a copy."""
    if x.ndim != 2:
        x = x.reshape(-1, cols)
    return x, *x.stride()


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One kernel of one launch plan, ready for `triton.compile`; a kernel file yields its own: `aot_cases(capability)`.

    Args:
        op: the public op, e.g. "attention".
        direction: "fwd" or "bwd".
        label: what tells cases of one op and direction apart, e.g. "d=64 dropout"; unique among them.
        fn: the `@triton.jit` function.
        signature: Triton type of every argument, by name: "*bf16", "*fp32", "i64", "i32", "fp32", or "constexpr".
        constexprs: value of every "constexpr" argument, by name (None for a missing pointer, 1 for a stride that a
            launch would specialise).
        attrs: properties a launch would find, by position of the argument: {(0,): [["tt.divisibility", 16]]}.
        num_warps, num_stages: as at the launch.
        matmul: whether the kernel multiplies matrices, and so must show its architecture's matrix instruction.
    """

    op: str
    direction: str
    label: str
    fn: Callable
    signature: dict
    constexprs: dict
    attrs: dict = field(default_factory=dict)
    num_warps: int
    num_stages: int
    matmul: bool = False


def aot_arguments(fn: Callable, **values) -> dict:
    """The signature, constexprs and attrs of an `AotCase`: what a launch with these arguments would specialise.

    Args:
        values: for a pointer its type, e.g. "*bf16", taken as aligned to 16 bytes; else the value (int is i32); a
            tuple of such.
    """
    signature, constexprs, attrs = {}, {}, {}

    def kind(value, place, special):
        """The type of an argument, which a tuple nests; what is known of it goes into constexprs and attrs."""
        if isinstance(value, tuple):
            parts = [kind(part, (*place, i), special) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if value is None or (special and type(value) is int and value == 1):
            constexprs[place] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if special and (isinstance(value, str) or value % 16 == 0):
            attrs[place] = [["tt.divisibility", 16]]
        return value if isinstance(value, str) else "i32"

    # of a kernel, or of the interpreter's wrapper
    varying = (fn.do_not_specialize if hasattr(fn, "do_not_specialize") else fn.kwargs["do_not_specialize"]) or ()
    # the function itself, which the interpreter's wrapper has too
    for index, (name, param) in enumerate(inspect.signature(fn.fn).parameters.items()):
        value = values.pop(name)
        if param.annotation is tl.constexpr:
            signature[name], constexprs[(index,)] = "constexpr", value
        else:
            signature[name] = kind(value, (index,), name not in varying)
    assert not values, f"{fn.__name__} has no arguments {', '.join(values)}"
    return {"signature": signature, "constexprs": constexprs, "attrs": attrs}


NORM_MAX_COLS = 8192


@dataclass(frozen=True, kw_only=True)
class NormPlan:
    """How row kernels are cut: block_m whole rows, padded to block_n columns, a tile; 16 elements a thread.

    programs_per_sm is 0 where there is a program a tile, else the persistent grid of a kernel that sums over rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    programs_per_sm: int = 0


@cache
def norm_plan(cols: int, direction: str) -> NormPlan:
    """The plan of `dropout_add_norm` for 1 .. NORM_MAX_COLS columns, "fwd" or "bwd".

    Forward takes the smallest programs, so that few rows fill a GPU too; backward 16 warps a multiprocessor, in at most
    4 programs, because each of them writes a row of partial weight gradients.
    """
    block_n = max(16, 1 << (cols - 1).bit_length())
    num_warps = max(1, block_n // 1024) if direction == "fwd" else max(8, block_n // 512)
    return NormPlan(
        block_m=max(1, num_warps * 512 // block_n), block_n=block_n, num_warps=num_warps,
        programs_per_sm=0 if direction == "fwd" else 16 // num_warps,
    )  # fmt: skip


@cache
def gelu_plan(cols: int, direction: str) -> NormPlan:
    """The plan of the activations, "fwd" or "bwd": tiles of 512 columns, or all of fewer, 16 elements a thread
    forward and 8 backward.

    Backward is a grid of strips of rows, and adds partial sums of the bias gradient, so it fills each multiprocessor
    with no more than two programs.
    """
    block_n = min(512, max(16, 1 << (cols - 1).bit_length()))
    num_warps, elements = (4, 512) if direction == "fwd" else (8, 256)
    return NormPlan(
        block_m=max(1, num_warps * elements // block_n), block_n=block_n, num_warps=num_warps,
        programs_per_sm=0 if direction == "fwd" else 2,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GatherPlan:
    """Tiles of block_m rows and block_n columns."""

    block_m: int
    block_n: int
    num_warps: int = 4


@cache
def gather_plan(cols: int) -> GatherPlan:
    """The plan of a gather of rows with 1 or more columns: at most 128 rows and 16 elements a thread a tile."""
    block_n = min(1024, 1 << (cols - 1).bit_length())
    return GatherPlan(block_m=min(128, 2048 // block_n), block_n=block_n)


@dataclass(frozen=True, kw_only=True)
class MaskingPlan:
    """A whole sequence of up to 2 ** log_block tokens a program."""

    log_block: int
    num_warps: int


@cache
def masking_plan(max_seqlen: int, reach: int = 1) -> MaskingPlan:
    """The plan of `mlm_mask`: 8 tokens a thread, or 16 of more than 2048 unless spans need the registers.

    Args:
        reach: tokens of the longest span; 1 for tokens and words.
    """
    log_block = max(max_seqlen - 1, 15).bit_length()
    return MaskingPlan(log_block=log_block, num_warps=min(max(1 << log_block >> 8, 1), 16 if reach > 1 else 8))


@dataclass(frozen=True, kw_only=True)
class CrossEntropyPlan:
    """A program a row, `block` columns at a time; a row that fits stays in registers."""

    block: int
    num_warps: int


@cache
def cross_entropy_plan(cols: int) -> CrossEntropyPlan:
    """The plan of the loss over `cols` classes: 64 columns a thread up to 32,768 of them, then 32 in a loop."""
    block = max(128, 1 << (cols - 1).bit_length())
    if block > 32768:
        return CrossEntropyPlan(block=8192, num_warps=8)
    return CrossEntropyPlan(block=block, num_warps=max(4, block // 2048))


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How an attention kernel is cut: tiles of block_m queries and block_n keys, heads padded to block_d.

    apart: a kernel of the long form takes its last tile, which may be a part of one, before the loop over the others.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    apart: bool = False


# (block_m, block_n, num_warps) for head sizes up to 64, up to 128 and up to 256: the largest tiles found that spill no
# register in 16 bits (in float32 those of heads of more than 64 do); with " bias" those where a score bias or ALiBi
# asks for smaller ones
ATTENTION_TILES = {
    ("sm_80", "fwd"): ((128, 64, 8), (64, 64, 8), (32, 64, 8)),
    ("sm_80", "fwd bias"): ((64, 32, 8), (64, 64, 8), (32, 32, 8)),
    ("sm_80", "dq"): ((64, 32, 4), (64, 64, 8), (32, 16, 8)),
    ("sm_80", "dkdv"): ((32, 32, 4), (32, 64, 8), (32, 32, 8)),
    ("sm_80", "dkdv bias"): ((32, 32, 4), (32, 32, 8), (32, 16, 8)),
    ("sm_80", "dbias"): ((64, 32, 8), (64, 16, 8), (16, 32, 8)),
    ("sm_90", "fwd"): ((128, 64, 8), (128, 64, 8), (64, 32, 8)),
    ("sm_90", "dq"): ((64, 64, 4), (64, 64, 8), (32, 32, 8)),
    ("sm_90", "dkdv"): ((32, 64, 4), (32, 64, 8), (32, 32, 8)),
    ("sm_90", "dbias"): ((64, 64, 8), (64, 64, 8), (64, 16, 8)),
    ("sm_100", "fwd"): ((64, 64, 4), (128, 64, 8), (64, 64, 8)),
    ("sm_100", "fwd bias"): ((64, 64, 4), (64, 64, 8), (64, 64, 8)),
    ("sm_100", "dq"): ((64, 64, 4), (64, 64, 8), (32, 16, 8)),
    ("sm_100", "dq bias"): ((64, 64, 4), (64, 64, 8), (64, 16, 8)),
    ("sm_100", "dkdv"): ((64, 64, 4), (64, 64, 8), (32, 64, 8)),
    ("sm_100", "dkdv bias"): ((32, 64, 4), (64, 64, 8), (32, 64, 8)),
    ("sm_100", "dbias"): ((64, 64, 8), (64, 64, 8), (64, 32, 8)),
    ("float32", "fwd"): ((16, 32, 4), (16, 32, 8), (16, 16, 8)),
    ("float32", "dq"): ((16, 32, 4), (16, 16, 8), (16, 16, 8)),
    ("float32", "dkdv"): ((32, 32, 8), (16, 32, 8), (16, 16, 8)),
    ("float32", "dbias"): ((16, 32, 4), (16, 16, 8), (16, 16, 8)),
}
# the longest sequences of the short form, likewise: up to there its kernels spill no register; 0: it has none
ATTENTION_SHORT_LENGTHS = {
    ("sm_80", "fwd"): (128, 64, 0),
    ("sm_80", "bwd"): (32, 16, 0),
    ("sm_90", "fwd"): (128, 128, 0),
    ("sm_90", "bwd"): (128, 64, 0),
    ("sm_100", "fwd"): (128, 128, 0),
    ("sm_100", "bwd"): (64, 64, 0),
    ("float32", "fwd"): (32, 16, 0),
    ("float32", "bwd"): (32, 16, 0),
}


def attention_plan(
    head_size: int, element_size: int, capability: int, max_seqlen: int, direction: str, bias: bool = False
) -> AttentionPlan:  # fmt: skip
    """The plan of a kernel of attention's long form; no tile is longer than the longest sequence.

    Args:
        element_size: bytes of an element of q; 4 has no matrix unit that keeps its precision.
        capability: of the GPU, 80 and up; consumer Blackwell, 120, has the matrix instructions of Ampere.
        direction: "fwd", "dq", "dkdv" or "dbias".
        bias: whether a score bias or ALiBi is added to the scores.
    """
    chip = _attention_chip(element_size, capability)
    tiles = ATTENTION_TILES.get((chip, f"{direction} bias")) if bias else None
    tiles = (tiles or ATTENTION_TILES[chip, direction])[_size_class(head_size)]
    return _cut(tiles, _block(max_seqlen), _block(head_size), chip, direction)


@cache  # by the tiles, which a search for better ones exchanges
def _cut(tiles, longest, block_d, chip, direction):
    block_m, block_n, num_warps = tiles
    num_warps = num_warps if longest >= min(block_m, block_n) else 4
    block_m, block_n = min(block_m, longest), min(block_n, longest)
    # ptxas serialises Hopper's matrix products, which have 64 rows, in two loops that share an accumulator if one may
    # be empty, and in one loop that draws a mask. Others (Ampere's, those of fewer rows, float32's) need no tile apart,
    # and heads of more than 64 leave no registers for it: Triton 3.9 would keep its operands in them
    rows = block_n if direction == "dkdv" else block_m
    return AttentionPlan(
        block_m=block_m, block_n=block_n, block_d=block_d, num_warps=num_warps,
        num_stages=1 if chip == "float32" else 2,
        apart=block_d <= 64 or (chip in ("sm_90", "sm_100") and rows >= 64),
    )  # fmt: skip


@cache
def attention_short_plan(
    head_size: int, element_size: int, capability: int, max_seqlen: int, direction: str, group: int = 1
) -> AttentionPlan | None:  # fmt: skip
    """The plan of the short form's "fwd" or "bwd" kernel, or None where the long form runs; arguments as above.

    Args:
        group: heads of queries that share a K/V head: their gradients are summed by the long form alone.
    """
    chip = _attention_chip(element_size, capability)
    block_s, block_d = _block(max_seqlen), _block(head_size)
    longest = ATTENTION_SHORT_LENGTHS[chip, direction][_size_class(head_size)]
    if block_s > longest or (direction == "bwd" and group > 1):
        return None
    if direction == "bwd" and block_s >= 64:
        block_d = max(block_d, 64)  # it is the rows of dqᵀ: a matrix instruction of sm_90 and sm_100 has 64
    # on sm_100 eight warps spill where heads have 32, and four do elsewhere
    few = chip == "sm_100" and direction == "fwd" and block_d <= 32
    num_warps = 8 if block_s == 128 and not few else 4
    return AttentionPlan(block_m=block_s, block_n=block_s, block_d=block_d, num_warps=num_warps, num_stages=1)


def _size_class(head_size):
    """The place of a head size in the tables of tiles."""
    return (head_size > 64) + (head_size > 128)


def _attention_chip(element_size, capability):
    return {9: "sm_90", 10: "sm_100"}.get(capability // 10, "sm_80") if element_size == 2 else "float32"


def _block(size):
    return max(16, 1 << (size - 1).bit_length())
