"""SIGKILL in the middle of a save: the newest checkpoint is the one that was reported, or the one being written."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

from minibert import BertConfig, BertForPreTraining, hub
from minibert.train import claim, latest, verify
from minibert.train.checkpoint import Run, read_trainer
from minibert.train.loop import OPTIMIZER, TrainingLoop

from .common import Tally, corpus, ended, fork, kill, litter, new_config, samples


def saver(run_dir: Path) -> TrainingLoop:
    """A trainer with moments; `save_as` makes a checkpoint of it that is a function of its number."""
    tokenizer, data = corpus()[0].tokenizer, samples()
    model = BertForPreTraining(
        BertConfig.preset("bert-tiny", vocab_size=tokenizer.vocab_size, hidden_size=64), backend="reference"
    )
    trainer = TrainingLoop(model, data, None, new_config(keep_last=2), Run(run_dir, False), tokenizer, data.parts, {})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    trainer.optimizer.step()
    return trainer


@torch.no_grad()
def save_as(trainer: TrainingLoop, step: int) -> None:
    for p in trainer.model.parameters():
        p.fill_(step)
        trainer.optimizer.state[p]["exp_avg"].fill_(-step)
    trainer.step, trainer.cursor = step, 3 * step
    trainer.save()


def check(run_dir: Path, expected: tuple[int, ...], model) -> int:
    """The step of the newest checkpoint, after checking that it is one of those, and whole to the last number."""
    newest = latest(run_dir)
    assert newest is not None, "every checkpoint is lost"
    step = int(newest.name.removeprefix("step-"))
    assert step in expected, f"{newest.name} is the newest, expected one of {expected}"
    verify(newest)
    assert read_trainer(newest)["cursor"] == 3 * step
    hub.load_into(model, newest)
    assert all(bool((p == step).all()) for p in model.parameters()), "weights of another step"
    moments = safetensors.torch.load_file(newest / OPTIMIZER)
    assert all(bool((value == -step).all()) for name, value in moments.items() if name.endswith(".exp_avg"))
    return step


def kills_while_saving(tally: Tally, count: int, directory: Path) -> None:
    """At random moments; those that hit no save in its middle are checked too, but not counted."""
    rng, trainer, newest, kills = random.Random(6), saver(directory), 0, 0
    loaded = BertForPreTraining(trainer.model.config)
    while tally.tried < count and kills < 20 * count + 20:
        reader, writer = os.pipe()

        def work(first=newest + 1, writer=writer):
            with claim(directory, resume=True):
                for step in range(first, first + 1000):
                    save_as(trainer, step)
                    os.write(writer, step.to_bytes(4, "little"))

        pid = fork(work)
        os.close(writer)
        told = os.read(reader, 4)
        time.sleep(rng.uniform(0, 0.08))
        kill(pid)
        with os.fdopen(reader, "rb") as rest:
            told = (told + rest.read())[-4:]
        done, kills = int.from_bytes(told, "little"), kills + 1
        with tally.trial(f"kill {kills}", counts=bool(litter(directory))):
            newest = done
            newest = check(directory, (done, done + 1), loaded)
    assert tally.tried == count, f"only {tally.tried} of {kills} kills hit a save"


def kills_before_each_operation(tally: Tally, count: int, directory: Path) -> None:
    """Before the first operation on files of a save, the second, …; or `count` of them, evenly spread.

    The save is one that has an old checkpoint to remove.
    """
    trainer = saver(directory)
    loaded = BertForPreTraining(trainer.model.config)
    reader, writer = os.pipe()
    pid = fork(lambda: os.write(writer, bytes([third_save(trainer, directory / "dry")])))
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        [total] = told.read()
    assert ended(pid) == 0 and total > 20
    for n in sorted({i * total // count for i in range(count)}):
        run_dir = directory / f"operation-{n}"
        with tally.trial(f"operation {n} of {total}"):
            code = ended(fork(lambda n=n, run_dir=run_dir: third_save(trainer, run_dir, n)))
            assert code == -signal.SIGKILL, f"it was not killed, but ended with {code}"
            check(run_dir, (2, 3), loaded)
            with claim(run_dir, resume=True):
                assert not litter(run_dir), "litter was not swept"
            check(run_dir, (2, 3), loaded)


def third_save(trainer: TrainingLoop, run_dir: Path, last: int | None = None) -> int:
    """Save the steps 1 to 3; returns how many operations on files the third took, or dies before number `last`."""
    seen, fsync = 0, os.fsync

    def operation(event, arguments=()):
        nonlocal seen
        reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if reads or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync"):
            return
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    trainer.path = run_dir
    run_dir.mkdir()
    for step in (1, 2):
        save_as(trainer, step)
    os.fsync = lambda handle: (operation("fsync"), fsync(handle))
    sys.addaudithook(operation)  # for good: this is a process of its own
    save_as(trainer, 3)
    return seen
