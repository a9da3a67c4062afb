"""What a run may have beside its steps, where several processes train: each of them decides the same."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import Failed, assert_logs_are_close, assert_weights_are_close, together, train_tiny
from test_loop import Crash, assert_runs_are_equal, log_of
from test_loop_extras import budget, clocked
from tiny_run import Stream, make_config, make_model

from minibert.cli import VERBS, build_parser, parse
from minibert.data import PretrainingData
from minibert.data.sample import write_sample_corpus
from minibert.train import WRITERS, best, latest


def train_with_all(run_dir, losses=None, before=lambda cursor: None, resume=False, **options):
    """A run with an average and a guard, one of whose micro-batches has a loss that is a hundred times too high."""
    model, given = make_model("pretraining"), iter(losses or ())

    def spoil(module, args, output):
        if module.training and 28 in args[0].seq_ids:
            output.mlm_loss = output.mlm_loss * 100

    def evaluate(model, limit):
        loss = model(Stream("pretraining").make(range(1000, 1013))).loss.item() if losses is None else next(given)
        return {"loss": loss, "weight": model.nsp.weight.abs().sum().item()}

    model.register_forward_hook(spoil)
    extras = {"ema": 0.8, "skip": 1, "spike": 5.0, "eval_every": 2, "best_metric": "loss", "accumulate": 2}
    config, data = make_config(**extras | options), Stream("pretraining", before=before)
    return train_tiny(run_dir, model=model, config=config, data=data, evaluate=evaluate, resume=resume)[1]


def test_average_guard_and_patience_are_those_of_one_process(tmp_path, caplog):
    losses = [3.0, 2.0, 2.5, 2.1]
    alone = train_with_all(tmp_path / "one", losses, steps=20, patience=2)
    caplog.clear()

    def work(world):
        # the second process has no evaluation to offer
        weights = train_with_all(tmp_path / "two", losses if world.is_main else [], steps=20, patience=2)
        return weights, caplog.text.count("no optimizer step was made")

    (first, warnings), (second, others) = together(2, work, tmp_path / "output")
    assert (warnings, others) == (1, 0)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert_weights_are_close(alone, first)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert two[2].pop("skipped") == one[2].pop("skipped") and two[-1]["step"] == 8
    assert [record.keys() for record in one] == [record.keys() for record in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5), a["step"]
    assert best(tmp_path / "two").name == "step-4" and latest(tmp_path / "two").name == "step-8"
    saved = load_file(latest(tmp_path / "two") / "model.safetensors")
    assert_weights_are_close(load_file(latest(tmp_path / "one") / "model.safetensors"), saved)
    [head] = [value for name, value in saved.items() if name.endswith("seq_relationship.weight")]
    assert two[-1]["eval_weight"] == pytest.approx(head.abs().sum().item(), rel=1e-6)
    assert not torch.equal(head, first["nsp.weight"])


def test_two_processes_with_all_of_it_resume_bit_for_bit(tmp_path):
    def crash(cursor):
        if cursor >= 110:  # the eighth step's, which are drawn in the seventh
            raise Crash

    def work(world):
        train_with_all(tmp_path / "whole", accumulate=4, ramp=0.5)
        world.all_reduce_sum(1)  # the lock is free
        train_with_all(tmp_path / "cut", before=crash, accumulate=4, ramp=0.5)

    assert [failed.kind for failed in together(2, work, tmp_path / "a")] == ["Crash", "Crash"]
    assert len(log_of(tmp_path / "cut")) == 6
    together(2, lambda world: train_with_all(tmp_path / "cut", resume=True, accumulate=4, ramp=0.5), tmp_path / "b")
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)
    assert (tmp_path / "cut/step-10/trained.safetensors").is_file()
    record = json.loads((tmp_path / "cut/run.json").read_text())
    assert [again["step"] for again in record["resumed"]] == [6]
    assert (tmp_path / "cut/step-10/README.md").is_file()


def test_a_growing_batch_has_as_many_micro_batches_for_each(tmp_path):
    config = make_config(accumulate=6, ramp=0.5)
    sizes = [max(1, round(6 * min(1, (step + 1) / 11 / 0.5))) for step in range(10)]
    assert any(size % 2 for size in sizes)
    work = lambda world: train_tiny(tmp_path / "run", config=config, data=Stream("pretraining"))  # noqa: E731
    results = together(2, work, tmp_path)
    whole = sum(size + size % 2 for size in sizes)
    # and one pass that only looks which parameters are used
    assert [len(seen) - 1 for seen, _ in results] == [whole // 2] * 2
    assert json.loads((latest(tmp_path / "run") / "trainer.json").read_text())["cursor"] == 5 * whole


def test_a_budget_runs_by_the_clock_of_the_first_process(tmp_path):
    def work(world):
        with pytest.MonkeyPatch.context() as patch:
            # the second's clock is four times as fast
            model = clocked(patch, make_model("pretraining"), seconds=24.0 if world.rank else 6.0)
            return train_tiny(tmp_path / "run", model=model, config=budget(accumulate=4, ramp=0.5))

    (seen, weights), (also, others) = together(2, work, tmp_path)
    assert len(seen) == len(also) and all(torch.equal(others[name], value) for name, value in weights.items())
    # of ten passes of six seconds the first only looks which parameters are used
    records, passes = log_of(tmp_path / "run"), [1, 1, 1, 2, 2, 2]
    done = [min(10, 1 + sum(passes[: n + 1])) for n in range(len(records))]
    rates = [1 - abs(share / 5 - 1) for share in done]
    assert [record["learning_rate"] / 3e-3 for record in records] == pytest.approx(rates) and done[-1] == 10


def test_a_writer_that_the_first_process_does_not_have_ends_the_others(tmp_path, monkeypatch):
    def refuse(run_dir):
        raise ValueError("no such package")

    monkeypatch.setitem(WRITERS, "wandb", refuse)
    config = make_config(accumulate=2, writer="wandb")
    results = together(2, lambda world: train_tiny(tmp_path / "run", config=config), tmp_path)
    assert results == [Failed("ValueError", "no such package"), Failed("PeerFailed", "rank 0 failed, and says why")]


def test_phases_in_two_processes_stop_together_and_go_on(tmp_path):
    corpus = write_sample_corpus(tmp_path / "topics.jsonl")
    arch = "--arch.hidden_size 12 --arch.num_attention_heads 2 --arch.intermediate_size 20 --arch.num_hidden_layers 1"
    rest = "--accumulate 2 --device cpu --vocab-size 200 --batch-tokens 256 --log-every 1 --eval-batches 2"
    phases = ["--phases", "{max_length: 24, steps: 3}", "{max_length: 40, steps: 2}"]

    def pretrain(out, *flags):
        argv = ["--data", str(corpus), "--out", str(out), *f"{arch} {rest}".split(), *phases, *flags]
        VERBS["pretrain"](
            **{k: v for k, v in parse(build_parser("pretrain"), argv).items() if k not in ("config", "debug")}
        )

    def stopped(world):
        before, made = PretrainingData.next_batch, []

        def next_batch(self, cursor):
            made.append(cursor)
            if world.rank == 1 and len(made) == 4:  # drawn in the last step of the first phase
                os.kill(os.getpid(), signal.SIGTERM)
            return before(self, cursor)

        PretrainingData.next_batch = next_batch  # of this process, which is a fork
        pretrain(tmp_path / "two")

    pretrain(tmp_path / "one")
    ends = together(2, stopped, tmp_path / "stopped")
    assert [end.kind for end in ends] == ["Interrupted"] * 2
    assert "SIGTERM at the end of phase 1" in ends[0].message and not (tmp_path / "two/phase-2").exists()
    assert together(2, lambda world: pretrain(tmp_path / "two", "--resume"), tmp_path / "resumed") == [None] * 2
    for phase in ("phase-1", "phase-2"):
        assert_logs_are_close(tmp_path / "one" / phase, tmp_path / "two" / phase, rel=1e-4)
