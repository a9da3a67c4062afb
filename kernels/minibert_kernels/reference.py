"""Every op in plain torch: the specification of the kernels, and the path on CPU.

Runs in any floating dtype (float64 for tests), differentiates by autograd, and draws the same dropout bits as the
kernels. T packed tokens, B sequences, H heads, d head size, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F

from .philox import attention_keep, keep_scale, row_keep


def attention(
    q, k, v, cu_seqlens, max_seqlen, *, dropout=0.0, seed=0, seq_ids=None, scale=None, causal=False, window=None,
    score_bias=None,
):  # fmt: skip
    """See `minibert_kernels.attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    layout = SequenceLayout(cu_seqlens, max_seqlen, q.shape[0])
    q, k, v = (layout.pad(x).transpose(1, 2) for x in (q, k, v))  # [B, H, S, d]
    bias = layout.score_mask(q.dtype, causal, window, score_bias)
    if dropout == 0.0:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        probs = (q @ k.mT * scale + (0 if bias is None else bias)).softmax(-1)
        out = drop_probs(probs, dropout, seed, seq_ids) @ v
    return layout.unpad(out.transpose(1, 2))


def attention_probs(q, k, cu_seqlens, max_seqlen, *, scale=None, causal=False, window=None, score_bias=None):
    """The attention map [B, H, S, S] that `attention` never writes, before dropout; zero at padding."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    layout = SequenceLayout(cu_seqlens, max_seqlen, q.shape[0])
    q, k = (layout.pad(x).transpose(1, 2) for x in (q, k))
    bias = layout.score_mask(q.dtype, causal, window, score_bias)
    probs = (q @ k.mT * scale + (0 if bias is None else bias)).softmax(-1)
    return probs * layout.valid[:, None, :, None] * layout.valid[:, None, None, :]


def drop_probs(probs, dropout, seed, seq_ids=None):
    """Dropout on a padded attention map [B, H, S, S]."""
    if seq_ids is None:
        seq_ids = torch.arange(probs.shape[0], device=probs.device)
    keep = attention_keep(seed, dropout, seq_ids, *probs.shape[1:])
    return torch.where(keep, probs * keep_scale(dropout), 0)


class SequenceLayout:
    """Moves between packed [T, ...] and padded [B, S, ...] without reading a length on the host."""

    def __init__(self, cu_seqlens, max_seqlen, num_tokens):
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        self.shape = (len(starts), max_seqlen)
        self.full = num_tokens == len(starts) * max_seqlen
        index = torch.arange(max_seqlen, device=cu_seqlens.device)
        self.valid = index < (ends - starts)[:, None]  # [B, S]
        if not self.full:
            token = torch.arange(num_tokens, device=cu_seqlens.device)
            sequence = torch.searchsorted(ends, token, right=True)
            self.slot = sequence * max_seqlen + token - starts[sequence]  # [T] into B * S

    def pad(self, x):
        if self.full:
            return x.unflatten(0, self.shape)
        padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return padded.index_copy(0, self.slot, x).unflatten(0, self.shape)

    def unpad(self, x):
        x = x.flatten(0, 1)
        return x if self.full else x[self.slot]

    def score_mask(self, dtype, causal, window, score_bias):
        """What is added to the scores: [B or 1, H or 1, S, S], -inf at keys out of sight; None if all are seen."""
        if self.full and not causal and window is None:
            return score_bias
        batch, length = self.shape
        distance = torch.arange(length, device=self.valid.device)
        distance = distance[None, :] - distance[:, None]  # key - query
        seen = self.valid[:, None, None, :]
        if causal:
            seen = seen & (distance <= 0)
        if window is not None:
            seen = seen & (distance.abs() <= window)
        # a padded query sees itself, so that no row of the softmax is empty
        seen = seen | (distance == 0)
        bias = torch.zeros((), dtype=dtype, device=seen.device) if score_bias is None else score_bias.to(dtype)
        return torch.where(seen, bias, float("-inf"))


def dropout_add_norm(
    x, residual, weight, bias, *, dropout=0.0, seed=0, rows=None, eps=1e-12, kind="layernorm", prenorm=False
):
    """See `minibert_kernels.dropout_add_norm`."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    if dropout > 0.0:
        if rows is None:
            rows = torch.arange(total.shape[:-1].numel(), device=x.device)
        keep = row_keep(seed, dropout, rows.flatten(), x.shape[-1]).view(x.shape)
        total = torch.where(keep, total * keep_scale(dropout), 0)
    if residual is not None:
        total = total + residual.to(wide)
    if residual is not None or dropout > 0.0:
        total = total.to(dtype).to(wide)  # what is normalised is what backward, or a following layer, would read
    out = normalise(total, weight, bias, eps, kind).to(dtype)
    return (out, total.to(dtype)) if prenorm else out


def normalise(x, weight, bias, eps, kind):
    """LayerNorm (Ba et al., 2016, eq. 4) or RMSNorm (Zhang and Sennrich, 2019, eq. 4) of the last axis."""
    weight = weight.to(x.dtype)
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.to(x.dtype), eps)
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return out if bias is None else out + bias.to(x.dtype)


def bias_gelu(x, bias, *, approximate="none"):
    """gelu(x + bias); BERT's is the erf form, approximate="none" (Hendrycks and Gimpel, 2016)."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def bias_geglu(x, bias, *, approximate="none"):
    """gelu(a) * b for the halves a, b of x + bias: [..., 2F] to [..., F] (Shazeer, 2020)."""
    gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * value


def bias_swiglu(x, bias):
    """silu(a) * b for the halves a, b of x + bias: [..., 2F] to [..., F] (Shazeer, 2020)."""
    gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.silu(gate) * value


def embed_norm(
    ids, type_ids, positions, word, position, type, weight, bias, *, dropout=0.0, seed=0, rows=None, eps=1e-12
):  # fmt: skip
    """norm(word[ids] + position[positions] + type[type_ids]), then dropout: [T] to [T, D]."""
    # the order of the two additions is Hugging Face's, so that float32 results agree to the last bit
    total = F.embedding(ids, word) + F.embedding(type_ids, type)
    if position is not None:
        total = total + F.embedding(positions, position)
    out = normalise(total, weight, bias, eps, "layernorm")
    if dropout == 0.0:
        return out
    rows = torch.arange(len(ids), device=ids.device) if rows is None else rows
    return torch.where(row_keep(seed, dropout, rows, out.shape[-1]), out * keep_scale(dropout), 0)


def linear_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100):
    """Mean cross entropy of hidden · weightᵀ + bias over the rows that have a label.

    Args:
        hidden: [N, D]; weight: [V, D]; bias: [V] or None; labels: [N] int64.
    Returns:
        (loss, correct): a scalar, 0 with zero gradients where every row is ignored, and the int64 count of rows whose
        largest logit is the label.
    """
    logits = F.linear(hidden, weight, bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")
    counted = labels != ignore_index
    return total / counted.sum().clamp(min=1), ((logits.argmax(-1) == labels) & counted).sum()


def select_rows(x, rows):
    """x[rows]: [T, ...] and int64 [N] to [N, ...]."""
    return x.index_select(0, rows)


def pack(x, mask):
    """[B, S, ...] and a bool mask [B, S] to the packed [T, ...] tokens where mask is true (T is read on the host)."""
    return x[mask]


def unpack(x, cu_seqlens, max_seqlen):
    """Packed [T, ...] to [B, S, ...], zero at padding."""
    return SequenceLayout(cu_seqlens, max_seqlen, x.shape[0]).pad(x)
