"""Integrated gradients: what they are where they can be computed by hand, and that they add up where they cannot."""

import sys

import pytest
import torch
from small import build

from minibert import BertForMaskedLM, BertForSequenceClassification
from minibert.batch import pack
from minibert.explain import integrated_gradients
from minibert.explain.attribution import class_score, token_score

IDS, TYPES, BASELINE = [2, 9, 17, 30, 5, 9, 3], [0, 0, 0, 0, 1, 1, 1], [2, 4, 4, 4, 4, 4, 3]


@pytest.fixture(autouse=True)
def captum():
    pytest.importorskip("captum")


def embeddings(model, ids):
    with torch.no_grad():
        return model.bert.embeddings(model.context(pack([ids], [TYPES]), None))


def test_a_linear_score_of_one_token_is_its_difference_and_nothing_else():
    model, weight = build(BertForSequenceClassification).eval(), torch.linspace(-1, 2, 24)

    def score(model, batch):
        x = model.bert.embeddings(model.context(batch, None))
        return x[batch.first_rows + 3] @ weight

    parts, present, absent = integrated_gradients(model, score, IDS, TYPES, BASELINE, steps=3)
    expected = torch.zeros(7)
    expected[3] = (embeddings(model, IDS) - embeddings(model, BASELINE))[3] @ weight
    torch.testing.assert_close(parts, expected)
    assert present - absent == pytest.approx(float(expected[3]), rel=1e-5)


def test_without_attention_a_guess_comes_from_the_token_it_stands_at():
    model = build(BertForMaskedLM).eval()
    for layer in model.bert.encoder.layers:
        torch.nn.init.zeros_(layer.attention.out.weight)
    parts, present, absent = integrated_gradients(model, token_score(4, 11), IDS, TYPES, BASELINE, steps=200)
    assert parts[[0, 1, 2, 3, 5, 6]].tolist() == [0.0] * 6
    assert float(parts[4]) == pytest.approx(present - absent, abs=1e-3) and abs(present - absent) > 0.1


def test_attributions_add_up_to_the_difference_of_the_logits_better_with_more_steps():
    model = build(BertForSequenceClassification, id2label=("a", "b", "c")).eval()
    errors = []
    for steps in (2, 150):
        parts, present, absent = integrated_gradients(model, class_score(2), IDS, TYPES, BASELINE, steps=steps)
        errors.append(abs(float(parts.sum()) - (present - absent)))
    logits = model(pack([IDS, BASELINE], [TYPES, TYPES])).logits[:, 2]
    assert [present, absent] == pytest.approx(logits.tolist(), abs=1e-5)
    assert errors[1] < 2e-4 < 10 * errors[0]
    assert parts[[0, 6]].tolist() == [0.0, 0.0] and parts[1:6].abs().min() > 0


def test_the_steps_are_the_same_in_one_batch_and_in_many(monkeypatch):
    model, seen = build(BertForSequenceClassification).eval(), []

    def score(model, batch):
        seen.append(batch.lengths)
        return class_score(1)(model, batch)

    once = integrated_gradients(model, score, IDS, TYPES, BASELINE, steps=11)[0]
    monkeypatch.setattr("minibert.explain.attribution.TOKENS", 30)
    many = integrated_gradients(model, score, IDS, TYPES, BASELINE, steps=11)[0]
    torch.testing.assert_close(once, many)
    assert [len(lengths) for lengths in seen] == [11, 2, 4, 4, 3, 2]
    assert {length for lengths in seen for length in lengths} == {7}  # nothing is padded


def test_nothing_is_left_behind():
    model = build(BertForSequenceClassification).eval()
    before = model(pack([IDS], [TYPES])).logits
    integrated_gradients(model, class_score(0), IDS, TYPES, BASELINE, steps=2)
    assert model(pack([IDS], [TYPES])).logits.equal(before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps=0 is not positive"):
        integrated_gradients(build(BertForSequenceClassification), class_score(0), IDS, TYPES, BASELINE, steps=0)


def test_a_missing_captum_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ValueError, match=r"one more package: pip install 'minibert\[explain\]'$"):
        integrated_gradients(build(BertForSequenceClassification), class_score(0), IDS, TYPES, BASELINE)
