"""Where else the numbers of a run can go, each by a package of its own; `metrics.jsonl` is written always."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol


class Writer(Protocol):
    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder `tensorboard`, one for each process of a run."""

    def __init__(self, run: Path):
        self.writer = package_of("tensorboard").SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """Weights & Biases, or trackio, which has the same three functions; a resumed run is a new one there."""

    def __init__(self, package: str, run: Path):
        self.package = package_of(package)
        self.package.init(project="minibert", name=str(run))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.package.log(dict(numbers), step=step)

    def close(self) -> None:
        self.package.finish()


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": partial(Tracker, "wandb"),
    "trackio": partial(Tracker, "trackio"),
}


def numbers_of(record: Mapping) -> dict[str, float]:
    """What of a record can be drawn."""
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}


def package_of(word: str):
    """The module that a writer writes with.

    Raises:
        ValueError: its package is missing.
    """
    try:
        return importlib.import_module("torch.utils.tensorboard" if word == "tensorboard" else word)
    except ImportError:
        raise ValueError(f"writer={word!r} needs one more package: pip install {word}") from None
