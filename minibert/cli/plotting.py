"""The verb that draws: plot."""

from pathlib import Path
from typing import Annotated

from ..train import METRICS, phases, read_metrics
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
    draw_curves({directory: records_of(Path(directory)) for directory in run}, Path(out))
    say(f"curves of {len(run)} {'run' if len(run) == 1 else 'runs'} in {out}")


def records_of(run: Path) -> list[dict]:
    """What a run logged; the steps of its phases count on."""
    logs = [log for folder in phases(run) or [run] if (log := folder / METRICS).is_file()]
    if not logs:
        raise ValueError(f"{run} is not a run: it has no {METRICS}")
    records: list[dict] = []
    for log in logs:
        begun = records[-1]["step"] if records else 0
        records += [record | {"step": begun + record["step"]} for record in read_metrics(log)]
    return records
