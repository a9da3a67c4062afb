"""Scaling: processes step together, one that fails says why, and points move one axis at a time."""

from dataclasses import replace

import pytest
import torch

from benchmarks import peers, scaling, training
from benchmarks.gate import Refused
from benchmarks.peers import Place
from minibert import BertForPreTraining
from minibert.config import BertConfig

CONFIG = BertConfig.preset("bert-tiny", vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(weights=peers.random_weights(CONFIG, tmp_path_factory.mktemp("weights"), BertForPreTraining))


def ranks(place, name="minibert", processes=2):
    reference = training.Reference(place)
    return scaling.Ranks(name, place, CONFIG, [5, 9], processes, reference)


def test_two_processes_step_together_and_end(place):
    pair = ranks(place)
    step = pair.build()
    step()
    step()
    assert all(process.is_alive() for process, _ in pair.members)
    pair.members[1][0].kill()
    with pytest.raises(RuntimeError, match="process 1: ended|process 0: "):
        step()
    pair.close()
    assert not any(process.is_alive() for process, _ in pair.members)


def test_a_process_that_fails_says_why(place, monkeypatch, tmp_path):
    broken = ranks(place, processes=1)
    name, _, *rest = broken.arguments
    broken.arguments = (name, replace(place, weights=tmp_path / "nowhere"), *rest)
    monkeypatch.setattr(training, "check", lambda *_: None)  # it would fail there, too
    with pytest.raises(RuntimeError, match=r"process 0: \w+Error: .*nowhere"):
        broken.build()
    broken.close()


def test_processes_are_judged_before_they_start(place, monkeypatch):
    monkeypatch.setitem(training.PROVIDERS, "minibert", lambda place, dropout: (_ for _ in ()).throw(Refused("no")))
    pair = ranks(place)
    with pytest.raises(Refused):
        pair.build()
    assert pair.members == []


def test_a_point_moves_one_axis():
    base = BertConfig.preset("bert-mini")
    for axis, value, config, sizes, processes in scaling.points(base, "cpu", quick=False):
        moved = {"length": sizes[0] != scaling.LENGTH, "batch": axis == "batch" and len(sizes) != scaling.BATCH,
                 "width": config.hidden_size != base.hidden_size, "processes": processes != 1}  # fmt: skip
        assert not any(changed for name, changed in moved.items() if name != axis), (axis, value)
        shown = {"length": sizes[0], "batch": len(sizes), "width": config.hidden_size, "processes": processes}
        assert shown[axis] == value
    assert torch.get_num_threads() >= processes
