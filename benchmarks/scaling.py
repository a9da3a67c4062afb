"""A pretraining step against sequence length, batch size, width, and number of processes: useful tokens/s and memory.

One axis moves, the others stay. Processes are data parallel, each with a batch of its own and its share of the cores,
or a GPU of its own; all wait for the slowest.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from minibert import BertForPreTraining
from minibert.config import BertConfig

from . import training
from .gate import Once
from .measure import Case, Work
from .peers import Place, random_weights

AXES = ("length", "batch", "width", "processes")
LENGTHS, BATCHES, WIDTHS = (32, 64, 128, 256, 512), (1, 2, 4, 8, 16, 32), (128, 256, 512, 768, 1024)
LENGTH, BATCH, HEAD_SIZE = 128, 8, 64  # where they are not the axis
PROVIDERS = ("minibert", "transformers sdpa", "transformers sdpa, masked rows")
START = 120  # seconds a process may take to be ready


def points(config: BertConfig, device: str, quick: bool) -> Iterator[tuple[str, int, BertConfig, list[int], int]]:
    """(axis, value, model, lengths of a process's batch, number of processes)."""
    step = 2 if quick else 1
    for length in LENGTHS[::step]:
        yield "length", length, config, [length] * max(LENGTH * BATCH // length, 1), 1
    for batch in BATCHES[::step]:
        yield "batch", batch, config, [LENGTH] * batch, 1
    for width in WIDTHS[::step]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // HEAD_SIZE}
        yield "width", width, BertConfig(**config.to_dict() | sizes), [LENGTH] * BATCH, 1
    count = torch.cuda.device_count() if device == "cuda" else torch.get_num_threads()
    for processes in (n for n in (1, 2, 4, 8) if n <= count):
        yield "processes", processes, config, [LENGTH] * BATCH, processes


def cases(
    config: BertConfig, *, dtype: torch.dtype, device: str = "cpu", backend: str = "auto", quick: bool = False,
    axes=AXES, only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Case]:  # fmt: skip
    """A case for every point of every axis."""
    for axis, value, model, sizes, processes in points(config, device, quick):
        if axis not in axes:
            continue
        with tempfile.TemporaryDirectory() as folder:
            weights = random_weights(model, Path(folder), BertForPreTraining)
            place = Place(weights=weights, dtype=dtype, device=device, backend=backend)
            batch = training.random_batch(np.array(sizes), model.vocab_size)
            flops = processes * training.step_flops(model, sizes, len(batch.mlm_rows))
            reference = training.Reference(place)
            names = [name for name in PROVIDERS if only(name)]
            if axis == "processes":
                ranks = [Ranks(name, place, model, sizes, processes, reference) for name in names]
                builds = dict(zip(names, (rank.build for rank in ranks), strict=True))
            else:
                ranks = []
                builds = {
                    name: partial(training.build, name, training.PROVIDERS[name], place, reference, [batch], Once())
                    for name in names
                }
            case = Case(
                suite="scaling", name=f"{axis} {value}", baseline="transformers sdpa", providers=builds,
                labels={"axis": axis, "value": value, "dtype": str(dtype).removeprefix("torch.")},
                elsewhere=axis == "processes",
                work=Work(tokens=processes * sum(sizes), sequences=processes * len(sizes), flops=flops),
            )  # fmt: skip
            try:
                yield case
            finally:
                for rank in ranks:
                    rank.close()


class Ranks:
    """Processes that make a step together, each time they are asked to; `build` starts and `close` ends them."""

    def __init__(self, name: str, place: Place, config: BertConfig, sizes: list[int], processes: int, reference):
        self.arguments, self.processes, self.members = (name, place, config, sizes, processes), processes, []
        self.reference = reference

    def build(self) -> Callable[[], None]:
        """Judge the trainee, start the processes, and give the call that makes them step.

        Raises:
            Refused: its loss or gradients differ.
            RuntimeError: one of them ended, or was not ready in `START` seconds.
        """
        name, place = self.arguments[:2]
        batch = training.random_batch(np.array(self.arguments[3]), self.arguments[2].vocab_size)
        training.check(name, training.PROVIDERS[name], place, self.reference, batch)
        context, self.folder = mp.get_context("spawn"), tempfile.TemporaryDirectory()
        for rank in range(self.processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_member, args=(rank, theirs, f"{self.folder.name}/meet", *self.arguments), daemon=True
            )
            process.start()
            theirs.close()
            self.members.append((process, ours))
        self._wait()
        return self.step

    def step(self) -> None:
        for _, pipe in self.members:
            pipe.send("step")
        self._wait()

    def _wait(self) -> None:
        for rank, (_, pipe) in enumerate(self.members):
            try:
                answer = pipe.recv() if pipe.poll(START) else f"gave no answer in {START} s"
            except EOFError:
                answer = "ended"
            if answer != "ready":
                raise RuntimeError(f"process {rank}: {answer}")

    def close(self) -> None:
        for process, pipe in self.members:
            with suppress(OSError):
                pipe.send("end")
            process.join(5)
            process.kill()
        if self.members:
            self.folder.cleanup()


def _member(rank, pipe, meet, name, place, config, sizes, processes):
    """A process of `Ranks`: its own batch, gradients averaged over all by torch's DistributedDataParallel."""
    on_gpu = place.device == "cuda"
    try:
        if on_gpu:
            torch.cuda.set_device(rank)
        torch.set_num_threads(max(torch.get_num_threads() // processes, 1))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"file://{meet}", rank=rank, world_size=processes
        )
        batch = training.random_batch(np.array(sizes), config.vocab_size, seed=rank)
        step = training.steps(training.with_dropout(training.PROVIDERS[name], place), place, [batch], parallel)
        step()
        pipe.send("ready")
        while pipe.recv() == "step":
            step()
            if on_gpu:
                torch.cuda.synchronize()
            pipe.send("ready")
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        with suppress(OSError):
            pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def parallel(model: nn.Module) -> nn.Module:
    on_gpu = next(model.parameters()).is_cuda
    return nn.parallel.DistributedDataParallel(model, [torch.cuda.current_device()] if on_gpu else None)
