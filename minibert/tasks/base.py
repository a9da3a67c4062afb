"""What a task is: records become examples, examples rows of tokens, scores predictions, and predictions numbers.

A task is one file and one line of the table `TASKS`. Nothing here knows any of them.
"""

import dataclasses
import itertools
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minibert_kernels.philox import fold, uniform

from ..batch import Batch
from ..config import BertConfig, refuse_unknown
from ..data.records import SHOWN, Record
from ..data.rows import Row, in_order
from ..data.spool import take
from ..data.text import refuse
from ..data.tokenizer import Tokenizer
from ..model import Output

CHUNK = 4096  # examples that are predicted at once: enough to sort by length, little to hold
BATCH_TOKENS = 8192  # of a batch that is predicted
SPLIT, DRAW = 0x59117, 0x11317  # keys of what is drawn


@dataclass(frozen=True)
class Example:
    """One record as its task understands it.

    texts: what the model reads. target: what it is to say, None where nobody said. where: `file:line`, for errors.
    group: examples of one group are never split up. extra: what a prediction repeats, as an id.
    """

    texts: tuple[str, ...]
    target: Any = None
    where: str = ""
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Verdict(NamedTuple):
    """A class that was said beside the one that is right; probability: how surely, None where none was said."""

    right: str
    said: str
    probability: float | None = None


@dataclass(frozen=True)
class Mistake:
    """What is wrong about a prediction, in short texts for a person.

    severity: the larger, the worse: the model was surer, or further off; ties go by the next number. how: it in words.
    said, right: what differs. parts: what was read, in pieces, each with a note; one whose note is not "" is marked.
    """

    severity: tuple[float, ...]
    how: str
    said: str
    right: str
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The fields of a subclass are its options; they are kept in the model's config, as `task_specific_params`.

    name: the key in `TASKS`. head: its model class. metric: the number of `measure` that decides which checkpoint is
    the best, mode whether `higher` or `lower` is better. dtype: of the labels.
    answers: the fields of a record that say what a prediction is to say.
    classes: how many names a model's `id2label` has, None where that depends on the examples.
    max_length: tokens of a row, None for as many as the model takes. truncate: cut what is longer; else it is an error.
    """

    name: ClassVar[str]
    head: ClassVar[type[nn.Module]]
    metric: ClassVar[str]
    mode: ClassVar[str] = "higher"
    answers: ClassVar[tuple[str, ...]] = ("label",)
    classes: ClassVar[int | None] = None
    dtype: ClassVar[torch.dtype] = torch.int64

    max_length: int | None = None
    truncate: bool = False

    def __post_init__(self):
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 3):
            raise ValueError(f"max_length={self.max_length!r} is not a whole number from 3")

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> "Task":
        """The task with these options.

        Raises:
            ValueError: one it does not have, with the nearest it has, or one that is no number, or no whole or finite
                one, where such is due.
        """
        refuse_unknown(options, cls, f"{cls.name} option")
        for option in dataclasses.fields(cls):
            value, default = options.get(option.name, option.default), option.default
            if type(default) is int and type(value) is not int:
                raise ValueError(f"{option.name}={value!r} is not a whole number")
            if type(default) is float and not (type(value) in (int, float) and math.isfinite(value)):
                raise ValueError(f"{option.name}={value!r} is not a number")
            if isinstance(default, bool) and not isinstance(value, bool):
                raise ValueError(f"{option.name}={value!r} is not true or false")
        return cls(**options)

    @property
    def together(self) -> int:
        """Rows that are a unit, see `RowData`."""
        return 1

    def example(self, record: Record) -> Example:
        """Raises ValueError, naming file, line and field, where the record is not one of this task's."""
        raise NotImplementedError

    def fields(self, *texts: str) -> dict[str, Any]:
        """What a record would hold of which only these texts are known: one, or as many as the task reads."""
        if len(texts) > 1:
            raise ValueError(f"{self.name} reads one text, got {len(texts)}")
        return {"text": texts[0]}

    def prepared(self, examples: Sequence[Example]) -> "Task":
        """The task with what it takes from the training examples before it is learned, as weights of classes."""
        return self

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        """The labels there are, the model's `id2label`."""
        raise NotImplementedError

    def config(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The fields of `BertConfig` that the head needs, known from the examples it learns from."""
        return {"id2label": self.names(examples), **self.kept()}

    def kept(self) -> dict[str, Any]:
        """The fields of `BertConfig` from which `task_of` makes this task again."""
        return {"finetuning_task": self.name, "task_specific_params": dataclasses.asdict(self)}

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        """The rows of examples, in their order, labelled where the examples are.

        Raises:
            ValueError: a text is too long or a target is none of `config`'s; the message names file and line.
        """
        raise NotImplementedError

    def check(self, example: Example, config: BertConfig) -> None:
        """Raises ValueError, naming file, line and field, where a target is none of the model's classes."""

    def check_part(self, examples: Sequence[Example], config: BertConfig) -> None:
        """Raises ValueError where labelled examples as a whole do not go with the model."""

    def initialise(self, model: nn.Module, rows: Sequence[Row]) -> None:
        """Give the model's `new_parameters` values that the training rows suggest, where some do."""

    def parts(self, batch: Batch) -> dict[str, int]:
        """The losses of the head and over how many things each is a mean, see `train`."""
        return {"loss": batch.num_sequences // self.together}

    def scores(self, output: Output, rows: Sequence[Row]) -> list[Any]:
        """What a prediction is made of, for each row of a batch; by default the logits of the sequence."""
        return list(as_numpy(output.logits))

    def predict(
        self, examples: Sequence[Example], rows: Sequence[Row], scores: Sequence[Any], config: BertConfig
    ) -> Iterator[dict[str, Any]]:
        """One prediction an example; what is of JSON's types can be printed, arrays are for `measure` and `mistake`."""
        raise NotImplementedError

    def measure(
        self, examples: Sequence[Example], predictions: Sequence[dict[str, Any]], config: BertConfig
    ) -> dict[str, Any]:
        """Numbers; a dictionary of dictionaries is a table."""
        raise NotImplementedError

    def fitted(self, examples: Sequence[Example], predictions: Sequence[dict[str, Any]], config: BertConfig) -> "Task":
        """The task with what is learned from held-out predictions beside the weights, as a threshold."""
        return self

    def line(self, prediction: Mapping[str, Any]) -> str:
        """A prediction as a person reads it."""
        raise NotImplementedError

    def verdicts(self, example: Example, prediction: Mapping[str, Any], config: BertConfig) -> list[Verdict]:
        """The classes in a prediction, for a confusion matrix; by default its `label`, none where it has no such."""
        if "label" not in prediction:
            return []
        return [Verdict(str(example.target), str(prediction["label"]), prediction.get("probability"))]

    def mistake(self, example: Example, prediction: Mapping[str, Any], config: BertConfig) -> Mistake | None:
        """What is wrong about a prediction, None where nothing is; by default a `label` that is not the target.

        Raises:
            ValueError: the task has neither a `label` nor a method of its own.
        """
        verdicts = self.verdicts(example, prediction, config)
        if not verdicts:
            raise ValueError(f"{self.name} does not say what a mistake is: give the task a method `mistake`")
        [(right, said, sure)] = verdicts
        if right == said:
            return None
        how = "unsure" if sure is None else f"{sure:.3f}"
        return Mistake((sure or 0.0,), how, said, right, ((" | ".join(example.texts), ""),))

    def limit(self, config: BertConfig) -> int:
        """Tokens of a row."""
        return min(self.max_length or config.max_position_embeddings, config.max_position_embeddings)


def read_examples(
    task: Task,
    records: Iterable[Record],
    bad: Callable[[ValueError], None] = refuse,
    config: BertConfig | None = None,
) -> Iterator[Example]:
    """The examples of records; `bad` gets the error of each that is none, and may let it pass.

    Two of one file with the same id are none, nor is one that `Task.check` refuses where the model's config is given.
    """
    seen: dict[str, set[str]] = defaultdict(set)
    for record in records:
        try:
            example = task.example(record)
            check_id(example, seen)
            if config is not None:
                task.check(example, config)
        except ValueError as error:
            bad(error)
        else:
            yield example


def check_id(example: Example, seen: dict[str, set[str]]) -> None:
    """Refuse an id that an earlier example of the same file has; `seen` keeps them by file."""
    name, ids = example.extra.get("id"), seen[example.where.rpartition(":")[0]]
    if name is None:
        return
    if repr(name) in ids:
        raise ValueError(f"{example.where}: id={SHOWN.repr(name)} is the id of an earlier record, too")
    ids.add(repr(name))


def read_texts(task: Task, records: Iterable[Record], bad: Callable[[ValueError], None] = refuse) -> Iterator[Example]:
    """The examples of records of which only the texts are looked at, whatever else stands beside them."""
    if "label_column" in (option.name for option in dataclasses.fields(task)):
        task = dataclasses.replace(task, label_column="")
    for record in records:
        fields = {name: value for name, value in record.fields.items() if name not in task.answers}
        yield from read_examples(task, [Record(record.where, fields)], bad)


@torch.no_grad()
def score(task: Task, model: nn.Module, rows: Sequence[Row]) -> list[Any]:
    """The scores of every row, in the order of the rows."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    result: list[Any] = [None] * len(rows)
    for numbers, batch in in_order(rows, BATCH_TOKENS):
        scores = task.scores(model(batch.to(device)), [rows[i] for i in numbers])
        for number, one in zip(numbers, scores, strict=True):
            result[number] = one
    model.train(was_training)
    return result


def as_numpy(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()


def per_position(x: Tensor, rows: Sequence[Row]) -> list[np.ndarray]:
    """[N, …] of all the positions that are read, to those of each row."""
    return np.split(as_numpy(x), np.cumsum([len(row.at) for row in rows])[:-1])


def per_token(x: Tensor, rows: Sequence[Row]) -> list[np.ndarray]:
    """[T, …] to the tokens of each row."""
    return np.split(as_numpy(x), np.cumsum([len(row.ids) for row in rows])[:-1])


def predict(
    task: Task,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    *,
    chunk: int = CHUNK,
    places: bool = False,
) -> Iterator[dict[str, Any]]:
    """The prediction for each example, in order; `chunk` examples are held, and sorted by length, at a time.

    places: each says, as `where`, in which file and line its example stands.

    Raises:
        ValueError: see `Task.encode`.
    """
    examples = iter(examples)
    while held := list(itertools.islice(examples, chunk)):
        rows = task.encode(tokenizer, held, model.config)
        answers = task.predict(held, rows, score(task, model, rows), model.config)
        for example, one in zip(held, answers, strict=True):
            yield {"where": example.where} | one if places else one


def printable(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction in JSON's types, without the arrays that `measure` alone needs."""
    return {name: value for name, value in prediction.items() if not isinstance(value, np.ndarray)}


def evaluate(
    task: Task, model: nn.Module, tokenizer: Tokenizer, examples: Sequence[Example], *, fit: bool = False
) -> dict[str, Any]:
    """What the task measures on labelled examples.

    `fit` lets it learn thresholds of them first, which the model's config keeps.
    """
    rows = task.encode(tokenizer, examples, model.config)
    scores = score(task, model, rows)
    predictions = list(task.predict(examples, rows, scores, model.config))
    if fit and (fitted := task.fitted(examples, predictions, model.config)) is not task:
        task, model.config = fitted, model.config.replace(**fitted.kept())
        predictions = list(task.predict(examples, rows, scores, model.config))
    return task.measure(examples, predictions, model.config)


def split_examples(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Two disjoint parts, the second with `fraction` of every label's examples; a pure function of the seed.

    Each label that has two examples has one in both parts; a single one stays in the first. Where examples have a
    group, or nearly as many targets as there are examples, whole groups are drawn instead.
    """
    groups: dict[str, int] = {}
    targets: dict[str, int] = {}
    unit_of, first, kind = array("q"), array("q"), array("q")  # of an example; of a unit, which is drawn as a whole
    for index, example in enumerate(examples):
        unit = len(first) if example.group is None else groups.setdefault(example.group, len(first))
        if unit == len(first):
            first.append(index)
            kind.append(targets.setdefault(example.target, len(targets)) if isinstance(example.target, str) else -1)
        unit_of.append(unit)
    units, firsts, kinds = (np.array(values, dtype=np.int64) for values in (unit_of, first, kind))
    kinds[np.bincount(units, minlength=len(firsts)) > 1] = -1
    if len(np.unique(kinds)) > len(examples) // 2:  # as many labels as a regression target has: draw over all
        kinds[:] = -1
    held = np.zeros(len(firsts), dtype=bool)
    for one in np.unique(kinds):
        chosen = np.flatnonzero(kinds == one)
        order = np.argsort(uniform(fold(seed, SPLIT), firsts[chosen]), kind="stable")
        held[chosen[order[: min(max(1, round(fraction * len(chosen))), len(chosen) - 1)]]] = True
    return take(examples, np.flatnonzero(~held[units])), take(examples, np.flatnonzero(held[units]))


def draw_examples(examples: Sequence[Example], count: int | None, seed: int) -> Sequence[Example]:
    """`count` of them, in their order; all where None or fewer."""
    if count is None or count >= len(examples):
        return examples
    order = np.argsort(uniform(fold(seed, DRAW), np.arange(len(examples))), kind="stable")
    return take(examples, np.sort(order[:count]))
