"""Fine-tuning tasks, one a file, and `pretraining`: what each reads, learns, predicts and measures."""

from torch import nn

from ..config import one_of
from ..hub import architecture, load_config
from ..model import MODELS
from .base import Example, Task, draw_examples, evaluate, predict, read_examples, read_texts, split_examples
from .choice import MultipleChoice
from .classification import Classification, Intent, MultiLabel, Regression
from .embedding import Embedding
from .qa import QuestionAnswering
from .relation import Relation
from .summary import Summary
from .tokens import Joint, Tagging

TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (
        Classification, Intent, MultiLabel, Regression, Tagging, Joint, Relation, QuestionAnswering, MultipleChoice,
        Summary, Embedding,
    )
}  # fmt: skip


def make_task(name: str, **options) -> Task:
    """The task of this name in `TASKS`, with options of its own.

    Raises:
        ValueError: there is no such task, it has no such option, or an option's value is out of range.
    """
    one_of("task", name, TASKS)
    return TASKS[name].make(options)


def task_of(model: nn.Module) -> Task:
    """The task a model was fine-tuned for, as its config says, or else as its head and problem type do."""
    config, kinds = model.config, tasks_for(model)
    if not kinds:
        raise ValueError(f"{type(model).__name__} is the head of no task: fine-tune it first")
    return kinds[0].make((config.task_specific_params or {}) if config.finetuning_task in TASKS else {})


def tasks_for(model: nn.Module) -> list[type[Task]]:
    """The task that a model's config names, or else all that its head and problem type serve."""
    config = model.config
    if config.finetuning_task in TASKS:
        return [TASKS[config.finetuning_task]]
    problem = config.problem_type or ("regression" if config.num_labels == 1 else None)
    fits = [kind for kind in TASKS.values() if kind.head is type(model) and kind.classes in (None, config.num_labels)]
    return [kind for kind in fits if problem and getattr(kind, "problem", None) == problem] or fits


def head_of(directory, allow_pickle: bool = False) -> type[nn.Module] | None:
    """The class of a fine-tuned model in a directory; None where it has no head of a task."""
    task = TASKS.get(load_config(directory).finetuning_task)
    kind = task.head if task else MODELS[architecture(directory, allow_pickle)]
    return kind if any(task.head is kind for task in TASKS.values()) else None


__all__ = [
    "TASKS",
    "Example",
    "Task",
    "draw_examples",
    "evaluate",
    "head_of",
    "make_task",
    "predict",
    "read_examples",
    "read_texts",
    "split_examples",
    "task_of",
    "tasks_for",
]
