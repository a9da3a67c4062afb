"""Verbs about weights and this machine: demo, parity, convert, info."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table

from .. import hub
from ..data.tokenizer import Tokenizer
from ..train import resolve_model
from ..train.card import copy_card
from ..version import __version__
from .common import (
    model_kind,
    one_directory,
    print_json,
    print_result,
    refuse_filled,
    resolve_device,
    say,
)
from .flags import Backend, Device, Json, MaybeDirectory, Out, Pickle


def demo(
    *,
    out: Out = "runs/demo",
    device: Device = "auto",
) -> int:
    """The whole road in minutes: pretrain, fill masks, match Hugging Face, fine-tune, time, save and reload.

    Example: minibert demo --out runs/demo
    """
    from ..demo import run_demo

    return run_demo(Path(out), resolve_device(device))


def parity(
    directory: Annotated[list[str], "a Hugging Face directory (also --model)"],
    /,
    *,
    model: MaybeDirectory = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
) -> int:
    """Compare with transformers on the same weights: states, heads, loss and all gradients.

    Example: minibert parity DIRECTORY
    """
    from ..integrations.parity import parity as compare

    source = resolve_model(one_directory(directory, model))
    result = compare(source, allow_pickle=allow_pickle, backend=backend, device=resolve_device(device))
    if json:
        print_json(result.to_dict())
        return 0 if result.passed else 1
    table = Table("inputs", "what", "error", "limit", "")
    for row in result.rows:
        table.add_row(row.inputs, row.what, f"{row.error:.1e}", f"{row.limit:.0e}", "ok" if row.passed else "DIFFERS")
    Console(highlight=False).print(table)
    first = result.first_difference
    print(f"first difference: {first.inputs}: {first.what}" if first else "no difference")
    return 0 if result.passed else 1


def convert(
    directory: Annotated[list[str], "a Hugging Face directory, a run or a checkpoint (also --model)"],
    /,
    *,
    out: Out,
    model: MaybeDirectory = None,
    allow_pickle: Pickle = False,
) -> None:
    """Write weights, config and tokenizer as a directory that transformers loads.

    Example: minibert convert runs/tiny --out tiny-hf
    """
    source = resolve_model(one_directory(directory, model))
    refuse_filled(out)
    network = model_kind(source, allow_pickle).from_pretrained(source, allow_pickle=allow_pickle)
    stored = hub.canonical(hub.load_state(source, allow_pickle), source)
    lost = [*network.new_parameters, *sorted(set(stored) - set(hub.canonical(hub.hf_state(network))) - {hub.DECODER})]
    if lost:
        raise ValueError(f"{source}: {', '.join(lost)} would be made up or lost: minibert has no such model to convert")
    has_tokenizer = any((source / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    network.save_pretrained(out, Tokenizer.from_pretrained(source) if has_tokenizer else None)
    copy_card(source, Path(out))
    say(f"{network.objective}, {network.num_parameters():,} parameters, in {out}")
    if hub.hf_config(network.config, network.objective)["model_type"] != "bert":
        say("its architecture is none of transformers' BERT: minibert alone loads it")


def info(
    directory: Annotated[list[str], "a model to describe (also --model)"],
    /,
    *,
    model: MaybeDirectory = None,
    device: Device = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Versions, device, which implementation each op has here and why; with a directory, the model in it.

    Example: minibert info --json
    """
    import minibert_kernels
    from minibert_kernels._triton import compiler_versions
    from minibert_kernels.dispatch import explain

    device = resolve_device(device)
    result: dict[str, Any] = {
        "minibert": __version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "triton", "transformers")},
        **compiler_versions(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "ops": {op: explain(op, device) for op in minibert_kernels.__all__},
    }
    if directory or model:
        source = resolve_model(one_directory(directory, model))
        kind = model_kind(source, allow_pickle)
        network = kind.from_pretrained(source, allow_pickle=allow_pickle)
        result["model"] = {
            "class": network.objective,
            "parameters": network.num_parameters(),
        } | network.config.to_dict()
    print_result(result, json)


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
