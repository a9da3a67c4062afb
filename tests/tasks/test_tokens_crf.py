"""Tags that are learned and found together: what a CRF gains, and that it goes where the model goes."""

import json
import sys

import pytest
import torch
from small import refused
from toy import finetune, save_weights, say, words_tokenizer

from minibert import pipeline
from minibert.cli import main
from minibert.data.records import as_records
from minibert.model import BertForTokenClassification
from minibert.tasks import evaluate, make_task, read_examples
from minibert.tasks import finetune as module
from minibert.train import resolve_model

pytest.importorskip("torchcrf")
WORDS = ["new", "york", "times"]
# nobody can know which: alone, each word's likeliest tags are O I-x I-x, which is no span
TAGS = ([["B-x", "I-x", "I-x"]] * 3 + [["O", "B-x", "I-x"]] * 2 + [["O", "O", "B-x"]] * 2) * 3
OPTIONS = {"batch_size": 21, "steps": 80, "lr": 5e-3, "device": "cpu", "keep_last": 9, "eval_every": 40}


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("init"), words_tokenizer(*WORDS))


def examples(task, **more):
    return list(read_examples(task, as_records([{"tokens": WORDS, "tags": tags} | more for tags in TAGS])))


def fit(init, out, **options):
    task = make_task("ner", crf=options.pop("crf", True))
    return module.finetune(task, {"train": examples(task), "valid": examples(task)}, init, out, **OPTIONS | options)


@pytest.fixture(scope="module")
def run(init, tmp_path_factory):
    out = tmp_path_factory.mktemp("crf") / "run"
    fit(init, out)
    return out


def test_where_words_alone_do_not_decide_a_crf_finds_tags_that_go_together(init, run, tmp_path):
    apart = pipeline(str(fit(init, tmp_path / "apart", crf=False).checkpoint))
    assert apart(" ".join(WORDS))["tags"] == ["O", "I-x", "I-x"] and apart(" ".join(WORDS))["entities"] == []
    together = pipeline(str(run))(" ".join(WORDS))
    assert together["tags"] == ["B-x", "I-x", "I-x"]
    # the marginal of its least sure word: B-x begins three of seven sentences
    assert together["entities"][0]["probability"] == pytest.approx(3 / 7, abs=0.1)


def test_a_step_that_was_never_seen_is_ruled_out_before_anything_is_learned(init, tmp_path):
    fit(init, tmp_path / "run", steps=1, lr=1e-9)
    model = BertForTokenClassification.from_pretrained(resolve_model(tmp_path / "run"))
    [inside] = [i for i, name in enumerate(model.config.id2label) if name == "I-x"]
    outside = model.config.label2id["O"]
    assert model.crf.transitions[outside, inside] < -4 < model.crf.transitions[outside, outside]
    assert model.crf.start_transitions[inside] < -4


def test_a_model_with_a_crf_says_the_same_when_it_is_saved_and_loaded(run, tmp_path, capsys):
    model = BertForTokenClassification.from_pretrained(resolve_model(run))
    assert model.new_parameters == () and model.config.task_specific_params["crf"] is True
    task = make_task("ner", **model.config.task_specific_params)
    tokenizer = pipeline(str(run)).tokenizer
    model.save_pretrained(tmp_path, tokenizer)
    again = BertForTokenClassification.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.crf.parameters(), again.crf.parameters(), strict=True))
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"tokens": WORDS, "tags": tags}) + "\n" for tags in TAGS)
    measured = say(capsys, "evaluate", "--model", run, "--data", tmp_path / "a.jsonl")
    assert measured == evaluate(task, again, tokenizer, examples(task)) and measured["f1"] == pytest.approx(3 / 7)
    said = say(capsys, "predict", "--model", run, " ".join(WORDS))["predictions"][0]
    assert said == pipeline("ner", str(tmp_path))(" ".join(WORDS))


def test_without_a_crf_the_one_of_a_checkpoint_is_left_unread_and_a_new_one_is_new(run, init, tmp_path):
    bare = BertForTokenClassification.from_pretrained(resolve_model(run), task_specific_params={})
    assert bare.crf is None and bare.new_parameters == ()
    fit(init, tmp_path / "bare", crf=False)
    params = {"task_specific_params": {"crf": True}}
    model = BertForTokenClassification.from_pretrained(resolve_model(tmp_path / "bare"), **params)
    assert set(model.new_parameters) == {f"crf.{name}" for name, _ in model.crf.named_parameters()}
    fewer = BertForTokenClassification.from_pretrained(resolve_model(run), id2label=("B-x", "O"))
    assert "crf.transitions" in fewer.new_parameters and "classifier.weight" in fewer.new_parameters


def test_a_run_with_a_crf_that_was_killed_goes_on_bit_for_bit(run, init, tmp_path, monkeypatch):
    real, evaluations = module.evaluate, iter(range(9))

    def killed(*args, **options):
        if next(evaluations) == 1:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(init, tmp_path / "run")
    monkeypatch.setattr(module, "evaluate", real)
    fit(init, tmp_path / "run", resume=True)
    ours, theirs = (BertForTokenClassification.from_pretrained(resolve_model(path)) for path in (tmp_path / "run", run))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_intents_and_slots_with_a_crf_are_learned_through_the_verbs(init, tmp_path, capsys):
    with open(tmp_path / "a.jsonl", "w") as file:
        for _ in range(40):
            file.write(json.dumps({"tokens": WORDS, "tags": TAGS[0], "label": "read"}) + "\n")
            file.write(json.dumps({"tokens": WORDS[1:], "tags": ["O", "O"], "label": "fly"}) + "\n")
    flags = {"option.crf": "true", "dtype": "bfloat16", "steps": 60}
    results = finetune("joint", tmp_path / "a.jsonl", init, tmp_path / "run", **flags)
    assert results["valid"]["intent_accuracy"] == 1
    answers = say(capsys, "predict", "--model", tmp_path / "run", "new york times", "york times")["predictions"]
    assert [one["tags"] for one in answers] == [["B-x", "I-x", "I-x"], ["O", "O"]]
    assert [one["label"] for one in answers] == ["read", "fly"]


def test_a_missing_package_is_said_before_the_run_begins(init, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchcrf", None)
    (tmp_path / "a.conll").write_text("new B-x\nyork I-x\n\nnew O\nyork B-x\n\n" * 9)
    files = ["--data", tmp_path / "a.conll", "--init", init, "--out", tmp_path / "run"]
    assert main([*map(str, ["finetune", "--task", "ner", "--option.crf", "true", *files])]) == 2
    line = "crf=True needs one more package: pip install 'minibert[tasks]'"
    assert capsys.readouterr().err.endswith(f"error: {line}\n") and not (tmp_path / "run").exists()
    assert refused(lambda: pipeline(str(run))) == line
