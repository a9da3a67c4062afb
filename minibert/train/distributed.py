"""Several processes that train one model: which of them this is, and what they tell each other.

torchrun starts them, and says who each is in RANK, WORLD_SIZE and LOCAL_RANK. The micro-batches of a step are dealt out
in turn, so that together they are the same whatever the number of processes, and dropout is keyed on sequences: what is
computed does not depend on who computes it, but for the order of sums. Rank 0 alone writes, prints and evaluates;
`sharded.py` is the World in which no rank has the whole model.
Alone there is no process group, and every function here hands back what it was given.
"""

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..batch import Batch
from . import checkpoint
from .checkpoint import Run

T = TypeVar("T")
POLL_SECONDS = 0.02


class PeerFailed(RuntimeError):
    """Rank 0 could not do what the others were waiting for; it says why."""


@dataclass(frozen=True)
class World:
    """The processes of a run, `size` of them, of which this is number `rank`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """Those that `join` joined, or this process alone."""
        joined = distributed.is_available() and distributed.is_initialized()
        return cls(distributed.get_rank(), distributed.get_world_size()) if joined else cls()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def check(self, accumulate: int, **alone: bool) -> None:
        """Raise ValueError unless every process gets as many micro-batches of a step.

        alone: options that are for one process only, by name.
        """
        if (near := self.round_up(accumulate)) != accumulate:
            raise ValueError(f"accumulate={accumulate} is not divisible by {self.size} processes: use {near}")
        for name, value in alone.items():
            if value and self.size > 1:
                raise ValueError(f"{name}=True is for one process, not for {self.size}: leave it out")

    def round_up(self, count: int) -> int:
        """The least number from `count` on of which every process gets as many."""
        return -(-count // self.size) * self.size

    def local_device(self, device: torch.device) -> torch.device:
        """Where this process computes: of GPUs, the one of its LOCAL_RANK.

        Raises:
            ValueError: one GPU is named for all, or there are fewer than processes on this machine.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        local, there = _local_rank(), torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(f"device='{device}' is one GPU for {self.size} processes: use device=cuda, each its own")
        if local >= there:
            raise ValueError(f"process {local} of this machine has no GPU: use --nproc-per-node {there}")
        return torch.device("cuda", local)

    def prepare_model(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model as it lies in this process, changed in place."""
        return model.to(device)

    def next_batches(self, data, cursor: int, count: int) -> tuple[list[Batch], int]:
        """The batches of this rank among the next `count`: number i is rank i % size's. And the cursor behind all."""
        mine = []
        for number in range(count):
            if number % self.size == self.rank:
                batch, cursor = data.next_batch(cursor)
                mine.append(batch)
            else:
                cursor = data.skip(cursor)
        return mine, cursor

    def all_gather(self, rows: Tensor) -> Tensor:
        """[k, …] of each rank to [k * size, …] on all of them, interleaved as `next_batches` does: row i * size + r is
        row i of rank r."""
        if self.size == 1:
            return rows
        table = rows.new_zeros(len(rows), self.size, *rows.shape[1:])
        table[:, self.rank] = rows
        distributed.all_reduce(table)  # each place is a value and zeros, so the sum is exact
        return table.flatten(0, 1)

    def all_reduce_sum(self, number: int) -> int:
        """The sum over the ranks."""
        return int(self.all_gather(torch.tensor([number])).sum())

    def gather_signals(self, signals: list[int]) -> list[int]:
        """What came to any rank, so that all stop after the same step; alone, the very list."""
        if self.size == 1:
            return signals
        largest = torch.tensor(signals[:1] or [0])
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return largest[largest > 0].tolist()

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, where alone it is called; the others wait for it.

        Raises:
            PeerFailed: on the others, where it raised on rank 0.
        """
        if self.size == 1:
            return work()
        answer = None
        with self.main_first(lambda: answer) as received:
            if self.is_main:
                answer = work()
        return answer if self.is_main else received

    @contextlib.contextmanager
    def main_first(self, result: Callable[[], Any] = lambda: None) -> Iterator[Any]:
        """Rank 0 goes through the block before the others: what it makes they find, what it refuses they do not try.

        Args:
            result: called on rank 0 after the block; the other ranks get what it returns.
        Raises:
            PeerFailed: on the others, where the block raised on rank 0.
        """
        if self.size == 1:
            yield
        elif self.is_main:
            try:
                yield
            except BaseException:
                # an error in passing the word on must not hide the first one
                with contextlib.suppress(RuntimeError):
                    _broadcast(None)
                raise
            _broadcast((result(),))
        else:
            answer = _broadcast(None)
            if answer is None:
                raise PeerFailed("rank 0 failed, and says why")
            yield answer[0]

    def prepare_losses(self, losses: nn.Module, *example) -> nn.Module:
        """`Losses` whose gradients are now means over the ranks; `example` is called with once, and without effect.

        An objective may leave out a head, whose parameters must stay without a gradient, as they do in one process:
        DDP looks for them in every step, which takes time, and is asked to only where there are any.
        """
        if self.size == 1:
            return losses
        parameters = [p for p in losses.parameters() if p.requires_grad]
        found = torch.autograd.grad(sum(losses(*example).values()), parameters, allow_unused=True)
        return DistributedDataParallel(
            losses,
            gradient_as_bucket_view=True,
            find_unused_parameters=any(gradient is None for gradient in found),
        )

    def gradient_sync(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around a micro-batch: gradients travel with the last one of a step only."""
        return contextlib.nullcontext() if last or self.size == 1 else module.no_sync()

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Scale the gradient down to a norm of `limit`; returns the norm that it had."""
        return nn.utils.clip_grad_norm_(model.parameters(), limit)

    def measure(self, model: nn.Module, work: Callable[[], T]) -> T:
        """What `work`, which calls the model, returns on rank 0."""
        return self.on_main(work)

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors like the model's, for rank 0 to write; every rank asks for them."""
        return tensors

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """A file of tensors, from all ranks together."""
        # not save_file, whose files only their owner may read
        self.on_main(lambda: path.write_bytes(safetensors.torch.save(dict(tensors))))

    def read(self, path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `write` wrote, in this World or another, as far as this rank needs it.

        Args:
            parameters: of the model, by name; a tensor is named and shaped as one, or named as one with a suffix.
        """
        if path.is_file():
            return safetensors.torch.load_file(path)
        from .shares import read_shares  # imports half a second of torch

        return read_shares(path, parameters, alone=self.size == 1)


def _broadcast(value: Any) -> Any:
    """What rank 0 passes."""
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


class Losses(nn.Module):
    """The losses of a model and none of its logits: DDP takes for used whatever leads to an output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, seed: int, names: list[str]) -> dict[str, Tensor]:
        output = self.model(batch, seed=seed)
        return {name: getattr(output, name) for name in names}


@contextlib.contextmanager
def join() -> Iterator[World]:
    """Be one of the processes that torchrun started, until the end of the block; alone where it started no others.

    Small messages between hosts go over gloo, also where gradients go over NCCL: none of them waits for the GPU.
    """
    if started().size == 1:
        yield World()
        return
    if _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())  # what `cuda` means from here on
    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=_of_this_start(store, rank, size), rank=rank, world_size=size)
    try:
        yield World.current()
    except BaseException as error:
        # the frames of an error hold DDP, which outlives the group then and waits for it forever when it is freed
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        raise
    finally:
        distributed.destroy_process_group()


def _of_this_start(store: Store, rank: int, size: int) -> Store:
    """A part of the store that no earlier start has written into.

    torchrun may keep a store over restarts, and in it are the addresses of processes that are gone. So every rank says
    a word that was never said before, and rank 0 answers with all that it finds, until each has found its own among
    them: then rank 0's word is the name of this start.
    """
    word = os.urandom(8).hex()
    store.set(f"word/{rank}", word)
    others = range(1, size)
    while rank == 0:
        store.set("answer", " ".join([word, *(store.get(f"word/{other}").decode() for other in others)]))
        heard = [f"heard/{other}" for other in others]
        if store.check(heard) and all(store.get(key).decode() == word for key in heard):
            return PrefixStore(word, store)
        time.sleep(POLL_SECONDS)
    while (answer := store.get("answer").decode().split())[rank : rank + 1] != [word]:
        time.sleep(POLL_SECONDS)
    store.set(f"heard/{rank}", answer[0])
    return PrefixStore(answer[0], store)


def started() -> World:
    """The processes that torchrun started, as it says in the environment: known before and after `join`, too."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def claim(run_dir, resume: bool = False) -> Iterator[Run]:
    """`checkpoint.claim`, where there are several processes by rank 0 for all of them."""
    with contextlib.ExitStack() as stack:
        yield World.current().on_main(lambda: stack.enter_context(checkpoint.claim(Path(run_dir), resume)))
