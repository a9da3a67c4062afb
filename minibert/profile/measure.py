"""A step under torch.profiler, Proton or NVTX ranges, and the tables made of what was seen."""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

from ..batch import Batch
from ..config import one_of
from ..files import write_atomically
from ..train import OPTIMIZERS
from ..version import __version__
from .step import Step
from .watch import Traffic, count_traffic, find_syncs, name_of, ranges

Mode = Literal["train", "infer"]
Dtype = Literal["float32", "bfloat16"]
Tool = Literal["torch", "proton", "nvtx"]
PHASES = ("step", "forward", "backward", "optimizer")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
PYTHON = "(python)"
BACKWARD = "autograd::engine::evaluate_function"
PROBE = 64 << 20  # bytes of the copy that measures the memory: larger than any cache but a server's last


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a step is and how often it runs. dtype bfloat16 is autocast, which weights in bfloat16 go without. memory:
    keep every allocation, too.

    compile: run the model under torch.compile; its modules then have no ranges of their own.
    Raises ValueError, naming field, value and what is expected.
    """

    mode: Mode = "train"
    dtype: Dtype = "float32"
    optimizer: str = "adamw"
    steps: int = 5
    warmup: int = 2
    compile: bool = False
    memory: bool = False

    def __post_init__(self):
        one_of("mode", self.mode, get_args(Mode))
        one_of("dtype", self.dtype, get_args(Dtype))
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} is not positive")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup} is negative")

    @property
    def step(self) -> dict[str, str]:
        return {"mode": self.mode, "dtype": self.dtype, "optimizer": self.optimizer}


def check_tool(tool: str, device: str) -> None:
    """Raise ValueError where `tool` is unknown or cannot run on this machine."""
    one_of("tool", tool, get_args(Tool))
    if tool == "torch":
        return
    if torch.device(device).type != "cuda":
        raise ValueError(f"tool={tool!r} needs a CUDA device, got {device}: use tool='torch'")
    if tool == "proton":
        try:
            import triton.profiler  # noqa: F401
        except ImportError:
            raise ValueError("tool='proton' needs triton.profiler, which is not installed: use tool='torch'") from None


def marker(*contexts):
    """A function from a name to a context manager that opens all of `contexts(name)`."""

    @contextlib.contextmanager
    def mark(name: str):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(name))
            yield

    return mark


def profile_step(model: nn.Module, batch: Batch, options: Options = Options(), out: Path | str | None = None) -> dict:
    """Profile a step of `model`, on the device it is on, under torch.profiler.

    Time is measured first, without the profiler. Training changes the weights.
    Args:
        batch: packed, on the host; with targets for mode "train".
        out: a directory for trace.json, summary.json, ops.json, modules.json and, with `options.memory`, memory.pickle
            (CUDA) or memory.json (CPU).
    Returns:
        {"summary": dict, "ops": rows, "modules": rows}, numbers a step: milliseconds, bytes, calls.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    mark = marker(record_function, *([torch.cuda.nvtx.range] if cuda else []))
    syncs, why = _syncs(model, batch, options)
    step = Step(model, batch, **options.step, mark=mark)
    step()
    traffic = None if options.compile else count_traffic(step)
    if options.compile:
        model.compile()
    for _ in range(options.warmup):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = time_steps(step, options.steps, device)
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    bandwidth = copy_bandwidth(device)
    named = contextlib.nullcontext() if options.compile else ranges(model, mark)
    model.zero_grad(set_to_none=True)  # the first step would release gradients that the profiler saw nobody allocate
    held = _held_bytes(model, step)
    with named, _profiler(cuda) as profiler:
        for _ in range(options.steps):
            step()
        _wait(device)
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(out or scratch) / "trace.json"
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        allocations = [] if cuda else allocations_of(trace)
    names = set(PHASES) | {name_of(path, module) for path, module in model.named_modules()}
    events = within_steps(profiler.events())
    ops = op_table(events, names, options.steps, cuda, traffic, bandwidth)
    modules = module_table(events, model, options.steps, cuda)
    summary = {
        **describe(model, batch, options, device),
        "step_ms": statistics.median(times),
        "step_ms_all": times,
        "tokens_per_second": batch.num_tokens / statistics.median(times) * 1e3,
        "profiled_step_ms": _total(events, "step", "cpu_time_total") / options.steps,
        "device_ms": sum(row["self_ms"] for row in ops) if cuda else None,
        "launches": _calls(events, LAUNCHES) / options.steps if cuda else None,
        "ops": sum(row["calls"] for row in ops),
        "host_syncs": syncs,
        "host_syncs_unknown": why,
        "cuda_waits": _calls(events, WAITS) / options.steps if cuda else None,
        "copies_to_host": _calls(events, ("Memcpy DtoH",)) / options.steps if cuda else None,
        "peak_memory_bytes": peak if cuda else held + max((a["total"] for a in allocations), default=0),
        "model_memory_bytes": held,
        "copy_gb_per_s": bandwidth / 1e9,
    }
    result = {"summary": summary, "ops": ops, "modules": modules}
    if out is not None:
        for name, value in result.items():
            write_atomically(Path(out) / f"{name}.json", json.dumps(value, indent=1) + "\n")
        if options.memory:
            _write_memory(Path(out), step, device, held, allocations)
    return result


def run_steps(model: nn.Module, batch: Batch, options: Options, tool: Tool, out: Path | str) -> None:
    """Run the steps for another profiler, modules as ranges: Proton, or with NVTX whatever started this process.

    The warm-up has no ranges. Under NVTX cudaProfilerStart and cudaProfilerStop enclose the measured steps; Proton
    writes `out`/proton.hatchet.
    Raises:
        ValueError: see `check_tool`.
    """
    device = next(model.parameters()).device
    check_tool(tool, str(device))
    if tool == "proton":
        import triton.profiler as proton

        context = proton.scope
    else:
        context = torch.cuda.nvtx.range
    step = Step(model, batch, **options.step, mark=marker(context))
    named = contextlib.nullcontext() if options.compile else ranges(model, marker(context))
    if options.compile:
        model.compile()
    for _ in range(options.warmup):
        step.mark, mark = contextlib.nullcontext, step.mark
        step()
        step.mark = mark
    _wait(device)
    Path(out).mkdir(parents=True, exist_ok=True)
    if tool == "proton":
        session = proton.start(str(Path(out) / "proton"), hook="triton")
    else:
        torch.cuda.profiler.start()
    with named:
        for _ in range(options.steps):
            step()
        _wait(device)
    if tool == "proton":
        proton.finalize(session)
    else:
        torch.cuda.profiler.stop()


def describe(model: nn.Module, batch: Batch, options: Options, device: torch.device) -> dict[str, Any]:
    """What a number needs to be one."""
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        **options.step,
        "steps": options.steps,
        "compile": options.compile,
        "backend": getattr(model, "backend", None),
        "sequences": batch.num_sequences,
        "tokens": batch.num_tokens,
        "longest": batch.max_seqlen,
        "fill": batch.num_tokens / max(1, batch.num_sequences * batch.max_seqlen),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "minibert": __version__,
        "torch": torch.__version__,
    }


def time_steps(step, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` steps, one after the other without a wait between them."""
    if device.type != "cuda":
        points = [time.perf_counter()]
        for _ in range(count):
            step()
            points.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in zip(points, points[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    _wait(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    _wait(device)
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second that a plain copy reads and writes here: the best of ten, what an op's traffic is held against."""
    size = size or (PROBE if device.type == "cpu" else 16 * PROBE)
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(time_steps(lambda: target.copy_(source), 10, device)) * 1e3


def within_steps(events) -> list:
    """The profiler's events inside a step, so that start and end of the profile count for nothing.

    Kernels may run on after the host has left the step: of what ran on the device, all is kept.
    """
    steps = [e.time_range for e in events if e.name == "step" and e.device_type == DeviceType.CPU]
    inside = lambda e: any(s.start <= e.time_range.start and e.time_range.end <= s.end for s in steps)  # noqa: E731
    return [e for e in events if e.device_type != DeviceType.CPU or inside(e)]


def op_table(events, names: set[str], steps: int, cuda: bool, traffic: Traffic | None, bandwidth: float) -> list[dict]:
    """A row an op, the most expensive first; numbers a step.

    Time is that of the op's own kernels on CUDA, the host's own time elsewhere; `total_ms` is with the ops it calls,
    and what bytes and FLOPs are divided by. Bytes are each input and each output once, and of ops that the model calls:
    of those inside another that has bytes, none; nor of an op that the watched step called another number of times.
    Time of the host between ops is in the row "(python)".
    """
    own, whole = ("self_device_time_total", "device_time_total") if cuda else ("self_cpu_time_total", "cpu_time_total")
    watched = traffic.calls if traffic else {}
    rows = defaultdict(lambda: Counter(calls=0, self_ms=0.0, total_ms=0.0, launches=0, flops=0, outer=0, outer_ms=0.0))
    for e in events:
        if e.device_type != DeviceType.CPU or e.name == "[memory]":
            continue
        row, inside = rows[PYTHON if e.name in names else e.name], ancestors(e)
        row["self_ms"] += getattr(e, own) / 1e3
        row["launches"] += len(e.kernels)
        row["flops"] += e.flops or 0
        if e.name in names:
            row["total_ms"] += getattr(e, own) / 1e3
            continue
        row["calls"] += 1
        if e.name not in inside:  # linear calls itself under autocast
            row["total_ms"] += getattr(e, whole) / 1e3
        if e.name in watched and inside.isdisjoint(watched):
            row["outer"] += 1
            row["outer_ms"] += getattr(e, whole) / 1e3
    everything = sum(row["self_ms"] for row in rows.values())
    table = []
    for name, row in rows.items():
        known = name in watched and row["outer"] == watched[name] * steps
        moved = (traffic.bytes[name] or None) if known else None
        rate = moved * steps / row["outer_ms"] * 1e3 if moved and row["outer_ms"] else None
        flops = row["flops"] / row["total_ms"] * 1e3 if row["flops"] and row["total_ms"] else None
        if row["self_ms"] or row["calls"]:
            table.append(
                {"op": name, **{key: row[key] / steps for key in ("calls", "self_ms", "total_ms", "launches", "flops")}}
                | {"share": row["self_ms"] / everything if everything else 0.0}
                | {"bytes": moved, "gb_per_s": rate and rate / 1e9, "of_copy": rate and rate / bandwidth}
                | {"tflops": flops and flops / 1e12}
            )
    return sorted(table, key=lambda row: (-row["self_ms"], -row["total_ms"]))


def module_table(events, model: nn.Module, steps: int, cuda: bool) -> list[dict]:
    """A row for every module that ran, in the model's order: milliseconds a step with all that is inside it.

    Backward time is found by autograd's sequence numbers, which name the forward op that a backward one belongs to;
    what has none (the accumulation of gradients) is in no row.
    """
    whole = "device_time_total" if cuda else "cpu_time_total"
    types = {name_of(path, module): type(module).__name__ for path, module in model.named_modules()}
    forward, backward, calls, owners = defaultdict(float), defaultdict(float), defaultdict(int), {}
    host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    for e in host:
        if e.name in types:
            forward[e.name] += getattr(e, whole) / 1e3
            calls[e.name] += 1
        elif e.sequence_nr >= 0 and not e.name.startswith(BACKWARD) and (inside := ancestors(e)).isdisjoint(PHASES[2:]):
            owners[e.sequence_nr] = inside  # of several ops with one number the last made the node
    for e in host:
        if e.name.startswith(BACKWARD):
            for name in owners.get(e.sequence_nr, ()):
                backward[name] += getattr(e, whole) / 1e3
    return [
        {"module": name, "type": kind, "calls": calls[name] / steps, "forward_ms": forward[name] / steps}
        | {"backward_ms": backward[name] / steps}
        for name, kind in types.items()
        if calls[name]
    ]


def ancestors(event) -> set[str]:
    """The names of all that encloses an event."""
    names = set()
    while (event := event.cpu_parent) is not None:
        names.add(event.name)
    return names


def allocations_of(trace: Path) -> list[dict]:
    """Every allocation (bytes > 0) and release on the host, in order, with what is held since the first of them."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    rows, total = [], 0
    for e in events:
        total += e["args"]["Bytes"]
        rows.append({"us": e["ts"] - events[0]["ts"], "bytes": e["args"]["Bytes"], "total": total})
    return rows


def _profiler(cuda: bool) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    return torch.profiler.profile(
        activities=activities, record_shapes=True, with_flops=True, profile_memory=not cuda, acc_events=True
    )


def _syncs(model: nn.Module, batch: Batch, options: Options) -> tuple[list[dict] | None, str | None]:
    try:
        return find_syncs(model, batch, **options.step), None
    except (RuntimeError, NotImplementedError, TypeError) as error:  # a part of somebody else's, as a rule
        return None, " ".join(str(error).split())[:300]


def _write_memory(out: Path, step: Step, device: torch.device, held: int, allocations: list[dict]) -> None:
    if device.type != "cuda":
        record = {"held_before": held, "allocations": allocations}
        write_atomically(out / "memory.json", json.dumps(record) + "\n")
        return
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    step()
    _wait(device)
    torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))
    torch.cuda.memory._record_memory_history(enabled=None)


def _held_bytes(model: nn.Module, step: Step) -> int:
    """Weights, buffers and moments: what is there between two steps."""
    tensors = [*model.parameters(), *model.buffers()]
    if step.optimizer is not None:
        tensors += [x for state in step.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return sum(x.numel() * x.element_size() for x in tensors)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _calls(events, prefixes: tuple[str, ...]) -> int:
    return sum(e.name.startswith(prefixes) for e in events)


def _total(events, name: str, what: str) -> float:
    return sum(getattr(e, what) for e in events if e.name == name and e.device_type == DeviceType.CPU) / 1e3
