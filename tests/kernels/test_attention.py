import importlib
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from harness import DTYPES, SEED, repeat_with
from tolerance import BACKWARD, FORWARD, assert_as_accurate

from minibert_kernels import attention, attention_probs, philox, reference
from minibert_kernels.launch import attention_plan, attention_short_plan, capability

op = importlib.import_module("minibert_kernels.attention")
LAYOUTS = ("contiguous", "fused projection", "heads first", "dims first", "misaligned", "every second dim")
LONG = 130  # max_seqlen that many tokens over the longest sequence chooses the long form


def kernel(*arguments, **options):
    return attention(*arguments, backend="triton", **options)


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def inputs(device, lengths=(5, 0, 17, 1), heads=2, head_size=16, dtype=torch.float32, seed=0, slack=0):
    """q, k, v as views of one fused projection that ask for gradients, an output gradient and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    qkv, dout = torch.randn(2, sum(lengths), 3, heads, head_size, generator=generator).to(device, dtype)
    q, k, v = (x.requires_grad_() for x in qkv.unbind(1))
    return (q, k, v, offsets(lengths, device), max(lengths, default=0) + slack), dout[:, 0]


def gradient_of_lse(dout):
    """[H, T], a line from -1 to 1."""
    shape = dout.shape[1], dout.shape[0]
    return torch.linspace(-1, 1, max(shape[0] * shape[1], 1), device=dout.device)[: shape[0] * shape[1]].view(shape)


def values_and_gradients(call, arguments, dout, *, score_bias=None, **options):
    """By name; with return_lse also lse, and its gradient."""
    q, k, v, *rest = arguments
    leaves = {name: x.detach().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    bias = {}
    if score_bias is not None:
        bias = {"score_bias": score_bias.detach().requires_grad_(score_bias.requires_grad)}
    outs = call(*leaves.values(), *rest, **bias, **options)
    outs = dict(zip(("out", "lse"), outs if isinstance(outs, tuple) else (outs,), strict=False))
    douts = [dout.to(outs["out"].dtype)]
    if "lse" in outs:
        douts.append(gradient_of_lse(dout).to(outs["lse"].dtype))
    leaves |= {name: x for name, x in bias.items() if x.requires_grad}
    grads = torch.autograd.grad(list(outs.values()), list(leaves.values()), douts)
    return {name: x.detach() for name, x in outs.items()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def widen(options):
    return {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}


def gradients_through_the_output(
    arguments, dout, *, score_bias=None, dropout=0.0, seed=0, seq_ids=None, scale=None, causal=False, window=None,
    alibi_slopes=None, return_lse=False, schedule=None,
):  # fmt: skip
    """By torch in the dtype of the arguments, from P ⊙ (dP - delta + dlse) with delta = rowsum(dout ⊙ out): the formula
    of every attention that walks over tiles (Dao et al., 2022, Algorithm 4), where delta and dP are rounded apart."""
    layout = reference.SequenceLayout(*arguments[3:], len(dout))
    leaves = {name: x.detach().requires_grad_() for name, x in zip(("dq", "dk"), arguments, strict=False)}
    padded = (layout.pad(x).transpose(1, 2) for x in (*leaves.values(), arguments[2].detach(), dout))
    q, k, v, dout_padded = (reference.repeat_heads(x, dout.shape[1]) for x in padded)
    terms = layout.score_terms(q.dtype, causal, window, score_bias, alibi_slopes)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + (0 if terms is None else terms)
    probs = reference.softmax(scores.detach()).requires_grad_()
    out = (reference.drop_probs(probs, dropout, seed, seq_ids) if dropout else probs) @ v
    (dprobs,) = torch.autograd.grad(out, probs, dout_padded)
    delta = (out * dout_padded).sum(-1)
    if return_lse:
        delta = delta - layout.pad(gradient_of_lse(dout).mT).mT
    if score_bias is not None and score_bias.requires_grad:
        leaves["dscore_bias"] = score_bias
    dscores = (probs * (dprobs - delta[..., None])).to(scores.dtype)
    return dict(zip(leaves, torch.autograd.grad(scores, list(leaves.values()), dscores), strict=True))


def references(arguments, dout, **options):
    """The reference in the dtype of the arguments, at its worst, and in float64.

    A sum over few terms may come out exact by luck; torch is measured on four orders of the head's dims, and each
    element is the one furthest from float64. Gradients of the long form and of the bias are measured by both formulas.
    """
    qkv, rest = arguments[:3], arguments[3:]
    wide = widen(options)
    exact = values_and_gradients(reference.attention, (*(x.double() for x in qkv), *rest), dout.double(), **wide)
    size, group = op._element_size(dout), op._group(*qkv[:2])
    plan = attention_short_plan(dout.shape[2], size, capability(dout.device), rest[1], "bwd", group)
    both = {"dq", "dk", "dscore_bias"} if plan is None else {"dscore_bias"}
    results = []
    for shift in range(4):
        rolled = [x.detach().roll(shift, -1) for x in (*qkv, dout)]
        found = values_and_gradients(reference.attention, (*rolled[:3], *rest), rolled[3], **options)
        other = gradients_through_the_output((*rolled[:3], *rest), rolled[3], **options) if both & found.keys() else {}
        for gradients in (found, {name: x for name, x in other.items() if name in both}):
            results += [
                (name, x.roll(-shift, -1) if name in ("out", "dq", "dk", "dv") else x) for name, x in gradients.items()
            ]
    worst = {}
    for name, x in results:
        before = worst.setdefault(name, x)
        further = (x - exact[name]).abs() >= (before - exact[name]).abs()
        worst[name] = torch.where(further | ~x.isfinite(), x, before)
    return worst, exact


def check(arguments, dout, **options):
    ours = values_and_gradients(kernel, arguments, dout, **options)
    torchs, exact = references(arguments, dout, **options)
    assert ours.keys() == exact.keys()
    for name in ours.keys() - {"dq", "dk", "dv"}:
        factor = BACKWARD if name.startswith("d") else FORWARD
        assert_as_accurate(ours[name], torchs[name], exact[name], factor=factor, name=name)
    # of the fused projection: dq and dk are differences of nearly equal numbers, whose error comes from those of dv
    fused = [torch.cat([x["dq"], x["dk"], x["dv"]], 1) for x in (ours, torchs, exact)]
    assert_as_accurate(*fused, factor=BACKWARD, name="gradient of [T, H + 2 H_kv, d]")


@dataclass(frozen=True)
class Case:
    seed: int
    lengths: tuple
    heads: int = 2
    group: int = 1  # of them share a K/V head
    head_size: int = 16
    dtype: torch.dtype = torch.float32
    layouts: tuple = ("fused projection",) * 4
    dropout: float = 0.0
    seq_ids: bool = False
    scale: float | None = None
    causal: bool = False
    window: int | None = None
    slack: int = 0
    bias: str = (
        ""  # letters of "bh" that have a size of their own, "g" asks for a gradient, "-" hides keys, "t" transposed
    )
    alibi: bool = False
    lse: bool = False
    schedule: bool = False

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        lengths = rng.choice(
            [(), (0,), (13, 7), (16,), (17, 0, 32), (33, 1), (70,), (64, 9), (3, 2, 1, 0, 5), (140,)]
            + [(rng.randint(2, 25), *(rng.randint(0, 25) for _ in range(rng.randint(0, 2))))] * 6
        )
        group = rng.choice([1, 1, 1, 2, 3])
        return cls(
            seed=seed,
            lengths=lengths,
            heads=group * rng.choice([1, 1, 2, 3] if group == 1 else [1, 2]),
            group=group,
            head_size=rng.choice([16, 32, 64, 128, 24, 37, 80, 160, rng.randint(16, 128), rng.randint(129, 256)]),
            dtype=rng.choice(DTYPES),
            layouts=tuple(rng.choice(LAYOUTS) for _ in range(4)),
            dropout=rng.choice([0.0, 0.0, 0.1, 0.5]),
            seq_ids=rng.random() < 0.5,
            scale=rng.choice([None, None, 0.3, 1.0]),
            causal=rng.random() < 0.3,
            window=rng.choice([None, None, 1, 3, 20]),
            slack=rng.choice([0, 1, 60, LONG, LONG]),
            alibi=rng.random() < 0.25,
            lse=rng.random() < 0.25,
            schedule=rng.random() < 0.5,
            bias=rng.choice(["", "", "1", "g", "hg", "bg", "bhg-", "hgt", "b-", "g-t"]),
        )

    def score_bias(self, generator, device):
        size = max(self.lengths, default=0) + self.slack
        shape = len(self.lengths) if "b" in self.bias else 1, self.heads if "h" in self.bias else 1, size, size
        bias = torch.randn(shape, generator=generator)
        if "-" in self.bias:
            bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.3, float("-inf"))
        bias = bias.to(device, self.dtype if self.seed % 2 else torch.float32)
        return (bias.mT if "t" in self.bias else bias).requires_grad_("g" in self.bias)

    def run(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        shape = sum(self.lengths), self.heads, self.head_size
        tensors = torch.randn(4, *shape, generator=generator).to(device)
        tensors[0] *= self.head_size**-0.5 / (self.scale or self.head_size**-0.5)  # scores of about 1
        heads = self.heads, self.heads // self.group, self.heads // self.group, self.heads
        tensors = [x[:, :n].to(self.dtype) for x, n in zip(tensors, heads, strict=True)]
        q, k, v, dout = (arrange(x, y) for x, y in zip(tensors, self.layouts, strict=True))
        seq_ids = torch.randint(-(2**62), 2**62, (len(self.lengths),), generator=generator).to(device)
        cu_seqlens = offsets(self.lengths, device)
        check(
            (q, k, v, cu_seqlens, max(self.lengths, default=0) + self.slack), dout,
            dropout=self.dropout, seed=self.seed << 30, seq_ids=seq_ids if self.seq_ids else None, scale=self.scale,
            causal=self.causal, window=self.window, return_lse=self.lse,
            score_bias=self.score_bias(generator, device) if self.bias else None,
            alibi_slopes=torch.rand(self.heads, generator=generator).to(device) if self.alibi else None,
            schedule=op.attention_schedule(cu_seqlens, len(q)) if self.schedule else None,
        )  # fmt: skip


both_forms = pytest.mark.parametrize("slack", [pytest.param(0, id="short"), pytest.param(LONG, id="long")])


def arrange(x, layout):
    """The values of x [T, H, d] in other strides, with NaN between them."""
    tokens, heads, dims = x.shape
    if layout == "contiguous":
        return x
    nan = {"dtype": x.dtype, "device": x.device, "fill_value": float("nan")}
    if layout == "fused projection":
        view = torch.full((tokens, 3, heads, dims), **nan)[:, 1]
    elif layout == "heads first":
        view = torch.full((heads, tokens, dims), **nan).transpose(0, 1)
    elif layout == "dims first":
        view = torch.full((dims, heads, tokens), **nan).permute(2, 1, 0)
    elif layout == "misaligned":
        view = torch.full((tokens, heads, dims + 3), **nan)[..., 1 : dims + 1]
    else:
        view = torch.full((tokens, heads, 2 * dims), **nan)[..., ::2]
    return view.copy_(x)


def test_any_call_is_as_accurate_as_torch(fuzz_seed, device, poisoned):
    case = Case.draw(fuzz_seed)
    with repeat_with(case, device):
        case.run(device)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_values_and_gradients_at_the_head_sizes_of_berts(head_size, dtype, dropout, device, poisoned):
    Case(seed=head_size, lengths=(130, 7, 64), heads=1, head_size=head_size, dtype=dtype, dropout=dropout).run(device)


@pytest.mark.parametrize("slack", [0, LONG])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_the_tiles_of_float32_are_right_too(head_size, slack, device, poisoned, monkeypatch):
    monkeypatch.setattr(op, "_element_size", lambda q: 4)
    options = {"bias": "hg", "lse": True, "dropout": 0.1, "slack": slack, "schedule": True}
    Case(seed=head_size, lengths=(20, 9), heads=2, head_size=head_size, **options).run(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize(
    "extras", [{}, {"bias": "hg", "alibi": True, "lse": True, "schedule": True}], ids=["", "extras"]
)
@pytest.mark.parametrize("lengths", [(512, 1, 0, 300, 1024, 77), (128, 1, 0, 77, 128), (64, 0, 3), (30, 17)])
def test_bfloat16_values_and_gradients_on_a_gpu(lengths, extras, head_size, dropout):
    case = Case(seed=1, lengths=lengths, heads=12, head_size=head_size, dtype=torch.bfloat16, dropout=dropout, **extras)
    case.run("cuda")


def test_a_wrong_kernel_is_seen(device, monkeypatch):
    monkeypatch.setattr(op, "threshold", lambda p: philox.threshold(p) + 1)
    with pytest.raises(AssertionError, match="error"):
        Case(seed=0, lengths=(32, 13), dropout=0.5).run(device)


def test_a_wrong_bias_gradient_is_seen(device, monkeypatch):
    monkeypatch.setattr(op, "_run_dbias", lambda q, tensors, *_: tensors[-1].fill_(1e-3))
    with pytest.raises(AssertionError, match="dscore_bias: error"):
        Case(seed=0, lengths=(32, 13), bias="g").run(device)


@both_forms
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_draws_the_mask_of_the_numpy_twin(p, slack, device):
    length, heads, seq_ids = 100, 2, np.array([7, (5 << 32) + 3, -2])
    q = torch.zeros(3 * length, heads, length, device=device)
    v = torch.eye(length, device=device).repeat(3, 1)[:, None].expand(-1, heads, -1)
    seq_tensor = torch.from_numpy(seq_ids).to(device)
    out = kernel(q, q, v, offsets([length] * 3, device), length + slack, dropout=p, seed=SEED, seq_ids=seq_tensor)
    kept = (out != 0).view(3, length, heads, length).transpose(1, 2).cpu().numpy()

    seq, head, row, col = np.ogrid[:3, :heads, :length, :length]
    words = philox.philox(SEED, (head << 22) + col // 16, row, seq_ids[seq], seq_ids[seq] >> 32)
    word = np.select([col % 16 // 4 == i for i in range(4)], words)
    assert np.array_equal(kept, (word >> (8 * (col % 4)) & 0xFF) >= philox.threshold(p))
    assert abs(kept.mean() - (1 - p)) < 0.01
    assert torch.allclose(out[out != 0], torch.tensor(philox.keep_scale(p) / length, device=device), rtol=1e-5)


def test_the_seed_may_be_an_int_of_any_size_or_a_tensor(device):
    arguments, _ = inputs(device)
    out = kernel(*arguments, dropout=0.5, seed=-3)
    assert torch.equal(out, kernel(*arguments, dropout=0.5, seed=2**64 - 3))
    assert torch.equal(out, kernel(*arguments, dropout=0.5, seed=torch.tensor(-3, device=device)))
    assert not torch.equal(out, kernel(*arguments, dropout=0.5, seed=-3 + (1 << 40)))


@both_forms
def test_packed_padded_and_rebatched_sequences_agree(slack, device):
    lengths, longest, ids = (5, 17, 11), 17, torch.tensor([3, 1 << 40, 8], device=device)
    arguments, dout = inputs(device, lengths, slack=slack)
    options = {"dropout": 0.4, "seed": SEED}
    packed = values_and_gradients(kernel, arguments, dout, seq_ids=ids, **options)
    rows = [slice(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(3)]

    # padded: the padding of each row is a sequence of its own
    slots = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)]).to(device)
    padded = [torch.ones(3 * longest, 2, 16, device=device).index_copy(0, slots, x) for x in (*arguments[:3], dout)]
    cuts = offsets([n for length in lengths for n in (length, longest - length)], device)
    padded_ids = torch.stack([ids, ids + 100], 1).flatten()
    apart = values_and_gradients(kernel, (*padded[:3], cuts, longest + slack), padded[3], seq_ids=padded_ids, **options)
    # re-batched: in another order, without the second
    order = torch.cat([torch.arange(sum(lengths), device=device)[rows[i]] for i in (2, 0)])
    fewer = [x[order] for x in (*arguments[:3], dout)]
    cuts = offsets([lengths[2], lengths[0]], device)
    other = values_and_gradients(kernel, (*fewer[:3], cuts, longest + slack), fewer[3], seq_ids=ids[[2, 0]], **options)
    for name, expected in packed.items():
        assert torch.equal(apart[name][slots], expected), name
        assert torch.equal(other[name], expected[order]), name


def check_cancelling(arguments, dout, largest_score, **options):
    """As `check` where gradients are differences of equal numbers: torch, which keeps the probabilities, is no measure.

    The error of a probability that is computed again is the rounding of its score, that of delta the rounding of out.
    """
    q, k, v = (x.detach().double() for x in arguments[:3])
    ours = values_and_gradients(kernel, arguments, dout, **options)
    torchs, exact = references(arguments, dout, **options)
    assert_as_accurate(ours["out"], torchs["out"], exact["out"])
    grain = torch.finfo(dout.dtype).eps + largest_score * torch.finfo(torch.float32).eps
    dprobs = torch.einsum("thd,shd->hts", dout.double().abs(), v.abs()).max() * philox.keep_scale(options["dropout"])
    scale, rows = q.shape[-1] ** -0.5, arguments[4]
    sizes = {"dq": scale * k.abs().max() * dprobs, "dk": rows * scale * q.abs().max() * dprobs, "dv": rows * dprobs}
    for name, size in sizes.items():
        assert (ours[name] - exact[name]).abs().max() <= 2 * grain * size, name


@both_forms
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_come_out_as_the_reference_has_them(dtype, dropout, slack, device, poisoned):
    (q, k, v, *rest), dout = inputs(device, (37, 20), dtype=dtype, slack=slack)
    q, k = q.detach() * 100, k.detach() * 30
    largest_score = torch.einsum("thd,shd->hts", q.double(), k.double()).abs().max().item() / 4
    assert largest_score > 1e4
    check_cancelling((q, k, v, *rest), dout, largest_score, dropout=dropout)


@both_forms
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_one_key_returns_its_value(dtype, dropout, slack, device, poisoned):
    arguments, dout = inputs(device, (1, 0, 37, 1), dtype=dtype, slack=slack)
    check_cancelling(arguments, dout, 10.0, dropout=dropout, window=0)
    assert torch.equal(kernel(*arguments, window=0), arguments[2])


@both_forms
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_infinities_and_nan_pass_through_as_in_torch(which, value, slack, device, poisoned):
    (*qkv, cu_seqlens, longest), _ = inputs(device, (37, 20), slack=slack)
    qkv = [x.detach().clone() for x in qkv]
    qkv[which][3, 1, 5] = value
    ours = kernel(*qkv, cu_seqlens, longest)
    # the product, not torch's fused kernel, which has a zero where a row is not a number
    q, k, v = (x.view(-1, 2, 16).transpose(0, 1)[:, :37] for x in qkv)
    expected = ((q @ k.mT * 0.25).softmax(-1) @ v).transpose(0, 1)
    assert torch.allclose(ours[:37], expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not expected.isfinite().all() or which == 1
    assert ours[37:].isfinite().all()


@both_forms
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens_give_empty_values_and_gradients(lengths, slack, device):
    arguments, dout = inputs(device, lengths, slack=slack)
    bias = torch.ones(1, 2, slack, slack, device=device, requires_grad=True)
    results = values_and_gradients(kernel, arguments, dout, dropout=0.1, score_bias=bias, return_lse=True)
    assert torch.equal(results.pop("dscore_bias"), torch.zeros_like(bias))
    assert results.pop("lse").shape == (2, 0)
    assert all(x.shape == (0, 2, 16) for x in results.values())


@pytest.mark.gpu
def test_offsets_beyond_2_31_elements_are_right_on_a_gpu():
    sequences, length, heads, head_size = 1400, 512, 16, 64  # 2.2e9 elements of q, k and v
    qkv = torch.randn(sequences * length, 3, heads, head_size, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(sequences * length, heads, head_size, device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(sequences, device="cuda")
    cuts = offsets([length] * sequences, "cuda")
    last = slice(-2 * length, None)
    full = values_and_gradients(kernel, (*qkv.unbind(1), cuts, length), dout, dropout=0.1, seq_ids=ids)
    few = values_and_gradients(
        kernel, (*qkv[last].unbind(1), cuts[:3], length), dout[last], dropout=0.1, seq_ids=ids[-2:]
    )
    assert all(torch.equal(full[name][last], few[name]) for name in few)


@both_forms
def test_a_bias_of_minus_infinity_hides_keys_and_an_empty_row_is_zero(slack, device, poisoned):
    arguments, dout = inputs(device, (5, 3), slack=slack)
    size = arguments[4]
    bias = torch.zeros(2, 1, size, size, device=device)
    bias[0, :, :, 1:3] = bias[1, :, 2] = float("-inf")
    bias.requires_grad_()
    results = values_and_gradients(kernel, arguments, dout, score_bias=bias, return_lse=True)
    first = [x.detach()[:5] for x in arguments[:3]]
    expected = reference.attention(*first, offsets([5], device), 5, score_bias=bias.detach()[:1, :, :5, :5])
    assert torch.allclose(results["out"][:5], expected, atol=1e-6)
    assert (results["out"][7] == 0).all() and (results["lse"][:, 7] == -float("inf")).all()
    assert all(x.isfinite().all() for name, x in results.items() if name != "lse")
    assert (results["dk"][1:3] == 0).all() and (results["dq"][7] == 0).all()
    assert (results["dscore_bias"][1, :, 2] == 0).all() and (results["dscore_bias"][0, :, :, 1:3] == 0).all()


@both_forms
def test_the_bias_kernel_runs_only_for_a_bias_that_asks_for_a_gradient(slack, device, monkeypatch):
    arguments, dout = inputs(device, slack=slack)
    calls = []
    monkeypatch.setattr(op, "_run_dbias", lambda q, tensors, *_: calls.append(tensors[-1].zero_()))
    bias = torch.randn(1, 2, arguments[4], arguments[4], device=device)
    values_and_gradients(kernel, arguments, dout, score_bias=bias)
    assert not calls
    values_and_gradients(kernel, arguments, dout, score_bias=bias.requires_grad_())
    assert len(calls) == 1


@both_forms
def test_alibi_is_a_bias_that_falls_with_the_distance(slack, device):
    arguments, dout = inputs(device, slack=slack)
    slopes = torch.tensor([0.5, 0.0625], device=device)
    index = torch.arange(arguments[4], device=device)
    bias = -slopes[:, None, None] * (index[:, None] - index).abs()
    for call in (kernel, reference.attention):
        ours = values_and_gradients(call, arguments, dout, alibi_slopes=slopes)
        theirs = values_and_gradients(call, arguments, dout, score_bias=bias[None])
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    probs = attention_probs(*arguments[:2], *arguments[3:], alibi_slopes=slopes)
    torch.testing.assert_close(probs, attention_probs(*arguments[:2], *arguments[3:], score_bias=bias[None]))


@both_forms
def test_the_returned_lse_is_the_natural_logarithm_of_the_sum_of_exponentials(slack, device):
    (q, k, v, cu_seqlens, longest), _ = inputs(device, (4, 9), slack=slack)
    out, lse = kernel(q, k, v, cu_seqlens, longest, dropout=0.3, return_lse=True)
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) / 4
    expected = torch.cat([scores[:, :4, :4].logsumexp(-1), scores[:, 4:, 4:].logsumexp(-1)], 1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(out, kernel(q, k, v, cu_seqlens, longest, dropout=0.3))
    # it has a gradient of its own
    ours = torch.autograd.grad(lse.square().sum(), (q, k))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "causal": True}, {"window": 40}])
@pytest.mark.parametrize("head_size", [16, 128])
def test_a_schedule_changes_no_bit(head_size, options, device, poisoned):
    arguments, dout = inputs(device, (5, 0, 140, 129), 1, head_size=head_size)
    schedule = op.attention_schedule(arguments[3], len(dout))
    sorted_, natural = (
        values_and_gradients(kernel, arguments, dout, schedule=table, **options) for table in (schedule, None)
    )
    assert all(torch.equal(sorted_[name], natural[name]) for name in natural)


@pytest.mark.parametrize(
    "lengths", [(), (0,), (1,), (128,), (129, 5), (5, 129), (0, 300, 128, 0, 1, 300), (127,) * 5, (130,) * 3]
)
def test_a_schedule_names_every_tile_once_the_longest_sequence_first(lengths, device):
    table = op.attention_schedule(offsets(lengths, device), sum(lengths))
    assert table.dtype == torch.int32 and table.shape == (sum(lengths) // 128 + len(lengths), 2)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    expected = [[i, tile] for i in order for tile in range(-(-lengths[i] // 128))]
    assert table.tolist() == expected + [[-1, -1]] * (len(table) - len(expected))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4, "seed": 4}, {"causal": True}, {"window": 2}])
@pytest.mark.parametrize("extras", [False, True])
def test_the_reference_passes_gradcheck(options, extras):
    (q, k, v, *rest), _ = inputs("cpu", (3, 0, 5), 2, 3)
    tensors = [x.detach().double().requires_grad_() for x in (q, k, v)]
    if extras:
        tensors += [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 5, 5), (2,))]

    def call(q, k, v, bias=None, slopes=None):
        return reference.attention(q, k, v, *rest, score_bias=bias, alibi_slopes=slopes, return_lse=extras, **options)

    assert torch.autograd.gradcheck(call, tensors)


def test_under_autocast_the_kernel_runs_in_the_dtype_of_autocast(device):
    (q, k, v, *rest), dout = inputs(device)
    with torch.autocast(device, torch.float16):
        out = kernel(q, k, v.half(), *rest)
    dq, dk = torch.autograd.grad(out, (q, k), dout.half())
    half = values_and_gradients(kernel, (q.half(), k.half(), v.half(), *rest), dout)
    assert out.dtype == torch.float16 and dq.dtype == dk.dtype == torch.float32
    assert torch.equal(out, half["out"]) and torch.equal(dq, half["dq"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 8)}, r"q is \[5, 8\]: expected \[T, H, d\]"),
        ({"q": torch.zeros(5, 2, 0)}, r"q is \[5, 2, 0\]"),
        ({"k": torch.zeros(4, 2, 8)}, r"k is torch.float32 \[4, 2, 8\]: expected torch.float32 \[5, H_kv, 8\]"),
        ({"k": torch.zeros(5, 2)}, r"k is torch.float32 \[5, 2\]: expected"),
        ({"v": torch.zeros(5, 1, 8)}, r"v is torch.float32 \[5, 1, 8\]: expected torch.float32 \[5, 2, 8\]"),
        ({"v": torch.zeros(5, 2, 8).half()}, r"v is torch.float16 \[5, 2, 8\]"),
        ({"v": None}, "v is None: expected torch.float32"),
        ({"v": torch.zeros(5, 2, 8, device="meta")}, "v is on meta, q is on cpu"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens is torch.int64 \[2\]: expected int32 \[B \+ 1\]"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens is torch.int32 \[0\]"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "cu_seqlens is on meta, q is on cpu"),
        ({"max_seqlen": 0}, "max_seqlen=0"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"window": -1}, "window=-1 is negative"),
        ({"seq_ids": torch.arange(2)}, r"seq_ids is torch.int64 \[2\]: expected int64 \[1\], one a sequence"),
        ({"seq_ids": torch.arange(1.0)}, r"seq_ids is torch.float32 \[1\]"),
        ({"seed": torch.zeros(2), "dropout": 0.1}, r"seed is torch.float32 \[2\]"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, reference"),
        (
            {"score_bias": torch.zeros(1, 5, 5)},
            r"score_bias is torch.float32 \[1, 5, 5\]: expected a floating dtype and",
        ),
        ({"score_bias": torch.zeros(1, 1, 5, 6)}, r"expected a floating dtype and \[1 or 1, 2 or 1, 5, 5\]"),
        ({"score_bias": torch.zeros(1, 3, 5, 5)}, r"score_bias is torch.float32 \[1, 3, 5, 5\]"),
        ({"score_bias": torch.zeros(1, 1, 5, 5).int()}, "score_bias is torch.int32"),
        ({"score_bias": torch.zeros(1, 1, 5, 5, device="meta")}, "score_bias is on meta, q is on cpu"),
        ({"score_bias": torch.zeros(1, 1, 5, 5).double(), "backend": "triton"}, "takes no score_bias in float64"),
        ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes is torch.float32 \[3\]: expected torch.float32 \[2\]"),
        ({"alibi_slopes": torch.zeros(2).half()}, r"alibi_slopes is torch.float16 \[2\]"),
        ({"alibi_slopes": torch.zeros(2, requires_grad=True), "backend": "triton"}, "gives alibi_slopes no gradient"),
        ({"schedule": torch.zeros(2, 2).int()}, r"schedule is torch.int32 \[2, 2\]: expected torch.int32 \[1, 2\]"),
        ({"schedule": torch.zeros(1, 2)}, r"schedule is torch.float32 \[1, 2\]"),
        ({"scale": -1.0, "backend": "triton"}, "'triton' takes scale > 0, got -1.0"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    arguments = {"q": torch.zeros(5, 2, 8), "cu_seqlens": cu_seqlens, "max_seqlen": 5} | change
    arguments = {"k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)} | arguments
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_what_the_kernel_cannot_do_runs_the_reference(device):
    (q, k, v, *rest), _ = inputs(device, head_size=257)
    with pytest.raises(ValueError, match="'triton' takes head sizes up to 256, got 257"):
        kernel(q, k, v, *rest)
    assert torch.equal(attention(q, k, v, *rest), reference.attention(q, k, v, *rest))
    slopes = torch.rand(2, device=device, requires_grad=True)
    attention(q, k, v, *rest, alibi_slopes=slopes).sum().backward()
    assert slopes.grad.abs().min() > 0


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
def test_short_plans_hold_a_whole_sequence(capability, direction):
    found = 0
    for head_size in (1, 16, 37, 64, 65, 128):
        for element_size in (2, 4):
            for max_seqlen in (1, 16, 17, 64, 100, 128, 129, 512):
                plan = attention_short_plan(head_size, element_size, capability, max_seqlen, direction)
                if plan is not None:
                    assert max_seqlen <= plan.block_m == plan.block_n <= 128 and plan.block_d >= head_size
                    found += 1
    assert found >= 12
    assert attention_short_plan(64, 2, capability, 129, direction) is None
    # on sm_100 its backward spills at 128 tokens without dropout
    assert (attention_short_plan(64, 2, capability, 128, direction) is None) == (
        direction == "bwd" and capability // 10 != 9
    )


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_cases_to_compile_have_names_of_their_own(capability):
    names = [(case.direction, case.label) for case in op.aot_cases(capability)]
    assert len(set(names)) == len(names) <= 66
    for head_size in (16, 32, 64, 80, 128, 192, 256):
        assert {direction for direction, label in names if f"d={head_size} " in f"{label} "} == {"fwd", "bwd"}
    for direction in ("fwd", "dq", "dkdv", "dbias"):  # 80 stands for 96, which is launched by the same plan
        for size, other in ((80, 96), (192, 160)):
            plans = [attention_plan(x, 2, capability, 512, direction) for x in (size, other)]
            assert plans[0] == plans[1]
