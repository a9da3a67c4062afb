"""Ranges stand around modules while one looks, and leave no trace."""

import contextlib

import pytest
import torch
from small import build
from torch import nn

from minibert.model import BertForPreTraining
from minibert.profile import Step, ranges, synthetic_batch


def recorder():
    events = []

    @contextlib.contextmanager
    def mark(name):
        events.append(f"+{name}")
        yield
        events.append(f"-{name}")

    return events, mark


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_ranges_nest_as_modules_do_and_are_removed():
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU()))
    events, mark = recorder()
    with ranges(model, mark):
        assert hooks(model) == 2 * 4
        model(torch.rand(2, 3))
    assert events == ["+Sequential", "+0", "-0", "+1", "+1.0", "-1.0", "-1", "-Sequential"]
    assert hooks(model) == 0
    model(torch.rand(2, 3))
    assert len(events) == 8


def test_ranges_close_where_a_module_raises():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("broken")

    events = []

    class Mark:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            events.append(f"+{self.name}")

        def __exit__(self, *error):
            events.append(f"-{self.name}")

    model = nn.Sequential(nn.ReLU(), Broken())
    with pytest.raises(KeyError), ranges(model, Mark):
        model(torch.rand(2))
    assert events == ["+Sequential", "+0", "-0", "+1", "-1", "-Sequential"]
    assert hooks(model) == 0


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_step_is_marked_by_its_phases(mode):
    model = build(BertForPreTraining)
    events, mark = recorder()
    batch = synthetic_batch(model.config, model.objective, batch_size=3, length=9)
    Step(model, batch, mode=mode, mark=mark)()
    phases = ["forward", "backward", "optimizer"] if mode == "train" else ["forward"]
    assert events == ["+step", *(sign + name for name in phases for sign in "+-"), "-step"]
