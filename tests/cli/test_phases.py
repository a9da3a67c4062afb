"""`minibert pretrain --phases`: several runs in one command, however often it is stopped."""

import json
import os
import re
import shutil
import signal

import pytest
import safetensors.torch

from minibert.cli import build_parser, main, parse
from minibert.cli.phases import plan_phases
from minibert.cli.plotting import records_of
from minibert.cli.pretraining import PHASED
from minibert.data import PretrainingData
from minibert.train import METRICS, TIMING_FIELDS, read_metrics, resolve_model

SENTENCE = "the lamp is good bad kettle film soup was not very kind of broken and we like it"
PHASES = ["--phases", "{max_length: 24, steps: 5, lr: 1e-3}", "{max_length: 40, steps: 3, save_every: 2}"]
SMALL = "--vocab-size 120 --arch.hidden_size 12 --arch.num_attention_heads 2 --arch.num_hidden_layers 1 --save-every 2"
SMALL += " --arch.intermediate_size 20 --batch-tokens 256 --valid-fraction 0.2 --log-every 1 --device cpu --lr 5e-4"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("phases") / "corpus.txt"
    words = SENTENCE.split()
    path.write_text("\n\n".join(". ".join(" ".join(words[i:] + words[:i]) for _ in range(4)) for i in range(16)))
    return path


def command(corpus, out, *flags):
    return ["pretrain", "--data", str(corpus), "--out", str(out), *SMALL.split(), *flags]


@pytest.fixture(scope="module")
def whole(corpus):
    out = corpus.parent / "whole"
    assert main(command(corpus, out, *PHASES)) == 0
    return out


def log_of(run):
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in read_metrics(run / METRICS)]


def assert_phases_are_equal(one, two):
    for phase, step in (("phase-1", 5), ("phase-2", 3)):
        assert log_of(one / phase) == log_of(two / phase)
        for name in ("model.safetensors", "optimizer.safetensors", "trainer.json"):
            names = [folder / phase / f"step-{step}" / name for folder in (one, two)]
            assert names[0].read_bytes() == names[1].read_bytes(), names[0]


def test_the_first_phase_is_the_run_it_would_be_alone_and_the_second_goes_on_from_its_end(corpus, whole, tmp_path):
    alone = ["--max-length", "24", "--steps", "5", "--lr", "1e-3"]
    assert main(command(whole / "data", tmp_path / "alone", *alone)) == 0
    assert log_of(tmp_path / "alone") == log_of(whole / "phase-1")
    first, second = log_of(whole / "phase-1"), log_of(whole / "phase-2")
    assert [record["step"] for record in second] == [1, 2, 3] and second[0]["loss"] < first[0]["loss"]
    assert second[0]["learning_rate"] == pytest.approx(5e-4)
    moments = safetensors.torch.load_file(whole / "phase-2/step-3/optimizer.safetensors")
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {8}
    seeds = [json.loads((whole / f"phase-{n}/run.json").read_text())["config"]["seed"] for n in (1, 2)]
    assert seeds == [0, 1], "no sample comes again as it was"
    assert sorted(path.name for path in whole.iterdir() if path.is_dir()) == ["data", "phase-1", "phase-2"]


def test_a_phase_with_another_optimizer_begins_without_moments(corpus, tmp_path):
    out = tmp_path / "run"
    assert main(command(corpus, out, "--phases", "{steps: 2}", "{steps: 2, optimizer: lamb}")) == 0
    moments = safetensors.torch.load_file(out / "phase-2/step-2/optimizer.safetensors")
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {2}


class Killed(BaseException):
    pass


# the first phase draws six batches, one of them ahead; so the seventh is the second's first
@pytest.mark.parametrize(
    ("how", "batch"), [("killed", 4), ("killed", 7), ("killed", 10), ("signal", 4), ("signal", 6), ("signal", 8)]
)
def test_a_stopped_command_goes_on_to_the_same_end(how, batch, corpus, whole, tmp_path, monkeypatch, capsys):
    made, before, out = [], PretrainingData.next_batch, tmp_path / "run"

    def next_batch(self, cursor):
        made.append(cursor)
        if len(made) == batch:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, cursor)

    monkeypatch.setattr(PretrainingData, "next_batch", next_batch)
    if how == "killed":
        with pytest.raises(Killed):
            main(command(corpus, out, *PHASES))
    else:
        assert main(command(corpus, out, *PHASES)) == 143
        assert "continue with --resume" in capsys.readouterr().err.splitlines()[-1]
    assert (out / "phase-2").exists() == (batch > 6)
    del made[:]
    monkeypatch.setattr(PretrainingData, "next_batch", before)
    assert main(command(corpus, out, *PHASES, "--resume")) == 0
    assert_phases_are_equal(whole, out)


def test_a_finished_phase_is_skipped_though_its_checkpoints_are_gone(corpus, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "phase-1/step-5")
    shutil.rmtree(out / "phase-1/step-4")
    shutil.rmtree(out / "phase-2/step-3")
    assert main(command(corpus, out, *PHASES, "--resume")) == 0
    assert not list((out / "phase-1").glob("step-*")) and log_of(out / "phase-2") == log_of(whole / "phase-2")


@pytest.mark.parametrize("kept", [1, 2])
def test_other_phases_are_not_resumed(kept, corpus, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    if kept == 1:
        shutil.rmtree(out / "phase-2")
    other = [*PHASES[:1], PHASES[1].replace("steps: 5", "steps: 6"), PHASES[2]]
    assert main(command(corpus, out, *other, "--resume")) == 2
    assert "steps=5, now it is 6" in capsys.readouterr().err
    assert main(command(corpus, out, *PHASES[:2], "--resume")) == 2
    assert main(command(corpus, out, *PHASES)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(command(corpus, out, "--steps", "5", "--resume")) == 2
    assert "holds a run in phases: resume it with those" in capsys.readouterr().err
    assert main(command(corpus, whole / "phase-1", *PHASES, "--resume")) == 2
    assert "holds a run without phases" in capsys.readouterr().err


def test_the_config_file_of_a_run_repeats_its_phases(whole, tmp_path):
    options = parse(build_parser("pretrain"), ["--config", str(whole / "config.yaml")])
    assert options["phases"] == [
        {"max_length": 24, "lr": 1e-3, "steps": 5},
        {"max_length": 40, "save_every": 2, "steps": 3},
    ]
    assert main(["pretrain", "--config", str(whole / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert log_of(tmp_path / "again/phase-2") == log_of(whole / "phase-2")


def test_a_run_in_phases_stands_for_the_last_one_and_is_drawn_as_one(whole, tmp_path, capsys):
    assert resolve_model(whole).parent == whole / "phase-2"
    assert main(["fill-mask", "--model", str(whole), "--device", "cpu", "the [MASK]"]) == 0
    assert [record["step"] for record in records_of(whole)] == [1, 2, 3, 4, 5, 6, 7, 8]
    (tmp_path / "run/phase-2").mkdir(parents=True)
    shutil.copytree(whole / "phase-1", tmp_path / "run/phase-1")
    assert resolve_model(tmp_path / "run").parent == tmp_path / "run/phase-1"
    assert [record["step"] for record in records_of(tmp_path / "run")] == [1, 2, 3, 4, 5]


def planned(phases, **given):
    return plan_phases(phases, {"steps": None, "minutes": None, "seed": 0} | given, PHASED)


def test_steps_and_minutes_are_shared_out_in_proportion():
    phases = [{"steps": 900, "lr": 1.0}, {"steps": 100}]
    assert planned(phases) == phases
    assert planned(phases, steps=44) == [{"lr": 1.0, "steps": 40}, {"steps": 4}]
    assert planned(phases, minutes=30) == [{"lr": 1.0, "minutes": 27}, {"minutes": 3}]
    assert planned([{"minutes": 1}, {"minutes": 2}, {"minutes": 1}], steps=7) == [{"steps": n} for n in (2, 3, 2)]
    with pytest.raises(ValueError, match="minutes=3 cannot be shared out: give every phase its steps, or every one"):
        planned([{"steps": 3}, {"minutes": 2}], minutes=3)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("{model: bert-base}", "phase 2: model is the same in all phases: give it beside them"),
        ("{arch: {num_hidden_layers: 2}}", "phase 2: arch is the same in all phases"),
        ("{tokenizer: other}", "phase 2: tokenizer is the same in all phases"),
        ("{data: [other]}", "phase 2: data is the same in all phases"),
        ("{objectives: [sop]}", "phase 2: objectives is the same in all phases"),
        ("{seed: 3}", "phase 2: seed is the same in all phases"),
        ("{max_lenght: 9}", "phase 2: option='max_lenght' is not one of steps, .*did you mean 'max_length'"),
        ("{max_length: long}", "phase 2: .max_length.: Expected a <class 'int'>"),
        ("{max_length: 24}", "phase 2: steps=None and minutes=None: give one of the two"),
        ("{steps: 3, max_length: 1024}", "phase 2: max_length=1024 exceeds max_position_embeddings=512"),
        ("{steps: 3, mask_rate: 2}", "phase 2: mask_rate=2"),
        ("{steps: 3, minutes: 2}", "phase 2: steps=3 and minutes=2"),
    ],
)
def test_a_phase_that_cannot_be_is_named_before_anything_is_written(phase, message, corpus, tmp_path, capsys):
    assert main(command(corpus, tmp_path / "run", "--phases", "{steps: 3}", phase)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_damage_in_a_finished_phase_does_not_stop_a_later_one(corpus, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for file in out.glob("phase-1/step-*/model.safetensors"):
        file.write_bytes(b"gone")
    shutil.rmtree(out / "phase-2/step-3")
    assert main(command(corpus, out, *PHASES, "--resume")) == 0
    weights = [(folder / "phase-2/step-3/model.safetensors").read_bytes() for folder in (whole, out)]
    assert weights[0] == weights[1]


def test_another_preset_is_refused_in_a_later_phase_too(corpus, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "phase-2/step-3")
    assert main(command(corpus, out, *PHASES, "--resume", "--model", "bert-mini")) == 2
    assert "was started with preset='bert-tiny', now it is 'bert-mini'" in capsys.readouterr().err


def test_steps_and_minutes_together_are_refused_with_phases_too(corpus, tmp_path, capsys):
    assert main(command(corpus, tmp_path / "run", *PHASES, "--steps", "4", "--minutes", "1")) == 2
    assert "steps=4 and minutes=1.0: give one of the two" in capsys.readouterr().err
