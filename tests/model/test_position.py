"""How a model knows where a token stands: added vectors, rotated queries and keys, slopes on the scores."""

import cmath

import pytest
import torch
from small import build, gradients, packed, padded, small_config
from tolerance import assert_as_accurate

from minibert.batch import pack
from minibert.model import BertModel
from minibert.model.position import POSITIONS, _Rotate, rotated
from minibert.profile.watch import Traffic

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the device here")
IDS = [5, 6, 7, 8, 9, 10, 11]


def test_a_rotated_pair_is_a_complex_number_times_a_unit_one():
    rotary, x = POSITIONS["rotary"](small_config()), torch.randn(7, 3, 8)
    *rotated, v = rotary.rotate(torch.stack([x, 2 * x, x], 1), pack([IDS])).unbind(1)
    assert torch.equal(v, x)
    for token, head, pair in ((0, 0, 0), (3, 1, 2), (6, 2, 3)):
        before = complex(x[token, head, pair], x[token, head, pair + 4])
        after = before * cmath.exp(1j * token * 10_000 ** (-2 * pair / 8))
        for factor, result in zip((1, 2), rotated, strict=True):
            found = complex(result[token, head, pair], result[token, head, pair + 4])
            assert found == pytest.approx(factor * after, abs=1e-5)


def test_rotated_scores_depend_on_the_distance_alone():
    rotary = POSITIONS["rotary"](small_config())
    q, k, _ = rotary.rotate(torch.randn(1, 3, 3, 8).expand(7, 3, 3, 8), pack([IDS])).unbind(1)
    scores = torch.einsum("ihd,jhd->hij", q, k)
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1], **CLOSE)
    assert (scores[:, 0] - scores[:, 0].mean(-1, keepdim=True)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_is_as_accurate_as_the_formula(dtype):
    x, dout = (torch.randn(7, 3, 3, 8).to(dtype) for _ in range(2))
    angles = torch.randn(7, 1, 1, 4)
    found = []
    for call, of in ((_Rotate.apply, dtype), (rotated, dtype), (rotated, torch.float64)):
        qkv, cos, sin = x.detach().to(of).requires_grad_(), angles.cos(), angles.sin()
        out = call(qkv, cos, sin)
        found.append((out, *torch.autograd.grad(out, qkv, dout.to(of))))
    for name, *values in zip(("out", "dqkv"), *found, strict=True):
        assert_as_accurate(*values, name=name)


def test_its_derivatives_are_right_to_the_second():
    x, angles = torch.randn(2, 3, 1, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 1, 1, 2).double()
    call = lambda x: _Rotate.apply(x, angles.cos(), angles.sin()).square()  # noqa: E731
    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


@WITHOUT_GPU
def test_the_gradients_of_a_projection_are_neither_stacked_nor_cut():
    model = build(BertModel, position="rotary", train=True, backend="triton", num_hidden_layers=1, vocab_size=9)
    states = model(pack([[5, 6, 7]]), seed=2).last_hidden_state
    with Traffic() as traffic:
        states.sin().sum().backward()
    names = {name.removeprefix("aten::") for name in traffic.calls}
    assert "addcmul" in names and not names & {"stack", "cat", "slice_backward", "select_backward"}


def test_alibi_takes_a_slope_times_the_distance_from_the_scores():
    model, plain = build(BertModel, position="alibi"), build(BertModel, position="alibi")
    plain.embeddings.position.slopes = lambda batch: None
    batch = pack([IDS])
    maps, flat = (m(batch, output_attentions=True).attentions[0][0] for m in (model, plain))
    distance = (torch.arange(7) - torch.arange(7)[:, None]).abs()
    slopes = torch.tensor([2 ** (-8 / 3), 2 ** (-16 / 3), 2**-8])[:, None, None]
    torch.testing.assert_close(maps, (flat.log() - slopes * distance).softmax(-1), **CLOSE)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_tokens_matters(position):
    model = build(BertModel, position=position)
    a, b = (model(pack([ids])).last_hidden_state for ids in (IDS, [5, 7, 6, *IDS[3:]]))
    assert (a[0] - b[0]).abs().max() > 1e-3


@pytest.mark.parametrize("position", POSITIONS)
def test_padded_and_packed_are_the_same(position):
    model, inputs = build(BertModel, position=position), padded()
    states = model(packed(inputs)).last_hidden_state
    torch.testing.assert_close(model(**inputs).last_hidden_state[inputs["attention_mask"].bool()], states, **CLOSE)


@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_there_is_nothing_to_learn_and_nothing_to_save(position):
    names = build(BertModel, position=position).state_dict()
    assert not [name for name in names if "position" in name]


def test_a_model_in_bfloat16_turns_by_exact_angles():
    x = torch.randn(300, 3, 3, 8)
    batch = pack([[5] * 300])
    exact, rounded = (POSITIONS["rotary"](small_config()).to(d).rotate(x, batch) for d in (None, torch.bfloat16))
    assert torch.equal(exact, rounded)


@WITHOUT_GPU
@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_kernels_and_reference_agree(position):
    a, b = (
        build(BertModel, train=True, position=position, num_hidden_layers=1, backend=backend)
        for backend in ("reference", "triton")
    )
    for model in (a, b):
        model(packed(padded((7, 3))), seed=2).last_hidden_state.square().sum().backward()
    a, b = gradients(a), gradients(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4, msg=name)


def test_an_odd_head_cannot_be_rotated():
    with pytest.raises(ValueError, match="position='rotary' rotates pairs of a head's channels: head size 3 is odd"):
        BertModel(small_config(position="rotary", num_attention_heads=8))
