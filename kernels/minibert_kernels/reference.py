"""Every op in plain torch: the specification of the kernels, and the path on CPU.

Runs in any floating dtype (float64 for tests), differentiates by autograd, and draws the same dropout bits as the
kernels. T packed tokens, B sequences, H heads, d head size, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F

from .dispatch import on_host
from .philox import attention_keep, fold, keep_scale, philox, row_keep


def attention(
    q, k, v, cu_seqlens, max_seqlen, *, dropout=0.0, seed=0, seq_ids=None, scale=None, causal=False, window=None,
    score_bias=None, alibi_slopes=None, return_lse=False, schedule=None, num_kv_heads=None,
):  # fmt: skip
    """See `minibert_kernels.attention`; a schedule changes no value."""
    q, k, v = split_projection(q, k, v, num_kv_heads)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    layout = SequenceLayout(cu_seqlens, max_seqlen, q.shape[0])
    heads = q.shape[1]
    q, k, v = (repeat_heads(layout.pad(x).transpose(1, 2), heads) for x in (q, k, v))  # [B, H, S, d]
    bias = layout.score_terms(q.dtype, causal, window, score_bias, alibi_slopes)
    if dropout == 0.0 and score_bias is None and not return_lse:
        return layout.unpad(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2))
    scores = q @ k.mT * scale + (0 if bias is None else bias)
    probs = scores.softmax(-1) if score_bias is None else softmax(scores)
    out = layout.unpad(((probs if dropout == 0.0 else drop_probs(probs, dropout, seed, seq_ids)) @ v).transpose(1, 2))
    if not return_lse:
        return out
    return out, layout.unpad(log_sum_exp(scores).mT, float("-inf")).mT.contiguous()


def attention_probs(
    q, k, cu_seqlens, max_seqlen, *, scale=None, causal=False, window=None, score_bias=None, alibi_slopes=None
):  # fmt: skip
    """The attention map [B, H, S, S] that `attention` never writes, before dropout; zero at padding. k may have fewer
    heads."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    layout = SequenceLayout(cu_seqlens, max_seqlen, q.shape[0])
    heads = q.shape[1]
    check_group(heads, k.shape[1])
    q, k = (repeat_heads(layout.pad(x).transpose(1, 2), heads) for x in (q, k))
    bias = layout.score_terms(q.dtype, causal, window, score_bias, alibi_slopes)
    scores = q @ k.mT * scale + (0 if bias is None else bias)
    probs = scores.softmax(-1) if score_bias is None else softmax(scores)
    return probs * layout.valid[:, None, :, None] * layout.valid[:, None, None, :]


def split_projection(q, k, v, num_kv_heads=None):
    """q [T, H, d], k and v [T, H_kv, d] of a fused projection [T, 3, H, d], or [T, H + 2 num_kv_heads, d]; or as they
    are."""
    if k is not None:
        return q, k, v
    if num_kv_heads is None:
        return q.unbind(1)
    return q.split((q.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), 1)


def check_group(heads, kv_heads):
    """Raise the ValueError of K/V heads that those of q cannot share."""
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"k has {kv_heads} heads, which do not divide the {heads} of q")


def repeat_heads(x, heads):
    """[B, H_kv, ...] to [B, heads, ...]: each K/V head for the queries' heads that share it, which are neighbours."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def softmax(scores):
    """Of the last axis; zero, with zero gradients, in a row that sees no key."""
    empty = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def log_sum_exp(scores):
    """Of the last axis, in float32 at least; -inf, with zero gradients, in a row that sees no key."""
    empty = scores.isneginf().all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0).to(torch.promote_types(scores.dtype, torch.float32))
    # torch's logsumexp differentiates by exp(scores - itself), which next to a score of -1e9 has lost the sum
    peak = scores.detach().amax(-1, keepdim=True) if scores.numel() else scores.detach().sum(-1, keepdim=True)
    return ((scores - peak).exp().sum(-1).log() + peak[..., 0]).masked_fill(empty[..., 0], float("-inf"))


def drop_probs(probs, dropout, seed, seq_ids=None):
    """Dropout on a padded attention map [B, H, S, S]."""
    if seq_ids is None:
        seq_ids = torch.arange(probs.shape[0], device=probs.device)
    keep = attention_keep(seed, dropout, seq_ids, *probs.shape[1:])
    return torch.where(keep, probs * keep_scale(dropout), 0)


class SequenceLayout:
    """Moves between packed [T, ...] and padded [B, S, ...] without waiting for a device.

    Tokens outside of the sequences go nowhere and come back as zeros.

    Args:
        whole: whether there are none; by default it is looked at where cu_seqlens is on the host.
    """

    def __init__(self, cu_seqlens, max_seqlen, num_tokens, whole=None):
        borders = cu_seqlens.long()
        starts, ends = borders[:-1], borders[1:]
        self.shape = (len(starts), max_seqlen)
        # where the host sees that every token is of a sequence, none has to be kept out
        if whole is None:
            whole = on_host(cu_seqlens) and cu_seqlens[[0, -1]].tolist() == [0, num_tokens]
        self.whole = whole
        self.full = self.whole and num_tokens == len(starts) * max_seqlen
        index = torch.arange(max_seqlen, device=cu_seqlens.device)
        self.valid = index < (ends - starts)[:, None]  # [B, S]
        if not self.full:
            token = torch.arange(num_tokens, device=cu_seqlens.device)
            sequence = torch.searchsorted(ends, token, right=True)  # B after the last
            position = token - borders[sequence]
            self.slot = sequence * max_seqlen + position  # [T] into B * S, and one more for what is outside
            if not self.whole:
                inside = (position >= 0) & (sequence < len(starts))
                self.slot = torch.where(inside, self.slot, len(starts) * max_seqlen)

    def pad(self, x):
        if self.full:
            return x.unflatten(0, self.shape)
        slots = self.shape[0] * self.shape[1]
        padded = x.new_zeros(slots if self.whole else slots + 1, *x.shape[1:])
        return padded.index_copy_(0, self.slot, x)[:slots].unflatten(0, self.shape)

    def unpad(self, x, outside=0):
        """The rows of tokens, and `outside` for those of no sequence."""
        x = x.flatten(0, 1)
        if not self.whole:
            x = torch.cat([x, x.new_full((1, *x.shape[1:]), outside)])
        return x if self.full else x[self.slot]

    def score_terms(self, dtype, causal, window, score_bias, alibi_slopes=None):
        """What is added to the scores: [B or 1, H or 1, S, S], -inf at keys out of sight; None if there is nothing."""
        bias = score_bias
        if bias is not None and bias.dtype != dtype:
            least = max(torch.finfo(dtype).min, torch.finfo(bias.dtype).min)  # a finite value stays finite
            bias = torch.where(bias.isneginf(), bias, bias.clamp(min=least)).to(dtype)
        index = torch.arange(self.shape[1], device=self.valid.device)
        distance = index[None, :] - index[:, None]  # key - query
        if alibi_slopes is not None:
            slopes = -alibi_slopes.to(dtype)[:, None, None] * distance.abs()
            bias = slopes[None] if bias is None else bias + slopes
        if self.full and not causal and window is None:
            return bias
        seen = self.valid[:, None, None, :]
        if causal:
            seen = seen & (distance <= 0)
        if window is not None:
            seen = seen & (distance.abs() <= window)
        # a padded query sees itself, so that no row of the softmax is empty
        seen = seen | (distance == 0)
        bias = torch.zeros((), dtype=dtype, device=seen.device) if bias is None else bias
        return torch.where(seen, bias, float("-inf"))


def dropout_add_norm(
    x, residual, weight, bias, *, dropout=0.0, seed=0, rows=None, eps=1e-12, kind="layernorm", prenorm=False
):
    """See `minibert_kernels.dropout_add_norm`."""
    dtype, wide, total = x.dtype, torch.promote_types(x.dtype, torch.float32), x
    if dropout > 0.0:
        if rows is None:
            rows = torch.arange(total.shape[:-1].numel(), device=x.device)
        keep = row_keep(seed, dropout, rows.flatten(), x.shape[-1]).view(x.shape)
        total = torch.where(keep, total.to(wide) * keep_scale(dropout), 0)
    if residual is not None:
        total = total + residual
    total = total.to(dtype)  # what is normalised is what backward, or a following layer, would read
    uniform = {dtype} == {p.dtype for p in (weight, bias) if p is not None}
    if kind == "layernorm" and uniform and (dtype == wide or not any_gradient(total, weight, bias)):
        # without a copy torch's statistics are float32, too; but what it saves of them for backward is rounded to dtype
        out = F.layer_norm(total, weight.shape, weight, bias, eps)
    else:
        out = normalise(total.to(wide), weight, bias, eps, kind).to(dtype)
    return (out, total) if prenorm else out


def any_gradient(*tensors):
    """Whether autograd records what is done with any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def normalise(x, weight, bias, eps, kind):
    """LayerNorm (Ba et al., 2016, eq. 4) or RMSNorm (Zhang and Sennrich, 2019, eq. 4) of the last axis."""
    weight = weight.to(x.dtype)
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.to(x.dtype), eps)
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return out if bias is None else out + bias.to(x.dtype)


def bias_gelu(x, bias, *, approximate="none"):
    """See `minibert_kernels.bias_gelu`."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)


def bias_geglu(x, bias, *, approximate="none"):
    """See `minibert_kernels.bias_geglu`."""
    gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
    return (F.gelu(gate, approximate=approximate) * value).to(x.dtype)


def bias_swiglu(x, bias):
    """See `minibert_kernels.bias_swiglu`."""
    gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
    return (F.silu(gate) * value).to(x.dtype)


def embed_norm(
    ids, type_ids, positions, word, position, type, weight, bias, *, dropout=0.0, seed=0, rows=None, eps=1e-12
):  # fmt: skip
    """See `minibert_kernels.embed_norm`."""
    # the order of the two additions is Hugging Face's, so that float32 results agree to the last bit
    total = F.embedding(ids, word) + F.embedding(type_ids, type)
    if position is not None:
        total = total + F.embedding(positions, position)
    out = normalise(total, weight, bias, eps, "layernorm")
    if dropout > 0.0:
        rows = torch.arange(len(ids), device=ids.device) if rows is None else rows
        out = torch.where(row_keep(seed, dropout, rows, out.shape[-1]), out * keep_scale(dropout), 0)
    return out.to(autocast_dtype(word))


def under_autocast(x):
    """Whether autocast is on where x is and x is not float64."""
    # meta tensors know no autocast; they come where shapes are tried, or waits for a device looked for
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def autocast_dtype(x):
    """That of autocast under it, else the dtype of x."""
    return torch.get_autocast_dtype(x.device.type) if under_autocast(x) else x.dtype


def linear_cross_entropy(
    hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0, reduction="mean", max_labels=None
):  # fmt: skip
    """See `minibert_kernels.linear_cross_entropy`; here all logits are written, and max_labels changes nothing."""
    logits = F.linear(hidden, weight, bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != ignore_index
    losses = F.cross_entropy(
        wide, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )  # fmt: skip
    correct = (logits.argmax(-1) == labels) & counted
    if reduction == "none":
        return losses, correct
    return losses.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1), correct.sum()


def select_rows(x, rows):
    """x[rows]: [T, ...] and int64 [N] to [N, ...]."""
    return x.index_select(0, rows)


def pack(x, mask, *, num_tokens=None):
    """See `minibert_kernels.pack`; here too T is read on the host unless num_tokens says it."""
    if num_tokens is None:
        return x[mask]
    slot = torch.searchsorted(mask.flatten().cumsum(0), torch.arange(1, num_tokens + 1, device=x.device))
    found = (slot < mask.numel()).view(-1, *(1,) * (x.ndim - 2))
    return torch.where(found, x.flatten(0, 1).index_select(0, slot.clamp(max=mask.numel() - 1)), 0)


def unpack(x, cu_seqlens, max_seqlen):
    """See `minibert_kernels.unpack`."""
    valid = torch.arange(max_seqlen, device=x.device) < cu_seqlens.diff()[:, None]
    out = x.new_zeros(*valid.shape, *x.shape[1:])
    return out.masked_scatter(valid.view(*valid.shape, *(1,) * (x.ndim - 1)), x)


MLM_SITE = 0x3A5C  # folded into the seed, so that masks share no draw with anything else under it
MLM_MASKED, MLM_RANDOM = round(0.8 * 2**32), round(0.9 * 2**32)  # a word below the first: [MASK]; the second: random
NEVER = 2**63 - 1  # the key of a token that may not be chosen
UNITS = ("token", "word", "span")


def span_reach(unit, max_span):
    """A unit reaches d tokens further where its start's word is at least the d-th of these; a start reaches itself.

    Lengths of spans are geometric with p = 0.2 among 1 .. max_span (Joshi et al., 2020): mean 3.8 for 10.
    """
    longest = max_span if unit == "span" else 1
    return tuple(round(2**32 * (1 - 0.8**d) / (1 - 0.8**longest)) for d in range(longest))


def mlm_mask(
    ids, cu_seqlens, max_seqlen, *, mask_id, special, ordinary, rate=0.15, unit="token", continues=None, max_span=10,
    seed=0, seq_ids=None, epochs=None, num_labels=None,
):  # fmt: skip
    """See `minibert_kernels.mlm_mask`."""
    layout = SequenceLayout(cu_seqlens, max(max_seqlen, 1), len(ids))
    tokens = layout.pad(ids)  # [B, S], as everything below
    position = torch.arange(tokens.shape[1], device=ids.device)
    seq = torch.arange(len(tokens), device=ids.device)[:, None] if seq_ids is None else seq_ids[:, None]
    epoch = torch.zeros_like(seq) if epochs is None else epochs[:, None]
    draw, action, choice, stretch = philox(fold(seed, MLM_SITE), position, seq, seq >> 32, epoch)

    candidate = layout.valid & ~special[tokens]
    begins = ~continues[tokens] if unit == "word" else torch.zeros_like(candidate)
    # where the run of candidates, or the word, of each token begins
    first = torch.where(candidate, torch.where(begins, position, 0), position + 1).cummax(1).values
    key, earliest = draw << 31 | position, torch.full_like(tokens, NEVER)
    for distance, least in enumerate(span_reach(unit, max_span)):
        start = (first if unit == "word" else position) - distance
        at = start.clamp(0, len(position) - 1).expand_as(tokens)
        reached = candidate & (start >= first) & (stretch.gather(1, at) >= least)
        earliest = torch.where(reached, torch.minimum(earliest, key.gather(1, at)), earliest)

    drawn = ordinary[(choice * len(ordinary)) >> 32]
    becomes = torch.where(action < MLM_MASKED, mask_id, torch.where(action < MLM_RANDOM, drawn, tokens))
    if num_labels is not None:
        return exact_labels(ids, layout.unpad(earliest), layout.unpad(becomes), layout, num_labels)
    wanted = (candidate.sum(1).double() * rate).round().clamp(min=1).long()
    ranked = earliest.sort(dim=1, stable=True)
    if unit == "span":
        chosen = ranked.indices.argsort(1) < wanted[:, None]
    else:
        chosen = earliest <= ranked.values.gather(1, wanted[:, None] - 1)
    chosen = layout.unpad(candidate & chosen)
    return torch.where(chosen, layout.unpad(becomes), ids), torch.where(chosen, ids, -100)


def exact_labels(ids, key, becomes, layout, num_labels):
    """The `num_labels` tokens that come first where sequences take turns: (masked ids [T], rows [K], labels [K]).

    Args:
        key: [T] int64, the order of choice within a sequence; NEVER for what may not be chosen.
        becomes: [T], what a token turns into where it is chosen.
    """
    key = torch.where(layout.valid, layout.pad(key), NEVER)
    rank, eligible = key.argsort(dim=1, stable=True).argsort(1), key != NEVER
    score = torch.where(rank == 0, -1.0, rank.double() / eligible.sum(1, keepdim=True))
    score = torch.where(layout.unpad(eligible), layout.unpad(score), float("inf"))
    order = score.argsort(stable=True)[:num_labels]
    real = score[order].isfinite()
    masked = ids.index_copy(0, order, torch.where(real, becomes[order], ids[order]))
    rows = torch.where(real, order, -1).sort().values
    labels = torch.where(rows < 0, -100, ids[rows.clamp(min=0)])
    missing = (num_labels - len(rows), 0)  # fewer tokens than labels
    return masked, F.pad(rows.clamp(min=0), missing), F.pad(labels, missing, value=-100)


def lamb_step(
    params, grads, exp_avgs, exp_avg_sqs, *, lr, step, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
    bias_correction=True, trust_clip=None, adapt=True,
):  # fmt: skip
    """See `minibert_kernels.lamb_step`."""
    steps = step.expand(len(params)) if isinstance(step, torch.Tensor) else [step] * len(params)
    for w, g, m, v, t in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        g, x = g.to(m.dtype), w.to(m.dtype)
        m.lerp_(g, 1 - betas[0])
        v.lerp_(g * g, 1 - betas[1])
        # in double, because 1 - beta ** t cancels
        t = t.double() if isinstance(t, torch.Tensor) else t
        unbias1, unbias2 = (1 - beta**t if bias_correction else 1.0 for beta in betas)
        u = (m / unbias1) / ((v / unbias2).sqrt() + eps) + weight_decay * x
        ratio = 1.0
        if adapt:
            x_norm, u_norm = x.norm(), u.norm()
            ratio = torch.where((x_norm > 0) & (u_norm > 0), x_norm / u_norm, 1.0)
            ratio = ratio if trust_clip is None else ratio.clamp(max=trust_clip)
        w.copy_(x - lr * ratio * u)
