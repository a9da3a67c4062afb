"""What `profile_step` measures adds up, is written to files, and follows the model."""

import json
import time

import pytest
import torch
from small import LENGTHS, build
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.profiler import record_function

from minibert.model import BertForPreTraining, BertModel
from minibert.profile import Options, Step, profile_step, synthetic_batch
from minibert.profile.measure import _profiler, within_steps
from minibert.profile.step import lengths_of

STEPS = 3


def batch_for(model, labels=True):
    return synthetic_batch(model.config, model.objective, batch_size=5, length=11, fill=0.6, labels=labels)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out, model = tmp_path_factory.mktemp("profile"), build(BertForPreTraining)
    return model, profile_step(model, batch_for(model), Options(steps=STEPS, warmup=1, memory=True), out), out


@pytest.fixture(scope="module")
def inferred():
    model = build(BertModel)
    options = Options(mode="infer", dtype="bfloat16", steps=STEPS, warmup=0)
    return model, profile_step(model, batch_for(model, labels=False), options)


@pytest.mark.parametrize("run", ["trained", "inferred"])
def test_times_of_ops_add_up_to_the_step(run, request):
    result = request.getfixturevalue(run)[1]
    ops, summary = result["ops"], result["summary"]
    assert sum(row["share"] for row in ops) == pytest.approx(1)
    assert sum(row["self_ms"] for row in ops) == pytest.approx(summary["profiled_step_ms"], rel=0.01)
    assert all(0 <= row["self_ms"] <= row["total_ms"] * (1 + 1e-9) <= summary["profiled_step_ms"] for row in ops)
    assert ops == sorted(ops, key=lambda row: -row["self_ms"])
    assert summary["ops"] == pytest.approx(sum(row["calls"] for row in ops))


@pytest.mark.parametrize("run", ["trained", "inferred"])
def test_no_rate_is_that_of_another_op(run, request):
    for row in request.getfixturevalue(run)[1]["ops"]:
        assert (row["gb_per_s"] is None) == (row["bytes"] is None)
        if row["bytes"] is not None:
            assert row["gb_per_s"] * 1e9 * row["total_ms"] / 1e3 >= row["bytes"] * (1 - 1e-9)


def test_calls_are_those_of_one_step(trained):
    calls = {row["op"]: row["calls"] for row in trained[1]["ops"]}
    assert calls["aten::native_layer_norm"] == calls["aten::native_layer_norm_backward"] == 1 + 2 * 2 + 1
    assert calls["aten::gelu"] == 2 + 1
    assert calls["Optimizer.step#AdamW.step"] == 1


def test_what_runs_outside_of_a_step_counts_for_nothing():
    x = torch.rand(7, 5)
    with _profiler(False) as profiler:
        x.sin()
        with record_function("step"):
            x.cos()
        x.tan()
    names = {event.name for event in within_steps(profiler.events())}
    assert "aten::cos" in names and not names & {"aten::sin", "aten::tan"}


def test_the_summary_says_what_ran(trained, inferred):
    summary = trained[1]["summary"]
    assert summary["model"] == "BertForPreTraining" and summary["mode"] == "train" and summary["steps"] == STEPS
    assert summary["sequences"] == 5 and summary["tokens"] == batch_for(trained[0]).num_tokens
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["step_ms"] * 1e3)
    assert len(summary["step_ms_all"]) == STEPS and summary["step_ms"] == sorted(summary["step_ms_all"])[STEPS // 2]
    assert summary["host_syncs"] == inferred[1]["summary"]["host_syncs"] == []
    assert inferred[1]["summary"]["dtype"] == "bfloat16"
    assert summary["launches"] is summary["cuda_waits"] is None or torch.cuda.is_available()


def test_modules_are_those_that_ran_in_the_order_of_the_model(trained):
    model, result, _ = trained
    rows, order = {row["module"]: row for row in result["modules"]}, [name for name, _ in model.named_modules()]
    assert list(rows)[0] == "BertForPreTraining"
    assert [order.index(name) for name in list(rows)[1:]] == sorted(order.index(name) for name in list(rows)[1:])
    assert rows["bert.encoder.layers.1.ffn"]["type"] == "MLP"
    assert all(row["calls"] == 1 for row in rows.values())
    for phase in ("forward_ms", "backward_ms"):
        layers = [rows[f"bert.encoder.layers.{i}"][phase] for i in range(2)]
        assert all(ms > 0 for ms in layers) and sum(layers) <= rows["bert.encoder"][phase] * (1 + 1e-9)
        assert rows["bert.encoder"][phase] < rows["BertForPreTraining"][phase] < result["summary"]["profiled_step_ms"]


def test_inference_has_no_backward(inferred):
    assert all(row["backward_ms"] == 0 < row["forward_ms"] for row in inferred[1]["modules"])


class Slow(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, ctx):
        time.sleep(0.02)
        return self.inner(x, ctx)


def test_a_slow_module_is_seen_where_it_is():
    model = build(BertModel)
    model.encoder.layers[1].ffn = Slow(model.encoder.layers[1].ffn)
    options = Options(mode="infer", steps=2, warmup=0)
    rows = {row["module"]: row for row in profile_step(model, batch_for(model, False), options)["modules"]}
    assert rows["encoder.layers.1.ffn"]["forward_ms"] >= 20 > rows["encoder.layers.1.ffn.inner"]["forward_ms"]


def test_files_hold_what_was_returned(trained):
    _, result, out = trained
    names = {"summary.json", "ops.json", "modules.json", "trace.json", "memory.json"}
    assert {path.name for path in out.iterdir()} == names
    for name, value in result.items():
        assert json.loads((out / f"{name}.json").read_text()) == value
    events = [event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]]
    for name in ("step", "forward", "backward", "optimizer", "bert.encoder.layers.0.attention"):
        assert events.count(name) == STEPS


def test_nothing_is_written_where_no_directory_is_named(tmp_path, monkeypatch, inferred):
    monkeypatch.chdir(tmp_path)
    model = build(BertModel)
    profile_step(model, batch_for(model, False), Options(mode="infer", steps=1, warmup=0, memory=True))
    assert list(tmp_path.iterdir()) == []


def test_memory_is_followed_from_allocation_to_release(trained):
    model, result, out = trained
    memory = json.loads((out / "memory.json").read_text())
    weights = sum(p.numel() for p in model.parameters())
    moments = sum(p.numel() for p in model.parameters()) * 2 + len(list(model.parameters()))
    assert memory["held_before"] == result["summary"]["model_memory_bytes"] == 4 * (weights + moments)
    total = 0
    for row in memory["allocations"]:
        total += row["bytes"]
        assert row["total"] == total >= 0
    assert total >= 4 * weights  # the last step's gradients are there
    most = max(row["total"] for row in memory["allocations"])
    assert result["summary"]["peak_memory_bytes"] == memory["held_before"] + most


class Greedy(nn.Module):
    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, x, ctx):
        torch.empty(self.size, dtype=torch.uint8, device=x.device)
        return self.inner(x, ctx)


def test_the_peak_is_that_of_the_moment_when_most_is_held():
    peaks = []
    for size in (0, 64 << 20):
        model = build(BertModel)
        model.encoder.layers[1].ffn = Greedy(model.encoder.layers[1].ffn, size)
        result = profile_step(model, batch_for(model, False), Options(mode="infer", steps=2, warmup=0))
        peaks.append(result["summary"]["peak_memory_bytes"])
    assert 0.9 * (64 << 20) < peaks[1] - peaks[0] <= 64 << 20


def test_a_compiled_step_is_compiled_once():
    torch._dynamo.reset()
    model, counter = build(BertForPreTraining, num_hidden_layers=1), CompileCounter()
    model.compile(backend=counter)
    step = Step(model, batch_for(model))
    for _ in range(3):
        step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("fill", [1.0, 0.5, 0.2])
def test_lengths_fill_the_batch_as_asked(fill):
    lengths = lengths_of(64, 100, fill).tolist()
    assert sum(lengths) / 6400 == pytest.approx(fill, abs=0.02) and min(lengths) >= 1 and max(lengths) <= 100
    assert (len(set(lengths)) == 1) == (fill == 1)


def test_a_batch_longer_than_the_positions_is_refused():
    model = build(BertModel)
    with pytest.raises(ValueError, match="length=20 exceeds max_position_embeddings=19"):
        synthetic_batch(model.config, model.objective, batch_size=len(LENGTHS), length=20)
