"""Timing that survives scrutiny: probes of this machine, interleaved rounds, medians, and no figure above the roofline.

A round runs every provider of a case once, in a new order, so that what the machine does meanwhile hits all alike. A
ratio is taken within a round, then its median over the rounds.
"""

import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from .gate import Refused

TOLERANCE = 1.05  # a probe is not the very best the machine can do: what is above it by more is refused


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run does at least: useful (non-padding) tokens, sequences, floating-point operations, bytes."""

    tokens: int = 0
    sequences: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of work and who does it.

    Args:
        suite, name: what the row is called. labels: further columns, e.g. {"dtype": "float32", "threads": 2}.
        work: what a run does.
        providers: name to a function that builds, judges and returns the call to time; it raises `Refused`, or
            ImportError where a package is missing.
        baseline: the provider whose seconds the ratios have on top.
    """

    suite: str
    name: str
    labels: dict = field(default_factory=dict)
    work: Work
    providers: dict[str, Callable[[], Callable[[], object]]]
    baseline: str


@dataclass(frozen=True)
class Peaks:
    """What this machine reached in the same run: FLOP/s of a large matrix product, bytes/s of a large copy."""

    flops: float
    bytes: float


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def probe(dtype: torch.dtype, device: str, repeats: int = 5) -> Peaks:
    """The best of `repeats` large matrix products and copies, on random data."""
    size, numel = (8192, 1 << 30) if device == "cuda" else (1536, 1 << 26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randint(-100, 100, (numel,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a @ b, target.copy_(source)  # the first call plans and touches memory
    product = min(seconds(lambda: a @ b) for _ in range(repeats))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(repeats))
    return Peaks(2 * size**3 / product, 2 * numel / copy)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    values = sorted(values)
    last = len(values) - 1
    return statistics.median(values), values[round(0.2 * last)], values[round(0.8 * last)]


def measure(case: Case, *, rounds: int, peaks: Peaks, say: Callable[[str], None] = lambda line: None) -> list[dict]:
    """A row for each provider of a case; one that was refused or is missing has `refused` and no figures."""
    calls, rows = {}, {}
    for name, build in case.providers.items():
        rows[name] = {"suite": case.suite, "case": case.name, **case.labels, "provider": name}
        say(f"{case.name}: {name}")
        try:
            calls[name] = build()
            calls[name]()  # compiles, fills caches
        except Refused as error:
            rows[name]["refused"] = str(error)
        except ImportError as error:
            rows[name]["refused"] = f"not installed: {error.name or error}"
        except Exception as error:  # one provider that breaks must not cost the others their figures
            calls.pop(name, None)
            rows[name]["refused"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    times, order, shuffle = {name: [] for name in calls}, list(calls), random.Random(0)
    memory = {name: _peak_memory(call) for name, call in calls.items()}
    load = os.getloadavg()[0]
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(seconds(calls[name]))
    for name, taken in times.items():
        rows[name] |= figures(case.work, taken, times.get(case.baseline), peaks)
        rows[name] |= {"rounds": rounds, "load": round(load, 2), "peak_memory": memory[name]}
    calls.clear()
    gc.collect()
    return list(rows.values())


def figures(work: Work, taken: list[float], baseline: list[float] | None, peaks: Peaks) -> dict:
    """Seconds, ratio, rates and shares of the peaks; or `refused`, where a rate is above the roofline."""
    median, low, high = spread(taken)
    row = {"seconds": median, "seconds_low": low, "seconds_high": high}
    for name, done, peak in (("matrix", work.flops, peaks.flops), ("bandwidth", work.bytes, peaks.bytes)):
        if done:
            row[f"{name}_share"] = done / median / peak
            if done / median > TOLERANCE * peak:
                return {"refused": f"{done / median:.2e} /s is above the {name} peak of {peak:.2e} /s: not believed"}
    for name, done in (("tokens", work.tokens), ("sequences", work.sequences)):
        if done:
            row[f"{name}_per_second"] = done / median
    if baseline:
        ratios = [theirs / ours for theirs, ours in zip(baseline, taken, strict=True)]
        row |= dict(zip(("ratio", "ratio_low", "ratio_high"), spread(ratios), strict=True))
    return row


def _peak_memory(call) -> int | None:
    """Bytes the GPU's allocator had at most during one call; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated()


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
    if torch.cuda.is_available():
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        values = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split(", ")
        record["gpu"] = dict(zip(fields.split(","), values, strict=False)) | {"name": torch.cuda.get_device_name()}
    return record


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
