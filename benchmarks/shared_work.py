"""Work that processes share through a folder: an item is claimed once, its result is a line of a file.

Nothing that ends a process loses what was done: a result is on disk before the next item begins, and a process that
dies is replaced as long as items are left. The standard library alone, so that it runs whatever is missing.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STARTED = time.perf_counter()  # this process, nearly
LOST = 3  # exit code of a process that lost its CUDA context: another one can go on
POLL = 0.2  # seconds between two looks at the processes
CLAIMS, ROWS = "claims", "rows.jsonl"
RESULT = "result.json"  # of a stage, also while it lasts


def save(path: Path, record: object) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def context_is_lost() -> bool:
    """Whether an error on the GPU has made CUDA useless for the rest of this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def seconds_left(margin: float) -> float:
    """Of the stage that this process is, less what it needs to end; a minute of a process that is none."""
    return max(float(os.environ.get("STAGE_SECONDS", 60)) - (time.perf_counter() - STARTED) - margin, 1)


def claim(folder: Path, item: str) -> bool:
    """Whether this process is the first that asks for `item`, which is then what it works on."""
    (folder / CLAIMS).mkdir(parents=True, exist_ok=True)
    try:
        _claim_of(folder, item).touch(exist_ok=False)
    except FileExistsError:
        return False
    _current(folder, os.getpid()).write_text(item, encoding="utf-8")
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While no other process is in this block; one that dies leaves it."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_claimed(folder: Path, item: str) -> bool:
    return _claim_of(folder, item).exists()


def _claim_of(folder: Path, item: str) -> Path:
    return folder / CLAIMS / hashlib.sha256(item.encode()).hexdigest()[:32]


def _current(folder: Path, pid: int) -> Path:
    return folder / CLAIMS / f"of.{pid}"


def _died(folder: Path, process: subprocess.Popen) -> bool:
    """Record what a process that failed was at, if it was at anything new."""
    with suppress(FileNotFoundError):
        item = _current(folder, process.pid).read_text(encoding="utf-8")
        if all(row["item"] != item for row in rows(folder)):
            add(folder, {"item": item, "outcome": "failed", "why": f"the process ended with code {process.returncode}"})
        return True
    return False


def add(folder: Path, row: dict) -> None:
    """Append a result; one write, so that lines of several processes do not mix."""
    with (folder / ROWS).open("ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")


def rows(folder: Path) -> list[dict]:
    found = []
    with suppress(FileNotFoundError):
        for line in (folder / ROWS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the process was killed while it wrote
                found.append(json.loads(line))
    return found


def run(command: list[str], folder: Path, processes: int, seconds: float, changed: Callable[[], None]) -> None:
    """Run `command` in several processes until all end with 0, or for `seconds`.

    One that ends otherwise has its item recorded as failed and is started again, unless it had claimed none: then its
    start itself fails. `changed` is called whenever results came.
    """
    end, size = time.perf_counter() + seconds, -1
    alive = [subprocess.Popen([sys.executable, *command]) for _ in range(processes)]
    try:
        while alive and time.perf_counter() < end:
            time.sleep(POLL)
            for process in [process for process in alive if process.poll() is not None]:
                alive.remove(process)
                if process.returncode and _died(folder, process):
                    alive.append(subprocess.Popen([sys.executable, *command]))
            if len(rows(folder)) != size:
                size = len(rows(folder))
                changed()
    finally:
        for process in alive:
            process.kill()
            process.wait()
        changed()
