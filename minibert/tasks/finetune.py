"""From examples and pretrained weights to a run directory with the best checkpoint."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import BertConfig
from ..data.rows import Row, RowData
from ..data.spool import Spool, take
from ..data.tokenizer import Tokenizer
from ..model.lora import adapt
from ..train import Result, Run, TrainConfig, claim, resolve_model, train
from . import task_of
from .base import CHUNK, Example, Task, draw_examples, evaluate

ALPHA = 16  # of low-rank adaptation, over its rank


def finetune(
    task: Task,
    parts: Mapping[str, Sequence[Example]],
    init: Path | str,
    run_dir: Path | str,
    *,
    batch_size: int = 32,
    epochs: float = 3,
    steps: int | None = None,
    eval_every: int | None = None,
    max_train: int | None = None,
    known: Sequence[Example] | None = None,
    scratch: bool = False,
    reinit_layers: int = 0,
    group_by_length: bool = False,
    lora: int | None = None,
    lora_alpha: float = ALPHA,
    backend: str = "auto",
    allow_pickle: bool = False,
    resume: bool = False,
    begin: Callable[[Run, nn.Module], None] = lambda run, network: None,
    **training: Any,
) -> Result:
    """Fine-tune the weights of `init` on `parts["train"]`; the checkpoint that does best on `parts["valid"]` is kept.

    Args:
        parts: labelled examples by split, see `read_examples` and `split_examples`.
        init: a Hugging Face directory with its tokenizer, a run, or a checkpoint of one.
        batch_size: examples of a micro-batch. epochs: passes over the examples, where `steps` is None.
        eval_every: steps between evaluations, None for one an epoch.
        max_train: learn from so many examples, drawn by the seed; labels are known from all.
        known: the examples whose labels there are, None for `parts["train"]`: a held-out one with another is refused.
        scratch: take architecture and tokenizer of `init`, and draw new weights.
        reinit_layers: draw new weights for so many of the last layers, and for the pooler (Zhang et al., 2021).
        lora: freeze the encoder, and learn additions of this rank to its weights, times lora_alpha / lora (Hu et al.,
            2021). Checkpoints hold the sums; to go on, a resumed run needs the weights of `init` as they were.
        group_by_length: batches of rows of about one length, see `RowData`.
        begin: called with the claimed directory and the model when everything fits, before the first step.
        training: other fields of `TrainConfig`.
    Raises:
        ValueError: an option, an example or the weights do not fit; or see `train`.
    """
    for name, value in (("batch_size", batch_size), ("epochs", epochs)):
        if value <= 0:
            raise ValueError(f"{name}={value} is not positive")
    for split in ("train", "valid"):
        if not parts.get(split):
            raise ValueError(f"parts has no examples called {split!r}: split_examples makes two parts of one")
    check_lora(lora, lora_alpha, scratch, reinit_layers)
    seed = training.get("seed", 0)
    network, tokenizer, parts = new_model(task, parts, init, seed, max_train, scratch, backend, allow_pickle, known)
    reinitialise(network, reinit_layers, seed)
    if lora is not None:
        torch.manual_seed(seed)
        adapt(network, lora, lora_alpha)
    task = task_of(network)  # with what it learned from the examples, as the names of its labels
    for part in parts.values():
        task.check_part(part, network.config)
    encoded = {split: rows_of(task, tokenizer, part, network.config) for split, part in parts.items()}
    encoded["train"] = Spool(encoded["train"])  # the others are read once, for their hash
    task.initialise(network, encoded["train"])
    if task.together > 1 and training.get("split_on_oom"):
        raise ValueError(f"split_on_oom=True would part what belongs together in {task.name}: use a smaller batch_size")
    rows = learnable(encoded["train"], task.together)
    if not len(rows):
        raise ValueError(f"{parts['train'][0].where}: nothing can be learned from this example, nor from the others")
    data = RowData(
        rows,
        batch_size=batch_size,
        seed=seed,
        together=task.together,
        dtype=task.dtype,
        group_by_length=group_by_length,
    )
    epoch = max(1, math.ceil(len(data) / batch_size / training.get("accumulate", 1)))
    config = TrainConfig(
        **training,
        steps=max(1, round(epochs * epoch)) if steps is None else steps,
        eval_every=epoch if eval_every is None else eval_every,
        best_metric=task.metric,
        best_mode=task.mode,
    )
    settings = {"task": task.kept(), "batch_size": batch_size, "backend": backend, "scratch": scratch}
    settings |= {"reinit_layers": reinit_layers, "group_by_length": group_by_length}
    if lora is not None:
        settings["lora"] = {"rank": lora, "alpha": lora_alpha, "frozen": frozen_hash(network)}
    settings["examples"] = {split: len(examples) for split, examples in parts.items()}
    settings["data"] = {split: rows_hash(part) for split, part in encoded.items()}
    check = lambda model, limit: numbers(evaluate(task, model, tokenizer, parts["valid"], fit=True))  # noqa: E731
    with claim(run_dir, resume) as run:
        begin(run, network)
        return train(network, data, check, config, run, tokenizer, parts=task.parts, settings=settings)


def check_lora(lora: int | None, lora_alpha: float, scratch: bool, reinit_layers: int) -> None:
    """Refuse what does not go together with low-rank adaptation, or has no sense without."""
    if lora is None and lora_alpha != ALPHA:
        raise ValueError(f"lora_alpha={lora_alpha} scales what lora adds: give lora, too")
    if lora is not None and (scratch or reinit_layers):
        name = "scratch=True" if scratch else f"reinit_layers={reinit_layers}"
        raise ValueError(f"lora={lora} would freeze the new weights of {name}: use one of the two")


def new_model(
    task: Task,
    parts: Mapping[str, Sequence[Example]],
    init: Path | str,
    seed: int,
    max_train: int | None = None,
    scratch: bool = False,
    backend: str = "auto",
    allow_pickle: bool = False,
    known: Sequence[Example] | None = None,
) -> tuple[nn.Module, Tokenizer, dict[str, Sequence[Example]]]:
    """The task's head on the weights of `init`, or on new ones; the tokenizer there; the parts, with what is drawn of
    "train". The arguments are those of `finetune`."""
    init, drawn = resolve_model(init), draw_examples(parts["train"], max_train, seed)
    task = task.prepared(drawn)
    torch.manual_seed(seed)
    changes = task.config(parts["train"] if known is None else known)
    network = task.head.from_pretrained(init, backend=backend, allow_pickle=allow_pickle, **changes)
    if scratch:
        torch.manual_seed(seed)
        network = task.head(network.config, backend=backend)
        network.new_parameters = tuple(name for name, _ in network.named_parameters())
    return network, Tokenizer.from_pretrained(init), {**parts, "train": drawn}


def reinitialise(network: nn.Module, layers: int, seed: int) -> None:
    """New weights for the last `layers` layers and, where there are any of those, for the pooler."""
    depth = network.config.num_hidden_layers
    if not isinstance(layers, int) or not 0 <= layers <= depth:
        raise ValueError(f"reinit_layers={layers!r} is not a whole number from 0 to {depth}, the model's layers")
    if not layers:
        return
    torch.manual_seed(seed)
    names = ("pooler.", *(f"encoder.layers.{number}." for number in range(depth - layers, depth)))
    fresh = type(network)(network.config, backend=network.backend).state_dict()
    chosen = {name: value for name, value in fresh.items() if name.removeprefix("bert.").startswith(names)}
    network.load_state_dict(chosen, strict=False)


def rows_of(task: Task, tokenizer: Tokenizer, examples: Iterable[Example], config: BertConfig) -> Iterator[Row]:
    """The rows of examples, `CHUNK` of which are held at a time; without what a prediction needs."""
    examples = iter(examples)
    while held := list(itertools.islice(examples, CHUNK)):
        for example in held:
            task.check(example, config)
        for row in task.encode(tokenizer, held, config):
            yield dataclasses.replace(row, example=0, extra=None)


def learnable(rows: Sequence[Row], together: int) -> Sequence[Row]:
    """The rows of the units that teach something: in which there is a label, or tags."""
    teaches = np.fromiter((row.label is not None or len(row.tags) > 0 for row in rows), bool, len(rows))
    units = teaches.reshape(-1, together).any(1)
    return rows if units.all() else take(rows, np.flatnonzero(units.repeat(together)))


def rows_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of the rows: what a resumed run must find again."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((list(row.ids), list(row.types), list(row.at), row.label, list(row.tags))).encode())
    return digest.hexdigest()


def frozen_hash(network: nn.Module) -> str:
    """SHA-256 of the parameters that do not learn, which no checkpoint keeps."""
    digest = hashlib.sha256()
    for p in network.parameters():
        if not p.requires_grad:
            digest.update(p.detach().numpy())
    return digest.hexdigest()


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among what was measured, without the tables; nan for None, as JSON has it."""
    found = {name: value for name, value in result.items() if value is None or isinstance(value, int | float)}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}
