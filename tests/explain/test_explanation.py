"""`explain`: what an explanation says is what the model does."""

import json

import pytest
import torch
from small import build

from minibert import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, Tokenizer
from minibert.batch import pack
from minibert.explain import explain

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] the lamp film soup was is good bad un ##break ##able and . very"
TOKENIZER = Tokenizer.from_vocab({piece: i for i, piece in enumerate(PIECES.split())})
CLASSES = {"id2label": ("negative", "positive", "neither")}


@pytest.fixture(autouse=True)
def captum():
    pytest.importorskip("captum")


@pytest.fixture(scope="module")
def classifier():
    return build(BertForSequenceClassification, **CLASSES).eval()


def test_a_classifier_that_learned_one_word_is_explained_by_that_word():
    torch.manual_seed(3)
    model = build(BertForSequenceClassification, initializer_range=0.1, hidden_dropout_prob=0.0, **CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    fill = torch.tensor(TOKENIZER.encode("the lamp film soup was is and . very [MASK]", add_special_tokens=False))
    for _ in range(60):
        words = fill[torch.randint(len(fill), (16, 5))]
        labels = torch.arange(16) % 3
        told = labels < 2  # bad is 12 and negative, good is 11 and positive; without either it is neither
        words[told, torch.randint(5, (16,))[told]] = 12 - labels[told]
        optimizer.zero_grad()
        model(pack([[2, *row, 3] for row in words.tolist()], labels=labels)).loss.backward()
        optimizer.step()
    for text, name, reason in (("the lamp was good .", "positive", "good"), ("bad soup and film", "negative", "bad")):
        said = explain(model.eval(), TOKENIZER, text)
        assert said.label == name and said.predictions[0][1] > 0.9
        best = max(said.words, key=lambda word: word.attribution)
        assert best.text == reason
        assert best.attribution > 3 * max(abs(word.attribution) for word in said.words if word is not best)


def test_words_are_written_as_in_the_text_and_their_pieces_sum(classifier):
    said = explain(classifier, TOKENIZER, "Unbreakable, THE lamp", "was good")
    assert " ".join(said.tokens) == "[CLS] un ##break ##able [UNK] the lamp [SEP] was good [SEP]"
    assert " ".join(word.text for word in said.words) == "[CLS] Unbreakable , THE lamp [SEP] was good [SEP]"
    assert said.types == (0,) * 8 + (1,) * 3 and said.offsets[2] == (2, 7) and said.offsets[9] == (4, 8)
    assert (said.words[1].start, said.words[1].stop) == (1, 4)
    assert said.words[1].attribution == pytest.approx(sum(said.attributions[1:4]))
    assert [said.attributions[i] for i in (0, 7, 10)] == [0.0] * 3
    assert said.attributions[4] != 0  # an unknown word is a word


@pytest.mark.parametrize(("texts", "pair", "kind"), [(1, "was good", "single texts"), (2, None, "pairs")])
def test_a_model_of_pairs_explains_no_text_alone_nor_the_reverse(texts, pair, kind):
    model = build(BertForSequenceClassification, task_specific_params={"texts": texts}, **CLASSES).eval()
    with pytest.raises(ValueError, match=f"pair={pair!r}: the model reads {kind}"):
        explain(model, TOKENIZER, "the lamp", pair)


def test_attributions_add_up_and_the_error_says_how_well(classifier):
    said = explain(classifier, TOKENIZER, "the film was good", steps=200)
    rough = explain(classifier, TOKENIZER, "the film was good", steps=2)
    assert abs(said.error) < 1e-3 < abs(rough.error)
    assert said.error == pytest.approx(sum(said.attributions) - said.score + said.baseline_score)


def test_predictions_and_scores_are_the_models(classifier):
    text, ids = "the film was good", [2, 5, 7, 9, 11, 3]
    logits = classifier(pack([ids])).logits[0].detach()
    said = explain(classifier, TOKENIZER, text)
    assert said.score == pytest.approx(float(logits.max()), abs=1e-5)
    assert dict(said.predictions)["neither"] == pytest.approx(float(logits.softmax(-1)[2]), abs=1e-6)
    assert [p for _, p in said.predictions] == sorted((p for _, p in said.predictions), reverse=True)
    other = explain(classifier, TOKENIZER, text, label="neither", baseline="pad")
    assert other.label == "neither" and other.score == pytest.approx(float(logits[2]), abs=1e-5)
    assert other.baseline == "[PAD]"
    without = classifier(pack([[2, 0, 0, 0, 0, 3]])).logits[0, 2].detach()
    assert other.baseline_score == pytest.approx(float(without), abs=1e-5)


def test_attention_maps_are_those_of_the_model(classifier):
    said = explain(classifier, TOKENIZER, "the film was good")
    expected = classifier(pack([[2, 5, 7, 9, 11, 3]]), output_attentions=True).attentions
    assert said.attentions.shape == (2, 3, 6, 6)
    assert all(said.attentions[layer].equal(expected[layer][0]) for layer in range(2))


@pytest.mark.parametrize("kind", (BertForMaskedLM, BertForPreTraining))
def test_the_guess_behind_a_mask_is_explained_and_seen_to_grow(kind):
    model = build(kind, vocab_size=19).eval()
    said = explain(model, TOKENIZER, "the [MASK] was [MASK] .", top=3)
    out = model(pack([[2, 5, 4, 9, 4, 17, 3]]), output_logits=True)
    logits = out.logits if out.prediction_logits is None else out.prediction_logits
    logits = logits.detach()
    best = [TOKENIZER.convert_ids_to_tokens(int(row.argmax())) for row in logits[[2, 4]]]
    assert said.guessed == (2, 4) and said.position == 2 and said.label == best[0]
    assert len(said.guesses) == 3 and [cell[0][0] for cell in said.guesses[-1]] == best
    assert len(said.predictions) == 3
    assert dict(said.guesses[-1][0]) == pytest.approx(dict(said.predictions), abs=1e-6)
    assert said.guesses[0] != said.guesses[-1]
    assert said.score == pytest.approx(float(logits[2].max()), abs=1e-5)
    assert said.attributions[2] == said.attributions[4] == 0 and said.attributions[1] != 0
    lamp = explain(model, TOKENIZER, "the [MASK] was [MASK] .", label="lamp")
    assert lamp.score == pytest.approx(float(logits[2, 6]), abs=1e-5)


def test_a_classifier_guesses_only_by_a_head_it_is_given():
    model = build(BertForSequenceClassification, vocab_size=19).eval()
    assert explain(model, TOKENIZER, "the film").guesses == ()
    head = build(BertForMaskedLM, seed=1, vocab_size=19).mlm
    said = explain(model, TOKENIZER, "the film", mlm=head)
    assert said.guessed == (0, 1, 2, 3) and [len(row) for row in said.guesses] == [4] * 3
    with pytest.raises(ValueError, match="vocab_size=41, hidden_size=24: the model has 19 and 24"):
        explain(model, TOKENIZER, "the film", mlm=build(BertForMaskedLM).mlm)


def test_a_regression_is_explained_by_its_value():
    model = build(BertForSequenceClassification, id2label=("score",)).eval()
    said = explain(model, TOKENIZER, "the film")
    assert said.predictions == () and said.label == "score"
    assert said.score == pytest.approx(model(pack([[2, 5, 7, 3]])).logits.item(), abs=1e-5)


def test_a_model_in_training_is_explained_without_dropout_and_left_in_training(classifier):
    model = build(BertForSequenceClassification, train=True, **CLASSES)
    assert explain(model, TOKENIZER, "the film").attributions == explain(classifier, TOKENIZER, "the film").attributions
    assert model.training


def test_a_dictionary_holds_all_but_the_maps_and_is_json(classifier):
    said = explain(classifier, TOKENIZER, "the film")
    values = json.loads(json.dumps(said.to_dict()))
    assert values["error"] == said.error and values["words"][1]["text"] == "the" and "attentions" not in values


@pytest.mark.parametrize(
    ("kind", "changes", "text", "options", "message"),
    [
        (BertForSequenceClassification, CLASSES, "good", {"label": "positiv"}, "did you mean 'positive'"),
        (BertForSequenceClassification, {}, "good", {"baseline": "zero"}, "'zero' is not one of mask, pad"),
        (BertForSequenceClassification, {}, " ", {}, "text=' ' is empty"),
        (BertForSequenceClassification, {}, "good", {"top": 0}, "top=0 is not positive"),
        (BertForSequenceClassification, {}, "good " * 18, {}, "has 20 tokens, the model takes 19: shorten it"),
        (BertForSequenceClassification, {"problem_type": "multi_label_classification"}, "good", {}, "multi_label"),
        (BertForMaskedLM, {}, "good", {}, r"has no \[MASK\], and the model has no classifier"),
        (BertForMaskedLM, {"vocab_size": 19}, "[MASK]", {"label": "lampe"}, "'lampe' is not a token"),
        (BertForMaskedLM, {"causal": True}, "[MASK]", {}, "causal=True"),
    ],
)
def test_what_cannot_be_explained_is_said_in_one_line(kind, changes, text, options, message):
    with pytest.raises(ValueError, match=message) as error:
        explain(build(kind, **changes), TOKENIZER, text, **options)
    assert "\n" not in str(error.value)
