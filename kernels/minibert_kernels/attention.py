"""Fused attention over packed sequences: softmax(q kᵀ · scale) ⊙ dropout · v, and its gradient.

The map [S, S] is never written: forward keeps a running maximum and sum of each row while it walks over the keys
(Milakov and Gimelshein, 2018; Dao et al., 2022), and saves q, k, v, the output and the row's log-sum-exp, in base 2 and
fp32. Backward recomputes the probabilities from them, and draws the dropout mask again from its counters.

In units of one activation row (T x H x d elements) forward moves 4: q, k, v in, the output out. Backward moves 8: q, k,
v, output, its gradient in, three gradients out; plus what its second kernel reads again. There are two, one over query
tiles for dq and delta = rowsum(dout ⊙ out), one over key tiles for dk and dv: no atomics, and the same call gives the
same bits. The second forms its scores as k qᵀ, [keys, queries], because on Hopper a transposed result of a product must
not be an operand.
"""

import torch

from . import reference
from ._triton import tl, triton
from .dispatch import use_triton
from .launch import FP_FUSION, AotCase, attention_plan, capability
from .philox import as_seed, philox_tile, threshold

MAX_HEAD_SIZE = 128


@triton.jit
def _locate(cu_seqlens_ptr, num_heads, num_tiles):
    """Sequence, head, tile, first token and length of this program; tiles of a head are neighbours (L2 cache)."""
    program = tl.program_id(0)
    tile = program % num_tiles
    head = program // num_tiles % num_heads
    seq = program // num_tiles // num_heads
    first = tl.load(cu_seqlens_ptr + seq)
    length = tl.load(cu_seqlens_ptr + seq + 1) - first
    return seq, head, tile, first.to(tl.int64), length


@triton.jit
def _pointers(ptr, strides, token, head, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses [ROWS, BLOCK_D] of one head, from `token` (int64) on."""
    row = tl.arange(0, ROWS).to(tl.int64)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    tile = ptr + token * strides[0] + head.to(tl.int64) * strides[1]
    return tile + row[:, None] * strides[0] + dim[None, :] * strides[2]


@triton.jit
def _inside(row, length, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile exist: bool [ROWS, BLOCK_D]."""
    return (row < length)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]


@triton.jit
def _keep_tile(seed_ptr, seq_ids_ptr, threshold, seq, head, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`philox.attention_keep` on a tile: bool [ROWS, COLS] from `row` and from `col`, a multiple of 16, on."""
    seq_id = seq.to(tl.int64)
    if seq_ids_ptr is not None:
        seq_id = tl.load(seq_ids_ptr + seq)
    group = (head << 22) + col // 16 + tl.arange(0, COLS // 16)  # 22 is philox.HEAD_SHIFT
    rows = (row + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    low, high = (seq_id & 0xFFFFFFFF).to(tl.uint32), ((seq_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox_tile(tl.load(seed_ptr), group.to(tl.uint32)[None, :], rows, low, high)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, COLS // 4, 1)
    drawn = (words >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]) & 0xFF
    return drawn.reshape(ROWS, COLS).to(tl.int32) >= threshold


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # [T, H, d]
    out_ptr, lse_ptr,  # [T, H, d] contiguous, [H, T] fp32
    cu_seqlens_ptr, seq_ids_ptr, seed_ptr,  # [B + 1], [B] or None, scalar or None
    q_strides, k_strides, v_strides,  # of (token, head, dim)
    num_tokens, num_heads, num_tiles,
    scale, threshold, band,  # threshold is None without dropout, band None or (keys to the left, keys to the right)
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    seq, head, tile, first, length = _locate(cu_seqlens_ptr, num_heads, num_tiles)
    m0 = tile * BLOCK_M
    if m0 >= length:
        return
    row = m0 + tl.arange(0, BLOCK_M)
    in_tile = _inside(row, length, HEAD_SIZE, BLOCK_D)
    q = tl.load(_pointers(q_ptr, q_strides, first + m0, head, BLOCK_M, BLOCK_D), mask=in_tile, other=0.0)
    k_tile = _pointers(k_ptr, k_strides, 0, head, BLOCK_N, BLOCK_D)
    v_tile = _pointers(v_ptr, v_strides, 0, head, BLOCK_N, BLOCK_D)
    scale2 = scale * 1.4426950408889634  # log2(e): exp(x * scale) = exp2(x * scale2)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, whole, end = 0, length // BLOCK_N * BLOCK_N, length
    if band is not None:
        begin = tl.maximum(m0 - band[0], 0) // BLOCK_N * BLOCK_N
        whole, end = begin, tl.minimum(m0 + BLOCK_M + band[1], length)
    # whole tiles of keys first, then the one that needs a mask
    for masked in tl.static_range(2):
        for n0 in range(whole if masked else begin, end if masked else whole, BLOCK_N):
            col = n0 + tl.arange(0, BLOCK_N)
            in_keys = _inside(col, length, HEAD_SIZE, BLOCK_D)
            k = tl.load(k_tile + (first + n0) * k_strides[0], mask=in_keys, other=0.0)
            v = tl.load(v_tile + (first + n0) * v_strides[0], mask=in_keys, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if masked:
                seen = (col < length)[None, :]
                if band is not None:
                    distance = col[None, :] - row[:, None]
                    seen = seen & (distance >= -band[0]) & (distance <= band[1])
                scores = tl.where(seen, scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1) * scale2)
            # a row that has seen no key yet: exp2(-inf - 0) is 0 where exp2(-inf + inf) is not a number
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            probs = tl.exp2(scores * scale2 - shift[:, None])
            shrink = tl.exp2(peak - shift)
            total = total * shrink + tl.sum(probs, 1)
            if threshold is not None:
                keep = _keep_tile(seed_ptr, seq_ids_ptr, threshold, seq, head, m0, n0, BLOCK_M, BLOCK_N)
                probs = tl.where(keep, probs, 0.0)
            acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            peak = new_peak
    if threshold is not None:
        acc *= 256.0 / (256 - threshold)
    out_tile = _pointers(out_ptr, (num_heads * HEAD_SIZE, HEAD_SIZE, 1), first + m0, head, BLOCK_M, BLOCK_D)
    tl.store(out_tile, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)
    tl.store(lse_ptr + head.to(tl.int64) * num_tokens + first + row, peak + tl.log2(total), mask=row < length)


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr,
    dq_ptr, delta_ptr,  # [T, H, d] contiguous, [H, T] fp32
    cu_seqlens_ptr, seq_ids_ptr, seed_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_tiles, scale, threshold, band,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    seq, head, tile, first, length = _locate(cu_seqlens_ptr, num_heads, num_tiles)
    m0 = tile * BLOCK_M
    if m0 >= length:
        return
    row = m0 + tl.arange(0, BLOCK_M)
    in_tile = _inside(row, length, HEAD_SIZE, BLOCK_D)
    own = first + m0
    out_strides = (num_heads * HEAD_SIZE, HEAD_SIZE, 1)
    out = tl.load(_pointers(out_ptr, out_strides, own, head, BLOCK_M, BLOCK_D), mask=in_tile, other=0.0)
    dout = tl.load(_pointers(dout_ptr, dout_strides, own, head, BLOCK_M, BLOCK_D), mask=in_tile, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    statistics = head.to(tl.int64) * num_tokens + first + row
    tl.store(delta_ptr + statistics, delta, mask=row < length)
    lse = tl.load(lse_ptr + statistics, mask=row < length, other=float("inf"))
    q = tl.load(_pointers(q_ptr, q_strides, own, head, BLOCK_M, BLOCK_D), mask=in_tile, other=0.0)
    k_tile = _pointers(k_ptr, k_strides, 0, head, BLOCK_N, BLOCK_D)
    v_tile = _pointers(v_ptr, v_strides, 0, head, BLOCK_N, BLOCK_D)
    scale2 = scale * 1.4426950408889634
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, whole, end = 0, length // BLOCK_N * BLOCK_N, length
    if band is not None:
        begin = tl.maximum(m0 - band[0], 0) // BLOCK_N * BLOCK_N
        whole, end = begin, tl.minimum(m0 + BLOCK_M + band[1], length)
    for masked in tl.static_range(2):
        for n0 in range(whole if masked else begin, end if masked else whole, BLOCK_N):
            col = n0 + tl.arange(0, BLOCK_N)
            in_keys = _inside(col, length, HEAD_SIZE, BLOCK_D)
            k = tl.load(k_tile + (first + n0) * k_strides[0], mask=in_keys, other=0.0)
            v = tl.load(v_tile + (first + n0) * v_strides[0], mask=in_keys, other=0.0)
            probs = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse[:, None])
            if masked:
                seen = (col < length)[None, :]
                if band is not None:
                    distance = col[None, :] - row[:, None]
                    seen = seen & (distance >= -band[0]) & (distance <= band[1])
                probs = tl.where(seen, probs, 0.0)
            dprobs = tl.dot(dout, tl.trans(v), input_precision="ieee")
            if threshold is not None:
                keep = _keep_tile(seed_ptr, seq_ids_ptr, threshold, seq, head, m0, n0, BLOCK_M, BLOCK_N)
                dprobs = tl.where(keep, dprobs * (256.0 / (256 - threshold)), 0.0)
            dscores = (probs * (dprobs - delta[:, None])).to(k.dtype)
            dq = tl.dot(dscores, k, dq, input_precision="ieee")
    dq_tile = _pointers(dq_ptr, out_strides, own, head, BLOCK_M, BLOCK_D)
    tl.store(dq_tile, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,  # [T, H, d] contiguous
    cu_seqlens_ptr, seq_ids_ptr, seed_ptr,
    q_strides, k_strides, v_strides, dout_strides,
    num_tokens, num_heads, num_tiles, scale, threshold, band,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    seq, head, tile, first, length = _locate(cu_seqlens_ptr, num_heads, num_tiles)
    n0 = tile * BLOCK_N
    if n0 >= length:
        return
    col = n0 + tl.arange(0, BLOCK_N)
    in_tile = _inside(col, length, HEAD_SIZE, BLOCK_D)
    own = first + n0
    k = tl.load(_pointers(k_ptr, k_strides, own, head, BLOCK_N, BLOCK_D), mask=in_tile, other=0.0)
    v = tl.load(_pointers(v_ptr, v_strides, own, head, BLOCK_N, BLOCK_D), mask=in_tile, other=0.0)
    q_tile = _pointers(q_ptr, q_strides, 0, head, BLOCK_M, BLOCK_D)
    dout_tile = _pointers(dout_ptr, dout_strides, 0, head, BLOCK_M, BLOCK_D)
    statistics = head.to(tl.int64) * num_tokens + first
    scale2 = scale * 1.4426950408889634
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, end = 0, length
    if band is not None:
        begin = tl.maximum(n0 - band[1], 0) // BLOCK_M * BLOCK_M
        end = tl.minimum(n0 + BLOCK_N + band[0], length)
    for m0 in range(begin, end, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)
        in_queries = _inside(row, length, HEAD_SIZE, BLOCK_D)
        q = tl.load(q_tile + (first + m0) * q_strides[0], mask=in_queries, other=0.0)
        dout = tl.load(dout_tile + (first + m0) * dout_strides[0], mask=in_queries, other=0.0)
        # rows past the end have probability exp2(0 - inf) = 0
        lse = tl.load(lse_ptr + statistics + row, mask=row < length, other=float("inf"))
        delta = tl.load(delta_ptr + statistics + row, mask=row < length, other=0.0)
        probs = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse[None, :])
        if band is not None:
            distance = col[:, None] - row[None, :]
            probs = tl.where((distance >= -band[0]) & (distance <= band[1]), probs, 0.0)
        dprobs = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dropped = probs
        if threshold is not None:
            keep = tl.trans(_keep_tile(seed_ptr, seq_ids_ptr, threshold, seq, head, m0, n0, BLOCK_M, BLOCK_N))
            dprobs = tl.where(keep, dprobs * (256.0 / (256 - threshold)), 0.0)
            dropped = tl.where(keep, probs, 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision="ieee")
        dscores = (probs * (dprobs - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, q, dk, input_precision="ieee")
    if threshold is not None:
        dv *= 256.0 / (256 - threshold)
    strides = (num_heads * HEAD_SIZE, HEAD_SIZE, 1)
    tl.store(_pointers(dk_ptr, strides, own, head, BLOCK_N, BLOCK_D), (dk * scale).to(k.dtype), mask=in_tile)
    tl.store(_pointers(dv_ptr, strides, own, head, BLOCK_N, BLOCK_D), dv.to(v.dtype), mask=in_tile)


def _launch(kernel, direction, tensors, strides, q, cu_seqlens, seq_ids, seed, max_seqlen, scale, dropout, band):
    """Run `kernel` over every (sequence, head, tile) on its plan."""
    num_tokens, num_heads, head_size = q.shape
    num_sequences = len(cu_seqlens) - 1
    if q.numel() == 0 or num_sequences == 0:
        return
    # the interpreter pays by the program, and gets the larger tiles
    element_size = q.element_size() if q.is_cuda else 2
    plan = attention_plan(head_size, element_size, capability(q.device), max_seqlen, direction)
    num_tiles = -(-max_seqlen // (plan.block_n if direction == "dkdv" else plan.block_m))
    with torch.cuda.device_of(q):
        kernel[(num_sequences * num_heads * num_tiles,)](
            *tensors, cu_seqlens, seq_ids, seed, *strides, num_tokens, num_heads, num_tiles,
            scale, threshold(dropout) if dropout > 0.0 else None, band,
            HEAD_SIZE=head_size, BLOCK_D=plan.block_d, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            num_warps=plan.num_warps, num_stages=plan.num_stages, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip


@torch.library.custom_op("minibert::attention_fwd", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    left: int | None,
    right: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _forward_buffers(q)
    strides = q.stride(), k.stride(), v.stride()
    _launch(
        _attention_fwd_kernel, "fwd", (q, k, v, out, lse), strides, q, cu_seqlens, seq_ids, seed,
        max_seqlen, scale, dropout, _band(left, right),
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q, k, v, cu_seqlens, seq_ids, seed, max_seqlen, scale, dropout, left, right):
    return _forward_buffers(q)


def _forward_buffers(q):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _band(left, right):
    return None if left is None else (left, right)


@torch.library.custom_op("minibert::attention_bwd", mutates_args=())
def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    left: int | None,
    right: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strides = q.stride(), k.stride(), v.stride(), dout.stride()
    options = q, cu_seqlens, seq_ids, seed, max_seqlen, scale, dropout, _band(left, right)
    _launch(_attention_bwd_dq_kernel, "dq", (q, k, v, out, dout, lse, dq, delta), strides, *options)
    _launch(_attention_bwd_dkdv_kernel, "dkdv", (q, k, v, dout, lse, delta, dk, dv), strides, *options)
    return dq, dk, dv


@_backward.register_fake
def _(dout, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, seq_ids, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, seq_ids, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout, _):
    if dout is None:
        return (None,) * 11
    return *_backward(dout, *ctx.saved_tensors, *ctx.options), *(None,) * 8


_forward.register_autograd(_gradient, setup_context=_save)


def attention(
    q, k, v, cu_seqlens, max_seqlen, *, dropout=0.0, seed=0, seq_ids=None, scale=None, causal=False, window=None,
    score_bias=None, backend="auto",
):  # fmt: skip
    """softmax(q kᵀ · scale + score_bias) ⊙ dropout · v within each sequence (Vaswani et al., 2017, eq. 1).

    Args:
        q, k, v: [T, H, d], one dtype, any strides: views of a fused projection [T, 3, H, d] are read in place.
            Under autocast they are cast to its dtype.
        cu_seqlens: int32 [B + 1], where each sequence begins in T: from 0 to T, never read on the host.
        max_seqlen: int, no less than the longest sequence.
        dropout: probability in [0, 1), in steps of 1/256; survivors are divided by the exact kept fraction.
        seed: int, or one int64 on the device of q.
        seq_ids: int64 [B], the counters that name the sequences in the dropout mask; by default 0, 1, 2, ...
        scale: of the scores, 1 / sqrt(d) by default.
        causal: a query sees no later key.
        window: a query sees keys at most this far away, on both sides.
        score_bias: [B or 1, H or 1, S, S] with S = max_seqlen, added to the scores; by the reference only.
        backend: "auto", "triton" (head sizes up to 128, scale > 0, no score_bias) or "reference".
    Returns:
        [T, H, d], contiguous, in the dtype of q; scores and sums are accumulated in float32.
    Raises:
        ValueError: names the argument that does not fit the others.
    """
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, cu_seqlens, max_seqlen, dropout, seq_ids, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = as_seed(seed, q.device) if dropout > 0.0 else None
    if not use_triton("attention", backend, q, unsupported=_unsupported(q, scale, score_bias)):
        return reference.attention(
            q, k, v, cu_seqlens, max_seqlen, dropout=dropout, seed=seed, seq_ids=seq_ids, scale=scale, causal=causal,
            window=window, score_bias=score_bias,
        )  # fmt: skip
    left = right = window
    if causal:
        left, right = max_seqlen if window is None else window, 0
    return _forward(q, k, v, cu_seqlens, seq_ids, seed, max_seqlen, scale, dropout, left, right)[0]


def _check(q, k, v, cu_seqlens, max_seqlen, dropout, seq_ids, window):
    if q.ndim != 3 or q.shape[-1] == 0:
        raise ValueError(f"q is {list(q.shape)}: expected [T, H, d] with d of at least 1")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: expected q's {q.dtype} {list(q.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: expected int32 [B + 1]")
    if max_seqlen < min(q.shape[0], 1):
        raise ValueError(f"max_seqlen={max_seqlen}: expected the length of the longest sequence, at least 1")
    looks = type(cu_seqlens) is torch.Tensor and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and len(cu_seqlens) > 1 and int(cu_seqlens.diff().max()) > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}: the longest sequence has {int(cu_seqlens.diff().max())} tokens")
    threshold(dropout)
    if window is not None and window < 0:
        raise ValueError(f"window={window} is negative: expected how many keys a query sees on each side, or None")
    if seq_ids is not None and (seq_ids.dtype != torch.int64 or seq_ids.shape != (len(cu_seqlens) - 1,)):
        raise ValueError(
            f"seq_ids is {seq_ids.dtype} {list(seq_ids.shape)}: expected int64 [{len(cu_seqlens) - 1}], one a sequence"
        )
    for name, x in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens), ("seq_ids", seq_ids)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q is on {q.device}: expected one device")


def _unsupported(q, scale, score_bias):
    if score_bias is not None:
        return "takes no score_bias"
    if q.shape[-1] > MAX_HEAD_SIZE:
        return f"takes head sizes up to {MAX_HEAD_SIZE}, got {q.shape[-1]}"
    if not scale > 0.0:
        return f"takes scale > 0, got {scale}"
    return None


def aot_cases(arch):
    """The default launch plans in bfloat16 on a fused projection, long sequences, for `xray`."""
    for head_size in (32, 64, 128):
        for dropout in (False, True):
            for direction in ("fwd", "dq", "dkdv"):
                plan = attention_plan(head_size, 2, arch, 512, direction)
                yield _aot_case(direction, plan, head_size, dropout)


def _aot_case(direction, plan, head_size, dropout, dtype="bf16", band=False):
    kernel = KERNELS[direction]
    signature, constexprs, attrs = {}, {}, {}
    blocks = {"HEAD_SIZE": head_size, "BLOCK_D": plan.block_d, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
    missing = {"seq_ids_ptr", *(() if dropout else ("seed_ptr", "threshold")), *(() if band else ("band",))}
    for position, name in enumerate(kernel.arg_names):
        if name in blocks or name in missing:
            signature[name], constexprs[name] = "constexpr", blocks.get(name)
        elif name.endswith("_strides"):
            signature[name], constexprs[position, 2] = ("i32", "i32", "constexpr"), 1
            attrs[position, 0] = attrs[position, 1] = DIVISIBLE
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, f"*{dtype}")
            attrs[position,] = DIVISIBLE
        else:
            signature[name] = {"scale": "fp32", "band": ("i32", "i32")}.get(name, "i32")
    return AotCase(
        op="attention", direction="fwd" if direction == "fwd" else "bwd",
        label=f"{direction} d={head_size}" + " dropout" * dropout, fn=kernel, signature=signature,
        constexprs=constexprs, attrs=attrs, num_warps=plan.num_warps, num_stages=plan.num_stages, matmul=True,
    )  # fmt: skip


KERNELS = {"fwd": _attention_fwd_kernel, "dq": _attention_bwd_dq_kernel, "dkdv": _attention_bwd_dkdv_kernel}
POINTERS = {"cu_seqlens_ptr": "*i32", "seed_ptr": "*i64", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
DIVISIBLE = [["tt.divisibility", 16]]
