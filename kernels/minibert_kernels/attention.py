"""Fused attention over packed sequences: softmax(q kᵀ · scale + bias) ⊙ dropout · v, and its gradient.

The map [S, S] is never written: forward saves q, k, v, the output and the row's log-sum-exp, in base 2 and fp32.
Backward recomputes the probabilities P from them, and draws the dropout mask again from its counters. With
dP = keep ⊙ (dout · vᵀ) / kept and delta = rowsum(dout ⊙ out):

    dS = P ⊙ (dP - delta + dlse),   dq = scale · dS · k,   dk = scale · dSᵀ · q,   dv = (keep ⊙ P / kept)ᵀ · dout

and dS, summed over the sequences and heads that share it, is the gradient of the bias.

In units of one activation row (T x H x d elements) forward moves 4: q, k, v in, the output out. Backward moves 8: q, k,
v, output, its gradient in, three gradients out; plus what the long form's second kernel reads again. The short form
moves 7, for it needs no output. The three gradients lie in one buffer [T, H + 2 H_kv, d], as those of a fused
projection.

Fewer K/V heads than heads of q (grouped-query attention) are read by each head of q that shares them. A program of dk
and dv has a tile of a K/V head, and goes through the queries of the whole group in one loop. Of the rows above those of
k, v and their gradients then shrink to H_kv / H.

Rows before the first sequence and after the last are zero, and so are their gradients: a few programs more than there
are tiles fill them, and return at once where there are none.

There are two forms, chosen by the launch plan: `attention_short` for at most 128 tokens a sequence, where a head's map
is one tile, and `attention_long`, which also takes heads of more than 128 dimensions, and the backward of groups.
Neither has atomics: the same call gives the same bits.
"""

import math

import torch

from . import reference
from .attention_long import (
    _attention_bwd_dbias_kernel,
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
    _attention_fwd_kernel,
)
from .attention_short import _attention_short_bwd_kernel, _attention_short_fwd_kernel
from .attention_tile import FILLERS, SCHEDULE_TILE, WIDEST, Dropout, Terms
from .dispatch import check_device, check_floating, check_sequences, use_triton
from .launch import (
    FP_FUSION,
    AotCase,
    aot_arguments,
    attention_plan,
    attention_short_plan,
    capability,
    ceil_div,
    on_device,
)
from .op import Op
from .philox import as_seed, threshold

MAX_HEAD_SIZE = 256


def attention_schedule(cu_seqlens, num_tokens):
    """The order of work in which no multiprocessor waits for the longest sequence: tiles of 128 tokens, longest first.

    Computed once a batch, on the device, for every call of `attention` with these sequences.

    Args:
        cu_seqlens: int32 [B + 1].
        num_tokens: T, an int.
    Returns:
        int32 [T // 128 + B, 2]: (sequence, tile) by falling length of the sequence, then -1 to the end.
    """
    size = SCHEDULE_TILE.value
    lengths, order = torch.sort(cu_seqlens.diff(), descending=True, stable=True)
    tiles = (lengths + size - 1) // size
    ends = tiles.cumsum(0)
    entry = torch.arange(num_tokens // size + len(lengths), device=cu_seqlens.device)
    if len(lengths) == 0:
        return entry.new_full((len(entry), 2), -1, dtype=torch.int32)
    slot = torch.searchsorted(ends, entry, right=True).clamp(max=len(lengths) - 1)
    table = torch.stack([order[slot], entry - (ends - tiles)[slot]], 1)
    return torch.where((entry < ends[-1])[:, None], table, -1).to(torch.int32)


def _group(q, k):
    """How many heads of queries share a K/V head."""
    return q.shape[1] // k.shape[1]


def _element_size(q):
    """That of the plan: the interpreter pays by the program, and gets the larger tiles of 2-byte elements."""
    return q.element_size() if q.is_cuda else 2


def _run(kernel, programs, plan, q, arguments, **blocks):
    with on_device(q):
        kernel[(programs,)](
            *arguments, HEAD_SIZE=q.shape[2], BLOCK_D=plan.block_d, **blocks,
            num_warps=plan.num_warps, num_stages=plan.num_stages, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip


def _run_long(kernel, direction, q, tensors, cu_seqlens, schedule, strides, max_seqlen, terms, dropped):
    """A kernel over every tile of every head, in the order of the sequences or of a schedule."""
    num_tokens, num_heads, head_size = q.shape
    bias = terms.bias_ptr is not None or terms.slopes_ptr is not None
    plan = attention_plan(head_size, _element_size(q), capability(q.device), max_seqlen, direction, bias)
    block = plan.block_n if direction == "dkdv" else plan.block_m
    entries, tokens = cu_seqlens.shape[0] - 1, max_seqlen
    if schedule is not None:
        entries, tokens = schedule.shape[0], SCHEDULE_TILE.value
    num_tiles, group = ceil_div(tokens, block), _group(*tensors[:2])
    sizes = num_tokens, num_heads, num_tiles
    if direction == "dkdv":  # which leaves what lies outside of all sequences to dq's kernel
        programs = entries * (num_heads // group) * num_tiles
    else:
        sizes, programs = (*sizes, cu_seqlens.shape[0] - 1), entries * num_heads * num_tiles + FILLERS.value
    arguments = *tensors, cu_seqlens, schedule, *strides, *sizes, terms, dropped
    blocks = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "GROUP": group, "APART": plan.apart}
    _run(kernel, programs, plan, q, arguments, **blocks)


def _run_short(kernel, plan, q, tensors, cu_seqlens, strides, terms, dropped, **group):
    """A kernel over every (sequence, head)."""
    num_tokens, num_heads, _ = q.shape
    num_sequences = cu_seqlens.shape[0] - 1
    arguments = *tensors, cu_seqlens, *strides, num_tokens, num_heads, num_sequences, terms, dropped
    _run(kernel, num_sequences * num_heads + FILLERS.value, plan, q, arguments, BLOCK_S=plan.block_m, **group)


def _run_dbias(q, tensors, cu_seqlens, strides, max_seqlen, terms, dropped):
    """The kernel over every tile of the bias."""
    num_tokens, num_heads, head_size = q.shape
    plan = attention_plan(head_size, _element_size(q), capability(q.device), max_seqlen, "dbias")
    batches, heads = tensors[-1].shape[:2]
    programs = batches * heads * ceil_div(max_seqlen, plan.block_m) * ceil_div(max_seqlen, plan.block_n)
    sizes = num_tokens, num_heads, cu_seqlens.shape[0] - 1, batches, heads, max_seqlen
    arguments = *tensors, cu_seqlens, *strides, *sizes, terms, dropped
    blocks = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "GROUP": _group(*tensors[:2])}
    _run(_attention_bwd_dbias_kernel, programs, plan, q, arguments, **blocks)


def _groups(seq_ids, seed, score_bias, alibi_slopes, scale, dropout, left, right):
    """The kernels' arguments of scores and of dropout."""
    strides = None
    if score_bias is not None:
        strides = tuple(
            0 if n == 1 else stride for n, stride in zip(score_bias.shape, score_bias.stride(), strict=True)
        )
    terms = Terms(scale, alibi_slopes, score_bias, strides, None if left is None else (left, right))
    bound = threshold(dropout)
    return terms, Dropout(bound, seed, seq_ids) if bound else Dropout()


def _run_forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    schedule: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    score_bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    left: int | None,
    right: int | None,
    num_kv_heads: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = reference.split_projection(q, k, v, num_kv_heads)
    out, lse = _forward_buffers(q, score_bias)
    if out.numel() == 0 or cu_seqlens.shape[0] == 1:
        return out.zero_(), lse.fill_(float("-inf"))
    tensors, strides = (q, k, v, out, lse), (q.stride(), k.stride(), v.stride())
    groups = _groups(seq_ids, seed, score_bias, alibi_slopes, scale, dropout, left, right)
    short = attention_short_plan(q.shape[2], _element_size(q), capability(q.device), max_seqlen, "fwd")
    if short is not None:
        _run_short(_attention_short_fwd_kernel, short, q, tensors, cu_seqlens, strides, *groups, GROUP=_group(q, k))
    else:
        _run_long(_attention_fwd_kernel, "fwd", q, tensors, cu_seqlens, schedule, strides, max_seqlen, *groups)
    return out, lse


def _forward_buffers(q, score_bias):
    """Uninitialised out [T, H, d] and log-sum-exp [1, H, T], or, with a bias, its two summands [2, H, T]."""
    tokens, heads, head_size = q.shape
    planes = 1 if score_bias is None else 2
    return q.new_empty(tokens, heads, head_size), q.new_empty(planes, heads, tokens, dtype=torch.float32)


def _run_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    schedule: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    score_bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    left: int | None,
    right: int | None,
    num_kv_heads: int | None,
    bias_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = reference.split_projection(q, k, v, num_kv_heads)
    grads, dbias = _backward_buffers(q, k, score_bias, bias_gradient)
    if grads.numel() == 0 or cu_seqlens.shape[0] == 1:
        return grads.zero_(), dbias.zero_()
    dlse = None if dlse is None else dlse[0].contiguous()  # of the sum of both planes, and so the same of each
    strides = q.stride(), k.stride(), v.stride(), dout.stride()
    groups = _groups(seq_ids, seed, score_bias, alibi_slopes, scale, dropout, left, right)
    size, group = _element_size(q), _group(q, k)
    short = attention_short_plan(q.shape[2], size, capability(q.device), max_seqlen, "bwd", group)
    delta = torch.empty_like(lse[0]) if short is None or bias_gradient else None
    if short is not None:
        tensors = q, k, v, dout, lse, dlse, grads, delta
        _run_short(_attention_short_bwd_kernel, short, q, tensors, cu_seqlens, strides, *groups)
    else:
        work = cu_seqlens, schedule, strides, max_seqlen, *groups
        _run_long(_attention_bwd_dq_kernel, "dq", q, (q, k, v, out, dout, lse, dlse, grads, delta), *work)
        _run_long(_attention_bwd_dkdv_kernel, "dkdv", q, (q, k, v, dout, lse, delta, grads), *work)
    if bias_gradient:
        _run_dbias(q, (q, k, v, dout, lse, delta, dbias), cu_seqlens, strides, max_seqlen, *groups)
    return grads, dbias


def _fake_forward(q, k, v, cu_seqlens, schedule, seq_ids, seed, score_bias, *options):
    return _forward_buffers(reference.split_projection(q, k, v, options[-1])[0], score_bias)


def _fake_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, schedule, seq_ids, seed, score_bias, *options):
    *_, num_kv_heads, bias_gradient = options
    q, k, v = reference.split_projection(q, k, v, num_kv_heads)
    return _backward_buffers(q, k, score_bias, bias_gradient)


def _backward_buffers(q, k, score_bias, bias_gradient):
    """Uninitialised gradients of a fused projection, [T, H + 2 H_kv, d], and of the bias, empty where nobody asks for
    it."""
    dbias = score_bias.new_empty(score_bias.shape) if bias_gradient else q.new_empty(0)
    return q.new_empty(q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2]), dbias


def _save(ctx, inputs, output):
    q, k, v, *tensors = inputs[:9]
    ctx.options = inputs[9:]
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout, dlse):
    if dout is None and dlse is None:
        return (None,) * 15
    q, k, v, out, *rest = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    bias_gradient = ctx.needs_input_grad[7]
    grads, dbias = _backward(dout, dlse, q, k, v, out, *rest, *ctx.options, bias_gradient)
    # those of a fused projection in one piece, so that nothing is stacked or copied
    if k is None:
        dq, dk, dv = grads.view(q.shape), None, None
    else:
        dq, dk, dv = grads.split((q.shape[1], k.shape[1], k.shape[1]), 1)
    return dq, dk, dv, *(None,) * 4, dbias if bias_gradient else None, *(None,) * 7


_backward = Op("attention_bwd", _run_backward, _fake_backward)
_forward = Op("attention_fwd", _run_forward, _fake_forward, save=_save, gradient=_gradient)


def attention(
    q, k, v, cu_seqlens, max_seqlen, *, dropout=0.0, seed=0, seq_ids=None, scale=None, causal=False, window=None,
    score_bias=None, alibi_slopes=None, return_lse=False, schedule=None, num_kv_heads=None, backend="auto",
):  # fmt: skip
    """softmax(q kᵀ · scale + score_bias) ⊙ dropout · v within each sequence (Vaswani et al., 2017, eq. 1), without
    writing the map (Dao et al., 2022).

    Args:
        q, k, v: [T, H, d], and [T, H_kv, d] twice, one dtype, any strides. With fewer K/V heads (grouped-query
            attention, Ainslie et al., 2023; H a multiple of H_kv) head h of q reads K/V head h // (H / H_kv). Or q is
            a fused projection [T, 3, H, d], or with num_kv_heads [T, H + 2 H_kv, d], and k and v are None: it is read
            in place, and its gradient written in place, where q, k, v taken out of it would have theirs put together
            again. Under autocast they are cast to its dtype.
        cu_seqlens: int32 [B + 1], where each sequence begins in T, in order, and where the last ends. Looked at on the
            host only where it is there already, or with MINIBERT_CHECK=1 in the environment. Rows before the first
            sequence and after the last give zeros, an lse of -inf and zero gradients.
        max_seqlen: int, no less than the longest sequence; up to 128 the short form runs, but for heads of more than
            128, and backward where H_kv < H.
        dropout: probability in [0, 1), in steps of 1/256; survivors are divided by the exact kept fraction.
        seed: int, or one int64 on the device of q.
        seq_ids: int64 [B], the counters that name the sequences in the dropout mask; by default 0, 1, 2, ...
        scale: of the scores, 1 / sqrt(d) by default.
        causal: a query sees no later key.
        window: a query sees keys at most this far away, on both sides.
        score_bias: [B or 1, H or 1, S, S] with S = max_seqlen, floating, any strides, added to the scaled scores; -inf
            hides a key, and a query that sees no key gives zeros and an lse of -inf. Values beyond 1e38 and
            finite ones beyond -1e38 count as those. It gets a gradient where it asks for one.
        alibi_slopes: float32 [H]: -slope · |i - j| is added to the scores of query i and key j (ALiBi, Press et al.,
            2022, in its symmetric form). A gradient of the slopes only by the reference.
        return_lse: return (out, lse) with the natural logarithm of each row's sum of exponentials, before dropout.
        schedule: of `attention_schedule`, the order in which a GPU takes the tiles of the long form; same values.
        num_kv_heads: H_kv, of a fused projection that has fewer than H.
        backend: "auto", "triton" (head sizes up to 256, scale > 0) or "reference".
    Returns:
        [T, H, d], contiguous, in the dtype of q; scores and sums are accumulated in float32. lse is float32 [H, T].
    Raises:
        ValueError: names the argument that does not fit the others.
    """
    if reference.under_autocast(q):
        dtype = reference.autocast_dtype(q)
        q, k, v = (None if x is None else x.to(dtype) for x in (q, k, v))
    num_heads = _check_heads(q, k, v, num_kv_heads)
    _check(q, k, v, cu_seqlens, max_seqlen, dropout, seq_ids, window)
    _check_score_terms(q, num_heads, cu_seqlens, max_seqlen, score_bias, alibi_slopes, schedule)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = as_seed(seed, q.device) if dropout > 0.0 else None
    if not use_triton("attention", backend, q, unsupported=_unsupported(q, scale, score_bias, alibi_slopes)):
        return reference.attention(
            q, k, v, cu_seqlens, max_seqlen, dropout=dropout, seed=seed, seq_ids=seq_ids, scale=scale, causal=causal,
            window=window, score_bias=score_bias, alibi_slopes=alibi_slopes, return_lse=return_lse,
            num_kv_heads=num_kv_heads,
        )  # fmt: skip
    # the kernels index these by number alone
    slopes = None if alibi_slopes is None else alibi_slopes.detach().contiguous()
    schedule = None if schedule is None else schedule.contiguous()
    seq_ids = None if seq_ids is None else seq_ids.contiguous()
    left = right = None if window is None else min(window, WIDEST)
    if causal:
        left, right = WIDEST if window is None else left, 0
    out, lse = _forward(
        q, k, v, cu_seqlens.contiguous(), schedule, seq_ids, seed, score_bias, slopes, max_seqlen, scale, dropout,
        left, right, num_kv_heads,
    )  # fmt: skip
    return (out, lse.sum(0) * math.log(2.0)) if return_lse else out


def _check_heads(q, k, v, num_kv_heads):
    """How many heads q has, or the ValueError of q, k and v that do not fit each other."""
    if k is None and v is None:
        if num_kv_heads is not None and type(num_kv_heads) is not int:
            raise ValueError(f"num_kv_heads={num_kv_heads!r} is not a whole number")
        if num_kv_heads is None:
            if q.ndim != 4 or q.shape[1] != 3 or q.shape[-1] == 0:
                raise ValueError(
                    f"q is {list(q.shape)}: expected [T, 3, H, d], a fused projection, where k and v are None"
                )
            return q.shape[2]
        if q.ndim != 3 or q.shape[-1] == 0 or num_kv_heads < 1 or q.shape[1] <= 2 * num_kv_heads:
            raise ValueError(
                f"q is {list(q.shape)}, num_kv_heads={num_kv_heads}: expected [T, H + 2 H_kv, d], a fused projection"
            )
        num_heads = q.shape[1] - 2 * num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide the {num_heads} heads of q")
        return num_heads
    if k is None:
        raise ValueError("k is None and v is not: expected both, or neither with a fused projection as q")
    if q.ndim != 3 or q.shape[-1] == 0:
        raise ValueError(f"q is {list(q.shape)}: expected [T, H, d] with d of at least 1")
    if num_kv_heads is not None:
        raise ValueError(f"num_kv_heads={num_kv_heads} is of a fused projection alone: k and v say theirs")
    tokens, num_heads, size = q.shape
    for name, x in (("k", k), ("v", v)):
        heads = "H_kv" if x is k else k.shape[1]
        if x is None or x.dtype != q.dtype or x.ndim != 3 or x.shape != (tokens, x.shape[1] if x is k else heads, size):
            found = None if x is None else f"{x.dtype} {list(x.shape)}"
            raise ValueError(f"{name} is {found}: expected {q.dtype} [{tokens}, {heads}, {size}]")
    reference.check_group(num_heads, k.shape[1])
    return num_heads


def _check(q, k, v, cu_seqlens, max_seqlen, dropout, seq_ids, window):
    check_floating(q=q)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: expected int32 [B + 1]")
    if max_seqlen < min(q.shape[0], 1):
        raise ValueError(f"max_seqlen={max_seqlen}: expected the length of the longest sequence, at least 1")
    check_sequences(cu_seqlens, q.shape[0], max_seqlen)
    threshold(dropout)
    if window is not None and window < 0:
        raise ValueError(f"window={window} is negative: expected how many keys a query sees on each side, or None")
    batch = cu_seqlens.shape[0] - 1
    if seq_ids is not None and (seq_ids.dtype != torch.int64 or seq_ids.shape != (batch,)):
        raise ValueError(f"seq_ids is {seq_ids.dtype} {list(seq_ids.shape)}: expected int64 [{batch}], one a sequence")
    check_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens, seq_ids=seq_ids)


def _check_score_terms(q, num_heads, cu_seqlens, max_seqlen, score_bias, alibi_slopes, schedule):
    num_tokens, batch = q.shape[0], cu_seqlens.shape[0] - 1
    if score_bias is not None and not (
        score_bias.is_floating_point()
        and score_bias.ndim == 4
        and score_bias.shape[0] in (1, batch)
        and score_bias.shape[1] in (1, num_heads)
        and score_bias.shape[2:] == (max_seqlen, max_seqlen)
    ):
        raise ValueError(
            f"score_bias is {score_bias.dtype} {list(score_bias.shape)}: expected a floating dtype and "
            f"[{batch} or 1, {num_heads} or 1, {max_seqlen}, {max_seqlen}], one side max_seqlen"
        )
    expected = {
        "alibi_slopes": (alibi_slopes, torch.float32, (num_heads,)),
        "schedule": (schedule, torch.int32, (num_tokens // SCHEDULE_TILE.value + batch, 2)),
    }
    for name, (x, dtype, shape) in expected.items():
        if x is not None and (x.dtype != dtype or x.shape != shape):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: expected {dtype} {list(shape)}")
    check_device(q=q, score_bias=score_bias, alibi_slopes=alibi_slopes, schedule=schedule)


def _unsupported(q, scale, score_bias, alibi_slopes):
    if q.shape[-1] > MAX_HEAD_SIZE:
        return f"takes head sizes up to {MAX_HEAD_SIZE}, got {q.shape[-1]}"
    if not scale > 0.0:
        return f"takes scale > 0, got {scale}"
    if score_bias is not None and score_bias.dtype == torch.float64:
        return "takes no score_bias in float64"
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "gives alibi_slopes no gradient"
    return None


def aot_cases(arch):
    """The default launch plans in bfloat16 on a fused projection, for `xray`: what minibert's encoder launches in
    training and inference, which orders long sequences by a schedule, a plain call, one with every term, and one with
    fewer K/V heads."""
    everything = {"dropout": True, "terms": "bias alibi band", "schedule": True}
    for direction in ("fwd", "dq", "dkdv"):
        # 80 and 192 for all padded to 128 and to 256: their code differs in a bound alone
        for head_size in (16, 32, 64, 80, 128, 192):
            yield _aot_case(arch, direction, head_size, dropout=True, schedule=True)
        for head_size in (64, 128):
            yield _aot_case(arch, direction, head_size, schedule=True)
        for head_size in (64, 128, 256):
            yield _aot_case(arch, direction, head_size, **everything)
        yield _aot_case(arch, direction, 64)
        yield _aot_case(arch, direction, 64, dropout=True, schedule=True, group=4)
        for terms in ("alibi", "causal"):
            yield _aot_case(arch, direction, 64, dropout=True, terms=terms, schedule=True)
    for head_size in (64, 128, 256):
        yield _aot_case(arch, "dbias", head_size, dropout=True, terms="bias alibi band")
    yield _aot_case(arch, "dkdv", 64, **everything, group=4)
    # a matrix instruction of sm_90 and sm_100 has 64 rows
    shortest = 64 if arch // 10 in (9, 10) else 32
    for head_size, length in ((32, 128), (64, shortest), (64, 128), (128, 128)):
        for direction in ("fwd", "bwd"):
            if attention_short_plan(head_size, 2, arch, length, direction) is not None:
                yield _aot_case(arch, direction, head_size, length, dropout=True)
                if head_size == 64:
                    yield _aot_case(arch, direction, head_size, length)
                    yield _aot_case(arch, direction, head_size, length, dropout=True, terms="bias alibi band")


def _aot_case(
    arch, direction, head_size, length=512, *, dropout=False, terms="", schedule=False, group=1, dtype="*bf16"
):  # fmt: skip
    """What a launch would specialise."""
    size = 2 if dtype == "*bf16" else 4
    short = length <= 128
    if short:
        plan = attention_short_plan(head_size, size, arch, length, direction)
    else:
        plan = attention_plan(head_size, size, arch, length, direction, bias="alibi" in terms)
    fn = KERNELS["short " * short + direction]
    constexprs = {
        "HEAD_SIZE": head_size, "BLOCK_D": plan.block_d, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n,
        "BLOCK_S": plan.block_m, "GROUP": group, "APART": plan.apart,
    }  # fmt: skip
    values = {
        "cu_seqlens_ptr": "*i32", "schedule_ptr": "*i32" if schedule else None, "lse_ptr": "*fp32", "dlse_ptr": None,
        "delta_ptr": None if short else "*fp32", "dropout": Dropout(26, "*i64", "*i64") if dropout else Dropout(),
    }  # fmt: skip
    values["terms"] = Terms(
        0.125,
        slopes_ptr="*fp32" if "alibi" in terms else None,
        bias_ptr=dtype if "bias" in terms else None,
        bias_strides=(0, length * length, length, 1) if "bias" in terms else None,
        band=(WIDEST, 0) if "causal" in terms else (length, 2) if "band" in terms else None,
    )
    row = 12 // group * (group + 2) * head_size
    values |= {f"{name}_strides": (row, head_size, 1) for name in ("q", "k", "v")}
    values |= {"dout_strides": (12 * head_size, head_size, 1)}
    sizes = dict.fromkeys((name for name in fn.arg_names if name.startswith("num_")), 12)
    sizes |= {"bias_batches": 1, "bias_heads": 12, "max_seqlen": length}
    values = dict.fromkeys(fn.arg_names, dtype) | sizes | values | constexprs
    arguments = aot_arguments(fn, **{name: values[name] for name in fn.arg_names})
    label = ["" if direction in ("fwd", "bwd") else direction, f"short {length}" if short else "", f"d={head_size}"]
    label += [f"group {group}" if group > 1 else ""] + ["dropout"] * dropout + [terms] + ["schedule"] * schedule
    return AotCase(
        op="attention", direction="fwd" if direction == "fwd" else "bwd", label=" ".join(filter(None, label)), fn=fn,
        **arguments, num_warps=plan.num_warps, num_stages=plan.num_stages, matmul=True,
    )  # fmt: skip


KERNELS = {
    "fwd": _attention_fwd_kernel,
    "dq": _attention_bwd_dq_kernel,
    "dkdv": _attention_bwd_dkdv_kernel,
    "dbias": _attention_bwd_dbias_kernel,
    "short fwd": _attention_short_fwd_kernel,
    "short bwd": _attention_short_bwd_kernel,
}
