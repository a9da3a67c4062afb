"""From examples to the best checkpoint: what is learned, kept, continued and drawn anew."""

import json

import pytest
import torch
from small import refused

from minibert import BertForMaskedLM, BertForSequenceClassification
from minibert.tasks import Example, make_task, task_of
from minibert.tasks import finetune as module
from minibert.train import latest, read_metrics

OPTIONS = {"batch_size": 5, "epochs": 3, "lr": 1e-2, "log_every": 1, "device": "cpu", "keep_last": 9}


def examples(count, first=0):
    """Dogs are one intent, cats another; birds are out of scope."""
    words, labels = (("dogs", "bark"), ("the cat", "sat"), ("birds", "sing")), ("dog", "cat", "oos")
    texts = (f"{words[i % 3][0]} {'at night ' * (i % 4)}and {words[i % 3][1]}" for i in range(first, first + count))
    return [Example((text,), labels[i % 3], f"x:{i}") for i, text in enumerate(texts, first)]


PARTS = {"train": examples(31), "valid": examples(14, 31)}
IN_SCOPE = {split: [example for example in part if example.target != "oos"] for split, part in PARTS.items()}
OUT_OF_SCOPE = {split: [example for example in part if example.target == "oos"] for split, part in PARTS.items()}


def fit(weights, out, task="intent", parts=PARTS, **options):
    return module.finetune(make_task(task), parts, weights, out, **OPTIONS | options)


def files(run):
    """What a run leaves that does not depend on the clock."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.glob("step-*/*"))
        if path.name in ("config.json", "model.safetensors")
    }


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(weights, out)
    return out


def test_a_threshold_is_kept_with_the_best_checkpoint_and_out_of_scope_is_no_class(whole):
    config = json.loads((latest(whole) / "config.json").read_text())
    assert config["finetuning_task"] == "intent" and config["id2label"] == {"0": "cat", "1": "dog"}
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert config["task_specific_params"]["threshold"] == last["eval_threshold"] > 0
    assert task_of(BertForSequenceClassification.from_pretrained(latest(whole))).threshold == last["eval_threshold"]
    assert last["eval_accuracy"] == 1.0


def test_an_epoch_has_the_examples_that_teach_something(whole):
    """Ten of 31 are out of scope; 21 are five batches of up to five, three times."""
    assert [record["step"] for record in read_metrics(whole / "metrics.jsonl")] == list(range(1, 16))


@pytest.mark.parametrize("evaluations", [1, 2])
def test_a_run_that_was_killed_goes_on_bit_for_bit(evaluations, whole, weights, tmp_path, monkeypatch):
    real, count = module.evaluate, 0

    def killed(*args, **options):
        nonlocal count
        if count == evaluations:
            raise KeyboardInterrupt
        count += 1
        return real(*args, **options)

    monkeypatch.setattr(module, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(weights, tmp_path / "run")
    assert files(tmp_path / "run") != files(whole)
    monkeypatch.setattr(module, "evaluate", real)
    fit(weights, tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(whole)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    fit(weights, tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(whole) and (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": {**PARTS, "train": PARTS["train"][::-1]}}, "was started with data.train="),
        ({"batch_size": 6}, "was started with"),
        (
            {"task": "classification", "parts": IN_SCOPE},
            "was started with",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_examples_or_another_task(changes, message, whole, weights):
    before = files(whole)
    assert message in refused(lambda: fit(weights, whole, resume=True, **changes))
    assert files(whole) == before


def test_from_scratch_nothing_but_the_shape_and_the_tokenizer_is_taken(weights, tmp_path):
    begun = []

    def begin(run, network):
        begun.append({name: parameter.clone() for name, parameter in network.named_parameters()})

    for number, scratch in enumerate((True, True, False)):
        fit(weights, tmp_path / str(number), steps=1, scratch=scratch, begin=begin)
    first, second, pretrained = begun
    assert all(first[name].equal(second[name]) for name in first)
    word = "bert.embeddings.word.weight"
    stored = BertForMaskedLM.from_pretrained(weights).state_dict()[word]
    assert pretrained[word].equal(stored) and not torch.isclose(first[word], stored).any(1).all()


def test_examples_are_drawn_for_learning_but_labels_are_known_from_all(weights, tmp_path):
    parts = {"train": [*examples(30), Example(("the mat",), "mat", "x:30")], "valid": examples(9)}
    fit(weights, tmp_path / "run", "classification", parts, max_train=2, steps=1)
    network = BertForSequenceClassification.from_pretrained(latest(tmp_path / "run"))
    assert network.config.id2label == ("cat", "dog", "mat", "oos")


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_label_that_only_held_out_examples_have_is_refused_unless_it_is_known(split, weights, tmp_path):
    odd = Example(("the mat",), "fish", "x.csv:7")
    parts = {"train": examples(9), "valid": examples(5), "test": examples(5)}
    parts |= {split: [*parts[split], odd]}
    message = refused(lambda: fit(weights, tmp_path / "run", "classification", parts))
    assert message == "x.csv:7: label='fish' is not one of cat, dog, oos" and not (tmp_path / "run").exists()
    fit(weights, tmp_path / "run", "classification", parts, known=[*parts["train"], odd], steps=1)
    network = BertForSequenceClassification.from_pretrained(latest(tmp_path / "run"))
    assert network.config.id2label == ("cat", "dog", "fish", "oos")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not positive"),
        ({"epochs": -1}, "epochs=-1 is not positive"),
        ({"parts": {**PARTS, "valid": [Example(("cat " * 20,), "cat", "x:9")]}}, "x:9: the text has 22 tokens"),
        ({"parts": OUT_OF_SCOPE}, "no example has a label"),
    ],
)
def test_what_does_not_fit_leaves_no_directory(options, message, weights, tmp_path):
    assert message in refused(lambda: fit(weights, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
