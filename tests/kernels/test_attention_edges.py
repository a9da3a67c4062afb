"""Attention on legal and extreme inputs: rows of no sequence, any strides, any window, a finite minus infinity."""

import importlib

import pytest
import torch
from harness import Names
from test_attention import both_forms, inputs, kernel, offsets, values_and_gradients
from tolerance import assert_as_accurate

from minibert_kernels import attention, philox, reference

op = importlib.import_module("minibert_kernels.attention")
OUTSIDE = (0, 3), (5, 0), (4, 9)  # rows before the first sequence, and after the last


def with_rows_outside(arguments, dout, before, after):
    """The arguments between rows of NaN, in memory as they would lie in a larger buffer."""
    *qkv, cu_seqlens, longest = arguments
    shape = before + len(dout) + after, *dout.shape[1:]
    wide = [x.new_full(shape, float("nan")) for x in (*qkv, dout)]
    for x, y in zip(wide, (*qkv, dout), strict=True):
        x[before : before + len(dout)] = y.detach()
    return (*wide[:3], cu_seqlens + before, longest), wide[3]


@both_forms
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"causal": True}], ids=str)
@pytest.mark.parametrize(("before", "after"), OUTSIDE)
@pytest.mark.parametrize("call", [kernel, reference.attention])
def test_rows_of_no_sequence_are_zero_and_change_nothing(call, before, after, options, slack, device, poisoned):
    arguments, dout = inputs(device, (5, 0, 17, 1), slack=slack)
    seed = {"seed": philox.as_seed(3, torch.device(device))}
    wide = with_rows_outside(arguments, dout, before, after)
    rows = slice(before, before + len(dout))
    alone, found = (values_and_gradients(call, *x, **options, **seed) for x in ((arguments, dout), wide))
    lse, lse_found = (call(*x, return_lse=True, **options, **seed)[1].mT.detach() for x in (arguments, wide[0]))
    for name, x in (*found.items(), ("lse", lse_found)):
        torch.testing.assert_close(x[rows], lse if name == "lse" else alone[name], rtol=1e-6, atol=1e-6)
        outside = torch.cat([x[: rows.start], x[rows.stop :]])
        assert (outside == (-float("inf") if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("call", [kernel, reference.attention])
@pytest.mark.parametrize(("lengths", "before"), [((), 0), ((0,), 0), ((0, 3), 2), ((2, 3), 0)])
def test_a_buffer_as_large_as_full_sequences_need_not_hold_them(call, lengths, before, device, poisoned):
    longest, tokens = 5, 5 * len(lengths) or 5
    q, k, v, dout = torch.randn(4, tokens, 2, 16, device=device)
    rows = slice(before, before + sum(lengths))
    found = values_and_gradients(call, (q, k, v, offsets(lengths, device) + before, longest), dout)
    few = (q[rows], k[rows], v[rows], offsets(lengths, device), longest)
    alone = values_and_gradients(call, few, dout[rows])
    for name, x in found.items():
        torch.testing.assert_close(x[rows], alone[name], rtol=1e-5, atol=1e-6)
        assert (x[: rows.start] == 0).all() and (x[rows.stop :] == 0).all()


@both_forms
def test_index_tensors_may_have_any_stride(slack, device):
    arguments, dout = inputs(device, (7, 14, 8), slack=slack)
    *qkv, cu_seqlens, longest = arguments
    ids = torch.tensor([5, 1 << 40, 2], device=device)
    slopes, seed = torch.tensor([0.5, 0.25], device=device), torch.tensor([3], device=device)
    table = op.attention_schedule(cu_seqlens, len(dout))

    def spread(x):
        """The same values between others."""
        wide = torch.full((*x.shape, 2), 9, dtype=x.dtype, device=device)
        wide[..., 0] = x
        return wide[..., 0]

    found = [
        values_and_gradients(
            kernel, (*qkv, change(cu_seqlens), longest), dout, dropout=0.4, seed=change(seed), seq_ids=change(ids),
            alibi_slopes=change(slopes), schedule=change(table),
        )
        for change in (lambda x: x, spread)
    ]  # fmt: skip
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
@both_forms
def test_a_window_of_any_size_is_none(window, causal, slack, device):
    arguments, dout = inputs(device, (150, 3) if slack else (20, 3))
    wide = values_and_gradients(kernel, arguments, dout, window=window, causal=causal)
    none = values_and_gradients(kernel, arguments, dout, causal=causal)
    for name in none:
        torch.testing.assert_close(wide[name], none[name], rtol=1e-5, atol=1e-6)


@both_forms
@pytest.mark.parametrize("value", [-1e9, -3e30, "min", "half's min"])
@pytest.mark.parametrize("where", ["rows", "keys"])
def test_a_finite_bias_that_stands_for_minus_infinity(where, value, slack, device, poisoned):
    arguments, dout = inputs(device, (9, 20, 1), slack=slack)
    smallest = {"min": torch.finfo(torch.float32).min, "half's min": torch.finfo(torch.float16).min}
    bias = torch.randn(1, 2, arguments[4], arguments[4], device=device)
    if where == "rows":
        bias[:, :, 2:5] = smallest.get(value, value)
    else:
        bias[..., 1:4] = smallest.get(value, value)
    bias.requires_grad_()
    # where the logits beside it are not all lost, both round them to parts of 65504
    grain = 0.05 if where == "rows" and value == "half's min" else 1e-4
    options = {"return_lse": True, "score_bias": bias}
    ours, theirs = (values_and_gradients(call, arguments, dout, **options) for call in (kernel, reference.attention))
    least = torch.finfo(torch.float32).min  # -1e38 and less count as -1e38, and so do the rows' lse
    lse = ours.pop("lse"), theirs.pop("lse")
    for x, y in (lse, *((ours[name], theirs[name]) for name in ours)):
        torch.testing.assert_close(x, y.clamp(min=-1e38) if y is lse[1] else y, rtol=grain, atol=grain)
    assert least < lse[0].min() and lse[0].isfinite().all()


@both_forms
def test_a_fused_projection_gets_one_gradient_and_nothing_is_copied(slack, device):
    (q, k, v, cu_seqlens, longest), dout = inputs(device, slack=slack)
    qkv = torch.stack([q, k, v], 1).detach()
    grads, seen = [], []
    for fused in (True, False):
        leaf = qkv.clone().requires_grad_()
        out = kernel(*((leaf, None, None) if fused else leaf.unbind(1)), cu_seqlens, longest, dropout=0.2)
        with Names() as names:
            grads.append(torch.autograd.grad(out, leaf, dout)[0])
        seen.append(names.like("stack", "cat", "copy", "clone"))
    assert torch.equal(*grads)
    assert not seen[0] and seen[1]
    expected = reference.attention(qkv, None, None, cu_seqlens, longest)
    torch.testing.assert_close(kernel(qkv, None, None, cu_seqlens, longest), expected, rtol=1e-5, atol=1e-5)


@both_forms
def test_dropout_of_a_probability_that_rounds_to_none_is_none(slack, device):
    arguments, dout = inputs(device, slack=slack)
    none, rounded = (values_and_gradients(kernel, arguments, dout, dropout=p) for p in (0.0, 0.0019))
    assert all(torch.equal(none[name], rounded[name]) for name in none)


@pytest.mark.parametrize("threshold", [1, 2, 127, 128, 129, 254, 255])
def test_every_threshold_keeps_the_bytes_of_the_reference(threshold, device):
    length = 64
    q = torch.zeros(length, 1, length, device=device)
    v = torch.eye(length, device=device)[:, None]
    seed = torch.tensor(11, device=device)
    out = kernel(q, q, v, offsets([length], device), length, dropout=threshold / 256, seed=seed)
    sequence = torch.zeros(1, dtype=torch.int64, device=device)
    keep = philox.attention_keep(seed, threshold / 256, sequence, 1, length, length)
    assert torch.equal(out[:, 0] != 0, keep[0, 0])


@both_forms
def test_a_scale_of_one_and_equal_inputs_give_the_mean(slack, device, poisoned):
    tokens = 20
    ones = torch.ones(tokens, 1, 16, device=device)
    arguments = ones, ones, ones, offsets((13, 7), device), 13 + slack
    found = values_and_gradients(kernel, arguments, ones, scale=1.0)
    torch.testing.assert_close(found["out"], ones)
    torch.testing.assert_close(found["dv"], ones)
    assert found["dq"].abs().max() < 1e-5 and found["dk"].abs().max() < 1e-5


def test_nothing_is_read_or_written_past_the_end(device):
    """Between two canaries: NaN after out and its gradients, a huge border after cu_seqlens."""
    arguments, dout = inputs(device, (130, 7))
    borders = torch.tensor([0, 130, 137, 2**31 - 1], dtype=torch.int32, device=device)[:3]
    made = []

    def guarded(q, *rest):
        tensors = buffers(q, *rest)
        for x in tensors:
            wide = x.new_full((x.numel() + 4096,), float("nan"))
            made.append((wide, x.numel()))
        return tuple(wide[:n].view(x.shape) for (wide, n), x in zip(made[-len(tensors) :], tensors, strict=True))

    buffers = op._forward_buffers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_forward_buffers", guarded)
        out, lse = op._run_forward(
            *(x.detach() for x in arguments[:3]), borders, *(None,) * 5, 130, 0.25, 0.0, None, None, None
        )
    assert all(wide[n:].isnan().all() and not wide[:n].isnan().any() for wide, n in made) and len(made) == 2
    assert torch.equal(out, kernel(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(3615, 0), (1055, 744), (1057, 111)])
def test_long_sequences_of_odd_lengths(lengths, device):
    """Once wrong in other implementations; one head, and the reference in float64 in pieces."""
    arguments, dout = inputs(device, lengths, 1)
    ours, exact = {}, {}
    ours = values_and_gradients(kernel, arguments, dout)
    wide = (*(x.detach().double() for x in arguments[:3]), *arguments[3:])
    exact = values_and_gradients(reference.attention, wide, dout.double())
    torchs = values_and_gradients(reference.attention, arguments, dout)
    for name in ours:
        assert_as_accurate(ours[name], torchs[name], exact[name], factor=4, name=name)


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([0, 4, 3, 5], "cu_seqlens goes down"),
        ([0, 3, 6], "cu_seqlens begins at 0 and ends at 6: expected at least 0, and at most 5"),
        ([-1, 3, 5], "cu_seqlens begins at -1"),
        ([0, 5], "max_seqlen=4: the longest sequence has 5 tokens"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_borders_that_do_not_fit_are_refused_on_the_host(borders, message, backend):
    q = torch.zeros(5, 2, 16)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, torch.tensor(borders, dtype=torch.int32), 4, backend=backend)


def test_integer_inputs_are_refused():
    q = torch.zeros(5, 2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="q is torch.int64: expected"):
        attention(q, q, q, torch.tensor([0, 5], dtype=torch.int32), 5)
