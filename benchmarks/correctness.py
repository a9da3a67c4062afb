"""The kernels' tests on the GPU, in groups, what matters most first; a result is on disk before the next test begins.

The tests are those of `tests/kernels`, run by pytest within workers that share them (`shared_work`). A worker whose
CUDA context is lost ends and is replaced, so that an illegal access costs one test. The stage `compile` runs the same
tests before, with their launches replaced by compilations.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from . import shared_work

PATHS = ["tests/kernels", "tests/train/test_loop.py", "tests/train/test_graph.py", "tests/model/test_padded.py"]
DRY_PATHS = ["tests/kernels/test_gelu.py", "tests/kernels/test_gather.py"]
ATTENTION_64 = "attention, {low}, d = 64"
GROUPS = (
    ATTENTION_64, "other ops, {low}", "attention, {low}, other head sizes", "graphs, and the same bits every time",
    "offsets beyond 2**31", "other tests that need a GPU", "edge cases",
)  # fmt: skip
OFFSETS, EDGES = GROUPS[4], GROUPS[-1]
# what the stage `compile` does, in order: groups, and by the beginning of their names units of `warm`
COMPILED = (*GROUPS[:2], "kernels", "training", GROUPS[3], GROUPS[2], "plans", EDGES)
SEEDS = 5  # of a fuzz test


def group_of(item: pytest.Item, low: str) -> str | None:
    """The group of a test, or None where it is not run: it compiles with torch.compile, or takes minutes."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name, needs_gpu = item.originalname, item.get_closest_marker("gpu")
    slow = item.get_closest_marker("slow") and not item.get_closest_marker("product")
    if slow or params.get("fuzz_seed", 0) >= SEEDS:
        return None
    if "2_31" in name:
        return OFFSETS if needs_gpu else None
    if low in name or str(params.get("dtype", "")) == f"torch.{low}":
        if not item.path.stem.startswith("test_attention"):
            return GROUPS[1]
        return GROUPS[0] if params.get("head_size") == 64 else GROUPS[2]
    if (needs_gpu and "captured" in name) or "same_bits_every_time" in name:
        return GROUPS[3]
    if needs_gpu:
        return GROUPS[5]
    on_device = "device" in item.fixturenames and not any(word in name for word in ("compile", "export", "opcheck"))
    return EDGES if on_device else None


class Worker:
    """A pytest plugin: this process' part of the tests; `between` does units of `warm`, by how their names begin."""

    def __init__(self, folder: Path, dry: bool, compiling: bool, between: Callable[[str], None]):
        self.folder, self.dry, self.compiling, self.between = folder, dry, compiling, between
        self.low = "float16" if dry else "bfloat16"
        self.groups: dict[str, str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = [part for part in COMPILED if part in GROUPS] if self.compiling else GROUPS
        groups: dict[str, list[pytest.Item]] = {group: [] for group in order}
        for item in items:
            if (group := group_of(item, self.low)) in groups:
                groups[group].append(item)
        for group, found in groups.items():
            del found[2 if self.dry else len(found) :]
            self.groups |= dict.fromkeys((item.nodeid for item in found), group)
        items[:] = [item for found in groups.values() for item in found]
        if shared_work.claim(self.folder, "the list of tests"):
            tests = {item: group.format(low=self.low) for item, group in self.groups.items()}
            shared_work.save(self.folder / "tests.json", tests)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for part in COMPILED if self.compiling else GROUPS:
            if part not in GROUPS:
                self.between(part)
            for item in session.items:
                if self.groups[item.nodeid] == part and shared_work.claim(self.folder, item.nodeid):
                    # the far offsets take most of the memory: one at a time
                    with shared_work.alone(self.folder) if part == OFFSETS else nullcontext():
                        self.run(item)
        return True

    def run(self, item: pytest.Item) -> None:
        from _pytest.runner import runtestprotocol

        start = time.perf_counter()
        with compiling(self.compiling) as failed:
            # no next test: another process may take it, so nothing is kept for it
            reports = runtestprotocol(item, nextitem=None, log=False)
        outcome, why = verdict(reports)
        row = {"item": item.nodeid, "seconds": round(time.perf_counter() - start, 2)}
        if self.compiling:  # outputs are memory that nobody wrote: only what does not compile counts
            outcome, why = ("failed", "; ".join(failed)) if failed else ("passed", "")
        shared_work.add(self.folder, row | {"outcome": outcome, "why": why[:1000]})
        if shared_work.context_is_lost():
            os._exit(shared_work.LOST)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # for the other processes


def compiling(wanted: bool):
    if not wanted:
        return nullcontext(())
    from .warm import compile_only

    return compile_only()


def verdict(reports: Sequence[pytest.TestReport]) -> tuple[str, str]:
    """passed, failed or skipped, and the line that says why."""
    for report in reports:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
            return "failed", " ".join(lines[:3])
    if any(report.skipped for report in reports):
        return "skipped", ""
    return "passed", ""


def work(folder: Path, dry: bool, compiling: bool, between: Callable[[str], None] = lambda part: None) -> None:
    """Run tests until none is left."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other packages' plugins take seconds to import
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--fuzz", str(SEEDS)]
    pytest.main([*options, *(DRY_PATHS if dry else PATHS)], plugins=[Worker(folder, dry, compiling, between)])


def summary(folder: Path) -> dict:
    """The groups, with how many of their tests passed, failed, were cut off, or were not reached."""
    try:
        tests = json.loads((folder / "tests.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        tests = {}
    found = {row["item"]: row for row in shared_work.rows(folder) if row["item"] in tests}
    groups: dict[str, dict] = {}
    for item, group in tests.items():
        count = groups.setdefault(group, dict.fromkeys(("passed", "failed", "skipped", "cut off", "not reached"), 0))
        begun = "cut off" if shared_work.is_claimed(folder, item) else "not reached"
        count[found[item]["outcome"] if item in found else begun] += 1
    lines = [f"{group}: " + ", ".join(f"{n} {what}" for what, n in count.items() if n or what in ("passed", "failed"))
             for group, count in groups.items()]  # fmt: skip
    lines += [f"FAILED {row['item']}: {row['why']}" for row in found.values() if row["outcome"] == "failed"]
    return {"groups": groups, "tests": list(found.values()), "lines": lines}
