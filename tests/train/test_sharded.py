"""A model of which each of several processes has a share, over gloo: `parallel="fsdp"`."""

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import SIZES, Failed, assert_logs_are_close, assert_weights_are_close, together
from test_loop import Crash, log_of
from tiny_run import KINDS, Stream, make_config, make_model

from minibert import hub
from minibert.model.lora import adapt
from minibert.train import TrainConfig, World, checkpoint, latest, train

EVALUATED = range(1000, 1013)


def evaluate(model, limit):
    assert not model.training and not torch.is_grad_enabled()
    return {"loss": model(Stream("pretraining").make(EVALUATED)).loss.item()}


def train_shares(run_dir, model=None, data=None, resume=False, **changes):
    """A run of two layers with evaluations, in as many processes as there are; returns the model."""
    model = model or make_model("pretraining", num_hidden_layers=2)
    config = make_config(**{"accumulate": 4, "parallel": "fsdp", "eval_every": 4, "ema": 0.8} | changes)
    data, parts = data or Stream("pretraining", SIZES), KINDS["pretraining"][1]
    train(model, data, evaluate, config, run_dir, resume=resume, parts=parts)
    return model


def assert_runs_are_close(one, two):
    assert_logs_are_close(one, two)
    stored = [load_file(latest(path) / "model.safetensors") for path in (one, two)]
    assert_weights_are_close(*({name: w for name, w in each.items() if "key.bias" not in name} for each in stored))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, for which `parallel` means nothing."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_shares(folder)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_a_divided_model_learns_what_a_whole_one_does(alone, tmp_path, size):
    def work(world):
        model, inside, reduced = make_model("pretraining", num_hidden_layers=2), set(), []
        for part in (model.mlm.norm, model.bert.encoder.layers[1].attention):
            part.register_forward_hook(lambda part, args, x: inside.update(map(type, [x, *part.parameters()])))
        with pytest.MonkeyPatch.context() as patch:
            reduce = torch.distributed.reduce_scatter_single
            count = lambda *args, **kwargs: (reduced.append(1), reduce(*args, **kwargs))[1]  # noqa: E731
            patch.setattr(torch.distributed, "reduce_scatter_single", count)
            train_shares(tmp_path / "run", model)
        tied = model.mlm.decoder.weight is model.bert.embeddings.word.weight
        held = [sum(p.to_local().numel() for p in model.parameters()), model.num_parameters()]
        moments = latest(tmp_path / "run") / f"optimizer-0000{world.rank + 1}.safetensors"
        return held, tied, inside, len(reduced), sum(value.numel() for value in load_file(moments).values())

    results = together(size, work, tmp_path)
    assert_runs_are_close(alone, tmp_path / "run")
    total = results[0][0][1]
    assert sum(held for (held, _), *_ in results) == total
    for (held, _), tied, inside, reduced, moments in results:
        assert tied and inside == {torch.Tensor, torch.nn.Parameter}
        assert held < 1.1 * total / size and moments < 2.3 * total / size
        assert reduced == 10 * 3  # gradients of two layers and the rest, once a step, whatever its micro-batches
    assert (tmp_path / "1.err").read_text() == ""


@pytest.mark.parametrize(
    "optimizer", ["lamb", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bertadam", "sgd"))]
)
def test_two_processes_resumed_equal_two_that_never_stopped(tmp_path, optimizer):
    options = {"optimizer": optimizer, "lr": 0.01}

    def crash(cursor):
        if cursor >= 110:
            raise Crash

    def work(world):
        train_shares(tmp_path / "whole", **options)
        world.all_reduce_sum(1)  # the lock is free
        train_shares(tmp_path / "cut", data=Stream("pretraining", SIZES, crash), **options)

    assert [failed.kind for failed in together(2, work, tmp_path / "a")] == ["Crash", "Crash"]
    assert 3 < len(log_of(tmp_path / "cut")) < 9
    together(2, lambda world: train_shares(tmp_path / "cut", resume=True, **options), tmp_path / "b")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    whole, cut = latest(tmp_path / "whole"), latest(tmp_path / "cut")
    shares = [f"{kind}-0000{rank}.safetensors" for kind in ("optimizer", "trained") for rank in (1, 2)]
    for name in (*shares, "model.safetensors"):  # values: the order of tensors in a share is torch's own
        one, two = load_file(whole / name), load_file(cut / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    assert (whole / "trainer.json").read_bytes() == (cut / "trainer.json").read_bytes()
    train_shares(tmp_path / "one", **options)
    assert_runs_are_close(tmp_path / "one", tmp_path / "whole")


def test_an_optimizer_without_moments_resumes_too(tmp_path):
    options = {"optimizer": "sgd", "beta1": 0.0}
    together(2, lambda world: train_shares(tmp_path / "run", **options), tmp_path / "a")
    shutil.rmtree(latest(tmp_path / "run"))
    ends = together(2, lambda world: train_shares(tmp_path / "run", resume=True, **options), tmp_path / "b")
    assert not any(hasattr(end, "kind") for end in ends) and latest(tmp_path / "run").name == "step-10"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "fsdp"), (1, "fsdp")),
        ((1, "ddp"), (2, "fsdp")),
        pytest.param((2, "fsdp"), (4, "fsdp"), marks=pytest.mark.slow),
        pytest.param((4, "fsdp"), (2, "ddp"), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_another_number_of_processes_and_divided_or_not(tmp_path, alone, before, after):
    def stop(cursor):
        if World.current().is_main and cursor == 56:
            os.kill(os.getpid(), signal.SIGTERM)

    stream = Stream("pretraining", SIZES, stop)
    (size, kind), (later, other) = before, after
    results = together(size, lambda world: train_shares(tmp_path / "run", data=stream, parallel=kind), tmp_path / "a")
    assert {failed.kind for failed in results} == {"Interrupted"}
    together(later, lambda world: train_shares(tmp_path / "run", resume=True, parallel=other), tmp_path / "b")
    assert_runs_are_close(alone, tmp_path / "run")


@pytest.mark.parametrize(("size", "kind"), [(2, "fsdp"), (1, "ddp"), pytest.param(1, "fsdp", marks=pytest.mark.slow)])
def test_factors_of_frozen_weights_are_divided_too_and_go_on_in_another_number_of_processes(tmp_path, size, kind):
    def model():
        network = make_model("pretraining", num_hidden_layers=2)
        torch.manual_seed(0)
        adapt(network, 3, 7)
        return network

    def stop(cursor):
        if World.current().is_main and cursor == 56:
            os.kill(os.getpid(), signal.SIGTERM)

    stream, path = Stream("pretraining", SIZES, stop), tmp_path / "run"
    train_shares(tmp_path / "one", model(), lr=0.03)
    results = together(size, lambda world: train_shares(path, model(), stream, parallel=kind, lr=0.03), tmp_path / "a")
    assert {failed.kind for failed in results} == {"Interrupted"}
    resume = {"resume": True, "parallel": kind, "lr": 0.03}
    ends = together(3 - size, lambda world: train_shares(path, model(), **resume), tmp_path / "b")
    assert not any(hasattr(end, "kind") for end in ends), ends
    assert_runs_are_close(tmp_path / "one", path)
    begun, saved = hub.hf_state(make_model("pretraining", num_hidden_layers=2)), load_file(latest(path) / hub.WEIGHTS)
    moved = {name for name, value in begun.items() if not torch.equal(value, saved[name])}
    assert all(part in str(moved) for part in ("query.weight", "output.dense.weight", "cls.predictions.bias"))
    assert not any("embeddings" in name or "bias" in name for name in moved if name.startswith("bert."))


def test_a_share_that_cannot_be_written_costs_the_checkpoint_and_no_earlier_one(tmp_path, monkeypatch):
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    write = HuggingFaceStorageWriter.write_data

    def fill(writer, plan, planner):
        if World.current().rank == 1 and "step-6" in str(writer.path):
            raise OSError(28, "No space left on device")
        return write(writer, plan, planner)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", fill)
    results = together(2, lambda world: train_shares(tmp_path / "run"), tmp_path / "output")
    where = tmp_path / "run" / "step-6"
    message = f"{where} could not be saved: No space left on device; step-3 is as it was"
    assert results[0] == Failed("CheckpointError", message) and results[1].kind == "PeerFailed"
    checkpoint.verify(latest(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-3"]


def test_a_share_that_is_damaged_or_lost_is_found_before_a_resume(tmp_path):
    together(2, lambda world: train_shares(tmp_path / "run", steps=3), tmp_path / "output")
    share = tmp_path / "run/step-3/optimizer-00002.safetensors"
    content = bytearray(share.read_bytes())
    content[-1] ^= 1
    share.write_bytes(content)
    assert "its sha256 is not the one in manifest.json" in checkpoint.is_damaged(share.parent)
    share.unlink()
    assert "optimizer-00002.safetensors is missing" in checkpoint.is_damaged(share.parent)


def test_a_step_that_is_not_finite_in_one_process_is_left_out_by_all(tmp_path, caplog):
    def work(world):
        model = make_model("pretraining", num_hidden_layers=2)

        def spoil(module, args, output):
            if 28 in args[0].seq_ids:
                output.mlm_loss = output.mlm_loss * float("nan")

        model.register_forward_hook(spoil)
        train_shares(tmp_path / "run", model, Stream("pretraining"), accumulate=2, skip=1)
        return [record.message for record in caplog.records if record.name.startswith("minibert")]

    message = "step 3: mlm_loss is nan on samples 25 to 29; no optimizer step was made"
    assert together(2, work, tmp_path / "output") == [[message], []]
    assert [record["step"] for record in log_of(tmp_path / "run") if "skipped" in record] == [3]


def test_another_word_for_parallel_is_refused():
    with pytest.raises(ValueError, match="parallel='zero' is not one of ddp, fsdp"):
        TrainConfig(steps=1, parallel="zero")
