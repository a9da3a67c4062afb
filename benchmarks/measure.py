"""Timing that survives scrutiny: probes of this machine, interleaved rounds, medians, and no figure above the roofline.

A round runs every provider of a case once, in a new order, so that what the machine does meanwhile hits all alike. A
ratio is taken within a round, then its median over the rounds. A clock turns a call into a `Timer`: `wall` counts what
a user waits for, `on_device` what a GPU works, its cache filled with other data before each call.
"""

import gc
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from minibert.profile.measure import allocations_of
from minibert_kernels._triton import compiler_versions

from .gate import Refused
from .shared_work import context_is_lost

TOLERANCE = 1.05  # a probe is not the very best the machine can do: what is above it by more is refused
FLUSH = 256 << 20  # bytes that are read between two calls: more than any L2
DEVICE_CALLS = 10  # that one sample of `on_device` is made of
PAIRS = 3  # graphs with the calls, and without, that one sample is the median of
CLOCK_TICK = 1e-4  # seconds by which the two clocks may differ, read one after the other
LOST = 1.05  # a sample whose wall clock is this many times its CPU time waited for a core, or for a disk
SHORT = 0.5  # seconds
ENERGY_SECONDS = 0.5  # the counter of energy moves every 20 to 100 ms


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run does at least: useful (non-padding) tokens, sequences, floating-point operations, bytes."""

    tokens: int = 0
    sequences: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Seconds of one call; where they are the wall clock's, also what the process used of the CPU meanwhile.

    cpu_seconds: of all its threads. switches: how often the kernel took a core away from it.
    """

    seconds: float
    cpu_seconds: float | None = None
    switches: int | None = None


@dataclass(frozen=True)
class Timer:
    """how: what is timed. sample: times one call."""

    how: str
    sample: Callable[[], Sample]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of work and who does it.

    Args:
        suite, name: what the row is called. labels: further columns, e.g. {"dtype": "float32", "threads": 2}.
        work: what a run does.
        providers: name to a function that builds, judges and returns the call to time; it raises `Refused`, or
            ImportError where a package is missing.
        baseline: the provider whose seconds the ratios have on top.
        clock: makes a `Timer` of a call; by default `wall`.
        elsewhere: other processes do the work, whose CPU time is not this one's.
    """

    suite: str
    name: str
    labels: dict = field(default_factory=dict)
    work: Work
    providers: dict[str, Callable[[], Callable[[], object]]]
    baseline: str
    clock: "Callable[[Callable[[], object]], Timer] | None" = None
    elsewhere: bool = False


@dataclass(frozen=True)
class Peaks:
    """What this machine reached in the same run: FLOP/s of a large matrix product, bytes/s of a large copy.

    cached: fewer bytes than these may lie in a cache, and then move faster than any copy.
    """

    flops: float
    bytes: float
    cached: int = 0


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], object]) -> Sample:
    """One call by the wall clock, the device's work included."""
    synchronize()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    synchronize()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(seconds, cpu, after.ru_nivcsw - before.ru_nivcsw)


def wall(call: Callable[[], object]) -> Timer:
    """What a user waits for. A call shorter than SHORT is first made once untimed: what lay idle while others ran has
    left the caches, and its own time would be that of bringing it back."""
    last = SHORT

    def sample() -> Sample:
        nonlocal last
        if last < SHORT:
            call()
        found = timed(call)
        last = found.seconds
        return found

    return Timer("wall clock", sample)


@cache
def side_stream() -> "torch.cuda.Stream":
    """Where `on_device` captures; a backward that is captured must have had its forward here."""
    return torch.cuda.Stream()


@contextmanager
def alone_on_side_stream() -> Iterator[None]:
    """Work on it, once all that was asked for before is done, and finish before anything else begins."""
    torch.cuda.synchronize()
    with torch.cuda.stream(side_stream()):
        yield
    torch.cuda.synchronize()


def on_device(call: Callable[[], object]) -> Timer:
    """The GPU's own seconds of a call; `wall` on a CPU.

    Two CUDA graphs are timed in turn: DEVICE_CALLS times the call, each behind a read of FLUSH bytes that fills the L2
    cache with clean lines, and the reads alone. Their difference has neither the start of a graph nor the reads in it.
    What a graph cannot capture is launched as it is, between events, while the host runs ahead during the read; then a
    call shorter than its own launches is timed as those.
    """
    if not torch.cuda.is_available():
        return wall(call)
    read, empty = _reads()
    with alone_on_side_stream():
        for _ in range(3):
            call()
        if not never_waits(call):  # a capture that fails would leave torch's generator unusable
            return Timer("launches", lambda: _launched(call, read))
        full = _captured(lambda: (read(), call()))
    return Timer("CUDA graph", lambda: _difference(full.replay, empty.replay))


@cache
def _reads() -> "tuple[Callable[[], object], torch.cuda.CUDAGraph]":
    """What reads FLUSH bytes, and a graph of DEVICE_CALLS of it: one for all calls."""
    read = torch.zeros(FLUSH // 4, device="cuda").sum
    with alone_on_side_stream():
        read()
        return read, _captured(read)


def _captured(run: Callable[[], object]) -> "torch.cuda.CUDAGraph":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side_stream()):
        for _ in range(DEVICE_CALLS):
            run()
    return graph


def _between_events(replay: Callable[[], object]) -> "tuple[torch.cuda.Event, torch.cuda.Event]":
    events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
    events[0].record()
    replay()
    events[1].record()
    return events


def _difference(full: Callable[[], None], empty: Callable[[], None]) -> Sample:
    with torch.cuda.stream(side_stream()):
        pairs = [[_between_events(replay) for replay in (full, empty)] for _ in range(PAIRS)]
    torch.cuda.synchronize()
    long, short = ([start.elapsed_time(end) for start, end in column] for column in zip(*pairs, strict=True))
    # of a call of a few microseconds the difference may be noise, and no longer than nothing: `figures` refuses it
    return Sample((statistics.median(long) - statistics.median(short)) / DEVICE_CALLS / 1e3)


def _launched(call: Callable[[], object], read: Callable[[], object]) -> Sample:
    events = []
    with torch.cuda.stream(side_stream()):
        for _ in range(DEVICE_CALLS):
            read()
            events.append(_between_events(call))
    torch.cuda.synchronize()
    return Sample(statistics.median(start.elapsed_time(end) for start, end in events) / 1e3)


def never_waits(call: Callable[[], object]) -> bool:
    """Whether a call leaves the host free, as a CUDA graph needs it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def probe(dtype: torch.dtype, device: str, repeats: int = 5) -> Peaks:
    """The best of `repeats` large matrix products and copies, on random data."""
    size, numel = (8192, 1 << 30) if device == "cuda" else (1536, 1 << 26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randint(-100, 100, (numel,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    clock = on_device if device == "cuda" else wall
    product, copy = clock(lambda: a @ b).sample, clock(lambda: target.copy_(source)).sample
    product(), copy()  # the first call plans and touches memory
    best = [min(sample().seconds for _ in range(repeats)) for sample in (product, copy)]
    return Peaks(2 * size**3 / best[0], 2 * numel / best[1], 0 if device == "cuda" else numel)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, between two values by linear interpolation."""
    low, median, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return median, low, high


def measure(case: Case, *, rounds: int, peaks: Peaks, say: Callable[[str], None] = lambda line: None) -> list[dict]:
    """A row for each provider of a case; one that was refused or is missing has `refused` and no figures."""
    calls, timers, memory, rows = {}, {}, {}, {}
    lost = None
    for name, build in case.providers.items():
        rows[name] = {"suite": case.suite, "case": case.name, **case.labels, "provider": name}
        if lost:
            rows[name]["refused"] = f"not reached: {lost} lost the CUDA context"
            continue
        say(f"{case.name}: {name}")
        try:
            call = build()
            call()  # compiles, fills caches
            memory[name] = extra_memory(call)
            timers[name] = (case.clock or wall)(call)
            calls[name] = call
        except Exception as error:  # one provider that breaks must not cost the others their figures
            rows[name]["refused"] = reason(error)
            lost = name if context_is_lost() else None
    if lost:  # nobody can be timed any more
        return [
            row | {"refused": row.get("refused", f"not timed: {lost} lost the CUDA context")} for row in rows.values()
        ]
    times, order, shuffle = {name: [] for name in timers}, list(timers), random.Random(0)
    load = os.getloadavg()[0]
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in [name for name in order if name in times]:
            try:
                times[name].append(timers[name].sample())
            except Exception as error:
                rows[name]["refused"] = reason(error)
                del times[name]
    samples = times
    times = {name: [sample.seconds for sample in taken] for name, taken in samples.items()}
    found = {name: figures(case.work, taken, None, peaks) for name, taken in times.items()}
    baseline = times.get(case.baseline) if "refused" not in found.get(case.baseline, {"refused": ""}) else None
    for name, taken in times.items():
        rows[name] |= figures(case.work, taken, baseline, peaks)
        rows[name] |= {"rounds": rounds, "load": round(load, 2), "timing": timers[name].how}
        rows[name] |= {} if case.elsewhere or torch.cuda.is_available() else cpu_use(samples[name])
        rows[name] |= {"extra_memory": memory[name], "joules": joules(calls[name]) if case.clock is None else None}
    calls.clear()
    timers.clear()
    gc.collect()
    return list(rows.values())


def cpu_use(samples: list[Sample]) -> dict:
    """What the process had of the CPU, and in how many samples it waited: its wall clock ran on without any thread of
    it. A waiting sample is longer than the call, so that no ratio with it means anything; nothing where a sample does
    not say."""
    if any(sample.cpu_seconds is None for sample in samples):
        return {}
    waited = sum(sample.seconds > LOST * sample.cpu_seconds + CLOCK_TICK for sample in samples)
    return {
        "cpu_seconds": statistics.median(sample.cpu_seconds for sample in samples),
        "switches": sum(sample.switches for sample in samples), "waited": waited,
    }  # fmt: skip


def reason(error: Exception) -> str:
    """Why a provider has no figures, in one line."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, ImportError):
        return f"not installed: {error.name or error}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def figures(work: Work, taken: list[float], baseline: list[float] | None, peaks: Peaks) -> dict:
    """Seconds, ratio, rates and shares of the peaks; or `refused`, where a rate is above the roofline."""
    if min([*taken, *(baseline or [])]) <= 0:
        return {"refused": "a sample is not longer than the timer's noise"}
    median, low, high = spread(taken)
    row = {"seconds": median, "seconds_low": low, "seconds_high": high}
    for name, done, peak in (("matrix", work.flops, peaks.flops), ("bandwidth", work.bytes, peaks.bytes)):
        if done:
            row[f"{name}_share"] = done / median / peak
            if done / median > TOLERANCE * peak and not (name == "bandwidth" and done < peaks.cached):
                return {"refused": f"{done / median:.2e} /s is above the {name} peak of {peak:.2e} /s: not believed"}
    for name, done in (("tokens", work.tokens), ("sequences", work.sequences)):
        if done:
            row[f"{name}_per_second"] = done / median
    if work.flops and work.bytes:
        row |= {"intensity": work.flops / work.bytes, "flops_per_second": work.flops / median}
    if baseline:
        ratios = [theirs / ours for theirs, ours in zip(baseline, taken, strict=True)]
        row |= dict(zip(("ratio", "ratio_low", "ratio_high"), spread(ratios), strict=True))
    return row


def extra_memory(call: Callable[[], object]) -> int | None:
    """Bytes that torch's allocator has at most during a call, beyond what it has before: activations and gradients.

    None where it saw nothing: others (ONNX Runtime, another process) allocate for themselves.
    """
    if torch.cuda.is_available():
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before or None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return max((row["total"] for row in allocations_of(trace)), default=None)


def joules(call: Callable[[], object]) -> float | None:
    """Energy of a call as NVML counts it for the whole board; None where there is no NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode())
        calls, start = 0, time.perf_counter()
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
        while time.perf_counter() - start < ENERGY_SECONDS:
            call()
            synchronize()
            calls += 1
        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(board) - before) / 1e3 / calls
    except Exception:  # no GPU, no package, or a board without the counter
        return None


def machine() -> dict:
    """What a number needs to be one: hardware, clocks, load, versions, commit, command, date."""
    packages = ("torch", "triton", "transformers", "onnxruntime", "sentence-transformers", "liger-kernel", "flash-attn")
    record = {
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "commit": _output("git", "describe", "--always", "--dirty"), "cpu": _cpu(), "cores": os.cpu_count(),
        "load": os.getloadavg(), "python": platform.python_version(), "versions": {},
    }  # fmt: skip
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            record["versions"][name] = metadata.version(name)
    record["versions"] |= compiler_versions()
    if torch.cuda.is_available():
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        values = _output("nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader").split(", ")
        record["gpu"] = dict(zip(fields.split(","), values, strict=False)) | {"name": torch.cuda.get_device_name()}
    return record


def place_and_date(record: dict) -> str:
    """What files of a machine are called, e.g. "h200-2026-01-31" of NVIDIA H200; "cpu-2026-01-31" without a GPU."""
    name = record.get("gpu", {}).get("name", "cpu")
    model = re.search(r"(RTX )?[A-Z]*\d{2,}\w*", name)
    return f"{(model[0] if model else name).replace(' ', '').lower()}-{record['date']}"


def condition() -> dict:
    """What may have changed while a suite ran: load, and a GPU's clocks, power and temperature."""
    return {name: value for name, value in machine().items() if name in ("load", "gpu")}


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def _output(*command: str) -> str:
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""
