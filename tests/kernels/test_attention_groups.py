"""Attention where heads of q share K/V heads, and with heads of more than 128."""

import pytest
import torch
from harness import SEED, Names
from test_attention import Case, both_forms, kernel, offsets, values_and_gradients

from minibert_kernels import attention, attention_probs, reference

LENGTHS = 5, 0, 17, 1
FUSED = r"\[T, H \+ 2 H_kv, d\], a fused projection"


def inputs(device, heads=4, num_kv_heads=2, head_size=16, slack=0):
    """A fused projection, cu_seqlens, a max_seqlen, and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(sum(LENGTHS), heads + 2 * num_kv_heads, head_size, generator=generator).to(device)
    dout = torch.randn(sum(LENGTHS), heads, head_size, generator=generator).to(device)
    return projection, (offsets(LENGTHS, device), max(LENGTHS) + slack), dout


def split(projection, num_kv_heads=2):
    return reference.split_projection(projection, None, None, num_kv_heads)


@both_forms
@pytest.mark.parametrize(("heads", "group"), [(4, 1), (4, 2), (4, 4), (6, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3, "bias": "bhg-", "window": 9, "lse": True, "seq_ids": True},
        {"dropout": 0.1, "bias": "g", "alibi": True, "causal": True, "schedule": True},
    ],
    ids=["window", "causal"],
)
def test_values_and_gradients_of_groups(options, heads, group, slack, device, poisoned):
    Case(seed=heads + group, lengths=(20, 0, 33, 1), heads=heads, group=group, slack=slack, **options).run(device)


@both_forms
@pytest.mark.parametrize("head_size", [96, 160, 192, 256])
def test_values_and_gradients_of_wide_heads(head_size, slack, device, poisoned):
    options = {"dropout": 0.2, "bias": "hg", "window": 15, "slack": slack}
    Case(seed=head_size, lengths=(35, 0, 20), heads=2, group=2, head_size=head_size, **options).run(device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "group", "head_size"), [(12, 4, 64), (8, 8, 128), (6, 3, 32), (4, 1, 256), (4, 2, 192)]
)
@pytest.mark.parametrize(
    "extras", [{}, {"bias": "hg", "alibi": True, "lse": True, "schedule": True}], ids=["", "extras"]
)
@pytest.mark.parametrize("lengths", [(512, 1, 0, 300, 77), (128, 1, 0, 77)])
def test_bfloat16_groups_and_wide_heads_on_a_gpu(lengths, extras, heads, group, head_size):
    options = {"head_size": head_size, "dtype": torch.bfloat16, "dropout": 0.1} | extras
    Case(seed=1, lengths=lengths, heads=heads, group=group, **options).run("cuda")


@both_forms
def test_a_shared_head_gives_each_query_what_copies_of_it_would(slack, device, poisoned):
    """To the last bit, with the dropout mask of the query's head; its own gradient is the sum of the copies'."""
    projection, rest, dout = inputs(device, slack=slack)
    q, k, v = split(projection)
    options = {"dropout": 0.3, "seed": SEED, "alibi_slopes": torch.rand(4, device=device)}
    shared = values_and_gradients(kernel, (q, k, v, *rest), dout, **options)
    copies = (reference.repeat_heads(x, 4) for x in (k, v))
    apart = values_and_gradients(kernel, (q, *copies, *rest), dout, **options)
    assert torch.equal(shared["out"], apart["out"])
    if slack:  # the short form has no backward of groups
        assert torch.equal(shared["dq"], apart["dq"])
    for name in ("dk", "dv"):
        torch.testing.assert_close(shared[name], apart[name].unflatten(1, (2, 2)).sum(2), rtol=1e-5, atol=1e-5)


@both_forms
def test_a_fused_projection_gets_one_gradient_and_nothing_is_put_together(slack, device, poisoned):
    projection, rest, dout = inputs(device, slack=slack)
    grads, seen = [], []
    for fused in (True, False):
        leaf = projection.clone().requires_grad_()
        qkv, options = ((leaf, None, None), {"num_kv_heads": 2}) if fused else (split(leaf), {})
        out = kernel(*qkv, *rest, dropout=0.2, **options)
        with Names() as names:
            grads.append(torch.autograd.grad(out, leaf, dout)[0])
        seen.append(names.like("cat", "copy", "clone", "pad", "add"))
    assert torch.equal(*grads)
    assert not seen[0] and seen[1]
    for backend in ("triton", "reference"):
        found = attention(projection, None, None, *rest, num_kv_heads=2, backend=backend)
        torch.testing.assert_close(found, reference.attention(*split(projection), *rest), rtol=1e-5, atol=1e-5)


def test_the_map_of_shared_heads_is_that_of_copies(device):
    projection, rest, _ = inputs(device)
    q, k, _ = split(projection)
    assert torch.equal(attention_probs(q, k, *rest), attention_probs(q, k.repeat_interleave(2, 1), *rest))


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ((6, 4, 4), {}, "k has 4 heads, which do not divide the 6 of q"),
        ((6, 0, 0), {}, "k has 0 heads, which do not divide the 6 of q"),
        ((6, 12, 12), {}, "k has 12 heads, which do not divide the 6 of q"),
        ((6, 3, 2), {}, r"v is torch.float32 \[23, 2, 16\]: expected torch.float32 \[23, 3, 16\]"),
        ((6, 3, 3), {"num_kv_heads": 3}, "num_kv_heads=3 is of a fused projection alone"),
        ((8,), {}, r"q is \[23, 8, 16\]: expected \[T, 3, H, d\], a fused projection"),
        ((8,), {"num_kv_heads": 4}, rf"q is \[23, 8, 16\], num_kv_heads=4: expected {FUSED}"),
        ((8,), {"num_kv_heads": 0}, rf"num_kv_heads=0: expected {FUSED}"),
        ((11,), {"num_kv_heads": 3}, "num_kv_heads=3 does not divide the 5 heads of q"),
    ],
)
def test_heads_that_do_not_fit_are_named(heads, options, message):
    qkv = [torch.zeros(sum(LENGTHS), n, 16) for n in heads] + [None] * (3 - len(heads))
    with pytest.raises(ValueError, match=message):
        attention(*qkv, offsets(LENGTHS), max(LENGTHS), **options)
