"""The verb that draws: plot."""

from pathlib import Path
from typing import Annotated

from ..train import METRICS, read_metrics
from ..train.plot import draw_curves
from .common import say


def plot(
    run: Annotated[list[str], "runs, drawn over each other"],
    /,
    *,
    out: Annotated[str, "picture to write: png, svg or pdf"] = "curves.png",
) -> None:
    """Draw loss, accuracy, learning rate and gradient norm of runs, finished or not.

    Example: minibert plot runs/tiny runs/causal --out curves.png
    """
    if not run:
        raise ValueError("name at least one run")
    for directory in run:
        if not (Path(directory) / METRICS).is_file():
            raise ValueError(f"{directory} is not a run: it has no {METRICS}")
    draw_curves({directory: read_metrics(Path(directory) / METRICS) for directory in run}, Path(out))
    say(f"curves of {len(run)} {'run' if len(run) == 1 else 'runs'} in {out}")
