"""Attention over sequences of at most 128 tokens (BERT's first phase): one program a (sequence, head).

The whole map of a head is one tile, so forward takes the softmax in a single pass, and backward is one kernel with five
products instead of two kernels with seven. It reads q, k, v and dout once (7 activation rows are moved, not 8): delta
is rowsum(P ⊙ dP), which equals rowsum(dout ⊙ out) and is the more exact, since its rounding cancels that of dP. As in
the long form, S and dP are formed as [keys, queries], because on Hopper a transposed result of a product must not be an
operand; dq therefore comes out of kᵀ · dSᵀ as [d, queries] and is stored through transposed addresses.

Where heads of q share K/V heads, forward runs here and backward in the long form: the sums of dk and dv over a group
would stay in registers beside two whole maps.
"""

from ._triton import tl
from .attention_tile import (
    VARYING_BATCH,
    base2,
    fill_outputs,
    fill_outside,
    filler,
    inside,
    keep_scale,
    keep_tile,
    load_lse,
    load_tile,
    logits,
    pointers,
    slope_of,
    span,
    store_lse,
    unit,
)
from .jit import kernel


@kernel(varying=VARYING_BATCH)
def _attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # [T, H, d], [T, H // GROUP, d] twice
    out_ptr, lse_ptr,  # [T, H, d] contiguous, [1 or, with a bias, 2, H, T] fp32
    cu_seqlens_ptr,  # [B + 1]
    q_strides, k_strides, v_strides,  # of (token, head, dim)
    num_tokens, num_heads, num_sequences, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if filler() >= 0:
        fill_outputs(out_ptr, lse_ptr, cu_seqlens_ptr, num_tokens, num_heads, num_sequences, terms, HEAD_SIZE)
        return
    seq, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first, length = span(cu_seqlens_ptr, seq)
    if length == 0:
        return
    row = tl.arange(0, BLOCK_S)
    in_tile = inside(row, length, HEAD_SIZE, BLOCK_D)
    if dropout.seed_ptr is not None:
        keep = keep_tile(dropout, seq, head, 0, 0, BLOCK_S, BLOCK_S)
    q = load_tile(q_ptr, q_strides, first, head, in_tile)
    k = load_tile(k_ptr, k_strides, first, head // GROUP, in_tile)
    v = load_tile(v_ptr, v_strides, first, head // GROUP, in_tile)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    slope = slope_of(terms, head)
    scores = logits(scores, terms, slope, seq, head, row[:, None], row[None, :], length, True)
    peak = tl.max(scores, 1) * unit(terms)
    # a row that sees no key: exp2(-inf - 0) is 0 where exp2(-inf + inf) is not a number
    probs = tl.exp2(scores * unit(terms) - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    total = tl.sum(probs, 1)
    if dropout.seed_ptr is not None:
        probs = tl.where(keep, probs, dropout.zero)
    out = tl.dot(probs.to(v.dtype), v, input_precision="ieee") / tl.where(total == 0.0, 1.0, total)[:, None]
    if dropout.seed_ptr is not None:
        out *= keep_scale(dropout)
    out_tile = pointers(out_ptr, (num_heads * HEAD_SIZE, HEAD_SIZE, 1), first, head, BLOCK_S, BLOCK_D)
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=in_tile)
    statistics = head.to(tl.int64) * num_tokens + first + row
    store_lse(lse_ptr, statistics, num_tokens, num_heads, peak, total, row < length, terms)


@kernel(varying=VARYING_BATCH)
def _attention_short_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dlse_ptr,  # the last [H, T] fp32, of lse in base 2, or None
    grads_ptr, delta_ptr,  # [T, 3, H, d] contiguous: dq, dk, dv; [H, T] fp32, or None where nobody reads it
    cu_seqlens_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_sequences, terms, dropout,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    if filler() >= 0:
        fill_outside(grads_ptr, 0.0, 3 * num_heads * HEAD_SIZE, cu_seqlens_ptr, num_sequences, num_tokens)
        return
    seq, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first, length = span(cu_seqlens_ptr, seq)
    if length == 0:
        return
    row = tl.arange(0, BLOCK_S)
    in_rows, in_tile = row < length, inside(row, length, HEAD_SIZE, BLOCK_D)
    strides = (3 * num_heads * HEAD_SIZE, HEAD_SIZE, 1)
    dq_tile = pointers(grads_ptr, strides, first, head, BLOCK_S, BLOCK_D)
    dk_tile = dq_tile + num_heads * HEAD_SIZE
    dout = load_tile(dout_ptr, dout_strides, first, head, in_tile)
    statistics = head.to(tl.int64) * num_tokens + first + row
    q = load_tile(q_ptr, q_strides, first, head, in_tile)
    k = load_tile(k_ptr, k_strides, first, head, in_tile)
    v = load_tile(v_ptr, v_strides, first, head, in_tile)

    # both [keys, queries]
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    slope = slope_of(terms, head)
    scores = logits(scores, terms, slope, seq, head, row[None, :], row[:, None], length, True)
    peak, rest = load_lse(lse_ptr, statistics, num_tokens, num_heads, in_rows, terms)
    probs = tl.exp2(scores * unit(terms) - peak[None, :] - rest[None, :])
    # the sum is 1 but for the rounding of lse, which all of a row shares
    total = tl.sum(probs, 0)
    probs *= (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]
    if dropout.seed_ptr is not None:
        # the sign carries the mask to its second use in no register
        probs = tl.where(tl.trans(keep_tile(dropout, seq, head, 0, 0, BLOCK_S, BLOCK_S)), probs, -probs)
    dropped = tl.where(probs < 0.0, 0.0, probs)
    dv = tl.dot(dropped.to(dout.dtype), dout, input_precision="ieee")
    if dropout.seed_ptr is not None:
        dv *= keep_scale(dropout)
    tl.store(dk_tile + num_heads * HEAD_SIZE, dv.to(v.dtype), mask=in_tile)
    dprobs = tl.dot(v, tl.trans(dout), input_precision="ieee")
    if dropout.seed_ptr is not None:
        dprobs = tl.where(probs < 0.0, 0.0, dprobs * keep_scale(dropout))
        probs = tl.abs(probs)
    delta = tl.sum(probs * dprobs, 0)
    if dlse_ptr is not None:
        delta -= base2(tl.load(dlse_ptr + statistics, mask=in_rows, other=0.0))
    if delta_ptr is not None:
        tl.store(delta_ptr + statistics, delta, mask=in_rows)
    dscores = (probs * (dprobs - delta[None, :])).to(q.dtype)
    dk = tl.dot(dscores, q, input_precision="ieee") * terms.scale
    tl.store(dk_tile, dk.to(k.dtype), mask=in_tile)
    dq = tl.dot(tl.trans(k), dscores, input_precision="ieee") * terms.scale  # [d, queries]
    tl.store(tl.trans(dq_tile), dq.to(q.dtype), mask=tl.trans(in_tile))
