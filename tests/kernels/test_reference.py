import math

import pytest
import torch

from minibert_kernels import philox, reference

LENGTHS = (5, 0, 1, 7)
CU_SEQLENS = torch.tensor([0, 5, 5, 6, 13], dtype=torch.int32)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def naive_attention(q, k, v, *, lengths=LENGTHS, dropout=0.0, seed=0, seq_ids=None, scale=None, seen=None, bias=None):
    """One sequence, head, query and key at a time."""
    out, start = torch.zeros_like(v), 0
    for b, length in enumerate(lengths):
        for h in range(q.shape[1]):
            for i in range(length):
                keys = [j for j in range(length) if seen is None or seen(i, j)]
                scores = torch.stack([q[start + i, h] @ k[start + j, h] for j in keys])
                scores = scores * (1 / math.sqrt(q.shape[2]) if scale is None else scale)
                if bias is not None:
                    scores = scores + bias[b, h, i, keys]
                probs = scores.exp() / scores.exp().sum()
                for j, p in zip(keys, probs, strict=True):
                    if dropout:
                        seq = b if seq_ids is None else int(seq_ids[b])
                        words = philox.philox(seed, (h << philox.HEAD_SHIFT) + j // 16, i, seq, seq >> 32)
                        byte = words[j % 16 // 4] >> 8 * (j % 4) & 0xFF
                        p = p * 256 / (256 - round(256 * dropout)) if byte >= round(256 * dropout) else 0 * p
                    out[start + i, h] += p * v[start + j, h]
        start += length
    return out


@pytest.mark.parametrize(
    ("options", "naive"),
    [
        ({}, {}),
        ({"scale": 0.3}, {"scale": 0.3}),
        ({"causal": True}, {"seen": lambda i, j: j <= i}),
        ({"window": 2}, {"seen": lambda i, j: abs(i - j) <= 2}),
        ({"causal": True, "window": 1}, {"seen": lambda i, j: i - 1 <= j <= i}),
        ({"dropout": 0.4, "seed": 9}, {"dropout": 0.4, "seed": 9}),
        ({"dropout": 0.4, "seed": 9, "window": 3}, {"dropout": 0.4, "seed": 9, "seen": lambda i, j: abs(i - j) <= 3}),
        *[2 * ({"dropout": 0.4, "seq_ids": torch.tensor([8, 2**40, 3, 1])},)],
        *[2 * ({"score_bias": normal(4, 3, 7, 7, seed=9).detach()},)],
    ],
    ids=["plain", "scale", "causal", "window", "causal window", "dropout", "dropout window", "seq_ids", "score_bias"],
)
def test_attention_is_a_loop_over_sequences_heads_queries_and_keys(options, naive):
    q, k, v = (normal(13, 3, 4, seed=s) for s in range(3))
    naive = {name.replace("score_bias", "bias"): value for name, value in naive.items()}
    ours, expected = reference.attention(q, k, v, CU_SEQLENS, 7, **options), naive_attention(q, k, v, **naive)
    torch.testing.assert_close(ours, expected)
    dout = normal(13, 3, 4, seed=5).detach()
    grads = (torch.autograd.grad(out, (q, k, v), dout) for out in (ours, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_attention_of_equal_lengths_needs_no_padding_and_agrees():
    q, k, v = (normal(14, 3, 4, seed=s) for s in range(3))
    ours = reference.attention(q, k, v, torch.tensor([0, 7, 14], dtype=torch.int32), 7)
    torch.testing.assert_close(ours, naive_attention(q, k, v, lengths=(7, 7)))


def test_attention_does_not_change_with_a_longer_max_seqlen():
    q, k, v = (normal(13, 3, 4, seed=s) for s in range(3))
    for dropout in (0.0, 0.4):
        short, long = (reference.attention(q, k, v, CU_SEQLENS, n, dropout=dropout, seed=2) for n in (7, 37))
        torch.testing.assert_close(short, long)


def test_the_attention_map_sums_to_one_at_tokens_and_zero_at_padding_and_gives_the_output():
    q, k, v = (normal(13, 3, 4, seed=s) for s in range(3))
    probs = reference.attention_probs(q, k, CU_SEQLENS, 7)
    assert probs.shape == (4, 3, 7, 7)
    rows = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    torch.testing.assert_close(probs.sum(-1), rows[:, None].expand(-1, 3, -1).double())
    out = torch.einsum("bhij,bjhd->bihd", probs, reference.unpack(v, CU_SEQLENS, 7))
    torch.testing.assert_close(out[rows], reference.attention(q, k, v, CU_SEQLENS, 7))


def test_layer_norm_by_hand():
    x, weight, bias = torch.tensor([[1.0, 3.0]]), torch.tensor([2.0, 10.0]), torch.tensor([0.5, 0.0])
    # mean 2, variance 1: (-1, 1)
    assert reference.dropout_add_norm(x, None, weight, bias).tolist() == [[-1.5, 10.0]]
    out, total = reference.dropout_add_norm(x, torch.tensor([[4.0, 0.0]]), weight, None, prenorm=True)
    assert total.tolist() == [[5.0, 3.0]] and out.tolist() == [[2.0, -10.0]]
    # mean square 25 / 2
    out = reference.dropout_add_norm(torch.tensor([[3.0, 4.0]]), None, weight, bias, kind="rmsnorm")
    torch.testing.assert_close(out, torch.tensor([[6.0, 40.0]]) / math.sqrt(12.5) + bias)


def test_dropout_acts_on_x_alone_and_scales_by_the_exact_fraction():
    x, weight = torch.ones(13, 37), torch.ones(37)
    _, total = reference.dropout_add_norm(x, 10 * x, weight, None, dropout=0.3, seed=5, prenorm=True)
    keep = philox.row_keep(5, 0.3, torch.arange(13), 37)
    torch.testing.assert_close(total, torch.where(keep, 10 + 256 / 179, 10.0))


def test_half_precision_is_accumulated_in_float32():
    x = torch.full((1, 4096), 100.0, dtype=torch.float16)
    x[0, 0] = 101.0
    out = reference.dropout_add_norm(x, None, torch.ones(4096).half(), None, kind="rmsnorm")
    assert out.dtype == torch.float16 and out[0, 1] == 1.0, "the squares sum to 4e7, which float16 does not hold"


@pytest.mark.parametrize("bias", [torch.tensor([0.5, -0.25]), None])
def test_gelu_forms_by_formula(bias):
    x = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    z = x if bias is None else x + bias
    erf = z / 2 * (1 + torch.erf(z / math.sqrt(2)))
    tanh = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    torch.testing.assert_close(reference.bias_gelu(x, bias), erf)
    torch.testing.assert_close(reference.bias_gelu(x, bias, approximate="tanh"), tanh)
    assert not torch.allclose(erf, tanh, atol=1e-6)


@pytest.mark.parametrize("bias", [torch.tensor([0.5, -0.25, 1.0, 2.0]), None])
def test_gated_forms_activate_the_first_half_and_multiply_by_the_second(bias):
    x = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    z = x if bias is None else x + bias
    gate, value = z[:, :2], z[:, 2:]
    torch.testing.assert_close(reference.bias_geglu(x, bias), gate / 2 * (1 + torch.erf(gate / math.sqrt(2))) * value)
    torch.testing.assert_close(reference.bias_swiglu(x, bias), gate / (1 + torch.exp(-gate)) * value)


def test_embeddings_are_summed_normalised_and_dropped():
    word, position, kind = normal(11, 37, seed=1), normal(7, 37, seed=2), normal(2, 37, seed=3)
    weight, bias = normal(37, seed=4), normal(37, seed=5)
    ids, types, positions = torch.tensor([3, 3, 10]), torch.tensor([0, 1, 1]), torch.tensor([0, 6, 2])
    total = torch.stack(
        [word[3] + position[0] + kind[0], word[3] + position[6] + kind[1], word[10] + position[2] + kind[1]]
    )
    centred = total - total.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-12).sqrt() * weight + bias
    arguments = ids, types, positions, word, position, kind, weight, bias
    torch.testing.assert_close(reference.embed_norm(*arguments), expected)
    rows = torch.tensor([5, 2**40, 6])
    keep = philox.row_keep(9, 0.5, rows, 37)
    dropped = reference.embed_norm(*arguments, dropout=0.5, seed=9, rows=rows)
    torch.testing.assert_close(dropped, torch.where(keep, expected * 2, 0))
    dropped.sum().backward()
    assert word.grad[[3, 10]].any(1).all() and not word.grad[[0, 1, 2, 4, 5]].any()


def test_embeddings_need_no_positions():
    word, kind, weight = normal(3, 2, seed=1), normal(1, 2, seed=2), torch.tensor([1.0, 2.0]).double()
    zero = torch.tensor([0])
    out = reference.embed_norm(zero + 1, zero, None, word, None, kind, weight, None)
    sign = (word[1] + kind[0]).diff().sign()
    torch.testing.assert_close(out, torch.stack([-sign, 2 * sign], 1))


def test_cross_entropy_counts_labelled_rows_alone():
    hidden, weight, bias = normal(6, 5), normal(7, 5, seed=1), normal(7, seed=2)
    logits = hidden @ weight.T + bias
    best = logits.argmax(1)
    labels = torch.tensor([int(best[0]), -100, int(best[2]), (int(best[3]) + 1) % 7, -100, -100])
    loss, correct = reference.linear_cross_entropy(hidden, weight, bias, labels)
    rows = torch.tensor([0, 2, 3])
    expected = (logits[rows].exp().sum(1).log() - logits[rows, labels[rows]]).mean()
    torch.testing.assert_close(loss, expected)
    assert correct.item() == 2 and correct.dtype == torch.int64
    loss.backward()
    assert not hidden.grad[[1, 4, 5]].any() and hidden.grad[rows].any(1).all()


def test_cross_entropy_of_ignored_rows_is_zero_with_zero_gradients():
    for count in (3, 0):
        hidden, weight, bias = normal(count, 5), normal(7, 5, seed=1), normal(7, seed=2)
        loss, correct = reference.linear_cross_entropy(hidden, weight, bias, torch.full((count,), -100))
        loss.backward()
        assert loss.item() == 0.0 and correct.item() == 0
        assert all(t.grad is not None and not t.grad.any() for t in (hidden, weight, bias))


def test_cross_entropy_takes_another_ignored_label_and_no_bias():
    hidden, weight = normal(3, 5), normal(7, 5, seed=1)
    loss, _ = reference.linear_cross_entropy(hidden, weight, None, torch.tensor([2, 0, 0]), ignore_index=0)
    torch.testing.assert_close(loss, -(hidden[0] @ weight.T).log_softmax(0)[2])


def test_pack_and_unpack_are_inverse_and_padding_is_zero():
    x = normal(4, 7, 3)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    packed = reference.pack(x, mask)
    assert torch.equal(packed[5], x[2, 0]) and packed.shape == (13, 3)
    padded = reference.unpack(packed, CU_SEQLENS, 7)
    assert torch.equal(padded, torch.where(mask[..., None], x, 0))
    assert torch.equal(reference.pack(padded, mask), packed)
    padded.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand_as(x).double())


def test_select_rows_gathers_and_its_gradient_adds_repeats_up():
    x = normal(5, 3)
    out = reference.select_rows(x, torch.tensor([4, 0, 4]))
    assert torch.equal(out, torch.stack([x[4], x[0], x[4]]))
    out.sum().backward()
    assert x.grad[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (lambda q, k, v: reference.attention(q, k, v, CU_SEQLENS, 7), [(13, 2, 3)] * 3),
        (lambda q, k, v: reference.attention(q, k, v, CU_SEQLENS, 7, dropout=0.4, window=2), [(13, 2, 3)] * 3),
        (lambda q, k: reference.attention_probs(q, k, CU_SEQLENS, 7, causal=True), [(13, 2, 3)] * 2),
        (reference.bias_gelu, [(3, 4), (4,)]),
        (reference.bias_geglu, [(3, 4), (4,)]),
        (reference.bias_swiglu, [(3, 4), (4,)]),
        (
            lambda *t: reference.embed_norm(*[torch.tensor([1, 0, 1])] * 3, *t, dropout=0.4),
            [(2, 7), (2, 7), (2, 7), (7,), (7,)],
        ),
        (
            lambda h, w, b: reference.linear_cross_entropy(h, w, b, torch.tensor([2, -100, 0]))[0],
            [(3, 5), (4, 5), (4,)],
        ),
        (lambda x: reference.unpack(x, CU_SEQLENS, 8), [(13, 3)]),
    ],
    ids=["attention", "attention dropout", "map", "gelu", "geglu", "swiglu", "embed", "cross entropy", "unpack"],
)
def test_gradients_agree_with_finite_differences(op, shapes):
    assert torch.autograd.gradcheck(op, [normal(*shape, seed=i) for i, shape in enumerate(shapes)])
