"""What the heads compute from labels, and which labels they refuse."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from small import LENGTHS, build, gradients, mlm_labels, packed, padded

from minibert.batch import IGNORE, pack
from minibert.model import BertForMaskedLM, BertForPreTraining

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NSP = torch.tensor([0, 1, 1, 0, 1])


def assert_gradients_agree(a, b):
    a, b = gradients(a), gradients(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_loss_on_labelled_rows_is_the_loss_on_all_logits():
    rows, whole, inputs = build(BertForPreTraining), build(BertForPreTraining), padded()
    labels = mlm_labels(inputs)
    output = rows(**inputs, labels=labels, next_sentence_label=NSP)
    logits = whole(**inputs)
    mlm = F.cross_entropy(logits.prediction_logits.flatten(0, 1), labels.flatten())
    nsp = F.cross_entropy(logits.seq_relationship_logits, NSP)
    torch.testing.assert_close(output.mlm_loss, mlm, **CLOSE)
    torch.testing.assert_close(output.nsp_loss, nsp, **CLOSE)
    torch.testing.assert_close(output.loss, mlm + nsp, **CLOSE)
    output.loss.backward()
    (mlm + nsp).backward()
    assert_gradients_agree(rows, whole)


def test_counts_and_hits_are_those_of_the_logits():
    model, inputs = build(BertForPreTraining), padded()
    labels = mlm_labels(inputs)
    best = model(**inputs).prediction_logits.argmax(-1)
    labels[0, 0] = best[0, 0]  # one that is right
    output = model(**inputs, labels=labels, next_sentence_label=NSP, output_logits=True)
    assert output.mlm_count == (labels != IGNORE).sum() and output.nsp_count == 5
    assert output.mlm_correct == (best == labels)[labels != IGNORE].sum() >= 1
    assert output.nsp_correct == (output.seq_relationship_logits.argmax(-1) == NSP).sum()
    assert torch.equal(output.prediction_logits.argmax(-1)[labels != IGNORE], best[labels != IGNORE])


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
def test_padding_does_not_change_the_loss_or_the_gradients(kind):
    tight, wide = build(kind), build(kind)
    a, b = padded(), padded(width=11)
    losses = [model(**x, labels=mlm_labels(x)).loss for model, x in ((tight, a), (wide, b))]
    torch.testing.assert_close(*losses, **CLOSE)
    for loss in losses:
        loss.backward()
    assert_gradients_agree(tight, wide)


def test_padded_and_packed_labels_give_the_same_loss():
    model, inputs = build(BertForPreTraining), padded()
    labels = mlm_labels(inputs)[inputs["attention_mask"].bool()]
    rows = (labels != IGNORE).nonzero().squeeze(1)
    batch = dataclasses.replace(packed(inputs), mlm_rows=rows, mlm_labels=labels[rows], nsp_labels=NSP)
    assert torch.equal(model(batch).loss, model(**inputs, labels=mlm_labels(inputs), next_sentence_label=NSP).loss)


def test_the_mean_over_a_batch_is_the_weighted_mean_of_its_sequences():
    model, inputs = build(BertForMaskedLM), padded()
    labels = mlm_labels(inputs)
    total = count = 0
    for row in range(5):
        output = model(**{k: v[row : row + 1] for k, v in inputs.items()}, labels=labels[row : row + 1])
        total, count = total + output.loss * output.mlm_count, count + output.mlm_count
    torch.testing.assert_close(total / count, model(**inputs, labels=labels).loss, **CLOSE)


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
def test_labels_that_are_all_ignored_give_loss_zero_and_finite_gradients(kind):
    model, inputs = build(kind, train=True), padded()
    output = model(**inputs, labels=torch.full_like(inputs["input_ids"], IGNORE), seed=3)
    assert output.mlm_loss == 0 and output.mlm_count == 0 and output.mlm_correct == 0
    output.loss.backward()
    assert gradients(model) and all(grad.abs().sum() == 0 for grad in gradients(model).values())


def test_sentence_labels_that_are_all_ignored_give_loss_zero():
    ignored = torch.full((5,), IGNORE)
    assert build(BertForPreTraining)(**padded(), next_sentence_label=ignored).nsp_loss == 0


def test_logits_are_made_only_where_they_are_wanted():
    inputs = padded()
    labels = mlm_labels(inputs)
    model = build(BertForPreTraining)
    assert model(**inputs, labels=labels).prediction_logits.shape == (5, 7, 41), "as Hugging Face"
    assert model(**inputs, labels=labels, output_logits=False).prediction_logits is None
    with_labels = dataclasses.replace(packed(inputs), mlm_rows=torch.tensor([1, 4]), mlm_labels=torch.tensor([7, 8]))
    assert model(with_labels).prediction_logits is None
    assert model(with_labels, output_logits=True).prediction_logits.shape == (sum(LENGTHS), 41)
    assert model(**inputs).prediction_logits.shape == (5, 7, 41) and model(**inputs).loss is None
    assert model(**inputs, output_logits=False).prediction_logits is None
    model = build(BertForMaskedLM)
    assert model(with_labels).logits is None and model(**inputs, labels=labels).logits.shape == (5, 7, 41)
    assert model(packed(inputs)).logits.shape == (sum(LENGTHS), 41)
    assert model(**inputs).logits[1, 1:].abs().sum() == 0, "a prediction at padding"


def test_positional_outputs_are_those_of_hugging_face():
    inputs = padded()
    output = build(BertForPreTraining)(**inputs, labels=mlm_labels(inputs), output_logits=True)
    assert output[0] is output.loss and output[1] is output.prediction_logits
    assert output[2] is output.seq_relationship_logits
    output = build(BertForMaskedLM)(**inputs, labels=mlm_labels(inputs), output_logits=True, output_hidden_states=True)
    assert output[0] is output.loss and output[1] is output.logits and len(output[2]) == 3


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
def test_labels_that_cannot_be_are_refused(kind):
    model, inputs = build(kind), padded()
    labels = mlm_labels(inputs)
    at_padding, too_large, negative = labels.clone(), labels.clone(), labels.clone()
    at_padding[1, 3], too_large[0, 0], negative[0, 0] = 5, 41, -1
    cases = [
        (at_padding, "labels has targets where attention_mask is 0: set them to -100"),
        (too_large, "labels holds 41: expected 0 to 40, or -100"),
        (negative, "labels holds -1: expected 0 to 40, or -100"),
        (labels[:, :4], "labels has shape [5, 4]: expected [5, 7], as input_ids"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError) as error:
            model(**inputs, labels=wrong)
        assert str(error.value) == message
    with pytest.raises(ValueError, match="a packed Batch carries its own mlm_rows and mlm_labels: pass labels=None"):
        model(packed(inputs), labels=labels)


def test_next_sentence_labels_that_cannot_be_are_refused():
    model, inputs = build(BertForPreTraining), padded()
    with pytest.raises(ValueError, match="next_sentence_label holds 2: expected 0 to 1"):
        model(**inputs, next_sentence_label=NSP + 1)
    with pytest.raises(ValueError, match=r"next_sentence_label has shape \[4\]: expected \[5\]"):
        model(**inputs, next_sentence_label=NSP[:4])
    with pytest.raises(ValueError, match="labels holds 50: expected 0 to 40"):
        model(pack([[1, 2]], mlm_rows=torch.tensor([0]), mlm_labels=torch.tensor([50])))


def test_the_next_sentence_column_of_shape_b_by_1_is_taken():
    model, inputs = build(BertForPreTraining), padded()
    assert torch.equal(
        model(**inputs, next_sentence_label=NSP[:, None]).loss, model(**inputs, next_sentence_label=NSP).loss
    )
