"""The verb that looks into a step: profile."""

from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from rich.table import Column, Table

from ..config import PRESETS, BertConfig
from ..hub import DTYPES
from ..model import BertForPreTraining, BertModel
from ..profile import Options, profile_step, run_steps, synthetic_batch
from ..profile.measure import check_tool
from ..train import resolve_model
from .common import check_backend, model_kind, pick, print_json, refuse_filled, resolve_device, say
from .flags import Arch, Backend, Device, Dtype, Json, Out, Pickle

SHOWN = 20


def profile(
    *,
    out: Out,
    model: Annotated[str, f"a directory with weights, or {', '.join(PRESETS)}"] = "bert-tiny",
    arch: Arch = {},  # noqa: B006
    mode: Annotated[str, "train (forward, backward, optimizer) or infer"] = "train",
    batch_size: Annotated[int, "sequences of the batch"] = 32,
    length: Annotated[int, "tokens of a sequence, at most"] = 128,
    fill: Annotated[float, "mean length over --length: below 1, lengths are uneven"] = 1.0,
    dtype: Dtype = "float32",
    optimizer: Annotated[str, "adamw, bertadam, lamb or sgd"] = "adamw",
    steps: Annotated[int, "steps to measure"] = 5,
    warmup: Annotated[int, "steps before them"] = 2,
    compile: Annotated[bool, "under torch.compile; modules then have no ranges of their own"] = False,
    memory: Annotated[bool, "also write every allocation"] = False,
    tool: Annotated[str, "torch (profiler), proton, or nvtx: ranges only, for nsys and ncu"] = "torch",
    fail_on_sync: Annotated[bool, "exit with 1 where the step makes the host wait for the device"] = False,
    device: Device = "auto",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
) -> int:
    """Profile a step: time, share, bytes, launches of each op and module; host syncs; a trace and memory.

    Example: minibert profile --model bert-tiny --mode train --fill 0.5 --out runs/profile
    """
    options = Options(**pick(locals(), "mode dtype optimizer steps warmup compile memory"))
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive")
    if length < 1:
        raise ValueError(f"length={length} is not positive")
    if not 0 < fill <= 1:
        raise ValueError(f"fill={fill} is not above 0 and at most 1")
    device = resolve_device(device)
    check_tool(tool, device)
    check_backend(backend, device)
    refuse_filled(out)
    network = network_of(model, arch, mode, backend, allow_pickle).to(device)
    if mode == "infer":
        network.to(DTYPES[options.dtype])
    sizes = {"batch_size": batch_size, "length": length, "fill": fill, "labels": mode == "train"}
    batch = synthetic_batch(network.config, network.objective, **sizes)
    if tool != "torch":
        run_steps(network, batch, options, tool, out)
        say(f"{steps} steps under {tool}" + (f": {Path(out) / 'proton.hatchet'}" if tool == "proton" else ""))
        return 0
    result = profile_step(network, batch, options, out)
    if json:
        print_json(result)
    else:
        show(result, out)
    syncs = result["summary"]["host_syncs"]
    return 1 if fail_on_sync and (syncs is None or syncs or result["summary"]["cuda_waits"]) else 0


def network_of(model: str, arch: dict, mode: str, backend: str, allow_pickle: bool) -> torch.nn.Module:
    """The model of a directory with all its heads; a preset with those of pretraining, or for inference none."""
    torch.manual_seed(0)
    if not Path(model).exists():
        kind = BertForPreTraining if mode == "train" else BertModel
        return kind(BertConfig.preset(model, **arch), backend=backend)
    source = resolve_model(model)
    kind = model_kind(source, allow_pickle)
    return kind.from_pretrained(source, backend=backend, allow_pickle=allow_pickle, **arch)


def show(result: dict, out: str) -> None:
    """The tables, the summary, and where the files are."""
    console, summary = Console(highlight=False, soft_wrap=True), result["summary"]
    on_gpu = summary["launches"] is not None
    calls = "launches" if on_gpu else "calls"
    heads = (whole("op"), calls, "ms", "share", "MB", "GB/s", "of copy", "TFLOP/s")
    table = Table(*heads, title="ops, a step", caption=shown(result["ops"], "ops"))
    for row in result["ops"][:SHOWN]:
        table.add_row(
            row["op"], number(row[calls], 1), number(row["self_ms"], 3),
            f"{row['share']:.1%}", number(row["bytes"] and row["bytes"] / 1e6, 1), number(row["gb_per_s"], 1),
            "" if row["of_copy"] is None else f"{row['of_copy']:.0%}", number(row["tflops"], 3),
        )  # fmt: skip
    console.print(table)
    heads, modules = (whole("module"), whole("type"), "forward, ms", "backward, ms"), result["modules"]
    table = Table(*heads, title="modules, a step", caption=shown(modules, "modules"))
    spent = lambda row: row["forward_ms"] + row["backward_ms"]  # noqa: E731
    least = min(sorted(map(spent, modules))[-SHOWN:], default=0)
    for row in [row for row in modules if spent(row) >= least]:
        table.add_row(row["module"], row["type"], number(row["forward_ms"], 3), number(row["backward_ms"], 3))
    if modules:
        console.print(table)
    console.print(
        f"{summary['step_ms']:.2f} ms a step, {summary['tokens_per_second']:,.0f} tokens/s; under the profiler "
        f"{summary['profiled_step_ms']:.2f} ms; peak memory {summary['peak_memory_bytes'] / 2**20:,.1f} MiB"
    )
    if on_gpu:
        console.print(
            f"{summary['launches']:.1f} launches, {summary['device_ms']:.2f} ms on the device; "
            f"{summary['cuda_waits']:.1f} waits, {summary['copies_to_host']:.1f} copies to the host"
        )
    if summary["host_syncs"] is None:
        console.print(f"host syncs: cannot be told ({summary['host_syncs_unknown']})", markup=False)
    else:
        console.print(f"host syncs: {sum(sync['calls'] for sync in summary['host_syncs'])}")
        for sync in summary["host_syncs"]:
            console.print(f"  {sync['where']}: {sync['op']}, {sync['calls']} a step", markup=False)
    console.print(f"in {out}: {', '.join(sorted(path.name for path in Path(out).iterdir()))}", markup=False)


def whole(name: str) -> Column:
    """A column whose words are folded rather than cut."""
    return Column(name, overflow="fold")


def shown(rows: list[dict], what: str) -> str | None:
    return f"the {SHOWN} dearest of {len(rows)}: all are in {what}.json" if len(rows) > SHOWN else None


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
