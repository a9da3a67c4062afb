"""Fine-tuning with rows of your own: `Trainer("classification", "runs/tiny", "runs/mine").fit(rows)`."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import check_fractions, one_of
from ..data.records import as_records
from ..data.spool import Spool
from ..train import Result, TrainConfig
from ..train.checkpoint import steps
from . import make_task
from .base import CHUNK, Example, Task, evaluate, read_examples, split_examples
from .finetune import finetune
from .pipelines import Input, Pipeline, pipeline

FITTING = inspect.getfullargspec(finetune).kwonlyargs
TAKEN = (*FITTING, "best_metric", "best_mode")  # the last two are the task's
OPTIONS = FITTING + [field.name for field in dataclasses.fields(TrainConfig) if field.name not in TAKEN]


class Trainer:
    """Learns a task from rows, measures what it learned, and uses it.

    A row is a dictionary with the fields that a line of the task's jsonl files has; rows are any iterable of them.

    Args:
        task: a name in `TASKS`, or a task with options of its own, see `make_task`.
        init: what to start from, see `finetune`.
        run_dir: where the run is kept; `evaluate` and `predict` use one that is there already.
        valid_fraction: the share of the rows that `fit` holds out, by label and drawn by the seed.
        options: those of `finetune`, as epochs, lr or seed; device is by default CUDA where there is one.
    Raises:
        ValueError: there is no such task or option, or valid_fraction is not between 0 and 1.
    """

    def __init__(self, task: str | Task, init, run_dir, *, valid_fraction: float = 0.1, **options: Any):
        for name in options:
            one_of("option", name, OPTIONS)
        check_fractions(valid_fraction=valid_fraction)
        self.task = make_task(task) if isinstance(task, str) else task
        self.init, self.run_dir, self.valid_fraction = init, Path(run_dir), valid_fraction
        self.options = {"device": "cuda" if torch.cuda.is_available() else "cpu"} | options
        self._best: Pipeline | None = None

    def fit(self, rows: Iterable[Mapping[str, Any]], valid: Iterable[Mapping[str, Any]] | None = None) -> Result:
        """Learn from rows; the checkpoint that does best on `valid`, or else on the rows held out, is kept.

        Raises:
            ValueError: a row is none of the task's, by its number from 1; there are too few; or see `finetune`.
        """
        known, self._best = labelled(self.task, rows, "rows"), None
        train = known
        if valid is None:
            train, held_out = split_examples(known, self.valid_fraction, self.options.get("seed", 0))
            if not held_out:
                raise ValueError(f"rows={len(train)} are too few to hold any out: give more, or valid")
        else:
            held_out = labelled(self.task, valid, "valid")
        parts = {"train": train, "valid": held_out}
        return finetune(self.task, parts, self.init, self.run_dir, **{"known": known} | self.options)

    def evaluate(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """What the task measures on rows, with the best checkpoint.

        Raises:
            ValueError: there is no checkpoint, or a row is none of the task's, by its number from 1.
        """
        best = self._load()
        return evaluate(best.task, best.model, best.tokenizer, labelled(best.task, rows, "rows"))

    def predict(
        self, inputs: Input | Iterable[Input], *, chunk: int = CHUNK
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """What the best checkpoint says of a text, a list or a stream, see `Pipeline`.

        Raises:
            ValueError: there is no checkpoint, or an input is none of the task's, by its number from 1.
        """
        return self._load()(inputs, chunk=chunk)

    def _load(self) -> Pipeline:
        """The best checkpoint, which is read once."""
        if self._best is None:
            if not steps(self.run_dir):
                raise ValueError(f"run_dir={self.run_dir} holds no checkpoint: fit first")
            device, backend = self.options["device"], self.options.get("backend", "auto")
            self._best = pipeline(self.task.name, self.run_dir, device=device, backend=backend)
        return self._best


def labelled(task: Task, rows: Iterable[Mapping[str, Any]], name: str) -> Spool[Example]:
    """The examples of rows, on disk; rows that are none or have no label are refused by `name` and number."""
    examples = Spool(read_examples(task, as_records(rows, name)))
    if not examples:
        raise ValueError(f"{name} is empty: expected dictionaries")
    bare = next((example for example in examples if example.target is None), None)
    if bare is not None:
        raise ValueError(f"{bare.where}: it has no label")
    return examples
