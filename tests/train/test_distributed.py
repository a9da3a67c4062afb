"""Several processes on one machine, over gloo: forked for the loop, under torchrun for the command line."""

import os
import pickle
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from test_loop import Crash, assert_runs_are_equal, crash_at, log_of
from tiny_run import KINDS, Stream, evaluate_loss, make_config, make_model, run

from minibert.cli import main
from minibert.train import NonFiniteError, World, checkpoint, claim, join, latest, train

ROOT = Path(__file__).resolve().parents[2]
SIZES = (5, 2, 7)  # so that micro-batches, and what is labelled in them, are of unequal size


class Failed(NamedTuple):
    kind: str
    message: str


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def together(size, work, folder, seconds=60):
    """What `work(world)` returned in each of `size` forked processes, or how it `Failed`, or None."""
    folder.mkdir(exist_ok=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    pids = []
    for rank in range(size):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                with open(folder / f"{rank}.err", "w") as file:
                    os.dup2(file.fileno(), 2)
                try:
                    with join() as world:
                        value = work(world)
                except BaseException as error:
                    value = Failed(type(error).__name__, str(error))
                (folder / f"{rank}.pickle").write_bytes(pickle.dumps(value))
            finally:
                os._exit(0)
    deadline, left = time.monotonic() + seconds, set(pids)
    while left and time.monotonic() < deadline:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not left, f"{len(left)} of {size} processes hang"
    answers = [folder / f"{rank}.pickle" for rank in range(size)]
    return [pickle.loads(answer.read_bytes()) if answer.exists() else None for answer in answers]


def train_tiny(run_dir, **options):
    """A run, in as many processes as there are. Returns the ids of each micro-batch's sequences, and the weights."""
    seen = []
    model = options.pop("model", None) or make_model("pretraining")
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].seq_ids.tolist()))
    options = {"data": Stream("pretraining", SIZES), "config": make_config(accumulate=4)} | options
    run(run_dir, "pretraining", model=model, **options)
    return seen, {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_logs_are_close(one, two, rel=1e-5):
    one, two = log_of(one), log_of(two)
    assert [record.keys() for record in one] == [record.keys() for record in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=rel), a["step"]


def assert_weights_are_close(one, two):
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder / "run", *train_tiny(folder / "run")


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_the_same_in_any_number_of_processes(alone, tmp_path, size):
    one, order, weights = alone
    results = together(size, lambda world: train_tiny(tmp_path / "run", model=make_model("pretraining")), tmp_path)
    # the first pass of each only looks which parameters are used
    gathered = [ids for turn in zip(*(seen[1:] for seen, _ in results), strict=True) for ids in turn]
    assert gathered == order and len({len(ids) for ids in order}) == 3
    assert_logs_are_close(one, tmp_path / "run")
    assert_weights_are_close(weights, results[0][1])
    for _, others in results[1:]:
        assert all(torch.equal(others[name], value) for name, value in results[0][1].items())
    assert checkpoint.steps(tmp_path / "run") == checkpoint.steps(one)


def test_losses_are_means_over_the_labels_of_all_processes(tmp_path):
    """One process has few labels, the other many: a mean of their means would be another number."""
    options = {"data": Stream("pretraining", (1, 12)), "config": make_config(accumulate=2, steps=3)}
    options["weights"] = {"nsp_loss": 0.25}
    _, weights = train_tiny(tmp_path / "one", **options)
    results = together(2, lambda world: train_tiny(tmp_path / "two", **options), tmp_path)
    assert_logs_are_close(tmp_path / "one", tmp_path / "two")
    assert_weights_are_close(weights, results[0][1])


def test_a_head_that_learns_nothing_stays_as_it_was(tmp_path):
    def work(world):
        model = make_model("pretraining")
        train(
            model, Stream("pretraining"), None, make_config(steps=3, accumulate=4), tmp_path / "run",
            parts=lambda batch: {"mlm_loss": KINDS["pretraining"][1](batch)["mlm_loss"]},
        )  # fmt: skip
        return model.nsp.weight, model.nsp.weight.grad

    for weight, gradient in together(2, work, tmp_path):
        assert torch.equal(weight, make_model("pretraining").nsp.weight) and gradient is None


def test_a_loss_that_is_not_finite_in_one_process_stops_all_without_a_step(tmp_path):
    def work(world):
        model = make_model("pretraining")

        def spoil(module, args, output):
            if 28 in args[0].seq_ids:
                output.mlm_loss = output.mlm_loss * float("nan")

        model.register_forward_hook(spoil)
        with pytest.raises(NonFiniteError) as caught:
            train_tiny(tmp_path / "run", model=model, config=make_config(accumulate=2), data=Stream("pretraining"))
        return str(caught.value), model.state_dict()

    results = together(2, work, tmp_path)
    expected = "step 3: mlm_loss is nan on samples 25 to 29; no optimizer step was made: try a lower lr"
    assert [message for message, _ in results] == [expected] * 2
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1, 2]
    model = make_model("pretraining")
    config = make_config(accumulate=2)
    with pytest.raises(Crash):
        run(
            tmp_path / "cut", "pretraining", model=model, config=config, data=Stream("pretraining", before=crash_at(30))
        )
    assert_weights_are_close(dict(model.named_parameters()), results[0][1])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_signal_to_one_process_stops_all_and_any_number_goes_on(alone, tmp_path, size):
    def before(cursor):
        if World.current().rank == 1 and cursor == 61:  # while the fourth step's batches are drawn
            os.kill(os.getpid(), signal.SIGTERM)

    results = together(
        2, lambda world: train_tiny(tmp_path / "run", data=Stream("pretraining", SIZES, before)), tmp_path / "stopped"
    )
    where = tmp_path / "run" / "step-3"
    assert results == [Failed("Interrupted", f"SIGTERM after step 3, saved in {where}: continue with --resume")] * 2
    [*_, (_, weights)] = together(size, lambda world: train_tiny(tmp_path / "run", resume=True), tmp_path / "continued")
    assert_logs_are_close(alone[0], tmp_path / "run")
    assert_weights_are_close(alone[2], weights)


def test_two_processes_resumed_equal_two_that_never_stopped(tmp_path):
    def work(world):
        train_tiny(tmp_path / "whole")
        world.all_reduce_sum(1)  # the lock is free
        train_tiny(tmp_path / "cut", data=Stream("pretraining", SIZES, crash_at(117 if world.rank else 112)))

    assert [failed.kind for failed in together(2, work, tmp_path / "a")] == ["Crash", "Crash"]
    assert len(log_of(tmp_path / "cut")) == 5
    together(2, lambda world: train_tiny(tmp_path / "cut", resume=True), tmp_path / "b")
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)


def test_a_bad_step_is_left_out_by_all_and_weights_are_averaged_alike(tmp_path):
    """The guard and the average of the weights see the same numbers in every process."""
    options = {"config": make_config(accumulate=4, skip=2, spike=1.0001, ema=0.9, warmup=0, lr=0.1)}
    train_tiny(tmp_path / "one", **options)
    results = together(2, lambda world: train_tiny(tmp_path / "two", **options), tmp_path)
    skipped = [[record["step"] for record in log_of(tmp_path / name) if "skipped" in record] for name in ("one", "two")]
    assert skipped[0] == skipped[1] and skipped[0]
    assert [len(seen) for seen, _ in results] == [21, 21]
    stored = [safetensors.torch.load_file(latest(tmp_path / name) / "model.safetensors") for name in ("one", "two")]
    stored[0].pop("bert.encoder.layer.0.attention.self.key.bias")  # its gradient is rounding alone: softmax ignores it
    assert_weights_are_close(*stored)


def test_a_killed_process_ends_the_other_and_both_go_on(alone, tmp_path):
    def before(cursor):
        if World.current().rank == 1 and cursor == 117:
            os.kill(os.getpid(), signal.SIGKILL)

    [first, second] = together(
        2, lambda world: train_tiny(tmp_path / "run", data=Stream("pretraining", SIZES, before)), tmp_path / "a"
    )
    assert first.kind == "RuntimeError" and second is None
    assert latest(tmp_path / "run").name == "step-3"
    [(_, weights), _] = together(2, lambda world: train_tiny(tmp_path / "run", resume=True), tmp_path / "b")
    assert_logs_are_close(alone[0], tmp_path / "run")
    assert_weights_are_close(alone[2], weights)


def test_the_first_process_evaluates_and_holds_the_directory(tmp_path):
    def work(world):
        measured = []

        def evaluate(model, limit):
            measured.append(world.rank)
            return evaluate_loss(make_model("classification").eval(), limit)

        with claim(tmp_path / "run") as held:
            train_tiny(held, evaluate=evaluate, config=make_config(steps=4, accumulate=2, eval_every=2))
            holder = (tmp_path / "run" / ".lock").read_text()
        return measured, int(holder) == os.getpid(), (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")

    assert together(2, work, tmp_path) == [([0, 0], True, 4), ([], False, 4)]
    assert {"eval_loss"} <= log_of(tmp_path / "run")[-1].keys()
    assert (tmp_path / "1.err").read_text() == ""


@pytest.mark.parametrize("what", ["accumulate", "claim"])
def test_what_the_first_process_refuses_ends_the_others(tmp_path, what):
    if what == "claim":
        train_tiny(tmp_path / "run", config=make_config(steps=1))
    config = make_config(accumulate=3 if what == "accumulate" else 2)
    first, second = together(2, lambda world: train_tiny(tmp_path / "run", config=config), tmp_path)
    message = {
        "accumulate": "accumulate=3 is not divisible by 2 processes: use 4",
        "claim": f"{tmp_path / 'run'} already holds a run: continue it with --resume, or choose another output",
    }[what]
    assert (first, second) == (Failed("ValueError", message), Failed("PeerFailed", "rank 0 failed, and says why"))


def test_alone_nothing_is_reduced():
    world = World.current()
    rows, signals = torch.ones(2), []
    assert world == World(0, 1) and world.is_main
    assert (
        world.all_gather(rows) is rows
        and world.gather_signals(signals) is signals
        and world.on_main(lambda: rows) is rows
    )
    assert world.all_reduce_sum(3) == 3 and world.local_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_a_machine_with_fewer_gpus_than_processes_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: use --nproc-per-node 2"):
        World(2, 4).local_device(torch.device("cuda"))
    with pytest.raises(ValueError, match="device='cuda:0' is one GPU for 4 processes: use device=cuda, each its own"):
        World(2, 4).local_device(torch.device("cuda:0"))
    assert World(2, 4).local_device(torch.device("cpu")) == torch.device("cpu")


def test_verbs_for_one_process_refuse_to_be_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["info"]) == 2
    assert "info is for one process, not for 2: start it without torchrun" in capsys.readouterr().err
