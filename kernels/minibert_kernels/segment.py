"""Sums of rows that share a key: out[k] = Σ_{i: keys[i] = k} x[i], without atomics and without asking the device.

The gradient of a gather: of selected rows, or of up to three embedding tables by their ids, which are summed together:
the keys of a second table begin where those of the first end, so that one sort serves all. Keys are of two bytes where
that suffices, and else of four, because a radix sort takes a pass a byte. A stable sort puts the rows of a key side by
side, as a run. A first kernel reads chunks of `ROWS` sorted rows, and writes the sum of each run that lies within its
chunk straight to the table. A run that crosses a border leaves the sum of its part in each chunk, in float32; a second
kernel, at the chunk where the run begins, adds those up. A key as frequent as all rows together costs no more than
others, every sum is taken in one fixed order, and the same call gives the same bits.

Bytes: each row of x once a table, each row of a table that has a key once, on tables of zeros; beside them 20 to 24 a
row and table for keys and order, and two float32 rows a chunk at most.
"""

import torch

from ._triton import tl, triton
from .jit import kernel
from .launch import FP_FUSION, VARYING_ROWS, AotCase, aot_arguments, ceil_div, on_device

ROWS = 64  # of a chunk: all in flight at once, and few enough that as many runs cost little arithmetic
STEP = 32  # chunks that the second kernel adds at a time
BLOCK = 1024  # keys a program writes
VARYING_TABLES = ("n_source", "second", "third", "size", *VARYING_ROWS)


@kernel(varying=VARYING_TABLES)
def _keys_kernel(
    index_ptr, second_index_ptr, third_index_ptr,  # int64 [n_source]; the others may be None
    keys_ptr, n_source, second, third, size,       # [tables * n_source]; second and third: where their keys begin
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _write_keys(index_ptr, keys_ptr, row, n_source, 0, second, size)
    if second_index_ptr is not None:
        _write_keys(second_index_ptr, keys_ptr + n_source, row, n_source, second, third, size)
    if third_index_ptr is not None:
        _write_keys(third_index_ptr, keys_ptr + 2 * n_source, row, n_source, third, size, size)


@triton.jit
def _write_keys(index_ptr, keys_ptr, row, n_source, begin, end, size):
    """An index that names no row of its table becomes the key `size`, which no table has."""
    index = tl.load(index_ptr + row, mask=row < n_source, other=0)
    key = tl.where((index >= 0) & (index < end - begin), index + begin, size)
    tl.store(keys_ptr + row, key.to(keys_ptr.dtype.element_ty), mask=row < n_source)


@triton.jit
def _store_sum(total, key, out_ptr, second_ptr, third_ptr, second, third, col, n_cols):
    """Write the sum of a key into the table that it belongs to."""
    row, in_row = key.to(tl.int64) * n_cols + col, col < n_cols
    total = total.to(out_ptr.dtype.element_ty)
    if second_ptr is None:
        tl.store(out_ptr + row, total, mask=in_row)
    else:
        if key < second:
            tl.store(out_ptr + row, total, mask=in_row)
        elif key < third:
            tl.store(second_ptr + row - second.to(tl.int64) * n_cols, total, mask=in_row)
        elif third_ptr is not None:
            tl.store(third_ptr + row - third.to(tl.int64) * n_cols, total, mask=in_row)


@kernel(varying=VARYING_TABLES)
def _segment_sum_kernel(
    x_ptr, keys_ptr, order_ptr,    # [n_source, cols], [rows] sorted, int64 [rows]: which key it was before the sort
    out_ptr, second_ptr, third_ptr, partial_ptr,  # tables of zeros; fp32 [chunks, 2, cols]: of the run before, after
    stride_x_row, stride_x_col, n_source, n_rows, n_cols, second, third, size,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_cols, BLOCK_N)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first = chunk * ROWS
    row = first + tl.arange(0, ROWS)
    in_rows, in_row = row < n_rows, col < n_cols
    keys = tl.load(keys_ptr + row, mask=in_rows, other=-1).to(tl.int32)
    source = tl.load(order_ptr + row, mask=in_rows, other=0)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1).to(tl.int32)
    after = tl.load(keys_ptr + first + ROWS, mask=first + ROWS < n_rows, other=-1).to(tl.int32)
    wanted = in_rows & (keys < size)
    if second_ptr is not None:
        source -= tl.where(keys < second, 0, tl.where(keys < third, n_source, 2 * n_source.to(tl.int64)))
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
            _store_sum(total, key, out_ptr, second_ptr, third_ptr, second, third, col, n_cols)
        key = tl.min(tl.where(wanted & (keys > key), keys, size), axis=0)


@kernel(varying=VARYING_TABLES)
def _crossing_runs_kernel(
    keys_ptr, partial_ptr, out_ptr, second_ptr, third_ptr, n_rows, n_cols, second, third, size,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_cols, BLOCK_N)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first, in_row = chunk * ROWS, col < n_cols
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1).to(tl.int32)
    key = tl.load(keys_ptr + first + ROWS - 1).to(tl.int32)
    after = tl.load(keys_ptr + first + ROWS).to(tl.int32)  # there is one: the last chunk has no program
    if (key != before) & (key == after) & (key < size):
        total = tl.load(partial_ptr + (2 * chunk + 1) * n_cols + col, mask=in_row, other=0.0)
        others = tl.zeros([STEP, BLOCK_N], tl.float32)
        chunks = chunk + 1 + tl.arange(0, STEP)
        more = True
        while more:
            # keys are sorted: a chunk has a part of the run where it begins with its key
            has_part = tl.load(keys_ptr + chunks * ROWS, mask=chunks * ROWS < n_rows, other=-1).to(tl.int32) == key
            partial = partial_ptr + 2 * chunks[:, None] * n_cols + col[None, :]
            others += tl.load(partial, mask=has_part[:, None] & in_row[None, :], other=0.0)
            more = tl.min(has_part.to(tl.int32), axis=0) > 0
            chunks += STEP
        total += tl.sum(others, axis=0)
        _store_sum(total, key, out_ptr, second_ptr, third_ptr, second, third, col, n_cols)


def segment_sum(x, keys, size, dtype=None):
    """The one table of `segment_sums`."""
    return segment_sums(x, [keys], [size], dtype)[0]


def segment_sums(x, keys, sizes, dtype=None):
    """Add up the rows of x by key, for each of up to three tables; called inside registered ops, without a gradient.

    Args:
        x: [N, D], float32, float16 or bfloat16, any strides.
        keys: for each table int64 [N]; a row whose key is not in [0, size) is left out.
        sizes: of the tables; together less than 2 ** 31.
        dtype: of the results, by default that of x; sums are taken in float32.
    Returns:
        A list of [size, D], zero for keys that do not occur.
    """
    num_source, cols = x.shape
    outs = [x.new_zeros(size, cols, dtype=dtype) for size in sizes]
    size, num_rows = sum(sizes), num_source * len(sizes)
    if num_rows == 0 or size * cols == 0:
        return outs
    absent = [None] * (3 - len(sizes))
    second, third = (*sizes, 0, 0)[0], sum((*sizes, 0, 0)[:2])
    unsorted = x.new_empty(num_rows, dtype=torch.int16 if size < 2**15 else torch.int32)
    block_n, chunks = _block_n(cols), ceil_div(num_rows, ROWS)
    blocks = ceil_div(cols, block_n)
    partial = x.new_empty(chunks, 2, cols, dtype=torch.float32)
    with on_device(x):
        _keys_kernel[(ceil_div(num_source, BLOCK),)](
            *(index.contiguous() for index in keys), *absent, unsorted, num_source, second, third, size,
            BLOCK=BLOCK, num_warps=4, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        keys, order = torch.sort(unsorted, stable=True)
        _segment_sum_kernel[(chunks * blocks,)](
            x, keys, order, *outs, *absent, partial, *x.stride(), num_source, num_rows, cols, second, third, size,
            ROWS=ROWS, BLOCK_N=block_n, num_warps=1, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        if chunks > 1:
            _crossing_runs_kernel[((chunks - 1) * blocks,)](
                keys, partial, *outs, *absent, num_rows, cols, second, third, size,
                ROWS=ROWS, STEP=STEP, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=FP_FUSION,
            )  # fmt: skip
    return outs


def _block_n(cols):
    # accesses of one element, as odd widths have them, take more registers
    return min(64 if cols % 8 == 0 else 32, max(16, 1 << (cols - 1).bit_length()))


def aot_cases(arch):
    """The default plans, of one table and of three, as `AotCase`s; they are the same on every architecture."""
    for cols in (37, 768):
        for dtype in ("*fp32", "*bf16"):
            for tables in (1, 3):
                key, index = "*i16" if tables == 3 else "*i32", "*i64" if tables == 3 else None
                others = dtype if tables == 3 else None
                known = {"x_ptr": dtype, "out_ptr": dtype, "second_ptr": others, "third_ptr": others}
                known |= {"partial_ptr": "*fp32", "keys_ptr": key, "order_ptr": "*i64"}
                known |= {"index_ptr": "*i64", "second_index_ptr": index, "third_index_ptr": index}
                known |= {"stride_x_row": cols, "stride_x_col": 1, "n_source": 4099, "n_rows": 4099, "n_cols": cols}
                known |= {"second": 30522, "third": 31034, "size": 31037}
                known |= {"ROWS": ROWS, "STEP": STEP, "BLOCK": BLOCK, "BLOCK_N": _block_n(cols)}
                kernels = {"runs": (_segment_sum_kernel, 1), "crossing runs": (_crossing_runs_kernel, 4)}
                if (cols, dtype) == (768, "*fp32"):
                    kernels["keys"] = (_keys_kernel, 4)
                for name, (fn, num_warps) in kernels.items():
                    arguments = aot_arguments(fn, **{name: known[name] for name in fn.arg_names})
                    label = f"{name}, {cols} columns, {dtype[1:]}{', three tables' if tables == 3 else ''}"
                    yield AotCase(
                        op="segment_sum", direction="bwd", label=label, fn=fn, **arguments, num_warps=num_warps,
                        num_stages=1,
                    )  # fmt: skip
