"""Dropout, add and normalise in one pass: out = norm(dropout(x) + residual), with statistics in float32.

Forward, a row t of D columns, with total = keep ⊙ x / kept + residual:

    layernorm  out = (total - mean) · rstd ⊙ weight + bias,  rstd = 1 / sqrt(mean((total - mean)²) + eps)
    rmsnorm    out = total · rstd ⊙ weight + bias,           rstd = 1 / sqrt(mean(total²) + eps)

Backward, with n = (total - mean) · rstd and g = dout ⊙ weight (mean is 0, and the middle term missing, for rmsnorm):

    dresidual = rstd · (g - mean(g) - n · mean(g ⊙ n)) + dtotal,   dx = keep ⊙ dresidual / kept
    dweight = Σ_t dout ⊙ n,   dbias = Σ_t dout

Bytes, in activation rows: forward reads x and residual, writes out and total (4); backward reads dout, total and
dtotal, writes dx and dresidual (5; dtotal exists with prenorm only, and dresidual is dx where nothing is dropped).
Saved: total (x itself where there is neither dropout nor residual), mean and rstd in float32; the dropout mask is drawn
again. Weight gradients are summed in the registers of each program, then over programs in one small second pass: no
atomics, so the same bits every time.
"""

import torch

from . import reference
from ._triton import tl, triton
from .dispatch import check_device, check_floating, use_triton
from .jit import kernel
from .launch import (
    FP_FUSION,
    NORM_MAX_COLS,
    VARYING_ROWS,
    AotCase,
    aot_arguments,
    as_matrix,
    ceil_div,
    multiprocessors,
    norm_plan,
    on_device,
)
from .op import Op
from .philox import as_seed, keep_scale, row_keep_tile, threshold

KINDS = ("layernorm", "rmsnorm")


@triton.jit
def centre_rows(total, in_row, n_cols):
    """total less the mean of its row, zero outside of in_row, and the mean; a constant row comes out as exact zeros."""
    n_cols = n_cols * 1.0
    inverse = 1.0 / n_cols
    mean = tl.sum(total, axis=1) * inverse
    total = tl.where(in_row, total - mean[:, None], 0.0)
    # the mean is rounded, and 1/sqrt(eps) would magnify that. Of a constant row a few equal bits are left: their sum is
    # exact, and so is their mean if the division is, which no GPU's fast division is without the second step
    total_rest = tl.sum(total, axis=1)
    rest = total_rest * inverse
    rest += tl.fma(-rest, n_cols, total_rest) * inverse
    return tl.where(in_row, total - rest[:, None], 0.0), mean + rest


@triton.jit
def _add_halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of the upper and the lower half of the rows, which lie in the same threads where rows are contiguous."""
    if BLOCK_M > 1:
        tile = tl.sum(tile.reshape(2, BLOCK_M // 2, BLOCK_N), axis=0)
    return tile


@kernel(varying=VARYING_ROWS)
def _dropout_add_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # [rows, cols] twice, [cols] twice; residual and bias may be None
    seed_ptr, rows_ptr,                         # with DROPOUT only: int64 scalar, int64 [rows] or None for 0, 1, ...
    out_ptr, total_ptr, stats_ptr,              # [rows, cols] contiguous twice, fp32 [2, rows] or, for RMS, [1, rows]
    stride_x_row, stride_x_col, stride_residual_row, stride_residual_col,
    n_rows, n_cols, eps, threshold, scale,
    RMS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N).to(tl.int64)
    in_rows, in_row = row < n_rows, (col < n_cols)[None, :]
    in_tile = in_rows[:, None] & in_row
    offset = row[:, None] * n_cols + col[None, :]

    x = x_ptr + row[:, None] * stride_x_row + col[None, :] * stride_x_col
    total = tl.load(x, mask=in_tile, other=0.0).to(tl.float32)
    if DROPOUT:
        counter = row
        if rows_ptr is not None:
            counter = tl.load(rows_ptr + row, mask=in_rows, other=0)
        keep = row_keep_tile(tl.load(seed_ptr), threshold, counter, BLOCK_M, BLOCK_N)
        total = tl.where(keep, total, 0.0) * scale
    if residual_ptr is not None:
        residual = residual_ptr + row[:, None] * stride_residual_row + col[None, :] * stride_residual_col
        total += tl.load(residual, mask=in_tile, other=0.0).to(tl.float32)
    if DROPOUT or residual_ptr is not None:
        # what is normalised is the sum as stored: backward reads it, and 1/sqrt(eps) would magnify a difference
        stored = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, stored, mask=in_tile)
        total = stored.to(tl.float32)

    if not RMS:
        total, mean = centre_rows(total, in_row, n_cols)
        tl.store(stats_ptr + n_rows + row, mean, mask=in_rows)
    rstd = tl.rsqrt(tl.sum(total * total, axis=1) * (1.0 / n_cols) + eps)
    tl.store(stats_ptr + row, rstd, mask=in_rows)

    # a matrix of one row, so that a program of one row reads it in the layout of x
    weight = tl.load(weight_ptr + col[None, :], mask=in_row, other=0.0).to(tl.float32)
    out = total * rstd[:, None] * weight
    if bias_ptr is not None:
        out += tl.load(bias_ptr + col[None, :], mask=in_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=in_tile)


@kernel(varying=VARYING_ROWS)
def _dropout_add_norm_bwd_kernel(
    dout_ptr, dtotal_ptr, total_ptr, stats_ptr,  # [rows, cols] three times, the second or None; as forward
    weight_ptr, seed_ptr, rows_ptr,
    dx_ptr, dresidual_ptr, dparams_ptr,  # [rows, cols] contiguous, the second or None; fp32 [2, programs, cols]
    stride_dout_row, stride_dout_col, stride_dtotal_row, stride_dtotal_col, stride_total_row, stride_total_col,
    n_rows, n_cols, threshold, scale,
    RMS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_N).to(tl.int64)
    in_row = col < n_cols
    weight = tl.load(weight_ptr + col, mask=in_row, other=0.0).to(tl.float32)[None, :]
    seed = tl.load(seed_ptr) if DROPOUT else 0
    inverse = 1.0 / n_cols
    # sums of half as many rows as a tile take half the registers
    dweight = tl.zeros([(BLOCK_M + 1) // 2, BLOCK_N], tl.float32)
    dbias = tl.zeros([(BLOCK_M + 1) // 2, BLOCK_N], tl.float32)
    # 16 warps have 128 registers a thread: none for what is read ahead, nor for two sums in one exchange
    for tile in tl.range(program, tl.cdiv(n_rows, BLOCK_M), programs, num_stages=1 if BLOCK_N > 4096 else 2):
        row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_rows = row < n_rows
        in_tile = in_rows[:, None] & in_row[None, :]
        offset = row[:, None] * n_cols + col[None, :]
        dout = dout_ptr + row[:, None] * stride_dout_row + col[None, :] * stride_dout_col
        dout = tl.load(dout, mask=in_tile, other=0.0).to(tl.float32)
        total = total_ptr + row[:, None] * stride_total_row + col[None, :] * stride_total_col
        n = tl.load(total, mask=in_tile, other=0.0).to(tl.float32)
        rstd = tl.load(stats_ptr + row, mask=in_rows, other=0.0)[:, None]
        if not RMS:
            n = tl.where(in_tile, n - tl.load(stats_ptr + n_rows + row, mask=in_rows, other=0.0)[:, None], 0.0)
        n *= rstd
        dweight += _add_halves(dout * n, BLOCK_M, BLOCK_N)
        dbias += _add_halves(dout, BLOCK_M, BLOCK_N)

        g = dout * weight
        if RMS:
            d = g - n * (tl.sum(g * n, axis=1) * inverse)[:, None]
        elif BLOCK_N > 4096:
            d = g - n * (tl.sum(g * n, axis=1) * inverse)[:, None] - (tl.sum(g, axis=1) * inverse)[:, None]
        else:
            gn_mean, g_mean = tl.split(tl.sum(tl.join(g * n, g), axis=1) * inverse)
            d = g - n * gn_mean[:, None] - g_mean[:, None]
        d *= rstd
        if dtotal_ptr is not None:
            dtotal = dtotal_ptr + row[:, None] * stride_dtotal_row + col[None, :] * stride_dtotal_col
            d += tl.load(dtotal, mask=in_tile, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offset, d.to(dresidual_ptr.dtype.element_ty), mask=in_tile)
        if DROPOUT:
            counter = row
            if rows_ptr is not None:
                counter = tl.load(rows_ptr + row, mask=in_rows, other=0)
            d = tl.where(row_keep_tile(seed, threshold, counter, BLOCK_M, BLOCK_N), d, 0.0) * scale
        tl.store(dx_ptr + offset, d.to(dx_ptr.dtype.element_ty), mask=in_tile)
    partial = dparams_ptr + program.to(tl.int64) * n_cols + col
    tl.store(partial, tl.sum(dweight, axis=0), mask=in_row)
    tl.store(partial + programs.to(tl.int64) * n_cols, tl.sum(dbias, axis=0), mask=in_row)


def _forward_buffers(x, residual, dropout, kind):
    """Uninitialised (out, total, stats [rstd, or rstd and mean; rows]); total is empty where it would be x."""
    shape = x.shape
    total = x.new_empty(shape if residual is not None or dropout > 0.0 else 0)
    stats = x.new_empty((2 if kind == "layernorm" else 1, x.numel() // shape[-1]), dtype=torch.float32)
    return x.new_empty(*shape), total, stats


def _backward_buffers(x, residual_dtype, dropout):
    """Uninitialised (dx, dresidual); dresidual is empty where it would equal dx."""
    separate = residual_dtype is not None and (dropout > 0.0 or residual_dtype != x.dtype)
    return x.new_empty(*x.shape), x.new_empty(x.shape if separate else 0, dtype=residual_dtype or x.dtype)


def _row_counters(rows, dropout):
    """What the kernels read of `rows`: nothing where they count themselves, or draw nothing."""
    return None if rows is None or dropout == 0.0 else rows.reshape(-1).contiguous()


def _run_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    rows: torch.Tensor | None,
    dropout: float,
    eps: float,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, total, stats = _forward_buffers(x, residual, dropout, kind)
    num_rows, cols = stats.shape[1], x.shape[-1]
    if num_rows == 0:
        return out, total, stats
    plan = norm_plan(cols, "fwd")
    x, *x_strides = as_matrix(x, cols)
    residual, *residual_strides = (None, 0, 0) if residual is None else as_matrix(residual, cols)
    with on_device(x):
        _dropout_add_norm_fwd_kernel[(ceil_div(num_rows, plan.block_m),)](
            x, residual, weight.contiguous(), None if bias is None else bias.contiguous(),
            seed, _row_counters(rows, dropout), out, total, stats,
            *x_strides, *residual_strides, num_rows, cols, eps, threshold(dropout), keep_scale(dropout),
            RMS=kind == "rmsnorm", DROPOUT=dropout > 0.0, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            num_warps=plan.num_warps, num_stages=plan.num_stages, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out, total, stats


def _fake_forward(x, residual, weight, bias, seed, rows, dropout, eps, kind):
    return _forward_buffers(x, residual, dropout, kind)


def _run_backward(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor | None,
    dropout: float,
    kind: str,
    residual_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dresidual = _backward_buffers(total, residual_dtype, dropout)
    num_rows, cols = stats.shape[1], total.shape[-1]
    if num_rows == 0:
        return dx, dresidual, weight.new_zeros(2, cols, dtype=torch.float32)
    plan = norm_plan(cols, "bwd")
    programs = min(ceil_div(num_rows, plan.block_m), plan.programs_per_sm * multiprocessors(total.device))
    dparams = total.new_empty(2, programs, cols, dtype=torch.float32)
    dout, *dout_strides = as_matrix(dout, cols)
    total, *total_strides = as_matrix(total, cols)
    dtotal, *dtotal_strides = (None, 0, 0) if dtotal is None else as_matrix(dtotal, cols)
    with on_device(total):
        _dropout_add_norm_bwd_kernel[(programs,)](
            dout, dtotal, total, stats,
            weight.contiguous(), seed, _row_counters(rows, dropout),
            dx, dresidual if dresidual.numel() else None, dparams,
            *dout_strides, *dtotal_strides, *total_strides,
            num_rows, cols, threshold(dropout), keep_scale(dropout),
            RMS=kind == "rmsnorm", DROPOUT=dropout > 0.0, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            num_warps=plan.num_warps, num_stages=plan.num_stages, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return dx, dresidual, dparams.sum(1)


def _fake_backward(dout, dtotal, total, stats, weight, seed, rows, dropout, kind, residual_dtype):
    dparams = weight.new_empty(2, total.shape[-1], dtype=torch.float32)
    return *_backward_buffers(total, residual_dtype, dropout), dparams


def _save(ctx, inputs, output):
    x, residual, weight, bias, seed, rows, ctx.dropout, _, ctx.kind = inputs
    _, total, stats = output
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(total if total.numel() else x, stats, weight, seed, rows)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout, dtotal, _):
    total, stats, weight, seed, rows = ctx.saved_tensors
    dout = torch.zeros_like(total) if dout is None else dout
    dtotal = dtotal if dtotal is not None and dtotal.numel() else None
    dx, dresidual, dparams = _backward(
        dout, dtotal, total, stats, weight, seed, rows, ctx.dropout, ctx.kind, ctx.residual_dtype
    )
    if ctx.residual_dtype is None:
        dresidual = None
    elif dresidual.shape != dx.shape:
        dresidual = dx
    dweight, dbias = dparams.unbind()
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dx, dresidual, dweight.to(weight.dtype), dbias, None, None, None, None, None


_backward = Op("dropout_add_norm_bwd", _run_backward, _fake_backward)
_forward = Op("dropout_add_norm_fwd", _run_forward, _fake_forward, save=_save, gradient=_gradient)


def dropout_add_norm(
    x, residual, weight, bias, *, dropout=0.0, seed=0, rows=None, eps=1e-12, kind="layernorm", prenorm=False,
    backend="auto",
):  # fmt: skip
    """Normalise the last axis of `dropout(x) + residual` (Ba et al., 2016, eq. 4; Zhang and Sennrich, 2019, eq. 4).

    Args:
        x: [..., D], float32, float16 or bfloat16, any strides; leading axes that have no common stride are copied.
        residual: [..., D] like x, in any of those dtypes, or None.
        weight, bias: [D], in any of those dtypes; bias may be None.
        dropout: of x, a probability in [0, 1) in steps of 1/256; survivors are divided by the exact kept fraction.
        seed: int, or one int64 on the device of x.
        rows: int64, one counter for each row of x, which names it in the dropout mask; by default 0, 1, 2, ...
        kind: "layernorm" or "rmsnorm".
        prenorm: return (out, total) with total = dropout(x) + residual.
        backend: "auto", "triton" or "reference".
    Returns:
        [..., D] in x.dtype; what is normalised is the sum rounded to x.dtype, with statistics in float32.
    Raises:
        ValueError: names the argument that does not fit the others.
    """
    _check(x, residual, weight, bias, dropout, seed, rows, kind)
    cols = x.shape[-1]
    unsupported = f"takes up to {NORM_MAX_COLS} columns, got {cols}" if cols > NORM_MAX_COLS else None
    if not use_triton("dropout_add_norm", backend, x, unsupported=unsupported):
        return reference.dropout_add_norm(
            x, residual, weight, bias, dropout=dropout, seed=seed, rows=rows, eps=eps, kind=kind, prenorm=prenorm
        )
    seed = as_seed(seed, x.device) if dropout > 0.0 else None
    out, total, _ = _forward(x, residual, weight, bias, seed, rows, dropout, eps, kind)
    if not prenorm:
        return out
    return out, x if residual is None and dropout == 0.0 else total


def _check(x, residual, weight, bias, dropout, seed, rows, kind):
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    shape = x.shape
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"x is {list(shape)}: expected [..., D] with D of at least 1")
    check_floating(x=x, residual=residual, weight=weight, bias=bias)
    threshold(dropout)
    if isinstance(seed, torch.Tensor):
        as_seed(seed, x.device)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual is {list(residual.shape)}, x is {list(shape)}: expected the same shape")
    for name, param in (("weight", weight), ("bias", bias)):
        if param is not None and param.shape != shape[-1:]:
            raise ValueError(f"{name} is {list(param.shape)}: expected [{shape[-1]}], the last axis of x")
    if rows is not None and (rows.dtype != torch.int64 or rows.numel() * shape[-1] != x.numel()):
        raise ValueError(
            f"rows is {rows.dtype} {list(rows.shape)}: expected int64, one for each row of x {list(shape)}"
        )
    check_device(x=x, residual=residual, weight=weight, bias=bias, rows=rows)


def aot_cases(capability):
    """The default plans in bfloat16 with float32 weights, as `AotCase`s; they are the same on every architecture."""
    for cols in (128, 768, 1024, 8192):
        for dropout in (False, True):
            yield from _aot_pair(cols, dropout)


def _aot_pair(cols, dropout):
    tensors = dict.fromkeys(("x_ptr", "residual_ptr", "out_ptr", "total_ptr", "dout_ptr", "dx_ptr"), "*bf16")
    tensors |= dict.fromkeys(("weight_ptr", "bias_ptr", "stats_ptr", "dparams_ptr"), "*fp32")
    counters = dict.fromkeys(("seed_ptr", "rows_ptr"), "*i64" if dropout else None)
    dresidual = {"dresidual_ptr": "*bf16" if dropout else None, "dtotal_ptr": None}
    strides = {f"stride_{name}_row": cols for name in ("x", "residual", "dout", "total")}
    strides |= {f"stride_{name}_col": 1 for name in ("x", "residual", "dout", "total")}
    strides |= {"stride_dtotal_row": 0, "stride_dtotal_col": 0}
    sizes = {"n_rows": 4099, "n_cols": cols, "eps": 1e-12, "threshold": 26, "scale": 1.1}
    for direction, fn in (("fwd", _dropout_add_norm_fwd_kernel), ("bwd", _dropout_add_norm_bwd_kernel)):
        plan = norm_plan(cols, direction)
        flags = {"RMS": False, "DROPOUT": dropout, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
        known = tensors | counters | dresidual | strides | sizes | flags
        arguments = aot_arguments(fn, **{name: known[name] for name in fn.arg_names})
        label = f"{cols} columns{', dropout' if dropout else ''}"
        yield AotCase(
            op="dropout_add_norm", direction=direction, label=label, fn=fn, **arguments,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
