"""Token ids to normalised embeddings in one pass: out = dropout(norm(word + type + position)), statistics in float32.

Forward, a token t of D columns:

    total = word[ids[t]] + type[type_ids[t]] + position[positions[t]]
    out = keep ⊙ ((total - mean) · rstd ⊙ weight + bias) / kept,   rstd = 1 / sqrt(mean((total - mean)²) + eps)

Backward, with n = (total - mean) · rstd, dnorm = keep ⊙ dout / kept and g = dnorm ⊙ weight:

    dtotal = rstd · (g - mean(g) - n · mean(g ⊙ n)),   dweight = Σ_t dnorm ⊙ n,   dbias = Σ_t dnorm
    dword[k] = Σ_{t: ids[t] = k} dtotal[t], and so for the other two tables

Bytes, in activation rows: forward gathers, and writes out (1); backward gathers, reads dout and writes dtotal (2).
Then each table's gradient reads dtotal once more (`segment.py`): sums by one sort for all tables, without atomics.
Saved: mean and rstd in float32; the sum is gathered again, the dropout mask is drawn again. dtotal has the dtype of the
tables, as the gradient of a sum in torch has: in a 16-bit output's dtype it would cost float32 tables the precision
that they are kept for.
"""

from typing import Any, NamedTuple

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
from .layer_norm import centre_rows
from .op import Op
from .packing import check_index
from .philox import as_counters, as_seed, keep_scale, row_keep_tile, threshold
from .segment import segment_sums


class Lookup(NamedTuple):
    """A table [size, cols] in memory, its strides, and the int64 [rows] that name a row of it for each token."""

    table_ptr: Any
    stride_row: Any
    stride_col: Any
    index_ptr: Any


@triton.jit
def _look_up(lookup, row, in_rows, col, in_tile):
    """The rows of a table, fp32 [M, N]."""
    index = tl.load(lookup.index_ptr + row, mask=in_rows, other=0)
    rows = lookup.table_ptr + index[:, None] * lookup.stride_row + col[None, :] * lookup.stride_col
    return tl.load(rows, mask=in_tile, other=0.0).to(tl.float32)


@triton.jit
def _total(word, type, position, row, in_rows, col, in_tile):
    """The sum of the embeddings, in the order of the reference."""
    total = _look_up(word, row, in_rows, col, in_tile) + _look_up(type, row, in_rows, col, in_tile)
    if position is not None:
        total += _look_up(position, row, in_rows, col, in_tile)
    return total


@kernel(varying=VARYING_ROWS)
def _embed_norm_fwd_kernel(
    word, type, position,          # Lookups; position may be None
    weight_ptr, bias_ptr,          # [cols] twice, bias may be None
    seed_ptr, rows_ptr,            # int64 scalar, int64 [rows]; read with DROPOUT only
    out_ptr, mean_ptr, rstd_ptr,   # [rows, cols] contiguous, fp32 [rows] twice
    n_rows, n_cols, eps, threshold, scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N).to(tl.int64)
    in_rows, in_row = row < n_rows, col < n_cols
    in_tile = in_rows[:, None] & in_row[None, :]
    total = _total(word, type, position, row, in_rows, col, in_tile)

    total, mean = centre_rows(total, in_row[None, :], n_cols)
    rstd = tl.rsqrt(tl.sum(total * total, axis=1) / n_cols + eps)
    tl.store(mean_ptr + row, mean, mask=in_rows)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)

    weight = tl.load(weight_ptr + col, mask=in_row, other=0.0).to(tl.float32)
    out = total * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + col, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        counter = tl.load(rows_ptr + row, mask=in_rows, other=0)
        keep = row_keep_tile(tl.load(seed_ptr), threshold, counter, BLOCK_M, BLOCK_N)
        out = tl.where(keep, out * scale, 0.0)
    tl.store(out_ptr + row[:, None] * n_cols + col[None, :], out.to(out_ptr.dtype.element_ty), mask=in_tile)


@kernel(varying=VARYING_ROWS)
def _embed_norm_bwd_kernel(
    dout_ptr, mean_ptr, rstd_ptr,  # [rows, cols], fp32 [rows] twice
    word, type, position, weight_ptr, seed_ptr, rows_ptr,
    dtotal_ptr, dparams_ptr,       # [rows, cols] contiguous or None, fp32 [2, programs, cols]
    stride_dout_row, stride_dout_col, n_rows, n_cols, threshold, scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_N).to(tl.int64)
    in_row = col < n_cols
    HELD: tl.constexpr = BLOCK_N <= 4096 or DROPOUT  # else 16 warps have no registers to hold it from tile to tile
    if HELD:
        weight = tl.load(weight_ptr + col, mask=in_row, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tl.cdiv(n_rows, BLOCK_M), programs):
        row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_rows = row < n_rows
        in_tile = in_rows[:, None] & in_row[None, :]
        n = _total(word, type, position, row, in_rows, col, in_tile)
        n = tl.where(in_tile, n - tl.load(mean_ptr + row, mask=in_rows, other=0.0)[:, None], 0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
        n *= rstd
        d = dout_ptr + row[:, None] * stride_dout_row + col[None, :] * stride_dout_col
        d = tl.load(d, mask=in_tile, other=0.0).to(tl.float32)
        if DROPOUT:
            counter = tl.load(rows_ptr + row, mask=in_rows, other=0)
            d = tl.where(row_keep_tile(tl.load(seed_ptr), threshold, counter, BLOCK_M, BLOCK_N), d * scale, 0.0)
        dweight += d * n
        dbias += d
        if dtotal_ptr is not None:
            if not HELD:
                weight = tl.load(weight_ptr + col, mask=in_row, other=0.0).to(tl.float32)[None, :]
            d *= weight
            d = d - n * (tl.sum(d * n, axis=1) / n_cols)[:, None] - (tl.sum(d, axis=1) / n_cols)[:, None]
            dtotal = dtotal_ptr + row[:, None] * n_cols + col[None, :]
            tl.store(dtotal, (d * rstd).to(dtotal_ptr.dtype.element_ty), mask=in_tile)
    partial = dparams_ptr + program.to(tl.int64) * n_cols + col
    tl.store(partial, tl.sum(dweight, axis=0), mask=in_row)
    tl.store(partial + programs.to(tl.int64) * n_cols, tl.sum(dbias, axis=0), mask=in_row)


def _lookup(table, index):
    return None if table is None else Lookup(table, *table.stride(), index.contiguous())


def _forward_buffers(ids, word, dtype):
    """Uninitialised (out, mean, rstd)."""
    mean, rstd = (word.new_empty(len(ids), dtype=torch.float32) for _ in range(2))
    return word.new_empty(len(ids), word.shape[1], dtype=dtype), mean, rstd


def _run_forward(
    ids: torch.Tensor,
    type_ids: torch.Tensor,
    positions: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None,
    type: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    rows: torch.Tensor | None,
    dropout: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, mean, rstd = _forward_buffers(ids, word, dtype)
    num_rows, cols = out.shape
    if num_rows == 0:
        return out, mean, rstd
    plan = norm_plan(cols, "fwd")
    with on_device(word):
        _embed_norm_fwd_kernel[(ceil_div(num_rows, plan.block_m),)](
            _lookup(word, ids), _lookup(type, type_ids), _lookup(position, positions),
            weight.contiguous(), None if bias is None else bias.contiguous(),
            seed, as_counters(rows, num_rows, word.device) if dropout > 0.0 else None, out, mean, rstd,
            num_rows, cols, eps, threshold(dropout), keep_scale(dropout),
            DROPOUT=dropout > 0.0, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            num_warps=plan.num_warps, num_stages=plan.num_stages, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out, mean, rstd


def _fake_forward(ids, type_ids, positions, word, position, type, weight, bias, seed, rows, dropout, eps, dtype):
    return _forward_buffers(ids, word, dtype)


def _run_backward(
    dout: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    ids: torch.Tensor,
    type_ids: torch.Tensor,
    positions: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None,
    type: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor | None,
    dropout: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, cols = dout.shape
    dtotal = word.new_empty(dout.shape) if any(wanted) else None
    dparams = word.new_zeros(2, 1, cols, dtype=torch.float32)
    if num_rows > 0:
        plan = norm_plan(cols, "bwd")
        programs = min(ceil_div(num_rows, plan.block_m), plan.programs_per_sm * multiprocessors(word.device))
        dparams = word.new_empty(2, programs, cols, dtype=torch.float32)
        dout, *dout_strides = as_matrix(dout, cols)
        with on_device(word):
            _embed_norm_bwd_kernel[(programs,)](
                dout, mean, rstd, _lookup(word, ids), _lookup(type, type_ids), _lookup(position, positions),
                weight.contiguous(), seed, as_counters(rows, num_rows, word.device) if dropout > 0.0 else None,
                dtotal, dparams, *dout_strides, num_rows, cols, threshold(dropout), keep_scale(dropout),
                DROPOUT=dropout > 0.0, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
                num_warps=plan.num_warps, num_stages=plan.num_stages, enable_fp_fusion=FP_FUSION,
            )  # fmt: skip
    tables = zip(wanted, (word, position, type), (ids, positions, type_ids), strict=True)
    chosen = [(index, len(table)) for want, table, index in tables if want]
    sums = iter(segment_sums(dtotal, *zip(*chosen, strict=True)) if chosen else ())
    return *(next(sums) if want else word.new_empty(0) for want in wanted), dparams.sum(1)


def _fake_backward(
    dout, mean, rstd, ids, type_ids, positions, word, position, type, weight, seed, rows, dropout, wanted
):
    tables = zip(wanted, (word, position, type), strict=True)
    dtables = (word.new_empty(table.shape if want else 0) for want, table in tables)
    return *dtables, word.new_empty(2, word.shape[1], dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, ctx.dropout, _, _ = inputs
    _, mean, rstd = output
    ids, type_ids, positions, word, position, type, weight, bias, seed, rows = tensors
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(mean, rstd, ids, type_ids, positions, word, position, type, weight, seed, rows)
    ctx.mark_non_differentiable(mean, rstd)


def _gradient(ctx, dout, *_):
    wanted = list(ctx.needs_input_grad[3:6])
    saved = ctx.saved_tensors
    *dtables, dparams = _backward(dout, *saved, ctx.dropout, wanted)
    dtables = (table if want else None for want, table in zip(wanted, dtables, strict=True))
    dweight = dparams[0].to(saved[8].dtype)
    return None, None, None, *dtables, dweight, dparams[1].to(ctx.bias_dtype) if ctx.bias_dtype else None, *(None,) * 5


_backward = Op("embed_norm_bwd", _run_backward, _fake_backward)
_forward = Op("embed_norm_fwd", _run_forward, _fake_forward, save=_save, gradient=_gradient)


def embed_norm(
    ids, type_ids, positions, word, position, type, weight, bias, *, dropout=0.0, seed=0, rows=None, eps=1e-12,
    backend="auto",
):  # fmt: skip
    """Embeddings of packed tokens, summed, normalised and dropped (Devlin et al., 2019, figure 2; Ba et al., 2016).

    Args:
        ids, type_ids, positions: int64 [T], rows of the tables; positions may be None where position is. Tokens after
            the last sequence are tokens as others: where their gradient is zero they add nothing to any table.
        word, position, type: [V, D], [P, D] and [K, D] of one dtype, float32, float16 or bfloat16, any strides;
            position may be None.
        weight, bias: [D], in any of those dtypes; bias may be None.
        dropout: of the result, a probability in [0, 1) in steps of 1/256; survivors are divided by the exact kept
            fraction.
        seed: int, or one int64 on the device of word.
        rows: int64 [T], the counters that name the tokens in the dropout mask; by default 0, 1, 2, ...
        backend: "auto", "triton" or "reference".
    Returns:
        [T, D] in the dtype of autocast where that is on, else of word; sum and statistics are taken in float32.
        Gradients of the tables are dense; those of a row that occurs more than once are added in float32.
    Raises:
        ValueError: names the argument that does not fit; on a GPU the values of ids, type_ids and positions are not
            looked at: one outside its table reads memory that is not the table's.
    """
    _check(ids, type_ids, positions, word, position, type, weight, bias, dropout, seed, rows)
    cols = word.shape[1]
    unsupported = f"takes up to {NORM_MAX_COLS} columns, got {cols}" if cols > NORM_MAX_COLS else None
    if not use_triton("embed_norm", backend, word, unsupported=unsupported):
        return reference.embed_norm(
            ids, type_ids, positions, word, position, type, weight, bias, dropout=dropout, seed=seed, rows=rows, eps=eps
        )
    seed = as_seed(seed, word.device) if dropout > 0.0 else None
    positions, dtype = None if position is None else positions, reference.autocast_dtype(word)
    out, _, _ = _forward(
        ids, type_ids, positions, word, position, type, weight, bias, seed, rows, dropout, eps, dtype
    )  # fmt: skip
    return out


def _check(ids, type_ids, positions, word, position, type, weight, bias, dropout, seed, rows):
    if word.ndim != 2 or word.shape[1] == 0:
        raise ValueError(f"word is {list(word.shape)}: expected [V, D] with D of at least 1")
    if position is not None and positions is None:
        raise ValueError("positions is None, position is a table: expected int64, one for each id")
    for name, table in (("position", position), ("type", type)):
        if table is not None and (table.ndim != 2 or table.shape[1] != word.shape[1] or table.dtype != word.dtype):
            raise ValueError(
                f"{name} is {table.dtype} {list(table.shape)}: expected a table of {word.dtype} with "
                f"{word.shape[1]} columns, as word"
            )
    for name, param in (("weight", weight), ("bias", bias)):
        if param is not None and param.shape != word.shape[1:]:
            raise ValueError(f"{name} is {list(param.shape)}: expected [{word.shape[1]}], the columns of word")
    check_floating(word=word, weight=weight, bias=bias)
    threshold(dropout)
    if isinstance(seed, torch.Tensor):
        as_seed(seed, word.device)
    indices = {
        "ids": (ids, word),
        "type_ids": (type_ids, type),
        "positions": (positions, position),
        "rows": (rows, None),
    }
    for name, (index, table) in indices.items():
        if index is not None and (index.dtype != torch.int64 or index.ndim != 1 or len(index) != len(ids)):
            raise ValueError(f"{name} is {index.dtype} {list(index.shape)}: expected int64, one for each id")
        if table is not None:
            check_index(name, index, len(table), "its table")
    check_device(
        word=word, position=position, type=type, weight=weight, bias=bias,
        **{name: index for name, (index, _) in indices.items()},
    )  # fmt: skip


def aot_cases(arch):
    """The default plans: float32 tables, a bfloat16 result, as `AotCase`s; they are the same on every architecture."""
    for cols in (128, 768, 1024, 8192):
        for dropout in (False, True):
            known = dict.fromkeys(
                ("mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr", "dtotal_ptr", "dparams_ptr"), "*fp32"
            )
            known |= dict.fromkeys(("word", "type", "position"), Lookup("*fp32", cols, 1, "*i64"))
            known |= dict.fromkeys(("out_ptr", "dout_ptr"), "*bf16")
            known |= dict.fromkeys(("seed_ptr", "rows_ptr"), "*i64" if dropout else None)
            known |= {"stride_dout_row": cols, "stride_dout_col": 1, "n_rows": 4099, "n_cols": cols, "eps": 1e-12}
            known |= {"threshold": 26, "scale": 1.1, "DROPOUT": dropout}
            for direction, fn in (("fwd", _embed_norm_fwd_kernel), ("bwd", _embed_norm_bwd_kernel)):
                plan = norm_plan(cols, direction)
                known |= {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
                arguments = aot_arguments(fn, **{name: known[name] for name in fn.arg_names})
                label = f"{cols} columns{', dropout' if dropout else ''}"
                yield AotCase(
                    op="embed_norm", direction=direction, label=label, fn=fn, **arguments,
                    num_warps=plan.num_warps, num_stages=plan.num_stages,
                )  # fmt: skip
