"""Moving whole rows: padded to packed and back, and a selection of rows. All are one gather,

    out[i] = x[index[i]],  or zeros where index[i] names no row,

and so are the gradients of pack and unpack, where no row goes to two places: with `inverse`, which says where each row
of x went, dx[j] = dout[inverse[j]]. select_rows may take a row twice: its gradient is a segment sum, in float32 and
without atomics.

Bytes, in rows: each row that is wanted is read once and written once (2), forward and backward; 8 an index. Saved: the
indices.
"""

import torch

from . import reference
from ._triton import tl
from .dispatch import check_device, check_sequences, on_host, use_triton
from .jit import kernel
from .launch import FP_FUSION, VARYING_ROWS, AotCase, aot_arguments, ceil_div, gather_plan, on_device
from .op import Op
from .segment import segment_sum


@kernel(varying=("n_source", "n_inner", *VARYING_ROWS))
def _gather_rows_kernel(
    x_ptr, index_ptr, out_ptr,  # [outer, inner, cols], int64 [rows] into outer * inner, [rows, cols] contiguous
    stride_x_outer, stride_x_inner, stride_x_col, n_source, n_inner, n_rows, n_cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_cols, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_rows, in_row = row < n_rows, (col < n_cols)[None, :]
    source = tl.load(index_ptr + row, mask=in_rows, other=-1)
    found = ((source >= 0) & (source < n_source))[:, None]
    x = x_ptr + (source // n_inner * stride_x_outer + source % n_inner * stride_x_inner)[:, None]
    x = tl.load(x + col[None, :] * stride_x_col, mask=found & in_row, other=0)
    tl.store(out_ptr + row[:, None] * n_cols + col[None, :], x, mask=in_rows[:, None] & in_row)


def _row_axes(inverse):
    """How many axes of x are its rows: those of `inverse`, which has a number for each row."""
    return 1 if inverse is None else inverse.ndim


def _run_forward(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    axes = _row_axes(inverse)
    shape = x.shape[axes:]
    out, cols = x.new_empty(*index.shape, *shape), shape.numel()
    if out.numel() == 0:
        return out
    outer, inner = (*x.shape[:axes], 1)[:2]
    x = x.reshape(outer, inner, cols)
    plan = gather_plan(cols)
    programs = ceil_div(index.numel(), plan.block_m) * ceil_div(cols, plan.block_n)
    with on_device(x):
        _gather_rows_kernel[(programs,)](
            x, index.contiguous(), out, *x.stride(), outer * inner, max(inner, 1), index.numel(), cols,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.num_warps, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out


def _fake_forward(x, index, inverse):
    return x.new_empty(*index.shape, *x.shape[_row_axes(inverse) :])


def _run_backward(dout: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    shape = dout.shape[1:]
    return segment_sum(dout.reshape(len(index), shape.numel()), index, size).view(size, *shape)


def _fake_backward(dout, index, size):
    return dout.new_empty(size, *dout.shape[1:])


def _save(ctx, inputs, output):
    x, index, inverse = inputs
    ctx.size = x.shape[0]
    ctx.save_for_backward(index, inverse)


def _gradient(ctx, dout):
    index, inverse = ctx.saved_tensors
    dx = _backward(dout, index, ctx.size) if inverse is None else _forward(dout, inverse, index)
    return dx, None, None


_backward = Op("gather_rows_bwd", _run_backward, _fake_backward)
_forward = Op("gather_rows_fwd", _run_forward, _fake_forward, save=_save, gradient=_gradient)


def pack(x, mask, *, num_tokens=None, backend="auto"):
    """Lay the tokens of a padded batch end to end, sequence after sequence.

    Args:
        x: [B, S, ...], any dtype, any strides between sequences and tokens; further axes that have no common stride
            are copied.
        mask: bool [B, S], true at tokens. The gradient of the other places is zero.
        num_tokens: T, where it is known; by default it is read on the host, which waits for the device.
        backend: "auto", "triton" or "reference".
    Returns:
        [T, ...] in x.dtype: x[mask]; with more tokens in `mask` than num_tokens only the first, with fewer zeros after
        the last.
    Raises:
        ValueError: names the argument that does not fit.
    """
    if mask.dtype != torch.bool or mask.ndim != 2 or x.shape[:2] != mask.shape:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}: expected bool [B, S], as x {list(x.shape)} begins")
    check_device(x=x, mask=mask)
    if num_tokens is not None and not 0 <= num_tokens <= mask.numel():
        raise ValueError(f"num_tokens={num_tokens}: expected 0 to {mask.numel()}, all of mask {list(mask.shape)}")
    if not use_triton("pack", backend, x):
        return reference.pack(x, mask, num_tokens=num_tokens)
    count = mask.flatten().cumsum(0)
    if num_tokens is None:
        num_tokens = int(count[-1]) if count.numel() else 0
    # token t is where the count first reaches t + 1, and past the last token it is no slot
    index = torch.searchsorted(count, torch.arange(1, num_tokens + 1, device=x.device))
    return _forward(x, index, torch.where(mask, count.view(mask.shape) - 1, -1))


def unpack(x, cu_seqlens, max_seqlen, *, backend="auto"):
    """The inverse of `pack`: every sequence in a row of its own, and zeros after its end.

    Args:
        x: [T, ...], any dtype, any stride between tokens; further axes that have no common stride are copied.
        cu_seqlens: int32 [B + 1], where each sequence begins in T: from 0; looked at where it is on the CPU, or with
            MINIBERT_CHECK=1 in the environment. Rows of x after
            the last sequence go nowhere, and their gradient is zero.
        max_seqlen: S, no less than the longest sequence.
        backend: "auto", "triton" or "reference".
    Returns:
        [B, S, ...] in x.dtype.
    Raises:
        ValueError: names the argument that does not fit.
    """
    if x.ndim == 0:
        raise ValueError("x is []: expected [T, ...]")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: expected int32 [B + 1]")
    check_device(x=x, cu_seqlens=cu_seqlens)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen={max_seqlen}: expected the length of the longest sequence")
    check_sequences(cu_seqlens, x.shape[0], max_seqlen, from_zero=True)
    if not use_triton("unpack", backend, x):
        return reference.unpack(x, cu_seqlens, max_seqlen)
    borders = cu_seqlens.long().contiguous()
    column, token = (torch.arange(n, device=x.device) for n in (max_seqlen, x.shape[0]))
    index = torch.where(column < borders.diff()[:, None], borders[:-1, None] + column, -1)
    sequence = torch.searchsorted(borders[1:], token, right=True)  # B after the last
    position = token - borders[sequence]
    slot = torch.where((token < borders[-1]) & (position < max_seqlen), sequence * max_seqlen + position, -1)
    return _forward(x, index, slot)


def select_rows(x, rows, *, backend="auto"):
    """x[rows].

    Args:
        x: [T, ...], any dtype, any stride between rows; further axes that have no common stride are copied.
        rows: int64 [N], in [0, T), in any order; a row may be taken more than once.
        backend: "auto", "triton" or "reference".
    Returns:
        [N, ...] in x.dtype; the gradients of a row that is taken more than once are added in float32.
    Raises:
        ValueError: names the argument that does not fit; on a GPU the values of rows are not looked at, and one
            outside x gives zeros.
    """
    if x.ndim == 0:
        raise ValueError("x is []: expected [T, ...]")
    check_device(x=x, rows=rows)
    check_index("rows", rows, x.shape[0], "x")
    if not use_triton("select_rows", backend, x):
        return reference.select_rows(x, rows)
    return _forward(x, rows, None)


def check_index(name, index, size, table):
    """Raise the ValueError of an index that is not int64 [N], or, on the CPU, leaves its table."""
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"{name} is {index.dtype} {list(index.shape)}: expected int64, one axis")
    if on_host(index) and index.numel():
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name} holds {low if low < 0 else high}: expected 0 to {size - 1}, the rows of {table}")


def aot_cases(arch):
    """The default plans in bfloat16 and for ids, as `AotCase`s; they are the same on every architecture."""
    for cols, dtype in ((1, "*i64"), (128, "*bf16"), (768, "*bf16"), (1024, "*bf16"), (4097, "*bf16")):
        plan = gather_plan(cols)
        arguments = aot_arguments(
            _gather_rows_kernel, x_ptr=dtype, index_ptr="*i64", out_ptr=dtype, stride_x_outer=128 * cols,
            stride_x_inner=cols, stride_x_col=1, n_source=4096, n_inner=128, n_rows=4099, n_cols=cols,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        )  # fmt: skip
        yield AotCase(
            op="pack", direction="fwd", label=f"{cols} columns", fn=_gather_rows_kernel, **arguments,
            num_warps=plan.num_warps, num_stages=1,
        )  # fmt: skip
