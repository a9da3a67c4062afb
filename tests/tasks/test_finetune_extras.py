"""What `finetune` may do beside learning: draw some weights anew, weigh classes, fit a temperature."""

import copy
import json

import numpy as np
import pytest
import torch
from small import SIZES, build

from minibert.config import BertConfig
from minibert.data.tokenizer import Tokenizer
from minibert.model import BertForPreTraining, BertForSequenceClassification, BertForTokenClassification
from minibert.tasks import Example, evaluate, make_task, metrics, task_of
from minibert.tasks.finetune import finetune, reinitialise
from minibert.train import train

WORDS = ["red", "green", "blue", "dog", "cat", "bird", "runs", "sleeps", "flies"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A directory with weights that were never trained, and a tokenizer."""
    directory = tmp_path_factory.mktemp("pretrained")
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, 60)
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size, "initializer_range": 0.2}
    BertForPreTraining(BertConfig(**sizes)).save_pretrained(directory, tokenizer)
    return directory


def colours(count, seed=0, noise=0.2):
    """Texts of three words, by the colour of the first; red ones are frequent, and `noise` of the labels are drawn."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        first, rest = rng.choice(3, p=(0.6, 0.3, 0.1)), rng.choice(WORDS, 2)
        label = rng.integers(3) if rng.random() < noise else first
        yield Example((" ".join([WORDS[first], *rest]),), WORDS[label], f"made:{number}")


def learn(pretrained, run_dir, task, noise=0.2, **options):
    parts = {"train": list(colours(83)), "valid": list(colours(41, 1, noise))}
    options = {"steps": 12, "lr": 3e-3, "eval_every": 5, "save_every": 3, "keep_last": 9, "batch_size": 16} | options
    result = finetune(task, parts, pretrained, run_dir, **options)
    model = BertForSequenceClassification.from_pretrained(result.checkpoint).eval()
    return result, model, Tokenizer.from_pretrained(result.checkpoint), parts


def test_balanced_weights_are_learned_from_the_training_examples_and_kept(pretrained, tmp_path):
    task = make_task("classification", class_weights="balanced", label_smoothing=0.1)
    _, model, _, parts = learn(pretrained, tmp_path, task, steps=2)
    counts = {name: sum(e.target == name for e in parts["train"]) for name in ("red", "green", "blue")}
    weights = model.config.task_specific_params["class_weights"]
    assert {name: 83 / 3 / count for name, count in counts.items()} == pytest.approx(weights)
    assert task_of(model).class_weights == weights and task_of(model).label_smoothing == 0.1


def test_examples_of_which_none_teaches_anything_are_refused(pretrained, tmp_path):
    parts = {"train": [Example(("red dog",), "oos", "made:7")], "valid": list(colours(9))}
    with pytest.raises(ValueError, match="^made:7: nothing can be learned from this example, nor from the others$"):
        finetune(make_task("intent"), parts, pretrained, tmp_path / "run", known=parts["valid"], steps=1)
    assert not (tmp_path / "run").exists()


def test_weights_of_several_labels_are_those_that_are_not_there_over_those_that_are():
    examples = [Example(("x",), labels, "f:1") for labels in (("a",), ("a", "b"), ("a",), ())]
    assert make_task("multilabel", class_weights="balanced").prepared(examples).class_weights == {"a": 1 / 3, "b": 3}


def test_an_intent_that_is_out_of_scope_has_no_weight():
    examples = [Example(("x",), label, "f:1") for label in ("a", "a", "b", "oos", "oos")]
    assert make_task("intent", class_weights="balanced").prepared(examples).class_weights == {"a": 0.75, "b": 1.5}


def test_a_temperature_is_fitted_to_the_held_out_examples_and_calibrates_them(pretrained, tmp_path):
    options = {"steps": 60, "eval_every": 60, "noise": 0.7}
    result, model, tokenizer, parts = learn(
        pretrained, tmp_path, make_task("classification", calibrate=True), **options
    )
    task = task_of(model)
    assert task.temperature > 2, "seven in ten labels are drawn: it is too sure"
    measured = evaluate(task, model, tokenizer, parts["valid"])
    assert measured["ece"] < measured["ece_before"] and measured["brier"] < measured["brier_before"]
    assert {name: measured[name] for name in ("ece", "brier", "temperature")} == pytest.approx(
        {name: result.metrics[name] for name in ("ece", "brier", "temperature")}, abs=1e-5
    ), "what the run reports is after the fit"
    plain, *_ = learn(pretrained, tmp_path / "plain", make_task("classification"), **options)
    assert plain.metrics["accuracy"] == result.metrics["accuracy"] and "ece" not in plain.metrics


def test_a_threshold_is_chosen_for_probabilities_with_the_temperature():
    logits = [[2.0, 0.0], [0.0, 3.0], [4.0, 0.0], [0.5, 0.0], [0.0, 0.4]]
    examples = [Example(("x",), label, "f:1") for label in ("a", "b", "b", "oos", "oos")]
    config = BertConfig(**SIZES, id2label=("a", "b"))
    task = make_task("intent", calibrate=True)
    scores = np.array(logits, dtype=np.float32)
    fitted = task.fitted(examples, list(task.predict(examples, [], scores, config)), config)
    assert fitted.temperature == pytest.approx(metrics.temperature([0, 1, 1], scores[:3]))
    said = [p["label"] for p in fitted.predict(examples, [], scores, config)]
    assert said == ["a", "b", "a", "oos", "oos"]


def test_a_run_that_stopped_between_two_fits_goes_on_as_one_that_did_not(pretrained, tmp_path, monkeypatch):
    task = make_task("classification", calibrate=True)
    learn(pretrained, tmp_path / "whole", task)

    def stopping(network, data, *rest, **options):
        draw = data.next_batch
        data.next_batch = lambda cursor: draw(cursor) if cursor < 100 else pytest.fail("stopped")
        return train(network, data, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception, match="stopped"):
        patch.setattr("minibert.tasks.finetune.train", stopping)
        learn(pretrained, tmp_path / "cut", task)
    assert (tmp_path / "cut/step-6").is_dir() and not (tmp_path / "cut/step-9").exists()
    learn(pretrained, tmp_path / "cut", task, resume=True)
    for name in ("config.json", "model.safetensors", "trainer.json"):
        files = [tmp_path / run / "step-9" / name for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    kept = json.loads((tmp_path / "cut/step-9/config.json").read_text())["task_specific_params"]
    assert kept["temperature"] != 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("classification", {"class_weights": "even"}, "class_weights='even' is neither 'balanced' nor"),
        ("classification", {"class_weights": {"a": 0}}, "is neither 'balanced' nor a positive number"),
        ("classification", {"label_smoothing": 1.0}, r"label_smoothing=1.0 is not in \[0, 1\)"),
        ("classification", {"temperature": 0}, "temperature=0 is not a positive number"),
        ("regression", {"class_weights": "balanced"}, "class_weights='balanced' makes no sense for regression"),
        ("multilabel", {"calibrate": True}, "calibrate=True makes no sense for multilabel"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **options)


def test_a_weight_of_a_label_that_there_is_not_is_refused():
    examples = [Example(("x",), label, "f:1") for label in ("a", "b")]
    with pytest.raises(ValueError, match="class_weights='A' is not one of a, b"):
        make_task("classification", class_weights={"A": 2.0}).config(examples)


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForTokenClassification])
def test_the_last_layers_and_the_pooler_are_drawn_anew_and_nothing_else(kind):
    model = build(kind, num_hidden_layers=3)
    before = copy.deepcopy(model.state_dict())
    reinitialise(model, 2, seed=5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    above = ("bert.encoder.layers.1.", "bert.encoder.layers.2.", "bert.pooler.")
    matrices_and_biases = {name for name in before if name.startswith(above) and "norm.weight" not in name}
    assert changed == matrices_and_biases, "the weights of norms were 1 and are 1"
    again = copy.deepcopy(model.state_dict())
    reinitialise(model, 2, seed=5)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    reinitialise(model, 0, seed=6)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layers", [-1, 3, 1.0])
def test_a_number_of_layers_that_there_is_not_is_refused(layers):
    with pytest.raises(ValueError, match=f"reinit_layers={layers} is not a whole number from 0 to 2"):
        reinitialise(build(BertForSequenceClassification), layers, seed=0)
