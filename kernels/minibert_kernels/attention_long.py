"""Attention over sequences of any length, tile by tile; and the gradient of the score bias, for both forms.

Forward keeps a running maximum and sum of each row while it walks over the keys (Milakov and Gimelshein, 2018; Dao et
al., 2022). Backward is two kernels, one over query tiles for dq and delta = rowsum(dout ⊙ out), one over key tiles for
dk and dv: no atomics, and the same call gives the same bits. The second forms its scores as k qᵀ, [keys, queries],
because on Hopper a transposed result of a product must not be an operand.

A piece of work is a tile of a head, counted in the order of a schedule or of the sequences. A program has one, or,
where num_work is given, walks over them all in steps of the grid.
"""

from ._triton import tl, triton
from .attention_tile import (
    base2,
    inside,
    keep_scale,
    keep_tile,
    load_lse,
    locate,
    logits_over_scale,
    pointers,
    slope_of,
    span,
)


@triton.jit
def _share(num_work):
    """This program's pieces of work, as range() takes them: all in steps of the grid, or its own alone."""
    if num_work is None:
        return tl.program_id(0), tl.program_id(0) + 1, 1  # a single step, and so the compiler leaves no loop
    else:
        return tl.program_id(0), num_work, tl.num_programs(0)


@triton.jit
def _keys_of(m0, length, band, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the keys of a query tile begin, from where on they need a mask, and where they end."""
    begin, masked, end = 0, length // BLOCK_N * BLOCK_N, length
    if band is not None:
        begin = tl.maximum(m0 - band[0], 0) // BLOCK_N * BLOCK_N
        masked, end = begin, tl.minimum(m0 + BLOCK_M + band[1], length)
    return begin, masked, end


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # [T, H, d]
    out_ptr, lse_ptr,  # [T, H, d] contiguous, [H, T] fp32
    cu_seqlens_ptr, schedule_ptr,  # [B + 1], [T // 128 + B, 2] or None
    q_strides, k_strides, v_strides,  # of (token, head, dim)
    num_tokens, num_heads, num_tiles, num_work, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    scale2 = base2(terms.scale)
    begin_work, end_work, programs = _share(num_work)
    for work in range(begin_work, end_work, programs):
        seq, head, m0, first, length = locate(work, cu_seqlens_ptr, schedule_ptr, num_heads, num_tiles, BLOCK_M)
        row = m0 + tl.arange(0, BLOCK_M)
        in_tile = inside(row, length, HEAD_SIZE, BLOCK_D)
        q = tl.load(pointers(q_ptr, q_strides, first + m0, head, BLOCK_M, BLOCK_D), mask=in_tile, other=0.0)
        k_tile = pointers(k_ptr, k_strides, 0, head, BLOCK_N, BLOCK_D)
        v_tile = pointers(v_ptr, v_strides, 0, head, BLOCK_N, BLOCK_D)
        slope = slope_of(terms, head)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        begin, masked, end = _keys_of(m0, length, terms.band, BLOCK_M, BLOCK_N)
        # whole tiles of keys first, then the one that needs a mask
        for last in tl.static_range(2):
            for n0 in range(masked if last else begin, end if last else masked, BLOCK_N):
                col = n0 + tl.arange(0, BLOCK_N)
                in_keys = inside(col, length, HEAD_SIZE, BLOCK_D)
                k = tl.load(k_tile + (first + n0) * k_strides[0], mask=in_keys, other=0.0)
                v = tl.load(v_tile + (first + n0) * v_strides[0], mask=in_keys, other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee")
                scores = logits_over_scale(
                    scores, terms, slope, seq, head, row[:, None], col[None, :], length, MASKED=last
                )
                new_peak = tl.maximum(peak, tl.max(scores, 1) * scale2)
                # a row that has seen no key yet: exp2(-inf - 0) is 0 where exp2(-inf + inf) is not a number
                shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                probs = tl.exp2(scores * scale2 - shift[:, None])
                shrink = tl.exp2(peak - shift)
                total = total * shrink + tl.sum(probs, 1)
                if dropout.seed_ptr is not None:
                    probs = tl.where(keep_tile(dropout, seq, head, m0, n0, BLOCK_M, BLOCK_N), probs, 0.0)
                acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
                peak = new_peak
        if dropout.seed_ptr is not None:
            acc *= keep_scale(dropout)
        total = tl.where(total == 0.0, 1.0, total)
        out_tile = pointers(out_ptr, (num_heads * HEAD_SIZE, HEAD_SIZE, 1), first + m0, head, BLOCK_M, BLOCK_D)
        tl.store(out_tile, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)
        tl.store(lse_ptr + head.to(tl.int64) * num_tokens + first + row, peak + tl.log2(total), mask=row < length)


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr,  # the last [H, T] fp32, of lse in base 2, or None
    dq_ptr, delta_ptr,  # [T, H, d] contiguous, [H, T] fp32
    cu_seqlens_ptr, schedule_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_tiles, num_work, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    strides = (num_heads * HEAD_SIZE, HEAD_SIZE, 1)
    begin_work, end_work, programs = _share(num_work)
    for work in range(begin_work, end_work, programs):
        seq, head, m0, first, length = locate(work, cu_seqlens_ptr, schedule_ptr, num_heads, num_tiles, BLOCK_M)
        row = m0 + tl.arange(0, BLOCK_M)
        in_rows, in_tile = row < length, inside(row, length, HEAD_SIZE, BLOCK_D)
        own = first + m0
        out = tl.load(pointers(out_ptr, strides, own, head, BLOCK_M, BLOCK_D), mask=in_tile, other=0.0)
        dout = tl.load(pointers(dout_ptr, dout_strides, own, head, BLOCK_M, BLOCK_D), mask=in_tile, other=0.0)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        statistics = head.to(tl.int64) * num_tokens + first + row
        if dlse_ptr is not None:
            delta -= base2(tl.load(dlse_ptr + statistics, mask=in_rows, other=0.0))
        tl.store(delta_ptr + statistics, delta, mask=in_rows)
        lse = load_lse(lse_ptr + statistics, in_rows)
        q = tl.load(pointers(q_ptr, q_strides, own, head, BLOCK_M, BLOCK_D), mask=in_tile, other=0.0)
        k_tile = pointers(k_ptr, k_strides, 0, head, BLOCK_N, BLOCK_D)
        v_tile = pointers(v_ptr, v_strides, 0, head, BLOCK_N, BLOCK_D)
        slope = slope_of(terms, head)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        begin, masked, end = _keys_of(m0, length, terms.band, BLOCK_M, BLOCK_N)
        for last in tl.static_range(2):
            for n0 in range(masked if last else begin, end if last else masked, BLOCK_N):
                col = n0 + tl.arange(0, BLOCK_N)
                in_keys = inside(col, length, HEAD_SIZE, BLOCK_D)
                k = tl.load(k_tile + (first + n0) * k_strides[0], mask=in_keys, other=0.0)
                v = tl.load(v_tile + (first + n0) * v_strides[0], mask=in_keys, other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee")
                scores = logits_over_scale(
                    scores, terms, slope, seq, head, row[:, None], col[None, :], length, MASKED=last
                )
                probs = tl.exp2(scores * base2(terms.scale) - lse[:, None])
                dprobs = tl.dot(dout, tl.trans(v), input_precision="ieee")
                if dropout.seed_ptr is not None:
                    keep = keep_tile(dropout, seq, head, m0, n0, BLOCK_M, BLOCK_N)
                    dprobs = tl.where(keep, dprobs * keep_scale(dropout), 0.0)
                dscores = (probs * (dprobs - delta[:, None])).to(k.dtype)
                dq = tl.dot(dscores, k, dq, input_precision="ieee")
        dq_tile = pointers(dq_ptr, strides, own, head, BLOCK_M, BLOCK_D)
        tl.store(dq_tile, (dq * terms.scale).to(dq_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,  # [T, H, d] contiguous
    cu_seqlens_ptr, schedule_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_tiles, num_work, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin_work, end_work, programs = _share(num_work)
    for work in range(begin_work, end_work, programs):
        seq, head, n0, first, length = locate(work, cu_seqlens_ptr, schedule_ptr, num_heads, num_tiles, BLOCK_N)
        col = n0 + tl.arange(0, BLOCK_N)
        in_tile = inside(col, length, HEAD_SIZE, BLOCK_D)
        own = first + n0
        k = tl.load(pointers(k_ptr, k_strides, own, head, BLOCK_N, BLOCK_D), mask=in_tile, other=0.0)
        v = tl.load(pointers(v_ptr, v_strides, own, head, BLOCK_N, BLOCK_D), mask=in_tile, other=0.0)
        q_tile = pointers(q_ptr, q_strides, 0, head, BLOCK_M, BLOCK_D)
        dout_tile = pointers(dout_ptr, dout_strides, 0, head, BLOCK_M, BLOCK_D)
        statistics = head.to(tl.int64) * num_tokens + first
        slope = slope_of(terms, head)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        begin, end = 0, length
        if terms.band is not None:
            begin = tl.maximum(n0 - terms.band[1], 0) // BLOCK_M * BLOCK_M
            end = tl.minimum(n0 + BLOCK_N + terms.band[0], length)
        for m0 in range(begin, end, BLOCK_M):
            row = m0 + tl.arange(0, BLOCK_M)
            in_rows, in_queries = row < length, inside(row, length, HEAD_SIZE, BLOCK_D)
            q = tl.load(q_tile + (first + m0) * q_strides[0], mask=in_queries, other=0.0)
            dout = tl.load(dout_tile + (first + m0) * dout_strides[0], mask=in_queries, other=0.0)
            lse = load_lse(lse_ptr + statistics + row, in_rows)
            delta = tl.load(delta_ptr + statistics + row, mask=in_rows, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            # a key past the end has a row of its own here, which is not stored
            scores = logits_over_scale(
                scores, terms, slope, seq, head, row[None, :], col[:, None], length, MASKED=terms.band is not None
            )
            probs = tl.exp2(scores * base2(terms.scale) - lse[None, :])
            dprobs = tl.dot(v, tl.trans(dout), input_precision="ieee")
            dropped = probs
            if dropout.seed_ptr is not None:
                keep = tl.trans(keep_tile(dropout, seq, head, m0, n0, BLOCK_M, BLOCK_N))
                dprobs = tl.where(keep, dprobs * keep_scale(dropout), 0.0)
                dropped = tl.where(keep, probs, 0.0)
            dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision="ieee")
            dscores = (probs * (dprobs - delta[None, :])).to(q.dtype)
            dk = tl.dot(dscores, q, dk, input_precision="ieee")
        if dropout.seed_ptr is not None:
            dv *= keep_scale(dropout)
        strides = (num_heads * HEAD_SIZE, HEAD_SIZE, 1)
        tl.store(pointers(dk_ptr, strides, own, head, BLOCK_N, BLOCK_D), (dk * terms.scale).to(k.dtype), mask=in_tile)
        tl.store(pointers(dv_ptr, strides, own, head, BLOCK_N, BLOCK_D), dv.to(v.dtype), mask=in_tile)


@triton.jit
def _attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    dbias_ptr,  # [bias_batches, bias_heads, S, S] contiguous
    cu_seqlens_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_sequences, bias_batches, bias_heads, max_seqlen, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
            q = tl.load(pointers(q_ptr, q_strides, first + m0, head, BLOCK_M, BLOCK_D), mask=in_queries, other=0.0)
            k = tl.load(pointers(k_ptr, k_strides, first + n0, head, BLOCK_N, BLOCK_D), mask=in_keys, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = logits_over_scale(
                scores, terms, slope_of(terms, head), seq, head, row[:, None], col[None, :], length, MASKED=True
            )
            statistics = head.to(tl.int64) * num_tokens + first + row
            lse = load_lse(lse_ptr + statistics, row < length)
            delta = tl.load(delta_ptr + statistics, mask=row < length, other=0.0)
            probs = tl.exp2(scores * base2(terms.scale) - lse[:, None])
            v = tl.load(pointers(v_ptr, v_strides, first + n0, head, BLOCK_N, BLOCK_D), mask=in_keys, other=0.0)
            dout = pointers(dout_ptr, dout_strides, first + m0, head, BLOCK_M, BLOCK_D)
            dprobs = tl.dot(tl.load(dout, mask=in_queries, other=0.0), tl.trans(v), input_precision="ieee")
            if dropout.seed_ptr is not None:
                keep = keep_tile(dropout, seq, head, m0, n0, BLOCK_M, BLOCK_N)
                dprobs = tl.where(keep, dprobs * keep_scale(dropout), 0.0)
            dbias += probs * (dprobs - delta[:, None])
    dbias_tile = dbias_ptr + (plane.to(tl.int64) * max_seqlen + row[:, None]) * max_seqlen + col[None, :]
    tl.store(dbias_tile, dbias.to(dbias_ptr.dtype.element_ty), mask=(row < max_seqlen)[:, None] & (col < max_seqlen))
