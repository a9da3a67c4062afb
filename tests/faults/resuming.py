"""A run that is killed, or asked to stop, and resumed is the run that never stopped, bit for bit."""

import os
import random
import signal
from dataclasses import fields
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from minibert.train import TIMING_FIELDS, latest, read_metrics
from minibert.train.checkpoint import read_trainer

from .common import STEPS, Tally, ended, fork, new_model, random_states, run, samples

MOMENTS = ("forward", "backward", "update")
BATCHES = 50


def strike(model, step: int, moment: str, signum: int) -> None:
    """Have this process signal itself in the given step, counted from its start, before that part of it is done."""
    seen = 0

    def tick(*_):
        nonlocal seen
        if model.training:
            seen += 1
            if seen == 2 * step + 1 - (moment == "update") * step:  # two micro-batches a step, one update
                os.kill(os.getpid(), signum)

    if moment == "forward":
        model.register_forward_pre_hook(tick)
    elif moment == "backward":
        model.mlm.dense.weight.register_hook(tick)
    else:
        register_optimizer_step_post_hook(tick)


class Record:
    """What two equal runs have in common: every number, file and draw."""

    def __init__(self, run_dir: Path, *, resume: bool = False):
        # what a checkpoint puts back must not have been there already
        data, model = samples(), new_model(seed=0 if latest(run_dir) is None else 1)
        before = random_states(seed=17)
        model, result = run(run_dir, model=model, data=data, resume=resume)
        self.random = before, random_states()
        self.parameters = [p.detach() for p in model.parameters()]
        self.files = {path.name: path.read_bytes() for path in result.checkpoint.iterdir()}
        records = read_metrics(run_dir / "metrics.jsonl")
        self.log = [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records]
        self.best, self.steps = result.best, sorted(path.name for path in run_dir.glob("step-*"))
        cursor, self.batches = read_trainer(result.checkpoint)["cursor"], []
        for _ in range(BATCHES):
            batch, cursor = data.next_batch(cursor)
            self.batches.append(batch)

    def compare(self, other: "Record") -> None:
        pairs = zip(self.parameters, other.parameters, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "parameters differ"
        assert self.files.keys() == other.files.keys() and "optimizer.safetensors" in self.files
        for name, content in self.files.items():
            assert content == other.files[name], f"{name} differs"
        assert self.random == other.random, "the random state differs"
        assert self.log == other.log, "metrics.jsonl differs"
        assert self.best == other.best, "another checkpoint is the best"
        for one, two in zip(self.batches, other.batches, strict=True):
            for field in fields(one):
                a, b = getattr(one, field.name), getattr(two, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f"{field.name} of a batch differs"


def stop_and_resume(tally: Tally, count: int, directory: Path, signals: tuple[int, ...]) -> None:
    rng, whole = random.Random(8), Record(directory / "whole")
    assert whole.random[0] == whole.random[1], "a run draws from the generators of Python, NumPy or torch"
    for n in range(count):
        step, moment, signum = rng.randrange(STEPS), MOMENTS[n % len(MOMENTS)], signals[n % len(signals)]
        cut, name = directory / f"cut-{n}", signal.Signals(signum).name

        def work(cut=cut, step=step, moment=moment, signum=signum):
            model = new_model()
            strike(model, step, moment, signum)
            run(cut, model=model)

        with tally.trial(f"{name} in step {step + 1}, {moment}"):
            code = ended(fork(work))
            if signum == signal.SIGKILL:
                assert code == -signum, f"it was not killed, but ended with {code}"
            else:
                last = step + 1 == STEPS  # nothing is left to continue
                assert code == (0 if last else 128 + signum), f"exit code {code}"
                assert latest(cut).name == f"step-{step + 1}", "the step was not finished and saved"
            resumed = Record(cut, resume=True)
            resumed.compare(whole)
            if signum == signal.SIGKILL:  # otherwise one more was saved
                assert resumed.steps == whole.steps, "other checkpoints are kept"


def kills_at_random_steps(tally: Tally, count: int, directory: Path) -> None:
    stop_and_resume(tally, count, directory, (signal.SIGKILL,))


def polite_signals(tally: Tally, count: int, directory: Path) -> None:
    stop_and_resume(tally, count, directory, (signal.SIGTERM, signal.SIGINT))
