"""Several runs of `finetune` that differ in a few options: a grid, seeds, or the amount of data."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import one_of
from ..files import write_atomically
from ..tasks import Task
from ..tasks.finetune import numbers
from ..train.log import jsonable
from ..train.plot import draw_learning_curve
from .common import print_result, say

RUNS = "runs.json"
CURVE = "curve.png"
# what a grid may go over, and what its values are
SWEPT = {
    "lr": int | float, "epochs": int | float, "steps": int, "batch_size": int, "max_train": int | None, "scratch": bool,
    "reinit_layers": int, "lora": int | None, "optimizer": str, "schedule": str, "warmup": int | float,
    "weight_decay": int | float, "layer_decay": int | float, "unfreeze": int | float, "ema": int | float | None,
    "accumulate": int, "class_weights": str | None, "label_smoothing": int | float, "seed": int,
}  # fmt: skip


def grid(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options that each run has of its own, by the name of its folder; one run without a name where none differ.

    Raises:
        ValueError: an option that cannot be swept, that is asked for twice, or a value of the wrong kind.
    """
    seeds, axes = options["seeds"], dict(options["sweep"])
    asked = {"max_train": list(options["learning_curve"])} if options["learning_curve"] else {}
    asked |= {"seed": [options["seed"] + number for number in range(seeds)]} if seeds > 1 else {}
    for name in axes.keys() & asked.keys():
        raise ValueError(f"sweep has {name}, and so has {'--seeds' if name == 'seed' else '--learning-curve'}")
    axes |= asked
    for name, values in axes.items():
        one_of("sweep", name, SWEPT)
        for value in values or [None]:
            if not isinstance(value, SWEPT[name]) or isinstance(value, bool) != (SWEPT[name] is bool):
                raise ValueError(f"sweep of {name} holds {value!r}: expected {kind_name(SWEPT[name])}")
    runs = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return {"_".join(f"{name}-{value}" for name, value in run.items()): run for run in runs}


def kind_name(kind) -> str:
    words = {int | float: "numbers", int: "whole numbers", int | None: "whole numbers", bool: "true or false"}
    return words.get(kind, "numbers" if isinstance(1.0, kind) else "names")


def report_runs(
    runs: Mapping[str, tuple[dict[str, Any], dict[str, dict]]], task: Task, out: Path, *, curve: bool
) -> None:
    """Print and keep what runs reached, those that differ in their seed alone as mean and standard deviation.

    runs: options and results of each. curve: draw the task's metric by the number of examples.
    """
    cells = summarise(runs)
    metric, sign = f"valid {task.metric}", 1 if task.mode == "higher" else -1
    measured = [cell for cell in cells if math.isfinite(mean_of(cell, metric))]
    best = max(measured, key=lambda cell: sign * mean_of(cell, metric), default=None)
    kept = {"metric": metric, "best": best and best["options"], "cells": cells}
    write_atomically(out / RUNS, json.dumps(jsonable(kept), indent=2) + "\n")
    if len(cells) == 1:
        print_result({"runs": len(runs), "mean and standard deviation": cells[0]["numbers"]}, as_json=False)
        return
    columns = [name for name in (metric, f"test {task.metric}") if any(name in cell["numbers"] for cell in cells)]
    table = {
        shown(cell["options"]): {"runs": len(cell["runs"]), "examples": cell["examples"]}
        | {f"{name} {word}": cell["numbers"][name][word] for name in columns for word in ("mean", "sd")}
        for cell in cells
    }
    print_result({"best": shown(best["options"]) if best else "none", "runs": table}, as_json=False)
    if curve:
        draw_learning_curve(curves(cells, columns[-1]), columns[-1], out / CURVE)
        say(f"learning curve in {out / CURVE}")


def summarise(runs: Mapping[str, tuple[dict[str, Any], dict[str, dict]]]) -> list[dict[str, Any]]:
    """A dictionary for all the runs whose options differ in the seed alone; sd is None of a single run."""
    groups: dict[str, list[str]] = {}
    for folder, (options, _) in runs.items():
        groups.setdefault(shown({k: v for k, v in options.items() if k != "seed"}), []).append(folder)
    cells = []
    for folders in groups.values():
        options, results = runs[folders[0]][0], [runs[folder][1] for folder in folders]
        values = {
            f"{split} {name}": [numbers(result[split])[name] for result in results]
            for split in results[0]
            for name in numbers(results[0][split])
            if all(name in numbers(result[split]) for result in results)  # another seed may hold out no such example
        }
        examples = values.pop("train examples")[0]
        table = {name: spread(each) for name, each in values.items()}
        options = {name: value for name, value in options.items() if name != "seed"}
        cells.append({"options": options, "examples": int(examples), "runs": folders, "numbers": table})
    return cells


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation of a sample; of one value there is none."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def mean_of(cell: Mapping[str, Any], name: str) -> float:
    return cell["numbers"].get(name, {"mean": math.nan})["mean"]


def curves(cells: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[tuple[int, float, float]]]:
    """(examples, mean, sd) by what else the runs differ in."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["examples"]):
        others = shown({name: value for name, value in cell["options"].items() if name != "max_train"})
        point = (cell["examples"], mean_of(cell, name), cell["numbers"][name]["sd"] or 0.0)
        found.setdefault(others, []).append(point)
    return found
