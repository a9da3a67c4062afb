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
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import hub
from ..batch import Batch
from ..config import one_of
from ..model.encoder import Encoder
from ..model.lora import learned, low_rank
from ..version import __version__
from . import checkpoint
from .average import Average, put_back
from .card import record_run, write_card
from .checkpoint import Run
from .config import TrainConfig, check_device
from .distributed import World, claim
from .graph import GraphedStep
from .guard import Guard
from .log import METRICS, MetricsLog, Progress, truncate_metrics
from .optim import OPTIMIZERS, cut_by_depth, load_optimizer_state, optimizer_state
from .schedule import micro_batches
from .signals import listen
from .step import EagerStep, autocast

OPTIMIZER = "optimizer.safetensors"
TRAINED = "trained.safetensors"  # the weights themselves, where model.safetensors holds their average
LEARNED = "learned.safetensors"  # what learns, where model.safetensors holds its sum with what is frozen
logger = logging.getLogger(__name__)


class Data(Protocol):
    """An endless stream; the cursor is one integer, 0 at the beginning.

    skip: the cursor behind the batch that begins there; asked for where the batch is another process's.
    """

    def next_batch(self, cursor: int) -> tuple[Batch, int]: ...

    def skip(self, cursor: int) -> int: ...


class NonFiniteError(RuntimeError):
    """A loss or the gradient is not finite, or the loss is a spike; the weights are those of the step before."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the step was finished and a checkpoint saved. `exit_code` is 128 + the signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum, self.exit_code = signum, 128 + signum


@dataclass(frozen=True)
class Result:
    """How a run ended: its steps, last evaluation, the record of the best one, and where the last checkpoint lies.

    signal: what came too late to interrupt it; whoever goes on to other work should not.
    """

    step: int
    metrics: dict[str, float]
    best: dict | None
    checkpoint: Path
    signal: int | None = None


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
    moments: Path | None = None,
) -> Result:
    """Train `model` in place; write `metrics.jsonl` and checkpoints `step-N/` into `run_dir`.

    Within `join`, together with the other processes: the micro-batches of a step are dealt out, rank 0 evaluates and
    writes. Every process passes the same arguments. With parallel="fsdp" the model stays divided, and all evaluate.
    Args:
        model: called as `model(batch, seed=int)`, saved with `save_pretrained`; its initial weights are the caller's.
        evaluate: called as `evaluate(model, config.eval_batches)` in eval mode, without gradients and under the run's
            autocast, every `eval_every` steps and after the last.
        run_dir: a directory, or the `Run` of a `claim` that the caller holds; then `resume` is the claim's.
        parts: the names of the model's losses, which are means, and over how many things of a batch each is one. The
            loss of a step is the sum of those means over all its micro-batches together: the same however it is cut.
        weights: of the losses in that sum, 1 where a name is not in it; kept with the settings.
        settings: whatever else decides the result, in JSON's types: saved, and compared when the run resumes.
        moments: a checkpoint of a run before this one, whose optimizer's state to begin with.
    Raises:
        ValueError: settings differ from those of the run to resume, or see `claim` and `checkpoint.latest`.
        NonFiniteError: a loss or gradient is not finite. Interrupted: a signal came. OSError: disk full and the like.
    """
    with contextlib.nullcontext(run_dir) if isinstance(run_dir, Run) else claim(run_dir, resume) as run:
        return TrainingLoop(
            model, data, evaluate, config, run, tokenizer, parts, settings or {}, weights, moments
        ).run()


class TrainingLoop:
    """One run: model, optimizer, and what a checkpoint holds beside them (step, cursor, best, metrics)."""

    def __init__(
        self, model, data, evaluate, config: TrainConfig, run: Run, tokenizer, parts, settings: Mapping,
        weights: Mapping[str, float] | None = None, moments: Path | None = None,
    ):  # fmt: skip
        self.world = World.current()
        self.world.on_main(lambda: self.world.check(config.accumulate, **config.alone))
        self.device = self.world.local_device(check_device(config.device))
        if config.parallel == "fsdp" and self.world.size > 1:
            from .sharded import Sharded  # imports half a second of torch

            self.world = Sharded.current()
        self.data, self.evaluate, self.adapted = data, evaluate, any(low_rank(model))
        self.config, self.path, self.tokenizer, self.parts = config, run.path, tokenizer, parts
        self.weights = dict(weights or {})
        settings = {"model": model.config.to_dict(), "weights": self.weights, **settings}
        self.saved = json.loads(json.dumps({"config": dataclasses.asdict(config), "settings": settings}))
        directory, state = self.world.on_main(self._find) if run.resume else (None, None)
        if directory is not None:
            if not self.adapted:
                hub.load_into(model, directory)  # while it is whole
            # what an evaluation fitted beside the weights
            fitted = hub.load_config(directory).task_specific_params
            model.config = model.config.replace(task_specific_params=fitted)
        for module in model.modules():
            if isinstance(module, Encoder):
                module.recompute = config.checkpoint_activations
        self.model = self.world.prepare_model(model, self.device)
        betas = (config.beta1, config.beta2)
        self.optimizer = OPTIMIZERS[config.optimizer](model, config.lr, config.weight_decay, betas, config.eps)
        cut_by_depth(model, self.optimizer, config.layer_decay, config.unfreeze)
        self.average = None if config.ema is None else Average(model, config.ema)
        self.guard = Guard(config.skip, config.spike)
        self.step = self.cursor = 0
        if config.cuda_graph:
            self.work = GraphedStep(self.model, self.optimizer, config, self.weights)
        else:
            progress = lambda: config.progress(self.step, self._elapsed())  # noqa: E731
            rest = {"parts": parts, "progress": progress, "world": self.world}
            self.work = EagerStep(self.model, self.optimizer, config, self.weights, **rest)
        self.best, self.metrics, self.checkpoint = None, {}, None
        self.started, self.over = time.monotonic(), False  # by the clock, when the first process would have started
        if moments:
            self._load_tensors(moments / OPTIMIZER, partial(load_optimizer_state, self.model, self.optimizer))
        if directory is not None:
            self.load(directory, state)
        if run.resume:
            self.world.on_main(lambda: truncate_metrics(self.path / METRICS, self.step))

    def run(self) -> Result:
        """Train from where the state is to the last step."""
        config = self.config
        started, tokens, busy = time.monotonic(), 0, 0.0
        is_main = self.world.is_main
        with self.world.main_first():
            log = MetricsLog(self.path / METRICS, config.writer) if is_main else MetricsLog(os.devnull)
        with (
            open(os.devnull, "w") as silence,
            log,
            Progress(config.steps, self.step, None if is_main else silence) as progress,
            listen() as signals,
        ):
            self.model.train()
            self.over = self._is_over() or self._is_stale()
            drawn = None if self.over else self._begin()
            while not self.over:
                begun = time.monotonic()
                batches, weights, cursor = drawn
                values = self._backward(batches, weights)
                # the host draws the next batches while the device still works on these
                drawn = self._draw(cursor, self.step + 1)
                came = self.world.gather_signals(signals)
                record = self._update(batches, weights, values)
                self.step, self.cursor = self.step + 1, cursor
                tokens, busy = tokens + sum(batch.num_tokens for batch in batches), busy + time.monotonic() - begun
                if self.step == 1 and config.minutes and busy > 6 * config.minutes:
                    logger.warning("a step takes a tenth of minutes=%g: take a smaller model or batch", config.minutes)
                self.over = self._is_over()
                evaluated = self.evaluate is not None and self._due(config.eval_every)
                improved = evaluated and self._evaluate()
                self.over = self.over or self._is_stale()
                if evaluated or "skipped" in record or self._due(config.log_every):
                    speed = self.world.all_reduce_sum(tokens) / busy
                    timing = {"tokens_per_second": speed, "seconds": time.monotonic() - started}
                    record |= timing | ({f"eval_{k}": v for k, v in self.metrics.items()} if evaluated else {})
                    log.write(record)
                    progress.show(record)
                    tokens, busy = 0, 0.0
                progress.advance(self.step)
                if improved or came or self._due(config.save_every):
                    if is_main:
                        log.sync()
                    self.save()
                if came and not self.over:
                    self._stop(came[0])
        came = self.world.gather_signals(signals)
        return Result(self.step, self.metrics, self.best, self.checkpoint, came[0] if came else None)

    def _due(self, every: int | None) -> bool:
        return self.over or (every is not None and self.step % every == 0)

    def _is_over(self) -> bool:
        config = self.config
        return self.step >= config.steps if config.minutes is None else self._elapsed() >= 60 * config.minutes

    def _is_stale(self) -> bool:
        """The best evaluation is too long ago, or there was none."""
        config, best = self.config, self.best["step"] if self.best else 0
        return config.patience is not None and self.step - best >= config.patience * config.eval_every

    def _elapsed(self) -> float:
        """Seconds of this run, resumed or not, as far as its work was saved, by rank 0's clock; 0 without minutes."""
        return 0.0 if self.config.minutes is None else self.world.on_main(lambda: time.monotonic() - self.started)

    def _begin(self):
        """Record the start, draw the first step, and let gradients be means over the ranks."""
        self.world.on_main(lambda: record_run(self.path, self.step, self.saved))
        drawn = self._draw(self.cursor, self.step)
        self.work.begin(drawn[0][0], drawn[1][0])
        return drawn

    def _draw(self, cursor: int, step: int = 0) -> tuple[list[Batch], list[dict[str, float]], int]:
        """This rank's micro-batches of a step, the share that each loss of all of them has in it, the next cursor."""
        config = self.config
        count = micro_batches(config.accumulate, config.ramp, config.progress(step, self._elapsed()))
        batches, cursor = self.world.next_batches(self.data, cursor, self.world.round_up(count))
        counts, totals = [self.parts(batch) for batch in batches], Counter()
        table = self.world.all_gather(torch.tensor([list(count.values()) for count in counts])).tolist()
        counts = [dict(zip(counts[0], row, strict=True)) for row in table]
        for count in counts:
            totals.update(count)
        return batches, [{name: n / max(totals[name], 1) for name, n in count.items()} for count in counts], cursor

    def _backward(self, batches: list[Batch], weights: list[dict[str, float]]) -> Tensor:
        """Gradients of one step. Returns their norm and the losses of all ranks, which are read in `_update`."""
        return self.work.gradients(self.step, batches, weights[self.world.rank :: self.world.size])

    def _update(self, batches: list[Batch], weights: list[dict[str, float]], values: Tensor) -> dict:
        """The optimizer's step, unless the guard finds it bad. Returns the record of the step."""
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
        loss = sum(self.weights.get(name, 1.0) * mean for name, mean in means.items())
        pieces = {"pieces": self.work.pieces} if self.work.pieces > 1 else {}
        record = {"step": self.step + 1, "loss": loss} | means | pieces
        if broken:
            fault, numbers = f"{broken[0][0]} is {broken[0][1]}", [number for _, _, number in broken]
        else:
            fault, numbers = self.guard.fault(loss, norm), list(range(len(weights)))
        if fault:
            self._leave_out(fault, batches, numbers)
            return record | {"grad_norm": norm, "skipped": fault}
        self.guard.good(loss)
        lr = self.config.learning_rate(self.config.progress(self.step, self._elapsed()))
        self.work.update(lr)
        if self.average:
            self.average.update(self.step)
        return record | {"learning_rate": lr, "grad_norm": norm}

    def _leave_out(self, fault: str, batches: list[Batch], numbers: list[int]) -> None:
        """Warn of a bad step, or raise NonFiniteError where no more may be left out; called on every rank.

        Names the samples of the micro-batches of these numbers, whoever has them.
        """
        spans = torch.stack([torch.stack([batch.seq_ids.min(), batch.seq_ids.max()]) for batch in batches])
        spans = self.world.all_gather(spans)[numbers]
        what = f"step {self.step + 1}: {fault} on samples {spans.min()} to {spans.max()}; no optimizer step was made"
        if not self.guard.passes():
            raise NonFiniteError(f"{what}: try a lower lr")
        if self.world.is_main:
            logger.warning(what)

    def _averaged(self):
        """Within, the model has the weights that are evaluated and saved."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def _measure(self) -> dict[str, float]:
        with self._averaged():
            return {name: float(value) for name, value in self.evaluate(self.model, self.config.eval_batches).items()}

    def _evaluate(self) -> bool:
        """Evaluate; true where the result is the best so far."""
        config = self.config
        self.model.eval()
        with torch.no_grad(), autocast(self.config.dtype, self.device):
            self.metrics = self.world.measure(self.model, self._measure)
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
        self.checkpoint = checkpoint.save(
            self.path, self.step, self._write, keep_last=keep_last, best=best, on_main=self.world.on_main
        )

    def _write(self, directory: Path) -> None:
        world = self.world
        with self._averaged():
            weights = world.full_tensors(dict(self.model.named_parameters()))
            world.on_main(lambda: self.model.save_pretrained(directory, self.tokenizer, weights))
            if self.adapted:
                world.write(directory / LEARNED, learned(self.model))
            if self.average:
                world.write(directory / TRAINED, self.average.trained())
        world.write(directory / OPTIMIZER, optimizer_state(self.model, self.optimizer))
        world.on_main(lambda: self._describe(directory))

    def _describe(self, directory: Path) -> None:
        """Write what a checkpoint holds beside tensors."""
        state = {"step": self.step, "cursor": self.cursor, "best": self.best, "metrics": self.metrics}
        state |= {"guard": self.guard.state, "pieces": self.work.pieces}
        if self.config.minutes is not None:  # without, the bytes do not depend on the clock
            state["seconds"] = time.monotonic() - self.started
        text = json.dumps(state | self.saved | {"versions": _versions()}, indent=2)
        (directory / "trainer.json").write_text(text + "\n", encoding="utf-8")
        write_card(directory, self.path, self.model, state)

    def load(self, directory: Path, state: dict) -> None:
        """Put back what a checkpoint holds beside the weights that the model has already."""
        self._load_tensors(directory / OPTIMIZER, partial(load_optimizer_state, self.model, self.optimizer))
        if self.adapted:
            self._load_tensors(directory / LEARNED, partial(put_back, learned(self.model)))
        if self.average:
            self._load_tensors(directory / TRAINED, self.average.load)
        self.step, self.cursor, self.checkpoint = state["step"], state["cursor"], directory
        self.best, self.metrics = state["best"], state["metrics"]
        self.guard.load(state.get("guard", {}))
        self.work.pieces = state.get("pieces", 1)
        self.started -= state.get("seconds", 0.0)

    def _load_tensors(self, path: Path, load: Callable[[dict[str, Tensor]], None]) -> None:
        """Hand a file's tensors to `load`; an error names the file."""
        try:
            load(self.world.read(path, dict(self.model.named_parameters())))
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def _find(self) -> tuple[Path | None, dict | None]:
        """The checkpoint to continue from and its `trainer.json`, or None; refused where it is of another run."""
        directory = checkpoint.latest(self.path)
        if directory is None:
            return None, None
        state = checkpoint.read_trainer(directory)
        for part in ("config", "settings"):
            checkpoint.refuse_changes(state[part], self.saved[part], self.path)
        if state["versions"] != _versions():
            logger.warning(
                "%s was written by %s, this is %s: bits may differ", directory, state["versions"], _versions()
            )
        return directory, state


def _versions() -> dict[str, str]:
    return {"minibert": __version__, "torch": torch.__version__, "python": platform.python_version()}
