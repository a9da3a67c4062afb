"""A fine-tuned model as a function of texts: `pipeline("ner", directory)("Ada lives in London.")`."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import one_of
from ..data.records import as_records
from ..data.tokenizer import Tokenizer
from ..train import check_device, resolve_model
from . import TASKS, head_of, task_of, tasks_for
from .base import CHUNK, Example, Task, predict, printable, read_texts

Input = str | tuple[str, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Pipeline:
    """A model, its tokenizer, and the task it was fine-tuned for.

    It is called with a text; with a tuple of the texts that belong together: a pair, a question and its context, a
    question and its choices; or with a dictionary, the fields of a record as the task's files have them.
    """

    task: Task
    model: nn.Module
    tokenizer: Tokenizer

    def __call__(
        self, inputs: Input | Iterable[Input], *, chunk: int = CHUNK
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """The prediction for one input, in JSON's types; of a list a list, and of any other iterable an iterator,
        which takes `chunk` inputs at a time.

        Raises:
            ValueError: an input is none of the task's; the message has its number, from 1.
        """
        if isinstance(inputs, str | tuple | Mapping) or not isinstance(inputs, Iterable):
            return next(self._predict([inputs], 1))
        answers = self._predict(inputs, chunk)
        return list(answers) if isinstance(inputs, list) else answers

    def _predict(self, inputs: Iterable[Input], chunk: int) -> Iterator[dict[str, Any]]:
        return map(printable, predict(self.task, self.model, self.tokenizer, self._examples(inputs), chunk=chunk))

    def _examples(self, inputs: Iterable[Input]) -> Iterator[Example]:
        return read_texts(self.task, as_records(map(self._fields, inputs), "input"))

    def _fields(self, one: Input) -> Mapping[str, Any]:
        if isinstance(one, Mapping):
            return one
        return self.task.fields(*(one if isinstance(one, tuple | list) else [one]))


def pipeline(
    task: str, directory=None, *, device: str | None = None, dtype: str | torch.dtype = "float32",
    backend: str = "auto", allow_pickle=False, **options: Any,
) -> Pipeline:  # fmt: skip
    """The model of a directory as a function of texts, see `Pipeline`.

    Args:
        task: a name in `TASKS`; or the directory, alone: then the task is the one that the model was fine-tuned for.
        directory: a run, a checkpoint or a Hugging Face directory.
        device: by default CUDA where there is one.
        dtype: of the weights, "float32" or "bfloat16"; see `minibert.hub.from_pretrained`.
        options: of the task, as truncate=True; by default those it was fine-tuned with.
    Raises:
        ValueError: the directory has no model for the task, or the task no such option.
    """
    name, directory = (None, task) if directory is None else (task, directory)
    if name is not None:
        one_of("task", name, TASKS)
    source = resolve_model(directory)
    head = head_of(source, allow_pickle) or (TASKS[name].head if name else None)
    if head is None:
        raise ValueError(f"{source} has no head of a task: fine-tune it first")
    place = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = head.from_pretrained(source, backend=backend, allow_pickle=allow_pickle, dtype=dtype)
    if model.new_parameters:
        raise ValueError(f"{source} has no {', '.join(model.new_parameters)}, which {name} needs: fine-tune it first")
    kinds = tasks_for(model)
    if name is not None and TASKS[name] not in kinds:
        raise ValueError(f"{source} is a model for {' or '.join(kind.name for kind in kinds)}, not for {name}")
    made = task_of(model) if name in (None, kinds[0].name) else TASKS[name]()
    made = made.make(dataclasses.asdict(made) | options)
    return Pipeline(made, model.to(place), Tokenizer.from_pretrained(source))
