"""What attention's kernels share: where a tile lies, what is added to its scores, what dropout keeps of it."""

from typing import Any, NamedTuple

from . import philox
from ._triton import tl, triton
from .philox import bytes_at_least, philox_tile

SCHEDULE_TILE = tl.constexpr(128)  # tokens of an entry of `attention_schedule`
WIDEST = 1 << 30  # keys on one side of a query: more than any sequence has, and sums with a token's number fit int32
FILLERS = tl.constexpr(16)  # programs, after those that have a tile, that fill what lies outside of all sequences
HEAD_SHIFT = tl.constexpr(philox.HEAD_SHIFT)
# values that change from batch to batch, and pointers to single values, make no new kernel
VARYING_BATCH = (
    "cu_seqlens_ptr", "schedule_ptr", "dlse_ptr", "num_tokens", "num_heads", "num_tiles", "num_sequences", "max_seqlen",
    "dropout",
)  # fmt: skip


class Terms(NamedTuple):
    """What makes logits of the products q kᵀ: scale · (product) + bias - slope · |i - j|, inside the band.

    slopes_ptr (fp32 [H]), bias_ptr with its strides of (sequence, head, query, key), and band, (keys to the left, keys
    to the right) of at most WIDEST, may be None.
    """

    scale: Any
    slopes_ptr: Any = None
    bias_ptr: Any = None
    bias_strides: Any = None
    band: Any = None


class Dropout(NamedTuple):
    """The byte threshold, 1 to 255; the int64 seed in memory, or None without dropout; the int64 [B] counters of the
    sequences, or None for 0, 1, 2, ...; and what stands for what is dropped.

    A kernel tests members: a tuple that may itself be None does not compile in Triton 3.6. A zero that the compiler
    knows would be selected after the conversion to 16 bits, for two instructions an element more.
    """

    threshold: Any = 0
    seed_ptr: Any = None
    seq_ids_ptr: Any = None
    zero: Any = 0.0


@triton.jit
def base2(x):
    """exp(x) = exp2(base2(x))."""
    return x * 1.4426950408889634


@triton.jit
def span(cu_seqlens_ptr, seq):
    """First token (int64) and length of a sequence."""
    first = tl.load(cu_seqlens_ptr + seq)
    return first.to(tl.int64), tl.load(cu_seqlens_ptr + seq + 1) - first


@triton.jit
def locate(cu_seqlens_ptr, schedule_ptr, num_heads, num_tiles, BLOCK: tl.constexpr):
    """Sequence, head, first row, first token and length of this program's tile; length 0 where it has no row.

    In natural order num_tiles cover the longest sequence, and those of a head are neighbours (L2 cache). With a
    schedule they cover one of its entries.
    """
    head = tl.program_id(0) // num_tiles % num_heads
    seq = tl.program_id(0) // num_tiles // num_heads
    row = tl.program_id(0) % num_tiles * BLOCK
    if schedule_ptr is None:
        first, length = span(cu_seqlens_ptr, seq)
    else:
        entry = tl.load(schedule_ptr + 2 * seq)
        row += tl.maximum(tl.load(schedule_ptr + 2 * seq + 1), 0) * SCHEDULE_TILE
        seq = tl.maximum(entry, 0)
        first, length = span(cu_seqlens_ptr, seq)
        length = tl.where(entry < 0, 0, length)
    return seq, head, row, first, tl.where(row < length, length, 0)


@triton.jit
def filler():
    """The number of this program among the FILLERS, negative for one that has a tile."""
    return tl.program_id(0) - (tl.num_programs(0) - FILLERS)


@triton.jit
def fill_outside(ptr, value, row_size, cu_seqlens_ptr, num_sequences, num_tokens):
    """A filler's share of the elements of [T, row_size] in rows before the first sequence and after the last."""
    offset = tl.arange(0, 1024).to(tl.int64)
    value = tl.full([1024], value, ptr.dtype.element_ty)
    share, row_size = filler().to(tl.int64) * 1024, tl.cast(row_size, tl.int64)
    begin, end = tl.load(cu_seqlens_ptr) * row_size, num_tokens * row_size
    for i in range(share, begin, FILLERS * 1024):
        tl.store(ptr + i + offset, value, mask=i + offset < begin)
    for i in range(tl.load(cu_seqlens_ptr + num_sequences) * row_size + share, end, FILLERS * 1024):
        tl.store(ptr + i + offset, value, mask=i + offset < end)


@triton.jit
def fill_outputs(
    out_ptr, lse_ptr, cu_seqlens_ptr, num_tokens, num_heads, num_sequences, terms, HEAD_SIZE: tl.constexpr
):  # fmt: skip
    """A filler's share of what forward writes: zeros, and a log-sum-exp of -inf."""
    fill_outside(out_ptr, 0.0, num_heads * HEAD_SIZE, cu_seqlens_ptr, num_sequences, num_tokens)
    for plane in range(num_heads if terms.bias_ptr is None else 2 * num_heads):
        lse = lse_ptr + tl.cast(plane, tl.int64) * num_tokens
        fill_outside(lse, float("-inf"), 1, cu_seqlens_ptr, num_sequences, num_tokens)


@triton.jit
def heads_of_gradients(num_heads, GROUP: tl.constexpr):
    """Of a token in the buffer of the gradients [T, H + 2 H_kv, d]: dq, dk, dv, where a K/V head has GROUP queries'."""
    return num_heads // GROUP * (GROUP + 2)


@triton.jit
def pointers(ptr, strides, token, head, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses [ROWS, BLOCK_D] of one head, from `token` (int64) on."""
    row = tl.arange(0, ROWS).to(tl.int64)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    tile = ptr + token * strides[0] + head.to(tl.int64) * strides[1]
    return tile + row[:, None] * strides[0] + dim[None, :] * strides[2]


@triton.jit
def load_tile(ptr, strides, token, head, in_tile):
    """One head's elements from `token` (int64) on, zero where they do not exist: the shape of in_tile."""
    return tl.load(pointers(ptr, strides, token, head, in_tile.shape[0], in_tile.shape[1]), mask=in_tile, other=0.0)


@triton.jit
def inside(row, length, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile exist: bool [ROWS, BLOCK_D]."""
    return (row < length)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]


@triton.jit
def slope_of(terms, head):
    """This head's ALiBi slope over the scale, or 0."""
    if terms.slopes_ptr is None:
        return 0.0
    else:
        return tl.load(terms.slopes_ptr + head) / terms.scale


@triton.jit
def unit(terms):
    """By what `logits` are to be multiplied, to be of base 2."""
    if terms.bias_ptr is None:
        return base2(terms.scale)
    else:
        return 1.0


@triton.jit
def logits(products, terms, slope, seq, head, row, col, length, MASKED: tl.constexpr):
    """Logits divided by the scale: the multiplication by `unit` then merges into exp2's subtraction. With a bias they
    are of base 2: a bias of the dtype's minimum over the scale would be infinite.

    Args:
        slope: of `slope_of`.
        row, col: int32 queries and keys that broadcast to the tile of products, in either orientation.
        MASKED: give keys past the end, or outside the band, -inf.
    """
    if terms.slopes_ptr is not None:
        products -= slope * tl.abs(col - row).to(tl.float32)
    if terms.bias_ptr is not None:
        bias = terms.bias_ptr + seq.to(tl.int64) * terms.bias_strides[0] + head.to(tl.int64) * terms.bias_strides[1]
        bias += row.to(tl.int64) * terms.bias_strides[2] + col.to(tl.int64) * terms.bias_strides[3]
        bias = tl.load(bias, mask=(row < length) & (col < length), other=0.0).to(tl.float32)
        # finite in base 2 too; -inf is left, which hides a key
        bias = tl.where(bias == float("-inf"), bias, tl.minimum(tl.maximum(bias, -1e38), 1e38))
        products = products * base2(terms.scale) + base2(bias)
    if MASKED:
        seen = col < length
        if terms.band is not None:
            seen = seen & (col - row >= -terms.band[0]) & (col - row <= terms.band[1])
        products = tl.where(seen, products, float("-inf"))
    return products


@triton.jit
def store_lse(ptr, statistics, num_tokens, num_heads, peak, total, in_rows, terms):
    """The log-sum-exp of rows in base 2; with a bias its two summands in two planes, because next to a peak of -1e9 the
    other is lost."""
    total = tl.log2(tl.where(total == 0.0, 1.0, total))
    if terms.bias_ptr is None:
        tl.store(ptr + statistics, peak + total, mask=in_rows)
    else:
        tl.store(ptr + statistics, peak, mask=in_rows)
        tl.store(ptr + num_heads.to(tl.int64) * num_tokens + statistics, total, mask=in_rows)


@triton.jit
def load_lse(ptr, statistics, num_tokens, num_heads, in_rows, terms):
    """The two summands that `store_lse` wrote, the second 0 where it is in the first.

    Rows that do not exist, or see no key, get inf: their probabilities are exp2(x - inf) = 0.
    """
    peak = tl.load(ptr + statistics, mask=in_rows, other=float("inf"))
    peak = tl.where(peak == float("-inf"), float("inf"), peak)
    if terms.bias_ptr is None:
        return peak, tl.zeros_like(peak)
    else:
        plane = num_heads.to(tl.int64) * num_tokens
        return peak, tl.load(ptr + plane + statistics, mask=in_rows, other=0.0)


@triton.jit
def keep_tile(dropout, seq, head, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`philox.attention_keep` on a tile: bool [ROWS, COLS] from `row` and from `col`, a multiple of 16, on."""
    seq_id = seq.to(tl.int64)
    if dropout.seq_ids_ptr is not None:
        seq_id = tl.load(dropout.seq_ids_ptr + seq)
    group = (head << HEAD_SHIFT) + col // 16 + tl.arange(0, COLS // 16)
    rows = (row + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    low, high = (seq_id & 0xFFFFFFFF).to(tl.uint32), ((seq_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox_tile(tl.load(dropout.seed_ptr), group.to(tl.uint32)[None, :], rows, low, high)
    # bits of words 0 and 2, and of 1 and 3, in one word that changes threads: byte b of word w as bit 8 b + 7 - w // 2.
    # in a tile of matrix instructions they belong to one thread each: the join keeps the compiler from drawing all four
    # words in every thread that needs some of their bits
    even = bytes_at_least(w0, dropout.threshold) | bytes_at_least(w2, dropout.threshold) >> 1
    odd = bytes_at_least(w1, dropout.threshold) | bytes_at_least(w3, dropout.threshold) >> 1
    half, byte = tl.arange(0, 2), tl.arange(0, 4)
    bit = (1 << (byte[None, :] * 8 + 7 - half[:, None])).to(tl.uint32)[None, None, :, None, :]
    kept = tl.join(even, odd).reshape(ROWS, COLS // 16, 1, 2, 1)
    return (kept & bit != 0).reshape(ROWS, COLS)


@triton.jit
def keep_scale(dropout):
    """1 / the exact kept fraction."""
    return 256.0 / (256 - dropout.threshold)
