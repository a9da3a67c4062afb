"""What happens in which order under NVTX and Proton; the two themselves are stand-ins here."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
from small import build

from minibert.model import BertModel
from minibert.profile import Options, measure, run_steps, synthetic_batch


@pytest.fixture
def calls(monkeypatch):
    calls = []

    @contextlib.contextmanager
    def mark(name):
        calls.append(f"+{name}")
        yield
        calls.append(f"-{name}")

    proton = SimpleNamespace(
        scope=mark,
        start=lambda path, hook: calls.append(f"start {path} {hook}") or 3,
        finalize=lambda session: calls.append(f"finalize {session}"),
    )
    monkeypatch.setattr(measure, "check_tool", lambda tool, device: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range", mark)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(triton, "profiler", proton, raising=False)
    monkeypatch.setitem(sys.modules, "triton.profiler", proton)
    return calls


@pytest.mark.parametrize(
    ("tool", "first", "last"), [("nvtx", "start", "stop"), ("proton", "start {out}/proton triton", "finalize 3")]
)
def test_ranges_open_in_the_measured_steps_only(tool, first, last, calls, tmp_path):
    model, ran = build(BertModel, num_hidden_layers=1), []
    model.register_forward_hook(lambda *_: ran.append(len(calls)))
    batch = synthetic_batch(model.config, model.objective, batch_size=3, length=9, labels=False)
    run_steps(model, batch, Options(mode="infer", steps=2, warmup=3), tool, tmp_path / "out")
    assert calls[0] == first.format(out=tmp_path / "out") and calls[-1] == last
    assert len(ran) == 5 and ran[:3] == [0, 0, 0]
    steps = calls[1:-1]
    assert steps[: len(steps) // 2] * 2 == steps and steps.count("+step") == 2
    inside = ["+step", "+forward", "+BertModel", "+embeddings"]
    assert steps[:4] == inside and steps[-1] == "-step"
    assert "+encoder.layers.0.attention" in steps
    assert sum(name[0] == "+" for name in steps) == sum(name[0] == "-" for name in steps)
    assert all(len(module._forward_pre_hooks) == 0 for module in model.modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("tool", ["nvtx", "proton"])
def test_without_a_gpu_both_are_refused(tool, tmp_path):
    model = build(BertModel)
    batch = synthetic_batch(model.config, model.objective, batch_size=3, length=9, labels=False)
    with pytest.raises(ValueError, match=f"tool='{tool}' needs a CUDA device, got cpu: use tool='torch'"):
        run_steps(model, batch, Options(mode="infer"), tool, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_proton_is_refused_where_triton_has_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.profiler", None)
    with pytest.raises(ValueError, match="needs triton.profiler, which is not installed: use tool='torch'"):
        measure.check_tool("proton", "cuda")
