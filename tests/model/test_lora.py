"""Low-rank adaptation: what a layer computes, what of a model learns, and that the sum is the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import build, gradients, packed, padded, refused

from minibert.model import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from minibert.model.lora import LowRank, adapt, learned, low_rank, merged
from minibert.train.optim import adamw, optimizer_state

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LABELS = torch.tensor([0, 1, 1, 0, 1])


def adapted(kind=BertForSequenceClassification, rank=3, alpha=7, *, moved=True, **options):
    """A model with factors that are not zero, as after some steps."""
    model = build(kind, **options)
    adapt(model, rank, alpha)
    for _, layer in low_rank(model) if moved else ():
        torch.nn.init.normal_(layer.b, std=0.1)
    return model


def test_values_and_gradients_are_those_of_the_sum_written_out():
    torch.manual_seed(0)
    linear, x, dy = torch.nn.Linear(7, 11), torch.randn(13, 7), torch.randn(13, 11)
    layer = LowRank(linear, 3, 5)
    torch.nn.init.normal_(layer.b)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.a, layer.b))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = F.linear(inputs[0], linear.weight + 5 / 3 * (b @ a), linear.bias)
    y = layer(inputs[1])
    torch.testing.assert_close(y, expected, **CLOSE)
    for one, other in zip(
        torch.autograd.grad(y, [inputs[1], layer.a, layer.b, layer.bias], dy),
        torch.autograd.grad(expected, [inputs[0], a, b, linear.bias], dy),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize(("backend", "ffn"), [("reference", "mlp"), ("reference", "geglu"), ("triton", "swiglu")])
def test_a_model_has_the_loss_and_the_gradients_of_one_with_the_sums_for_weights(backend, ffn):
    """By the chain rule the sum's gradient G gives s·BᵀG for A, and s·GAᵀ for B."""
    options = {"train": True, "backend": backend, "ffn": ffn, "num_hidden_layers": 1}
    model, plain = adapted(**options), build(BertForSequenceClassification, **options)
    plain.load_state_dict(merged(model, dict(model.named_parameters())))
    losses = [each(**padded(), labels=LABELS, seed=5).loss for each in (model, plain)]
    torch.testing.assert_close(*losses, **CLOSE)
    for loss in losses:
        loss.backward()
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == learned(model).keys()
    for name, layer in low_rank(model):
        g = layer.scale * expected[f"{name}.weight"]
        torch.testing.assert_close(found.pop(f"{name}.a"), layer.b.T @ g, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.pop(f"{name}.b"), g @ layer.a.T, rtol=1e-4, atol=1e-4)
    assert found.keys() == {"classifier.weight", "classifier.bias"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification])
def test_at_first_it_is_the_model_that_it_was(kind):
    before, model = build(kind), adapted(kind, moved=False)
    outputs = [each(**padded(), return_dict=False) for each in (before, model)]
    assert all(torch.equal(one, two) for one, two in zip(*outputs, strict=True))


def test_a_head_what_is_new_and_the_factors_of_every_layer_learn_and_nothing_else():
    model = build(BertForSequenceClassification)
    model.new_parameters = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    adapt(model, 3, 7)
    layers = ("attention.qkv", "attention.out", "ffn.up", "ffn.down")
    factors = {f"bert.encoder.layers.{n}.{layer}.{part}" for n in range(2) for layer in layers for part in "ab"}
    assert learned(model).keys() == factors | {"classifier.weight", "classifier.bias", *model.new_parameters}
    assert "bert.pooler.dense.weight" not in learned(adapted())


def test_of_a_model_of_embeddings_the_factors_alone_learn():
    model = build(BertForSentenceEmbedding)
    adapt(model, 3, 7)
    assert learned(model).keys() == {f"{name}.{part}" for name, _ in low_rank(model) for part in "ab"}
    assert len(list(low_rank(model))) == 2 * 4


def test_what_does_not_learn_has_no_moments_and_stays_bit_for_bit():
    model = adapted(BertForTokenClassification, train=True)
    before, optimizer = copy.deepcopy(model.state_dict()), adamw(model, lr=0.1, weight_decay=0.1)
    for step in range(3):
        model(packed(padded()), labels=torch.arange(23) % 2, seed=step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == learned(model).keys()
    assert {name.rpartition(".")[0] for name in optimizer_state(model, optimizer)} == changed


def test_what_is_saved_is_a_plain_model_with_the_same_answers(tmp_path):
    model = adapted().eval()
    model.save_pretrained(tmp_path)
    plain = BertForSequenceClassification.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == build(BertForSequenceClassification).state_dict().keys()
    assert model.num_parameters() == plain.num_parameters() and not any(low_rank(plain))
    torch.testing.assert_close(plain(**padded()).logits, model(**padded()).logits, **CLOSE)
    untouched = build(BertForSequenceClassification)
    assert (untouched(**padded()).logits - plain(**padded()).logits).abs().max() > 0.01


@pytest.mark.parametrize("rank", [0, -1, 25, 2.0, True, "8"])
def test_a_rank_that_is_none_is_refused(rank):
    message = refused(lambda: adapt(build(BertForSequenceClassification), rank, 16))
    assert message == f"lora={rank!r} is not a rank: expected a whole number from 1 to 24, the hidden size"


@pytest.mark.parametrize("alpha", [0, -2.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(alpha):
    message = refused(lambda: adapt(build(BertForSequenceClassification), 3, alpha))
    assert message == f"lora_alpha={alpha!r} is not a positive number"
