"""What a run says of itself: `run.json`, how it was started and on what; and the model card made from it."""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from ..version import __version__

RUN, CARD = "run.json", "README.md"
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers")


def record_run(run_dir: Path, step: int, saved: Mapping[str, Any]) -> None:
    """Write `run.json`; where there is one, add to it that the run goes on from `step`.

    Args:
        saved: config and settings, as they stand in `trainer.json` too.
    """
    known, now = read_run(run_dir), surroundings(saved["config"]["device"])
    if known:
        known["resumed"].append({"step": step} | now)
    else:
        data = saved["settings"].get("data")
        digest = data and hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        known = now | {"data_sha256": digest} | saved | {"resumed": []}
    write_atomically(run_dir / RUN, json.dumps(known, indent=2) + "\n")


def read_run(run_dir: Path) -> dict | None:
    """The `run.json` of a run; None where there is none that can be read: a run does not depend on it."""
    try:
        run = json.loads((run_dir / RUN).read_text(encoding="utf-8"))
        return run if isinstance(run["resumed"], list) and run["versions"] and run["settings"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def surroundings(device: str = "cpu") -> dict[str, Any]:
    """Time, command line, versions, machine, and the repository that the working directory belongs to."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "versions": {"minibert": __version__, "python": platform.python_version()} | dict(_versions()),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        },
        "git": _git_state(),
    }


def _versions() -> Iterator[tuple[str, str | None]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def _git_state() -> dict[str, Any] | None:
    """The commit, and how many files differ from it; None outside a repository, or without git."""
    try:
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed_files": len(changes.splitlines())}


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def write_card(directory: Path, run_dir: Path, model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Put a model card beside the weights, unless there is one, or no `run.json` to make it from.

    Args:
        state: step, metrics and best, as they stand in `trainer.json`.
    """
    run = read_run(run_dir)
    if run is None or (directory / CARD).exists():
        return
    tokenizer = (directory / "tokenizer.json").is_file()
    names = f"{model.objective}, Tokenizer" if tokenizer else model.objective
    load = [
        f"from minibert import {names}",
        "",
        'directory = "."  # where this file lies',
        f"model = {model.objective}.from_pretrained(directory)",
        *["tokenizer = Tokenizer.from_pretrained(directory)"] * tokenizer,
    ]
    facts = "\n".join(f"- {fact}" for fact in _facts(run, model, state))
    text = f"# {model.objective}\n\n{facts}\n\n## Load it\n\n```python\n" + "\n".join(load) + "\n```\n"
    write_atomically(directory / CARD, text)


def copy_card(source: Path, target: Path) -> None:
    """Keep the card of weights that are written once more."""
    if (source / CARD).is_file() and not (target / CARD).exists():
        shutil.copyfile(source / CARD, target / CARD)


def _facts(run: Mapping, model: torch.nn.Module, state: Mapping) -> Iterator[str]:
    """One sentence a fact."""
    config, settings, shape, versions = run["config"], run["settings"], model.config, run["versions"]
    yield (
        f"A BERT of {shape.num_hidden_layers} layers, {shape.hidden_size} wide, "
        f"with {model.num_parameters():,} parameters and a vocabulary of {shape.vocab_size:,}."
    )
    steps, minutes = config["steps"], config["minutes"]
    whole = f"of {steps:,} steps" if minutes is None else f"steps, in a budget of {minutes:g} minutes,"
    yield (
        f"It was trained for {state['step']:,} {whole} by {config['optimizer']} in "
        f"{config['dtype']}, with a peak learning rate of {config['lr']:g} and seed {config['seed']}."
    )
    if "objectives" in settings:
        yield f"It learned {', '.join(settings['objectives'])}."
    if "task" in settings:
        yield f"It learned {settings['task']['finetuning_task']} of texts: {', '.join(shape.id2label)}."
    yield from _data_facts(settings, run["data_sha256"])
    if state["metrics"]:
        yield f"Its last evaluation: {_numbers(state['metrics'])}."
    if best := state["best"]:
        yield f"The best {best['metric']} so far was {best['value']:.4g}, at step {best['step']:,}."
    where = run["machine"]["gpu"] or run["machine"]["processor"]
    yield f"It was made with minibert {versions['minibert']} and torch {versions['torch']} on: {where}."
    yield f"`{RUN}` of the run says more: the command, the machine, the state of the repository, every option."


def _data_facts(settings: Mapping, digest: str | None) -> Iterator[str]:
    data = settings.get("data")
    stores = data.get("stores", [data]) if isinstance(data, dict) else []
    for counts in (store["counts"] for store in stores if "counts" in store):
        yield f"Its text: {', '.join(f'{counts[name]:,} {name}' for name in ('documents', 'sentences', 'tokens'))}."
    if "examples" in settings:
        yield f"Its examples: {', '.join(f'{count:,} {split}' for split, count in settings['examples'].items())}."
    if digest:
        yield f"The sha256 of what describes its data is {digest}."


def _numbers(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
