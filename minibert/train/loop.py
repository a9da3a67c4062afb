"""The training loop. It knows steps, not objectives: pretraining and fine-tuning differ in model, data and `parts`.

Everything random is a function of (seed, step) or of the data's cursor, so a run that was killed and resumed has the
weights and the log of one that was not, bit for bit.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from minibert_kernels.philox import fold

from .. import __version__, hub
from ..batch import Batch
from ..config import one_of
from . import checkpoint
from .checkpoint import Run
from .distributed import Losses, World, claim
from .log import METRICS, MetricsLog, Progress, truncate_metrics
from .optim import OPTIMIZERS, load_optimizer_state, optimizer_state
from .schedule import SCHEDULES

Dtype = Literal["float32", "bfloat16"]
Mode = Literal["lower", "higher"]
OPTIMIZER = "optimizer.safetensors"
DROPOUT = 0xD809  # the key of dropout: the data draws under the same seed with keys of its own
FREE = (
    "save_every",
    "keep_last",
)  # the only fields that a resumed run may change: neither weights nor log depend on them
logger = logging.getLogger(__name__)


class Data(Protocol):
    """An endless stream; the cursor is one integer, 0 at the beginning.

    skip: the cursor behind the batch that begins there; asked for where the batch is another process's.
    """

    def next_batch(self, cursor: int) -> tuple[Batch, int]: ...

    def skip(self, cursor: int) -> int: ...


class NonFiniteError(RuntimeError):
    """A loss or the gradient is not finite; the weights are those of the step before."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the step was finished and a checkpoint saved. `exit_code` is 128 + the signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum, self.exit_code = signum, 128 + signum


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. `None` for eval_every or save_every means at the end only.

    steps: optimizer steps. optimizer: adamw or lamb. lr: the peak learning rate.
    warmup: a whole number of steps, or a fraction of `steps` (a float in [0, 1)).
    clip: largest norm of the gradient, None for no limit. accumulate: micro-batches a step, of all processes.
    dtype: bfloat16 is autocast; weights and optimizer stay float32.
    eval_batches: handed to the evaluation, None for everything.
    best_metric: the evaluation's number whose best checkpoint is kept, best_mode whether lower or higher is better.
    Raises ValueError, naming field, value and what is expected.
    """

    steps: int
    optimizer: str = "adamw"
    lr: float = 1e-4
    warmup: int | float = 0.1
    schedule: str = "linear"
    weight_decay: float = 0.01
    clip: float | None = 1.0
    accumulate: int = 1
    seed: int = 0
    dtype: Dtype = "float32"
    eval_every: int | None = None
    eval_batches: int | None = None
    best_metric: str | None = None
    best_mode: Mode = "lower"
    save_every: int | None = None
    keep_last: int = 2
    log_every: int = 10
    device: str = "cpu"

    def __post_init__(self):
        optional = ("eval_every", "eval_batches", "save_every")
        for name in ("steps", "accumulate", "keep_last", "log_every", *optional):
            value = getattr(self, name)
            if not (name in optional and value is None) and (not _is_whole(value) or value < 1):
                raise ValueError(f"{name}={value!r} is not a positive whole number{' or null' * (name in optional)}")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} is not a whole number from 0 to 2**63 - 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (name == "clip" and value is None) and (not _is_number(value) or value <= 0):
                raise ValueError(f"{name}={value!r} is not a positive number")
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay!r} is not a number from 0")
        if not _is_number(self.warmup) or not 0 <= self.warmup < (self.steps if _is_whole(self.warmup) else 1):
            raise ValueError(
                f"warmup={self.warmup!r} is neither a fraction in [0, 1) nor fewer than steps={self.steps}"
            )
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("dtype", self.dtype, get_args(Dtype))
        one_of("best_mode", self.best_mode, get_args(Mode))
        check_device(self.device)

    @property
    def warmup_steps(self) -> int:
        return self.warmup if _is_whole(self.warmup) else round(self.warmup * self.steps)


@dataclass(frozen=True)
class Result:
    """How a run ended: its steps, last evaluation, the record of the best one, and where the last checkpoint lies."""

    step: int
    metrics: dict[str, float]
    best: dict | None
    checkpoint: Path


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


def mean_over_sequences(batch: Batch) -> dict[str, int]:
    """`loss` is a mean over the sequences of a batch: classification and regression."""
    return {"loss": batch.num_sequences}


def train(
    model: nn.Module,
    data: Data,
    evaluate: Callable[[nn.Module, int | None], Mapping[str, float]] | None,
    config: TrainConfig,
    run_dir: Path | str | Run,
    tokenizer=None,
    resume: bool = False,
    *,
    parts: Callable[[Batch], dict[str, int]] = mean_over_sequences,
    weights: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Train `model` in place; write `metrics.jsonl` and checkpoints `step-N/` into `run_dir`.

    Within `join`, together with the other processes: the micro-batches of a step are dealt out, rank 0 evaluates and
    writes. Every process passes the same arguments.
    Args:
        model: called as `model(batch, seed=int)`, saved with `save_pretrained`; its initial weights are the caller's.
        evaluate: called as `evaluate(model, config.eval_batches)` in eval mode, without gradients and under the run's
            autocast, every `eval_every` steps and after the last.
        run_dir: a directory, or the `Run` of a `claim` that the caller holds; then `resume` is the claim's.
        parts: the names of the model's losses, which are means, and over how many things of a batch each is one. The
            loss of a step is the sum of those means over all its micro-batches together: the same however it is cut.
        weights: of the losses in that sum, 1 where a name is not in it; kept with the settings.
        settings: whatever else decides the result, in JSON's types: saved, and compared when the run resumes.
    Raises:
        ValueError: settings differ from those of the run to resume, or see `claim` and `checkpoint.latest`.
        NonFiniteError: a loss or gradient is not finite. Interrupted: a signal came. OSError: disk full and the like.
    """
    with contextlib.nullcontext(run_dir) if isinstance(run_dir, Run) else claim(run_dir, resume) as run:
        return Trainer(model, data, evaluate, config, run, tokenizer, parts, settings or {}, weights).run()


class Trainer:
    """One run: model, optimizer, and what a checkpoint holds beside them (step, cursor, best, metrics)."""

    def __init__(
        self, model, data, evaluate, config: TrainConfig, run: Run, tokenizer, parts, settings: Mapping,
        weights: Mapping[str, float] | None = None,
    ):  # fmt: skip
        self.world = World.current()
        self.world.once(lambda: self.world.check(config.accumulate))
        self.device = self.world.place(check_device(config.device))
        self.model, self.data, self.evaluate = model.to(self.device), data, evaluate
        self.config, self.path, self.tokenizer, self.parts = config, run.path, tokenizer, parts
        self.weights = dict(weights or {})
        settings = {"model": model.config.to_dict(), "weights": self.weights, **settings}
        self.saved = json.loads(json.dumps({"config": dataclasses.asdict(config), "settings": settings}))
        self.optimizer = OPTIMIZERS[config.optimizer](model, config.lr, config.weight_decay)
        self.step = self.cursor = 0
        self.best, self.metrics, self.checkpoint = None, {}, None
        if run.resume:
            self.load()
        self.losses = Losses(self.model)

    def run(self) -> Result:
        """Train from where the state is to the last step."""
        config = self.config
        started, tokens, busy = time.monotonic(), 0, 0.0
        leads = self.world.leads
        with (
            open(os.devnull, "w") as silence,
            MetricsLog(self.path / METRICS if leads else os.devnull) as log,
            Progress(config.steps, self.step, None if leads else silence) as progress,
            _signals() as signals,
        ):
            self.model.train()
            drawn = self._draw(self.cursor) if self.step < config.steps else None
            if drawn:
                with self._autocast():
                    example = drawn[0][0].to(self.device), config.seed, list(drawn[1][0])
                    self.losses = self.world.spread(self.losses, *example)
            while self.step < config.steps:
                begun = time.monotonic()
                batches, weights, cursor = drawn
                values = self._backward(batches, weights)
                # the host draws the next batches while the device still works on these
                drawn = self._draw(cursor)
                came = self.world.agree(signals)
                record = self._update(batches, weights, values)
                self.step, self.cursor = self.step + 1, cursor
                tokens, busy = tokens + sum(batch.num_tokens for batch in batches), busy + time.monotonic() - begun
                evaluated = self.evaluate is not None and self._due(config.eval_every)
                improved = evaluated and self._evaluate()
                if evaluated or self._due(config.log_every):
                    speed = self.world.total(tokens) / busy
                    timing = {"tokens_per_second": speed, "seconds": time.monotonic() - started}
                    record |= timing | ({f"eval_{k}": v for k, v in self.metrics.items()} if evaluated else {})
                    log.write(record)
                    progress.show(record)
                    tokens, busy = 0, 0.0
                progress.advance(self.step)
                if improved or came or self._due(config.save_every):
                    if leads:
                        log.sync()
                    self.save()
                if came and self.step < config.steps:
                    self._stop(came[0])
        return Result(self.step, self.metrics, self.best, self.checkpoint)

    def _due(self, every: int | None) -> bool:
        return self.step == self.config.steps or (every is not None and self.step % every == 0)

    def _draw(self, cursor: int) -> tuple[list[Batch], list[dict[str, float]], int]:
        """This rank's micro-batches of a step, the share that each loss of all of them has in it, the next cursor."""
        batches, cursor = self.world.deal(self.data, cursor, self.config.accumulate)
        counts, totals = [self.parts(batch) for batch in batches], Counter()
        table = self.world.weave(torch.tensor([list(count.values()) for count in counts])).tolist()
        counts = [dict(zip(counts[0], row, strict=True)) for row in table]
        for count in counts:
            totals.update(count)
        return batches, [{name: n / max(totals[name], 1) for name, n in count.items()} for count in counts], cursor

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def _backward(self, batches: list[Batch], weights: list[dict[str, float]]) -> Tensor:
        """Gradients of one step. Returns [1 + micro-batches * parts] on the device: the gradient's norm, the losses.

        The norm is that of the reduced gradient and the losses are those of all ranks: each decides the same.
        """
        # not keyed on the micro-batch: dropout is keyed on sequences, so it is the same however the step is cut
        seed = fold(self.config.seed, DROPOUT, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        world, losses = self.world, []
        for batch, share in zip(batches, weights[world.rank :: world.size], strict=True):
            with world.reducing(self.losses, last=batch is batches[-1]):
                with self._autocast():
                    means = self.losses(batch.to(self.device), seed, list(share))
                # times the ranks, over which the gradients will be averaged
                factors = {name: part * self.weights.get(name, 1.0) * world.size for name, part in share.items()}
                sum(means[name] * factor for name, factor in factors.items()).backward()
            losses.append(torch.stack([mean.detach().float() for mean in means.values()]))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        return torch.cat([norm.float()[None], world.weave(torch.stack(losses)).flatten()])

    def _update(self, batches: list[Batch], weights: list[dict[str, float]], values: Tensor) -> dict:
        """The optimizer's step, unless something is not finite. Returns the record of the step."""
        norm, *losses = values.tolist()  # the one wait for the device in a step
        flat = [(name, weight, number) for number, share in enumerate(weights) for name, weight in share.items()]
        means = dict.fromkeys((name for name, _, _ in flat), 0.0)
        for (name, weight, _), loss in zip(flat, losses, strict=True):
            means[name] += weight * loss
        broken = [
            (name, loss, number)
            for (name, _, number), loss in zip(flat, losses, strict=True)
            if not math.isfinite(loss)
        ]
        if broken:
            self._refuse(f"{broken[0][0]} is {broken[0][1]}", batches, [number for _, _, number in broken])
        if not math.isfinite(norm):
            self._refuse(f"the norm of the gradient is {norm}", batches, list(range(len(weights))))
        lr = self.config.lr * SCHEDULES[self.config.schedule](self.step, self.config.steps, self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        loss = sum(self.weights.get(name, 1.0) * mean for name, mean in means.items())
        return {"step": self.step + 1, "loss": loss} | means | {"learning_rate": lr, "grad_norm": norm}

    def _refuse(self, what: str, batches: list[Batch], numbers: list[int]) -> NoReturn:
        """Name the samples of the micro-batches of these numbers; called on every rank."""
        spans = torch.stack([torch.stack([batch.seq_ids.min(), batch.seq_ids.max()]) for batch in batches])
        spans = self.world.weave(spans)[numbers]
        where = f"samples {spans.min()} to {spans.max()}"
        raise NonFiniteError(f"step {self.step + 1}: {what} on {where}; no optimizer step was made: try a lower lr")

    def _evaluate(self) -> bool:
        """Evaluate; true where the result is the best so far."""
        config = self.config
        self.model.eval()
        with torch.no_grad(), self._autocast():
            self.metrics = self.world.once(
                lambda: {name: float(value) for name, value in self.evaluate(self.model, config.eval_batches).items()}
            )
        self.model.train()
        if config.best_metric is None:
            return False
        one_of("best_metric", config.best_metric, self.metrics)
        value = self.metrics[config.best_metric]
        sign = 1 if config.best_mode == "lower" else -1
        improved = math.isfinite(value) and (self.best is None or sign * value < sign * self.best["value"])
        if improved:
            self.best = {"metric": config.best_metric, "value": value, "step": self.step}
        return improved

    def _stop(self, signum: int) -> None:
        name = signal.Signals(signum).name
        raise Interrupted(f"{name} after step {self.step}, saved in {self.checkpoint}: continue with --resume", signum)

    def save(self) -> None:
        """Write the checkpoint of this step."""
        best = self.best and self.best["step"]
        keep_last = self.config.keep_last
        self.checkpoint = self.world.once(
            lambda: checkpoint.save(self.path, self.step, self._write, keep_last=keep_last, best=best)
        )

    def _write(self, directory: Path) -> None:
        self.model.save_pretrained(directory, self.tokenizer)
        # not save_file, whose files only their owner may read
        (directory / OPTIMIZER).write_bytes(safetensors.torch.save(optimizer_state(self.model, self.optimizer)))
        state = {"step": self.step, "cursor": self.cursor, "best": self.best, "metrics": self.metrics}
        text = json.dumps(state | self.saved | {"versions": _versions()}, indent=2)
        (directory / "trainer.json").write_text(text + "\n", encoding="utf-8")

    def load(self) -> None:
        """Put the newest whole checkpoint's state back, and cut the log to its step; without one, start at step 0."""
        directory, state = self.world.once(self._find)
        if directory is not None:
            hub.load_into(self.model, directory)
            try:
                load_optimizer_state(self.model, self.optimizer, safetensors.torch.load_file(directory / OPTIMIZER))
            except (OSError, SafetensorError, ValueError) as error:
                raise ValueError(f"{directory / OPTIMIZER}: {error}") from None
            self.step, self.cursor, self.checkpoint = state["step"], state["cursor"], directory
            self.best, self.metrics = state["best"], state["metrics"]
        self.world.once(lambda: truncate_metrics(self.path / METRICS, self.step))

    def _find(self) -> tuple[Path | None, dict | None]:
        """The checkpoint to continue from and its `trainer.json`, or None; refused where it is of another run."""
        directory = checkpoint.latest(self.path)
        if directory is None:
            return None, None
        state = checkpoint.read_trainer(directory)
        for part in ("config", "settings"):
            _refuse_changes(state[part], self.saved[part], self.path)
        if state["versions"] != _versions():
            logger.warning(
                "%s was written by %s, this is %s: bits may differ", directory, state["versions"], _versions()
            )
        return directory, state


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINT or SIGTERM that came meanwhile; a second one acts as it would without us."""
    came: list[int] = []

    def restore():
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def note(signum, frame):
        came.append(signum)
        restore()

    # python lets only the main thread listen
    listening = threading.current_thread() is threading.main_thread()
    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM) if listening}
    try:
        yield came
    finally:
        restore()


def _refuse_changes(saved, now, run_dir, name: str = "") -> None:
    """Raise ValueError for the first field, however deep, that is not what the run was started with."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            if name or key not in FREE:
                _refuse_changes(saved.get(key), now.get(key), run_dir, f"{name}.{key}".strip("."))
    elif saved != now:
        raise ValueError(
            f"{run_dir} was started with {name}={saved!r}, now it is {now!r}: resume with what it was started with"
        )


def _versions() -> dict[str, str]:
    return {"minibert": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
