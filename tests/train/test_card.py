"""A run says how it came about, and its checkpoints carry a card that says so in sentences."""

import json
import os
import re
import subprocess

import pytest
import torch
from tiny_run import Stream, evaluate_loss, make_config, run

from minibert import BertForSequenceClassification
from minibert.cli import main
from minibert.train import Interrupted, card, verify
from minibert.train.card import read_run, record_run, surroundings

DATA = {"counts": {"documents": 1234, "sentences": 5, "tokens": 67}, "sources": [{"file": "a.txt", "sha256": "ab"}]}


def stop_at(cursor, signum=15):
    def before(now):
        if now == cursor:
            os.kill(os.getpid(), signum)

    return before


def sentences(directory):
    return (directory / "README.md").read_text(encoding="utf-8").splitlines()


def test_a_run_names_its_command_versions_machine_data_and_options(tmp_path, monkeypatch):
    monkeypatch.setattr(card.sys, "orig_argv", ["minibert", "pretrain", "--data", "my texts"])
    run(tmp_path, settings={"data": DATA})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"] == "minibert pretrain --data 'my texts'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["started"])
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0]) and record["versions"]["minibert"]
    assert record["machine"]["cores"] >= 1 and record["machine"]["processor"] and record["machine"]["gpu"] is None
    assert record["config"]["steps"] == 10 and record["settings"]["data"] == DATA and record["resumed"] == []
    assert re.fullmatch("[0-9a-f]{64}", record["data_sha256"])
    run(tmp_path / "other", settings={"data": DATA | {"sources": []}})
    assert read_run(tmp_path / "other")["data_sha256"] != record["data_sha256"]


def test_what_goes_on_is_added_and_the_beginning_stays(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, data=Stream(before=stop_at(20)))
    first = read_run(tmp_path)
    run(tmp_path, resume=True)
    record = read_run(tmp_path)
    assert [entry["step"] for entry in record["resumed"]] == [4]
    assert {"command", "started", "versions", "machine", "git"} <= record["resumed"][0].keys()
    assert record | {"resumed": []} == first
    run(tmp_path, resume=True)  # nothing is left to do
    assert read_run(tmp_path) == record


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"resumed": 3}', "[" * 100_000])
def test_a_broken_record_stops_no_run(tmp_path, content):
    with pytest.raises(Interrupted):
        run(tmp_path, data=Stream(before=stop_at(20)))
    (tmp_path / "run.json").write_text(content)
    assert read_run(tmp_path) is None
    run(tmp_path, resume=True)
    assert read_run(tmp_path)["config"]["steps"] == 10


def test_the_state_of_the_repository_is_the_one_around_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert surroundings()["git"] is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD").strip()
    assert surroundings()["git"] == {"commit": commit, "changed_files": 0}
    (tmp_path / "x").write_text("22")
    (tmp_path / "untracked").write_text("")
    assert surroundings()["git"] == {"commit": commit, "changed_files": 1}
    monkeypatch.setenv("PATH", "")
    assert surroundings()["git"] is None


def test_the_card_says_what_was_trained_on_what_and_how_well(tmp_path):
    settings = {"task": {"finetuning_task": "classification"}, "examples": {"train": 1152, "valid": 384}, "data": DATA}
    config = make_config(eval_every=5, best_metric="loss")
    _, result = run(tmp_path, config=config, evaluate=evaluate_loss, settings=settings)
    lines = sentences(tmp_path / "step-10")
    assert lines[0] == "# BertForSequenceClassification"
    for fact in (
        "- A BERT of 1 layers, 12 wide, with ",
        "- It was trained for 10 of 10 steps by adamw in float32, with a peak learning rate of 0.003 and seed 11.",
        "- It learned classification of texts: LABEL_0, LABEL_1.",
        "- Its text: 1,234 documents, 5 sentences, 67 tokens.",
        "- Its examples: 1,152 train, 384 valid.",
        f"- The sha256 of what describes its data is {read_run(tmp_path)['data_sha256']}.",
        f"- Its last evaluation: loss {result.metrics['loss']:.4g}, batches 0.",
        f"- The best loss so far was {result.best['value']:.4g}, at step {result.best['step']}.",
    ):
        assert [line for line in lines if line.startswith(fact)], fact
    assert sum(line.startswith("- ") for line in lines) == 10


def test_the_python_of_a_card_loads_the_model(tmp_path, monkeypatch):
    model, result = run(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (result.checkpoint / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(result.checkpoint)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert torch.equal(names["model"].classifier.weight, model.classifier.weight)


def test_a_mixture_names_each_of_its_texts(tmp_path):
    run(tmp_path, settings={"data": {"mix": [1.0, 2.0], "stores": [DATA, DATA]}, "objectives": ["mlm", "sop"]})
    lines = sentences(tmp_path / "step-10")
    assert lines.count("- Its text: 1,234 documents, 5 sentences, 67 tokens.") == 2
    assert "- It learned mlm, sop." in lines


def test_a_card_that_is_there_stays_and_a_converted_model_keeps_it(tmp_path):
    _, result = run(tmp_path / "run")
    (result.checkpoint / "README.md").write_text("# Mine")
    verify(result.checkpoint)
    card.write_card(
        result.checkpoint, tmp_path / "run", BertForSequenceClassification.from_pretrained(result.checkpoint), {}
    )
    assert main(["convert", str(result.checkpoint), "--out", str(tmp_path / "hf")]) == 0
    assert sentences(tmp_path / "hf") == ["# Mine"]


def test_without_a_record_there_is_no_card(tmp_path):
    model, result = run(tmp_path / "run")
    model.save_pretrained(tmp_path / "plain")
    card.write_card(tmp_path / "plain", tmp_path, model, {})
    assert not (tmp_path / "plain" / "README.md").exists()
    record_run(tmp_path / "plain", 0, {"config": {"device": "cpu"}, "settings": {"model": {}}})
    assert read_run(tmp_path / "plain")["data_sha256"] is None
