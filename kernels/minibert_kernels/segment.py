"""Sums of rows that share a key: out[k] = Σ_{i: keys[i] = k} x[i], without atomics and without asking the device.

The gradient of a gather: of an embedding table by its ids, of selected rows. Keys are sorted (stable), which puts the
rows of a key side by side, as a run. A first kernel reads chunks of `ROWS` sorted rows, and writes the sum of each run
that lies within its chunk straight to the table. A run that crosses a border leaves the sum of its part in each chunk,
in float32; a second kernel, at the chunk where the run begins, adds those up. A key as frequent as all rows together
costs no more than others, every sum is taken in one fixed order, and the same call gives the same bits.

Bytes: each row of x once, each row of the table that has a key once, on a table of zeros; beside them 16 a row for
keys and order, and two float32 rows a chunk at most.
"""

import torch

from ._triton import tl, triton
from .launch import FP_FUSION, VARYING, AotCase, aot_arguments, ceil_div

ROWS = 64  # of a chunk: all in flight at once, and few enough that as many runs cost little arithmetic
STEP = 32  # chunks that the second kernel adds at a time


@triton.jit(do_not_specialize=("size", *VARYING))
def _segment_sum_kernel(
    x_ptr, keys_ptr, order_ptr,    # [rows, cols], int64 [rows] sorted, int64 [rows]: where in x each of them is
    out_ptr, partial_ptr,          # [size, cols] zeros, fp32 [chunks, 2, cols]: of the run before, of the run after
    stride_x_row, stride_x_col, n_rows, n_cols, size,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_cols, BLOCK_N)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first = chunk * ROWS
    row = first + tl.arange(0, ROWS)
    in_rows, in_row = row < n_rows, col < n_cols
    keys = tl.load(keys_ptr + row, mask=in_rows, other=-1)
    source = tl.load(order_ptr + row, mask=in_rows, other=0)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    after = tl.load(keys_ptr + first + ROWS, mask=first + ROWS < n_rows, other=-1)
    wanted = in_rows & (keys >= 0) & (keys < size)
    x = x_ptr + source[:, None] * stride_x_row + col[None, :] * stride_x_col
    x = tl.load(x, mask=wanted[:, None] & in_row[None, :], other=0.0).to(tl.float32)

    partial = partial_ptr + 2 * chunk * n_cols + col
    key = tl.min(tl.where(wanted, keys, size), axis=0)
    while key < size:
        total = tl.sum(tl.where((keys == key)[:, None], x, 0.0), axis=0)
        if key == before:
            tl.store(partial, total, mask=in_row)
        elif key == after:
            tl.store(partial + n_cols, total, mask=in_row)
        else:
            tl.store(out_ptr + key * n_cols + col, total.to(out_ptr.dtype.element_ty), mask=in_row)
        key = tl.min(tl.where(wanted & (keys > key), keys, size), axis=0)


@triton.jit(do_not_specialize=("size", *VARYING))
def _crossing_runs_kernel(
    keys_ptr, partial_ptr, out_ptr, n_rows, n_cols, size,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_cols, BLOCK_N)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first, in_row = chunk * ROWS, col < n_cols
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    key = tl.load(keys_ptr + first + ROWS - 1)
    after = tl.load(keys_ptr + first + ROWS)  # there is one: the last chunk has no program
    if (key != before) & (key == after) & (key >= 0) & (key < size):
        total = tl.load(partial_ptr + (2 * chunk + 1) * n_cols + col, mask=in_row, other=0.0)
        others = tl.zeros([STEP, BLOCK_N], tl.float32)
        chunks = chunk + 1 + tl.arange(0, STEP)
        more = True
        while more:
            # keys are sorted: a chunk has a part of the run where it begins with its key
            has_part = tl.load(keys_ptr + chunks * ROWS, mask=chunks * ROWS < n_rows, other=-1) == key
            partial = partial_ptr + 2 * chunks[:, None] * n_cols + col[None, :]
            others += tl.load(partial, mask=has_part[:, None] & in_row[None, :], other=0.0)
            more = tl.min(has_part.to(tl.int32), axis=0) > 0
            chunks += STEP
        total += tl.sum(others, axis=0)
        tl.store(out_ptr + key * n_cols + col, total.to(out_ptr.dtype.element_ty), mask=in_row)


def segment_sum(x, keys, size, dtype=None):
    """Add up the rows of x by key; called inside registered ops, and has no gradient of its own.

    Args:
        x: [N, D], float32, float16 or bfloat16, any strides.
        keys: int64 [N]; a row whose key is not in [0, size) is left out.
        size: of the table.
        dtype: of the result, by default that of x; sums are taken in float32.
    Returns:
        [size, D], zero for keys that do not occur.
    """
    num_rows, cols = x.shape
    out = x.new_zeros(size, cols, dtype=dtype)
    if num_rows == 0 or out.numel() == 0:
        return out
    keys, order = torch.sort(keys.contiguous(), stable=True)
    block_n, chunks = _block_n(cols), ceil_div(num_rows, ROWS)
    blocks = ceil_div(cols, block_n)
    partial = x.new_empty(chunks, 2, cols, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _segment_sum_kernel[(chunks * blocks,)](
            x, keys, order, out, partial, *x.stride(), num_rows, cols, size,
            ROWS=ROWS, BLOCK_N=block_n, num_warps=1, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        if chunks > 1:
            _crossing_runs_kernel[((chunks - 1) * blocks,)](
                keys, partial, out, num_rows, cols, size,
                ROWS=ROWS, STEP=STEP, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=FP_FUSION,
            )  # fmt: skip
    return out


def _block_n(cols):
    return min(64, max(16, 1 << (cols - 1).bit_length()))


def aot_cases(arch):
    """The default plans, as `AotCase`s; they are the same on every architecture."""
    for cols in (37, 768):
        for dtype in ("*fp32", "*bf16"):
            known = {"x_ptr": dtype, "out_ptr": dtype, "partial_ptr": "*fp32", "keys_ptr": "*i64", "order_ptr": "*i64"}
            known |= {"stride_x_row": cols, "stride_x_col": 1, "n_rows": 4099, "n_cols": cols, "size": 30522}
            known |= {"ROWS": ROWS, "STEP": STEP, "BLOCK_N": _block_n(cols)}
            for fn, num_warps in ((_segment_sum_kernel, 1), (_crossing_runs_kernel, 4)):
                arguments = aot_arguments(fn, **{name: known[name] for name in fn.arg_names})
                label = f"{'runs' if fn is _segment_sum_kernel else 'crossing runs'}, {cols} columns, {dtype[1:]}"
                yield AotCase(
                    op="segment_sum", direction="bwd", label=label, fn=fn, **arguments, num_warps=num_warps,
                    num_stages=1,
                )  # fmt: skip
