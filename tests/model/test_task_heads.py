"""What the heads of fine-tuning compute, that padding changes nothing, and which labels they refuse."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from small import LENGTHS, build, gradients, packed, padded, with_ends

from minibert.batch import IGNORE, pack
from minibert.model import (
    BertForJointClassification,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForRelationExtraction,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    BertForTokenClassification,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NSP = torch.tensor([0, 1, 1, 0, 1])
NAMES = ("a", "b", "c")


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_classes_are_scored_by_cross_entropy(problem_type):
    model, labels = build(BertForSequenceClassification, id2label=NAMES, problem_type=problem_type), NSP + 1
    output = model(**padded(), labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_several_labels_are_scored_one_by_one(problem_type):
    model = build(BertForSequenceClassification, id2label=NAMES, problem_type=problem_type)
    labels = torch.stack([NSP, 1 - NSP, NSP], 1).float()
    output = model(**padded(), labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


@pytest.mark.parametrize("problem_type", [None, "regression"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_one_output_is_regression(problem_type, dtype):
    model = build(BertForSequenceClassification, id2label=("score",), problem_type=problem_type)
    labels = (NSP * 3).to(dtype)
    output = model(**padded(), labels=labels)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], labels.float()))


def test_regression_may_have_several_outputs():
    model = build(BertForSequenceClassification, id2label=NAMES, problem_type="regression")
    labels = torch.randn(5, 3)
    output = model(**padded(), labels=labels)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits, labels))


def test_labels_of_a_packed_batch_are_used():
    model, inputs = build(BertForSequenceClassification), padded()
    batch = dataclasses.replace(packed(inputs), labels=NSP)
    assert torch.equal(model(batch).loss, model(**inputs, labels=NSP).loss)


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        (None, NSP + 2, "labels holds 3: expected 0 to 2, or -100"),
        (None, NSP[:3], "labels has shape [3]: expected [5]"),
        ("multi_label_classification", NSP, "labels has shape [5]: expected [5, 3]"),
        ("regression", NSP.float(), "labels has shape [5]: expected [5, 3]"),
    ],
)
def test_sentence_labels_that_cannot_be_are_refused(problem_type, labels, message):
    model = build(BertForSequenceClassification, id2label=NAMES, problem_type=problem_type)
    with pytest.raises(ValueError) as error:
        model(**padded(), labels=labels)
    assert str(error.value) == message


CLASSES = torch.tensor([1, 0, 2, 1, 2])
ANSWERS = torch.tensor([[0, 6], [0, 0], [1, 3], [2, 1], [4, 5]])
FIRST_AND_LAST = torch.tensor([[0, length - 1] for length in LENGTHS])
HEAVY = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.4}


def model_for(kind, **changes):
    return build(kind, id2label=NAMES[:2] if kind is BertForQuestionAnswering else NAMES, **changes)


def tags(inputs) -> torch.Tensor:
    """[B, S]: a class for every other token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    return torch.where(mask & (torch.arange(ids.shape[1]) % 2 == 0), ids % 3, IGNORE)


def task(kind, width=None):
    """The same labelled sequences padded, as arguments of the Hugging Face call, and packed."""
    inputs = padded(width=width)
    batch, mask = packed(inputs), inputs["attention_mask"].bool()
    labels = tags(inputs)[mask]
    if kind is BertForTokenClassification:
        return inputs | {"labels": tags(inputs)}, dataclasses.replace(batch, token_labels=labels)
    if kind is BertForJointClassification:
        call = inputs | {"labels": tags(inputs), "intent_labels": CLASSES}
        return call, dataclasses.replace(batch, token_labels=labels, labels=CLASSES)
    if kind is BertForQuestionAnswering:
        call = inputs | {"start_positions": ANSWERS[:, 0], "end_positions": ANSWERS[:, 1]}
        return call, dataclasses.replace(batch, labels=ANSWERS)
    if kind is BertForMultipleChoice:
        call = {name: value[None] for name, value in inputs.items()} | {"labels": torch.tensor([3])}
        return call, dataclasses.replace(batch, labels=torch.tensor([3]))
    if kind is BertForRelationExtraction:
        call = inputs | {"entity_positions": FIRST_AND_LAST, "labels": CLASSES}
        return call, dataclasses.replace(with_ends(batch), labels=CLASSES)
    return inputs | {"labels": CLASSES}, dataclasses.replace(batch, labels=CLASSES)


TASKS = [
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForQuestionAnswering,
    BertForMultipleChoice,
    BertForRelationExtraction,
    BertForJointClassification,
]


def step(model, *call, **inputs):
    model.zero_grad()
    output = model(*call, **inputs)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("train", [True, False])
def test_loss_gradients_and_dropout_are_the_same_padded_and_packed(kind, train):
    model = model_for(kind, train=train, **HEAVY)
    _, batch = task(kind)
    loss, grads = step(model, batch, seed=7)
    assert len(grads) == len(list(model.parameters())) and loss > 0
    for width in (None, 12):
        other, other_grads = step(model, **task(kind, width)[0], seed=7)
        torch.testing.assert_close(other, loss, **CLOSE)
        for name in grads:
            torch.testing.assert_close(other_grads[name], grads[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind is not BertForQuestionAnswering])
def test_the_head_drops_by_seed_and_only_in_training(kind):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, (_, batch) = model_for(kind, train=True, classifier_dropout=0.5, **off), task(kind)
    assert torch.equal(model(batch, seed=1).logits, model(batch, seed=1).logits)
    assert not torch.equal(model(batch, seed=1).logits, model(batch, seed=2).logits)
    plain = model_for(kind, **off)(batch)
    mean = torch.stack([model(batch, seed=seed).logits.detach() for seed in range(300)]).mean(0)
    torch.testing.assert_close(mean, plain.logits, rtol=0.15, atol=0.25)
    assert torch.equal(model.eval()(batch).logits, plain.logits)


@pytest.mark.parametrize("kind", TASKS)
def test_labels_that_are_all_ignored_give_loss_zero_and_zero_gradients(kind):
    model, (_, batch) = model_for(kind, train=True), task(kind)
    ignored = {
        name: None if value is None else torch.full_like(value, IGNORE)
        for name, value in (("labels", batch.labels), ("token_labels", batch.token_labels))
    }
    loss, grads = step(model, dataclasses.replace(batch, **ignored), seed=3)
    assert loss == 0 and grads and all(grad.abs().sum() == 0 for grad in grads.values())


@pytest.mark.parametrize("kind", [*TASKS, BertForSentenceEmbedding])
def test_states_and_maps_are_given_on_request(kind):
    call, batch = task(kind) if kind in TASKS else (padded(), packed(padded()))
    model, wanted = model_for(kind), {"output_hidden_states": True, "output_attentions": True}
    output = model(**call, **wanted)
    assert [state.shape for state in output.hidden_states] == [(5, 7, 24)] * 3
    assert [probs.shape for probs in output.attentions] == [(5, 3, 7, 7)] * 2
    assert [state.shape for state in model(batch, **wanted).hidden_states] == [(sum(LENGTHS), 24)] * 3
    assert model(batch).hidden_states is None and model(batch).attentions is None


@pytest.mark.parametrize("kind", TASKS)
def test_without_labels_there_are_logits_and_no_loss(kind):
    model, (call, batch) = model_for(kind), task(kind)
    targets = ("labels", "intent_labels", "start_positions", "end_positions")
    call = {name: value for name, value in call.items() if name not in targets}
    for output in (model(dataclasses.replace(batch, labels=None, token_labels=None)), model(**call)):
        assert output.loss is None and output.sequence_loss is None and output.token_loss is None
        first = {BertForQuestionAnswering: output.start_logits}.get(kind, output.logits)
        assert first is not None and output[0] is first


def test_tokens_are_scored_by_cross_entropy_and_padding_has_no_score():
    model, inputs = model_for(BertForTokenClassification), padded(width=9)
    output = model(**inputs, labels=tags(inputs))
    assert output.logits.shape == (5, 9, 3) and output.logits[~inputs["attention_mask"].bool()].abs().sum() == 0
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), tags(inputs).flatten()))


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForJointClassification])
def test_the_rows_of_a_batch_are_the_tokens_that_are_read(kind):
    model, batch = model_for(kind, train=True, **HEAVY), packed(padded())
    rows = torch.tensor([21, 3, 0, 8, 3])
    whole, some = model(batch, seed=5), model(dataclasses.replace(batch, token_rows=rows), seed=5)
    torch.testing.assert_close(some.logits, whole.logits[rows], **CLOSE)
    labels = torch.tensor([2, IGNORE, 0, 1, 1])
    given = model(dataclasses.replace(batch, token_rows=rows), labels=labels, seed=5)
    inside = model(dataclasses.replace(batch, token_rows=rows, token_labels=labels), seed=5)
    torch.testing.assert_close(given.loss, F.cross_entropy(some.logits, labels), **CLOSE)
    assert torch.equal(given.loss, inside.loss)
    none = model(dataclasses.replace(batch, token_rows=rows[:0], token_labels=labels[:0]), seed=5)
    assert none.logits.shape == (0, 3) and none.loss == 0


def test_an_answer_is_sought_among_the_tokens_of_its_own_sequence():
    model, inputs = model_for(BertForQuestionAnswering), padded(width=9)
    alone = [
        model(**{name: value[row : row + 1, :length] for name, value in inputs.items()}, labels=ANSWERS[row : row + 1])
        for row, length in enumerate(LENGTHS)
    ]
    output = model(**inputs, labels=ANSWERS)
    torch.testing.assert_close(output.loss, torch.stack([one.loss for one in alone]).mean(), **CLOSE)
    both = F.cross_entropy(output.start_logits, ANSWERS[:, 0]), F.cross_entropy(output.end_logits, ANSWERS[:, 1])
    torch.testing.assert_close(output.loss, sum(both) / 2, **CLOSE)
    assert (output.start_logits.argmax(1) < torch.tensor(LENGTHS)).all(), "an answer at padding"
    assert output[1] is output.start_logits and output[2] is output.end_logits
    assert model(packed(inputs)).start_logits.shape == (sum(LENGTHS),)


def test_an_answer_outside_its_sequence_is_ignored():
    model, inputs = model_for(BertForQuestionAnswering), padded()
    outside = ANSWERS.clone()
    outside[1], outside[3], outside[4] = torch.tensor([1, 1]), torch.tensor([IGNORE, 7]), torch.tensor([4, 70])
    output = model(**inputs, start_positions=outside[:, :1], end_positions=outside[:, 1:])
    start = F.cross_entropy(output.start_logits[[0, 2, 4]], ANSWERS[[0, 2, 4], 0])
    end = F.cross_entropy(output.end_logits[[0, 2]], ANSWERS[[0, 2], 1])
    torch.testing.assert_close(output.loss, (start + end) / 2, **CLOSE)
    assert torch.equal(model(dataclasses.replace(packed(inputs), labels=outside)).loss, output.loss)


def test_positions_of_the_hugging_face_call_are_columns_wherever_the_tokens_lie():
    right, left = padded(), padded(left=True)
    shift = torch.tensor([[7 - length] for length in LENGTHS])
    positions = {"position_ids": (left["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    model = model_for(BertForQuestionAnswering)
    a, b = model(**right, labels=ANSWERS), model(**left, **positions, labels=ANSWERS + shift)
    torch.testing.assert_close(a.loss, b.loss, **CLOSE)
    model = model_for(BertForRelationExtraction)
    a = model(**right, entity_positions=FIRST_AND_LAST)
    b = model(**left, **positions, entity_positions=FIRST_AND_LAST + shift)
    torch.testing.assert_close(a.logits, b.logits, **CLOSE)


def test_choices_are_sequences_in_a_row():
    model, sequences = model_for(BertForMultipleChoice), [[5, 6], [7], [8, 9, 10], [11, 3], [4, 4, 4, 4], [2]]
    batch, labels = pack(sequences), torch.tensor([2, 0])
    output = model(batch, labels=labels)
    single = torch.stack([model(pack([ids])).logits[0, 0] for ids in sequences]).view(2, 3)
    torch.testing.assert_close(output.logits, single, **CLOSE)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert model(batch).logits.shape == (1, 6) and model(batch, num_choices=2).logits.shape == (3, 2)


def test_a_relation_is_read_from_two_tokens_in_their_order():
    model, batch = model_for(BertForRelationExtraction), with_ends(packed(padded()))
    states = model(batch, output_hidden_states=True).hidden_states[-1]
    first, last = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long() - 1
    expected = model.classifier(torch.cat([states[first], states[last]], 1))
    torch.testing.assert_close(model(batch).logits, expected, **CLOSE)
    swapped = dataclasses.replace(batch, token_rows=batch.token_rows.view(-1, 2).flip(1).flatten())
    assert (model(swapped).logits - expected).abs().max() > 1e-2


def test_the_joint_loss_is_the_sum_of_its_two_means():
    model, (call, batch) = model_for(BertForJointClassification), task(BertForJointClassification)
    output = model(batch)
    assert output.sequence_logits.shape == (5, 4) and output.logits.shape == (sum(LENGTHS), 3)
    torch.testing.assert_close(output.sequence_loss, F.cross_entropy(output.sequence_logits, CLASSES))
    torch.testing.assert_close(output.token_loss, F.cross_entropy(output.logits, batch.token_labels))
    assert torch.equal(output.loss, output.sequence_loss + output.token_loss)
    only = model(dataclasses.replace(batch, token_labels=None))
    assert torch.equal(only.loss, output.sequence_loss) and only.token_loss is None
    assert model(**call).logits.shape == (5, 7, 3)


@pytest.mark.parametrize("intents", [None, [], "ab", ["a", "a"], ["a", 1]])
def test_a_joint_model_needs_names_for_its_intents(intents):
    with pytest.raises(ValueError, match=r"task_specific_params\['intents'\]=.* is not a list of distinct names"):
        build(BertForJointClassification, task_specific_params={"intents": intents})


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_embedding_is_the_mean_or_the_first_state(pooling, normalize):
    params = {"normalize": normalize} | ({"pooling": pooling} if pooling else {})
    model, inputs = build(BertForSentenceEmbedding, task_specific_params=params), padded(width=9)
    output = model(**inputs)
    mask = inputs["attention_mask"][..., None]
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    expected = output.last_hidden_state[:, 0] if pooling == "cls" else mean
    expected = F.normalize(expected) if normalize else expected
    assert output.sentence_embedding.shape == (5, 24)
    torch.testing.assert_close(output.sentence_embedding, expected, **CLOSE)
    torch.testing.assert_close(model(packed(inputs)).sentence_embedding, expected, **CLOSE)


def test_the_gradient_of_a_mean_reaches_every_token_once():
    model, batch = build(BertForSentenceEmbedding), pack([[3, 4, 5], [], [6]])
    output = model(batch)
    assert output.sentence_embedding[1].abs().sum() == 0, "of a sequence without tokens"
    states = output.last_hidden_state
    [grad] = torch.autograd.grad(output.sentence_embedding.sum(), states)
    torch.testing.assert_close(grad[:, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))


@pytest.mark.parametrize(
    ("params", "message"),
    [({"pooling": "max"}, "pooling='max' is not one of mean, cls"), ({"normalize": 1}, "normalize=1 is not true or")],
)
def test_an_embedding_that_is_not_known_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build(BertForSentenceEmbedding, task_specific_params=params)


def test_an_answer_has_two_ends():
    with pytest.raises(ValueError, match="id2label has 3 names: an answer has two ends, pass num_labels=2"):
        build(BertForQuestionAnswering, id2label=NAMES)


PADDED = padded()
AT_PADDING = tags(PADDED).index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(1))
BATCH = packed(PADDED)
WRONG = [
    (BertForTokenClassification, PADDED | {"labels": tags(PADDED)[:4]}, "labels has shape [4, 7]: expected [5, 7]"),
    (BertForTokenClassification, PADDED | {"labels": AT_PADDING}, "labels has targets where attention_mask is 0"),
    (BertForTokenClassification, {"token_labels": CLASSES}, "token_labels has shape [5]: expected [23]"),
    (
        BertForTokenClassification,
        {"token_rows": CLASSES, "token_labels": CLASSES + 1},
        "token_labels holds 3: expected 0 to 2, or -100",
    ),
    (BertForTokenClassification, {"token_rows": CLASSES + 22}, "token_rows holds 23: expected 0 to 22"),
    (BertForTokenClassification, {"token_rows": ANSWERS}, "token_rows has shape [5, 2]: expected [rows]"),
    (BertForQuestionAnswering, PADDED | {"start_positions": CLASSES}, "pass both or neither"),
    (BertForQuestionAnswering, {"labels": CLASSES}, "labels has shape [5]: expected [5, 2], start and end"),
    (BertForMultipleChoice, PADDED, "input_ids has shape [5, 7]: expected [questions, choices, length]"),
    (BertForMultipleChoice, {"labels": CLASSES[:2]}, "5 sequences are not questions of num_choices=2 each"),
    (BertForMultipleChoice, {"labels": torch.tensor([5])}, "labels holds 5: expected 0 to 4, or -100"),
    (BertForRelationExtraction, PADDED, "entity_positions has shape None: expected [5, 2]"),
    (
        BertForRelationExtraction,
        PADDED | {"entity_positions": FIRST_AND_LAST + 1},
        "entity_positions names a column outside its sequence, or of padding",
    ),
    (BertForRelationExtraction, {}, "token_rows has shape None: expected [10], two a sequence"),
    (BertForRelationExtraction, {"token_rows": CLASSES}, "token_rows has shape [5]: expected [10], two a sequence"),
    (BertForJointClassification, {"labels": CLASSES + 2}, "intent_labels holds 4: expected 0 to 3, or -100"),
    (BertForJointClassification, {"labels": CLASSES[:3]}, "intent_labels has shape [3]: expected [5]"),
]


@pytest.mark.parametrize(("kind", "given", "message"), WRONG)
def test_what_no_head_can_read_is_refused(kind, given, message):
    model = model_for(kind)
    with pytest.raises(ValueError) as error:
        model(**given) if "input_ids" in given else model(dataclasses.replace(BATCH, **given))
    assert message in str(error.value) and "\n" not in str(error.value)
