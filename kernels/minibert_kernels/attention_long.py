"""Attention over sequences of any length, tile by tile; and the gradient of the score bias, for both forms.

Forward keeps a running maximum and sum of each row while it walks over the keys (Milakov and Gimelshein, 2018; Dao et
al., 2022). Backward is two kernels, one over query tiles for dq and delta = rowsum(dout ⊙ out), one over key tiles for
dk and dv: no atomics, and the same call gives the same bits. The second forms its scores as k qᵀ, [keys, queries],
because on Hopper a transposed result of a product must not be an operand. Where GROUP heads of q share a K/V head, one
loop goes through the queries of head after head, and not a loop through tiles within one through heads: ptxas
serialises Hopper's matrix products where two loops share an accumulator.

A program has a tile of a head, in the order of a schedule or of the sequences.
"""

from ._triton import tl, triton
from .attention_tile import (
    VARYING_BATCH,
    base2,
    fill_outputs,
    fill_outside,
    filler,
    heads_of_gradients,
    inside,
    keep_scale,
    keep_tile,
    load_lse,
    load_tile,
    locate,
    logits,
    pointers,
    slope_of,
    span,
    store_lse,
    unit,
)
from .jit import kernel


@triton.jit
def _keys_of(m0, length, band, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the first and the last tile of keys begin that a tile of queries sees; there is one."""
    begin, end = 0, length
    if band is not None:
        begin = tl.maximum(m0 - band[0], 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(m0 + BLOCK_M + band[1], length)
    return begin, (end - 1) // BLOCK_N * BLOCK_N


@triton.jit
def _add_keys(
    n0, peak, total, acc, q, k_tile, v_tile, k_strides, v_strides, seq, head, m0, first, length, slope, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and output of BLOCK_M queries with BLOCK_N keys more."""
    row, col = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    in_keys = inside(col, length, HEAD_SIZE, BLOCK_D)
    if dropout.seed_ptr is not None:
        keep = keep_tile(dropout, seq, head, m0, n0, BLOCK_M, BLOCK_N)
    k = tl.load(k_tile + (first + n0) * k_strides[0], mask=in_keys, other=0.0)
    v = tl.load(v_tile + (first + n0) * v_strides[0], mask=in_keys, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = logits(scores, terms, slope, seq, head, row[:, None], col[None, :], length, MASKED)
    new_peak = tl.maximum(peak, tl.max(scores, 1) * unit(terms))
    # a row that has seen no key yet: exp2(-inf - 0) is 0 where exp2(-inf + inf) is not a number
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    probs = tl.exp2(scores * unit(terms) - shift[:, None])
    shrink = tl.exp2(peak - shift)
    total = total * shrink + tl.sum(probs, 1)
    if dropout.seed_ptr is not None:
        probs = tl.where(keep, probs, dropout.zero)
    return new_peak, total, tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")


@kernel(varying=VARYING_BATCH)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # [T, H, d], [T, H // GROUP, d] twice
    out_ptr, lse_ptr,  # [T, H, d] contiguous, [1 or, with a bias, 2, H, T] fp32
    cu_seqlens_ptr, schedule_ptr,  # [B + 1], [T // 128 + B, 2] or None
    q_strides, k_strides, v_strides,  # of (token, head, dim)
    num_tokens, num_heads, num_tiles, num_sequences, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    if filler() >= 0:
        fill_outputs(out_ptr, lse_ptr, cu_seqlens_ptr, num_tokens, num_heads, num_sequences, terms, HEAD_SIZE)
        return
    seq, head, m0, first, length = locate(cu_seqlens_ptr, schedule_ptr, num_heads, num_tiles, BLOCK_M)
    if length == 0:
        return
    row = m0 + tl.arange(0, BLOCK_M)
    in_tile = inside(row, length, HEAD_SIZE, BLOCK_D)
    q = load_tile(q_ptr, q_strides, first + m0, head, in_tile)
    k_tile = pointers(k_ptr, k_strides, 0, head // GROUP, BLOCK_N, BLOCK_D)
    v_tile = pointers(v_ptr, v_strides, 0, head // GROUP, BLOCK_N, BLOCK_D)
    slope = slope_of(terms, head)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, last = _keys_of(m0, length, terms.band, BLOCK_M, BLOCK_N)
    if APART:
        peak, total, acc = _add_keys(
            last, peak, total, acc, q, k_tile, v_tile, k_strides, v_strides, seq, head, m0, first, length, slope, terms,
            dropout, HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, MASKED=True,
        )  # fmt: skip
    for n0 in range(begin, last if APART else last + BLOCK_N, BLOCK_N):
        peak, total, acc = _add_keys(
            n0, peak, total, acc, q, k_tile, v_tile, k_strides, v_strides, seq, head, m0, first, length, slope, terms,
            dropout, HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, MASKED=terms.band is not None or not APART,
        )  # fmt: skip
    if dropout.seed_ptr is not None:
        acc *= keep_scale(dropout)
    out_tile = pointers(out_ptr, (num_heads * HEAD_SIZE, HEAD_SIZE, 1), first + m0, head, BLOCK_M, BLOCK_D)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=in_tile)
    statistics = head.to(tl.int64) * num_tokens + first + row
    store_lse(lse_ptr, statistics, num_tokens, num_heads, peak, total, row < length, terms)


@triton.jit
def _add_to_dq(
    n0, dq, q, dout, peak, rest, delta, k_tile, v_tile, k_strides, v_strides, seq, head, m0, first, length, slope,
    terms, dropout, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M queries with that through BLOCK_N keys more."""
    row, col = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    in_keys = inside(col, length, HEAD_SIZE, BLOCK_D)
    if dropout.seed_ptr is not None:
        keep = keep_tile(dropout, seq, head, m0, n0, BLOCK_M, BLOCK_N)
    k = tl.load(k_tile + (first + n0) * k_strides[0], mask=in_keys, other=0.0)
    v = tl.load(v_tile + (first + n0) * v_strides[0], mask=in_keys, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    dprobs = tl.dot(dout, tl.trans(v), input_precision="ieee")
    scores = logits(scores, terms, slope, seq, head, row[:, None], col[None, :], length, MASKED)
    probs = tl.exp2(scores * unit(terms) - peak[:, None] - rest[:, None])
    if dropout.seed_ptr is not None:
        ddropped = tl.where(keep, dprobs * keep_scale(dropout) - delta[:, None], -delta[:, None])
    else:
        ddropped = dprobs - delta[:, None]
    return tl.dot((probs * ddropped).to(k.dtype), k, dq, input_precision="ieee")


@kernel(varying=VARYING_BATCH)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr,  # the last [H, T] fp32, of lse in base 2, or None
    grads_ptr, delta_ptr,  # [T, H + 2 H // GROUP, d] contiguous: dq, dk, dv; [H, T] fp32
    cu_seqlens_ptr, schedule_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_tiles, num_sequences, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    if filler() >= 0:
        row_size = heads_of_gradients(num_heads, GROUP) * HEAD_SIZE
        fill_outside(grads_ptr, 0.0, row_size, cu_seqlens_ptr, num_sequences, num_tokens)
        return
    seq, head, m0, first, length = locate(cu_seqlens_ptr, schedule_ptr, num_heads, num_tiles, BLOCK_M)
    if length == 0:
        return
    strides = (num_heads * HEAD_SIZE, HEAD_SIZE, 1)
    row = m0 + tl.arange(0, BLOCK_M)
    in_rows, in_tile = row < length, inside(row, length, HEAD_SIZE, BLOCK_D)
    own = first + m0
    out = load_tile(out_ptr, strides, own, head, in_tile)
    dout = load_tile(dout_ptr, dout_strides, own, head, in_tile)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    statistics = head.to(tl.int64) * num_tokens + first + row
    if dlse_ptr is not None:
        delta -= base2(tl.load(dlse_ptr + statistics, mask=in_rows, other=0.0))
    tl.store(delta_ptr + statistics, delta, mask=in_rows)
    peak, rest = load_lse(lse_ptr, statistics, num_tokens, num_heads, in_rows, terms)
    q = load_tile(q_ptr, q_strides, own, head, in_tile)
    k_tile = pointers(k_ptr, k_strides, 0, head // GROUP, BLOCK_N, BLOCK_D)
    v_tile = pointers(v_ptr, v_strides, 0, head // GROUP, BLOCK_N, BLOCK_D)
    slope = slope_of(terms, head)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, last = _keys_of(m0, length, terms.band, BLOCK_M, BLOCK_N)
    if APART:
        dq = _add_to_dq(
            last, dq, q, dout, peak, rest, delta, k_tile, v_tile, k_strides, v_strides, seq, head, m0, first, length,
            slope, terms, dropout, HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, MASKED=True,
        )  # fmt: skip
    for n0 in range(begin, last if APART else last + BLOCK_N, BLOCK_N):
        dq = _add_to_dq(
            n0, dq, q, dout, peak, rest, delta, k_tile, v_tile, k_strides, v_strides, seq, head, m0, first, length,
            slope, terms, dropout, HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, MASKED=terms.band is not None or not APART,
        )  # fmt: skip
    grads_strides = (heads_of_gradients(num_heads, GROUP) * HEAD_SIZE, HEAD_SIZE, 1)
    dq_tile = pointers(grads_ptr, grads_strides, own, head, BLOCK_M, BLOCK_D)
    tl.store(dq_tile, (dq * terms.scale).to(grads_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _add_to_dkdv(
    m0, member, dk, dv, k, v, lse_ptr, delta_ptr, q_tile, dout_tile, q_strides, dout_strides, num_tokens, num_heads,
    seq, head, n0, first, length, slope, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values with those through BLOCK_M queries more, of a member of their group.

    head, slope, q_tile and dout_tile are those of the group's first member. The way to a member is added to a scalar:
    to tiles of pointers it would take their registers.
    """
    BLOCK_N: tl.constexpr = k.shape[0]
    BLOCK_D: tl.constexpr = k.shape[1]
    if GROUP > 1:
        head += member
        slope = slope_of(terms, head)
    row, col = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    in_rows, in_queries = row < length, inside(row, length, HEAD_SIZE, BLOCK_D)
    if dropout.seed_ptr is not None:
        keep = tl.trans(keep_tile(dropout, seq, head, m0, n0, BLOCK_M, BLOCK_N))
    place = (first + m0) * q_strides[0]
    if GROUP > 1:
        place += tl.cast(member, tl.int64) * q_strides[1]
    q = tl.load(q_tile + place, mask=in_queries, other=0.0)
    place = (first + m0) * dout_strides[0]
    if GROUP > 1:
        place += tl.cast(member, tl.int64) * dout_strides[1]
    dout = tl.load(dout_tile + place, mask=in_queries, other=0.0)
    statistics = head.to(tl.int64) * num_tokens + first + row
    peak, rest = load_lse(lse_ptr, statistics, num_tokens, num_heads, in_rows, terms)
    delta = tl.load(delta_ptr + statistics, mask=in_rows, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    # a key past the end has a row of its own here, which is not stored
    scores = logits(scores, terms, slope, seq, head, row[None, :], col[:, None], length, MASKED=terms.band is not None)
    probs = tl.exp2(scores * unit(terms) - peak[None, :] - rest[None, :])
    dprobs = tl.dot(v, tl.trans(dout), input_precision="ieee")
    if dropout.seed_ptr is not None:
        dscores = probs * tl.where(keep, dprobs * keep_scale(dropout) - delta[None, :], -delta[None, :])
        probs = tl.where(keep, probs, dropout.zero)
    else:
        dscores = probs * (dprobs - delta[None, :])
    dv = tl.dot(probs.to(dout.dtype), dout, dv, input_precision="ieee")
    return tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee"), dv


@kernel(varying=VARYING_BATCH)
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    grads_ptr,  # [T, H + 2 H // GROUP, d] contiguous: dq, dk, dv
    cu_seqlens_ptr, schedule_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_tiles, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """A program a tile of a K/V head: it goes through the queries of all GROUP heads that share it, in their order."""
    num_kv_heads = num_heads // GROUP
    seq, kv_head, n0, first, length = locate(cu_seqlens_ptr, schedule_ptr, num_kv_heads, num_tiles, BLOCK_N)
    if length == 0:
        return
    col = n0 + tl.arange(0, BLOCK_N)
    in_tile = inside(col, length, HEAD_SIZE, BLOCK_D)
    own = first + n0
    k = load_tile(k_ptr, k_strides, own, kv_head, in_tile)
    v = load_tile(v_ptr, v_strides, own, kv_head, in_tile)
    head = kv_head * GROUP
    q_tile = pointers(q_ptr, q_strides, 0, head, BLOCK_M, BLOCK_D)
    dout_tile = pointers(dout_ptr, dout_strides, 0, head, BLOCK_M, BLOCK_D)
    slope = slope_of(terms, head)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, end = 0, length
    if terms.band is not None:
        begin = tl.maximum(n0 - terms.band[1], 0) // BLOCK_M * BLOCK_M
        end = tl.minimum(n0 + BLOCK_N + terms.band[0], length)
    last = (end - 1) // BLOCK_M * BLOCK_M
    span = last + BLOCK_M - begin  # of a member's tiles: those of the group are numbered one member after another
    end = last + (GROUP - 1) * span
    if APART:
        dk, dv = _add_to_dkdv(
            last, GROUP - 1, dk, dv, k, v, lse_ptr, delta_ptr, q_tile, dout_tile, q_strides, dout_strides, num_tokens,
            num_heads, seq, head, n0, first, length, slope, terms, dropout, HEAD_SIZE, BLOCK_M, GROUP,
        )  # fmt: skip
    m0, member = begin, 0
    for place in range(begin, end if APART else end + BLOCK_M, BLOCK_M):
        if GROUP == 1:
            m0 = place
        dk, dv = _add_to_dkdv(
            m0, member, dk, dv, k, v, lse_ptr, delta_ptr, q_tile, dout_tile, q_strides, dout_strides,
            num_tokens, num_heads, seq, head, n0, first, length, slope, terms, dropout, HEAD_SIZE, BLOCK_M, GROUP,
        )  # fmt: skip
        if GROUP > 1:
            member = tl.where(m0 == last, member + 1, member)
            m0 = tl.where(m0 == last, begin, m0 + BLOCK_M)
    if dropout.seed_ptr is not None:
        dv *= keep_scale(dropout)
    strides = (heads_of_gradients(num_heads, GROUP) * HEAD_SIZE, HEAD_SIZE, 1)
    dk_tile = pointers(grads_ptr + num_heads * HEAD_SIZE, strides, own, kv_head, BLOCK_N, BLOCK_D)
    tl.store(dk_tile, (dk * terms.scale).to(k.dtype), mask=in_tile)
    tl.store(dk_tile + num_kv_heads * HEAD_SIZE, dv.to(v.dtype), mask=in_tile)


@kernel(varying=VARYING_BATCH)
def _attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    dbias_ptr,  # [bias_batches, bias_heads, S, S] contiguous
    cu_seqlens_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_sequences, bias_batches, bias_heads, max_seqlen, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program a tile of the bias: it sums dS over the sequences and heads that share the tile, in their order."""
    n_tiles, m_tiles = tl.cdiv(max_seqlen, BLOCK_N), tl.cdiv(max_seqlen, BLOCK_M)
    plane = tl.program_id(0) // n_tiles // m_tiles  # of [bias_batches, bias_heads]
    m0, n0 = tl.program_id(0) // n_tiles % m_tiles * BLOCK_M, tl.program_id(0) % n_tiles * BLOCK_N
    row, col = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # of either one or all, because the numbers of a bias are 1 or those of q
    heads = num_heads // bias_heads
    for shared in range(num_sequences // bias_batches * heads):
        seq, head = plane // bias_heads + shared // heads, plane % bias_heads + shared % heads
        first, length = span(cu_seqlens_ptr, seq)
        if tl.maximum(m0, n0) < length:
            in_queries, in_keys = inside(row, length, HEAD_SIZE, BLOCK_D), inside(col, length, HEAD_SIZE, BLOCK_D)
            q = load_tile(q_ptr, q_strides, first + m0, head, in_queries)
            k = load_tile(k_ptr, k_strides, first + n0, head // GROUP, in_keys)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = logits(
                scores, terms, slope_of(terms, head), seq, head, row[:, None], col[None, :], length, MASKED=True
            )
            statistics = head.to(tl.int64) * num_tokens + first + row
            peak, rest = load_lse(lse_ptr, statistics, num_tokens, num_heads, row < length, terms)
            delta = tl.load(delta_ptr + statistics, mask=row < length, other=0.0)
            probs = tl.exp2(scores * unit(terms) - peak[:, None] - rest[:, None])
            v = load_tile(v_ptr, v_strides, first + n0, head // GROUP, in_keys)
            dout = pointers(dout_ptr, dout_strides, first + m0, head, BLOCK_M, BLOCK_D)
            dprobs = tl.dot(tl.load(dout, mask=in_queries, other=0.0), tl.trans(v), input_precision="ieee")
            if dropout.seed_ptr is not None:
                keep = keep_tile(dropout, seq, head, m0, n0, BLOCK_M, BLOCK_N)
                dprobs = tl.where(keep, dprobs * keep_scale(dropout), 0.0)
            dbias += probs * (dprobs - delta[:, None])
    dbias_tile = dbias_ptr + (plane.to(tl.int64) * max_seqlen + row[:, None]) * max_seqlen + col[None, :]
    tl.store(dbias_tile, dbias.to(dbias_ptr.dtype.element_ty), mask=(row < max_seqlen)[:, None] & (col < max_seqlen))
