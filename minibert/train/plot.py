"""The curves of runs as a picture."""

from collections.abc import Mapping
from pathlib import Path

from ..data.report import figure_class

PANELS = ("loss", "accuracy", "learning_rate", "grad_norm")  # a number belongs to the one that its name ends with


def draw_curves(runs: Mapping[str, list[dict]], out: Path) -> None:
    """Draw what `read_metrics` gives of each run, by step, into a file whose ending says its kind.

    What was measured on held-out text has dots. A panel without numbers is left out.
    Raises:
        ValueError: no numbers at all, matplotlib is missing or does not know the ending.
    """
    figure = figure_class()
    panels = {panel: curves for panel in PANELS if (curves := curves_of(runs, panel))}
    if not panels:
        raise ValueError(f"{', '.join(runs)}: there is nothing to draw yet")
    figure = figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for axes, (panel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, (steps, values) in curves.items():
            axes.plot(steps, values, label=label, linewidth=1, marker="." if "eval_" in label else None)
        axes.set(xlabel="step", title=panel)
        axes.legend(fontsize=7)
    figure.savefig(out, dpi=150, metadata={"Software": None} if Path(out).suffix == ".png" else None)


def curves_of(runs: Mapping[str, list[dict]], panel: str) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values by the name of the number, after that of its run where there are several."""
    curves = {}
    for run, records in runs.items():
        for record in records:
            for name, value in record.items():
                if name.endswith(panel) and value is not None:
                    steps, values = curves.setdefault(f"{run} {name}" if len(runs) > 1 else name, ([], []))
                    steps.append(record["step"])
                    values.append(value)
    return curves


def draw_learning_curve(curves: Mapping[str, list[tuple[int, float, float]]], what: str, out: Path) -> None:
    """Draw a measure by the number of examples learned from, of each curve (examples, mean, standard deviation).

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = figure_class()(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        examples, means, deviations = zip(*points, strict=True)
        axes.errorbar(examples, means, deviations, label=label or None, marker="o", markersize=4, capsize=3)
    axes.set(xlabel="training examples", ylabel=what, xscale="log")
    axes.grid(alpha=0.3)
    if any(curves):
        axes.legend()
    figure.savefig(out, dpi=150, metadata={"Software": None})
