import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from minibert.cli import main
from minibert.train.log import MetricsLog, Progress, read_metrics, truncate_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 1 / step})
    return path


def test_a_record_is_in_the_file_when_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": 0.1})
        assert read_metrics(path) == [{"step": 1, "loss": 0.1}]


def test_numbers_come_back_as_they_were_and_what_is_not_finite_as_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(
            {"step": 1, "a": 0.1 + 0.2, "b": math.nan, "c": np.float32(0.5), "d": torch.tensor(3), "e": {"f": math.inf}}
        )
    assert read_metrics(path) == [{"step": 1, "a": 0.1 + 0.2, "b": None, "c": 0.5, "d": 3, "e": {"f": None}}]


class Recorder:
    """Stands for a package that draws numbers: what was called, in order."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs)) or self


def test_a_writer_gets_the_numbers_and_is_closed(tmp_path, monkeypatch):
    record, tracker, board = {"step": 3, "loss": 0.5, "skipped": "why"}, Recorder(), Recorder()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for word in ("trackio", "tensorboard"):
        with MetricsLog(tmp_path / "metrics.jsonl", word) as log:
            log.write(record)
    assert [name for name, *_ in tracker.calls] == ["init", "log", "finish"]
    assert tracker.calls[1][1:] == (({"loss": 0.5},), {"step": 3})
    assert [name for name, *_ in board.calls] == ["SummaryWriter", "add_scalar", "close"]
    assert board.calls[1][1] == ("loss", 0.5, 3)
    assert read_metrics(tmp_path / "metrics.jsonl") == [record, record]


def test_a_writer_whose_package_is_missing_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="writer='wandb' needs one more package: pip install wandb"):
        MetricsLog(tmp_path / "metrics.jsonl", "wandb")
    assert main(f"pretrain --data {tmp_path} --out {tmp_path / 'run'} --writer wandb".split()) == 2
    assert capsys.readouterr().err.endswith("writer='wandb' needs one more package: pip install wandb\n")
    assert not (tmp_path / "run").exists()


def test_a_resumed_log_keeps_the_records_up_to_its_step_and_drops_half_a_line(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 6, "lo')
    truncate_metrics(path, 3)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_log_that_is_not_there_stays_away(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_log_that_fails_to_be_cut_is_as_it_was(path, monkeypatch):
    whole = path.read_bytes()

    def no(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no)
    with pytest.raises(OSError, match="No space"):
        truncate_metrics(path, 2)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff"])
def test_a_broken_line_inside_the_log_is_named(path, line):
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is not a record"):
        read_metrics(path)


def test_a_full_disk_names_the_log(tmp_path):
    with pytest.raises(OSError, match="/dev/full cannot be written: No space left"), MetricsLog("/dev/full") as log:
        log.write({"step": 1})


def test_without_a_terminal_there_are_few_plain_lines_and_one_for_each_evaluation():
    stream = io.StringIO()
    with Progress(100, stream=stream) as progress:
        for step in range(1, 51):
            progress.advance(step)
            progress.show({"step": step, "loss": 0.5} | ({"eval_loss": 0.25} if step % 25 == 0 else {}))
    lines = stream.getvalue().splitlines()
    assert lines == ["step 1/100  loss 0.5", *(f"step {s}/100  loss 0.5  eval_loss 0.25" for s in (25, 50))]


def test_on_a_terminal_there_is_a_bar():
    stream = Terminal()
    with Progress(10, 3, stream=stream) as progress:
        progress.advance(7)
        progress.show({"step": 7, "loss": 0.5, "eval_f1": 0.75, "learning_rate": 1e-4})
    assert "7/10" in stream.getvalue() and "eval_f1 0.75" in stream.getvalue() and "\x1b" in stream.getvalue()


def test_a_record_is_one_line_of_strict_json(path):
    for line in path.read_text().splitlines():
        assert json.loads(line, parse_constant=lambda word: pytest.fail(word))["step"] > 0
