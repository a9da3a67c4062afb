"""`TrainConfig`: how to train, and which values are valid."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..config import one_of
from .optim import CAPTURABLE, OPTIMIZERS
from .schedule import SCHEDULES, factor
from .writers import WRITERS

Dtype = Literal["float32", "bfloat16"]
Mode = Literal["lower", "higher"]
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. `None` for eval_every or save_every means at the end only.

    steps: optimizer steps; or instead minutes, on the clock, all processes of a resumed run together.
    lr: the peak learning rate. warmup: a whole number of steps, or a fraction of the run (a float in [0, 1)).
    schedule: a word of `SCHEDULES`, down to final_lr times the peak; for decay and power see `schedule.factor`.
    optimizer: a word of `OPTIMIZERS`; beta1 is sgd's momentum.
    layer_decay: the rate of a layer over that of the one above it; the head has the whole one, the embeddings least.
    unfreeze: a share of the run in which the layers begin to learn one after the other, the embeddings at its end.
    clip: largest norm of the gradient, None for no limit.
    accumulate: micro-batches a step, of all processes; with ramp, a share of the run, from 1 up to so many there.
    split_on_oom: where memory runs out, compute micro-batches in halves, quarters … by sequences, for the same gradient
        but for the order of sums; one process only.
    checkpoint_activations: keep the inputs of the encoder's blocks alone, and compute the blocks again in the backward
        pass: the same bits in less memory.
    cuda_graph: capture the step as CUDA graphs and replay them, by one process with a GPU; see `graph.GraphedStep`.
    ema: the most that an average of the weights keeps of itself in a step; it is what is evaluated and saved.
    spike, skip: the step is bad whose loss is above spike times the mean of late; so many in a row are left out.
    patience: stop after so many evaluations without a better best_metric.
    dtype: bfloat16 is autocast; weights and optimizer stay float32.
    eval_batches: handed to the evaluation, None for everything.
    writer: a word of `WRITERS`, which gets the numbers of metrics.jsonl too.
    parallel: what each of several processes has of the model: all of it (ddp), or a share (fsdp).
    best_metric: the evaluation's number whose best checkpoint is kept, best_mode whether lower or higher is better.
    Raises ValueError, naming field, value and what is expected.
    """

    steps: int | None = None
    minutes: float | None = None
    optimizer: str = "adamw"
    lr: float = 1e-4
    warmup: int | float = 0.1
    schedule: str = "linear"
    final_lr: float = 0.0
    decay: float = 0.1
    power: float = 1.0
    weight_decay: float = 0.01
    layer_decay: float = 1.0
    unfreeze: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    clip: float | None = 1.0
    accumulate: int = 1
    ramp: float = 0.0
    split_on_oom: bool = False
    checkpoint_activations: bool = False
    cuda_graph: bool = False
    ema: float | None = None
    spike: float | None = None
    skip: int = 0
    patience: int | None = None
    seed: int = 0
    dtype: Dtype = "float32"
    eval_every: int | None = None
    eval_batches: int | None = None
    best_metric: str | None = None
    best_mode: Mode = "lower"
    save_every: int | None = None
    keep_last: int = 2
    log_every: int = 10
    writer: str | None = None
    device: str = "cpu"
    parallel: Parallel = "ddp"

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps={self.steps!r} and minutes={self.minutes!r}: give one of the two")
        optional = ("steps", "patience", "eval_every", "eval_batches", "save_every")
        for name in ("steps", "accumulate", "keep_last", "log_every", *optional):
            value = getattr(self, name)
            if not (name in optional and value is None) and (not _is_whole(value) or value < 1):
                raise ValueError(f"{name}={value!r} is not a positive whole number{' or null' * (name in optional)}")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} is not a whole number from 0 to 2**63 - 1")
        if not _is_whole(self.skip) or self.skip < 0:
            raise ValueError(f"skip={self.skip!r} is not a whole number from 0")
        for name in ("lr", "eps", "decay", "power", "clip", "minutes", "spike"):
            value = getattr(self, name)
            if not (name in ("clip", "minutes", "spike") and value is None) and (not _is_number(value) or value <= 0):
                raise ValueError(f"{name}={value!r} is not a positive number")
        for name in ("beta1", "beta2", "ramp", "ema", "unfreeze"):
            value = getattr(self, name)
            if not (name == "ema" and value is None) and (not _is_number(value) or not 0 <= value < 1):
                raise ValueError(f"{name}={value!r} is not in [0, 1)")
        if self.patience is not None and None in (self.eval_every, self.best_metric):
            raise ValueError(f"patience={self.patience} needs eval_every and best_metric")
        if not _is_number(self.layer_decay) or not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay!r} is not in (0, 1]")
        if not _is_number(self.final_lr) or not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr={self.final_lr!r} is not a share of the peak, in [0, 1]")
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay!r} is not a number from 0")
        most = (self.steps or 1) if _is_whole(self.warmup) else 1
        if not _is_number(self.warmup) or not 0 <= self.warmup < most:
            raise ValueError(
                f"warmup={self.warmup!r} is neither a fraction in [0, 1) nor fewer than steps={self.steps}"
            )
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("schedule", self.schedule, SCHEDULES)
        if self.writer is not None:
            one_of("writer", self.writer, WRITERS)
        one_of("dtype", self.dtype, get_args(Dtype))
        one_of("best_mode", self.best_mode, get_args(Mode))
        one_of("parallel", self.parallel, get_args(Parallel))
        device = check_device(self.device)
        if self.cuda_graph:
            if device.type != "cuda":
                raise ValueError(f"cuda_graph=True needs a GPU, not device={self.device!r}: use cuda_graph=False")
            if self.optimizer not in CAPTURABLE:
                raise ValueError(
                    f"cuda_graph=True: optimizer={self.optimizer!r} reads the learning rate on the host: "
                    f"use one of {', '.join(CAPTURABLE)}"
                )
            for name in ("unfreeze", "split_on_oom", "checkpoint_activations"):
                if value := getattr(self, name):
                    raise ValueError(f"cuda_graph=True does not go with {name}={value!r}: use one of the two")

    @property
    def warmup_steps(self) -> int:
        return self.warmup if _is_whole(self.warmup) else round(self.warmup * self.steps)

    @property
    def alone(self) -> dict[str, bool]:
        """The options that are for one process only."""
        return {name: getattr(self, name) for name in ("split_on_oom", "cuda_graph")}

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done in step `step` (from 0), `seconds` after the start."""
        return (step + 1) / (self.steps + 1) if self.minutes is None else min(seconds / (60 * self.minutes), 1.0)

    def learning_rate(self, progress: float) -> float:
        """The rate there; the peak lies in the step after the warm-up's last, or by the clock at its end."""
        warmup = self.warmup if self.steps is None else self.progress(self.warmup_steps, 0.0)
        shape = {"final": self.final_lr, "decay": self.decay, "power": self.power}
        return self.lr * factor(self.schedule, progress, warmup, **shape)


def check_device(device: str) -> torch.device:
    """Raise ValueError unless this machine has `device`."""
    try:
        result = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r} is not the name of a device: expected cpu, cuda or cuda:0") from None
    if result.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} is not supported: expected cpu, cuda or cuda:0")
    if result.type == "cuda" and (result.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices: use device=cpu"
        )
    return result


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
