"""A run's directory: who may write into it, and checkpoints that are whole or not there.

A checkpoint is written as `step-N.tmp/`, every file (but for the model card, which may be edited) flushed to the disk
and listed with size and sha256 in its `manifest.json`, and then renamed to `step-N/`. Which checkpoint is the newest
is found by looking: no file points to it, so none can point to the wrong one.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..files import MANIFEST, fsync_path, verify_manifest, write_manifest
from .card import CARD
from .log import METRICS

LOCK = ".lock"
STEP, PHASE = re.compile(r"step-(0|[1-9]\d*)"), re.compile(r"phase-([1-9]\d*)")
HALF = re.compile(r"\..+\.\d+\.tmp")  # as `write_atomically` names what it has not finished
# the only fields that a resumed run may change: neither weights nor log depend on them, but for the order of sums
FREE = ("save_every", "keep_last", "writer", "parallel", "checkpoint_activations", "split_on_oom", "cuda_graph")
logger = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


@dataclass(frozen=True)
class Run:
    """A run directory that this process holds, see `claim`."""

    path: Path
    resume: bool


@contextlib.contextmanager
def claim(run_dir, resume: bool = False) -> Iterator[Run]:
    """Hold `run_dir` (made where it is missing) for this process, and sweep what a killed process left half-written.

    A directory that was made here and got nothing written into it is removed at the end.
    Raises:
        ValueError: another process holds it, it holds a run already and `resume` is false, or it cannot be written.
    """
    path = Path(run_dir)
    try:
        _refuse_run(path, resume)
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"{path} is no directory to write into ({error.strerror}): choose another output") from None
    try:
        _lock(lock, path)
        try:
            _refuse_run(path, resume)  # a run may have ended while we came here
            sweep(path)
            yield Run(path, resume)
        finally:
            with contextlib.suppress(OSError):
                if [entry.name for entry in path.iterdir()] == [LOCK]:
                    (path / LOCK).unlink()
                    path.rmdir()
    finally:
        os.close(lock)


def _refuse_run(path: Path, resume: bool) -> None:
    if not resume and ((path / METRICS).exists() or steps(path) or phases(path)):
        raise ValueError(f"{path} already holds a run: continue it with --resume, or choose another output")


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.fstat(handle).st_nlink > 0  # else its holder removed it, with the directory, as we came
    except BlockingIOError:
        held = False
    if not held:
        holder = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
        raise ValueError(f"{path} is in use by another process (pid {holder}): wait for it, or choose another output")
    with contextlib.suppress(OSError):  # a disk too full for the pid says so where it matters
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())


def sweep(run_dir: Path) -> None:
    """Remove half-written checkpoints and files; only for who holds the directory."""
    for path in Path(run_dir).glob("step-*.tmp"):
        shutil.rmtree(path)
    for path in Path(run_dir).iterdir():
        if HALF.fullmatch(path.name):
            path.unlink()


def steps(run_dir) -> list[int]:
    """The steps that have a checkpoint directory, whole or damaged, in order."""
    return _numbers(Path(run_dir), STEP)


def phases(run_dir) -> list[Path]:
    """The directories of the runs that a run in phases consists of, in order; none of any other run."""
    return [Path(run_dir) / f"phase-{number}" for number in _numbers(Path(run_dir), PHASE)]


def _numbers(run_dir: Path, name: re.Pattern) -> list[int]:
    names = [entry.name for entry in run_dir.iterdir() if entry.is_dir()] if run_dir.is_dir() else []
    return sorted(int(match[1]) for match in map(name.fullmatch, names) if match)


def save(
    run_dir,
    step: int,
    write: Callable[[Path], None],
    *,
    keep_last: int = 2,
    best: int | None = None,
    on_main: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> Path:
    """Write a checkpoint, then remove those that are neither among the last `keep_last` nor that of step `best`.

    Args:
        step: number of optimizer steps done. A step that is already saved whole is left as it is.
        write: puts the files into the directory it is given.
        on_main: where several processes save together, does on rank 0 what only one may do, see `World.on_main`;
            `write` is called in all.
    Returns:
        `run_dir/step-N`.
    Raises:
        CheckpointError: it could not be written (disk full, read-only, …). Nothing of it is left where that is
            possible, and every earlier checkpoint is as it was.
    """
    target = Path(run_dir) / f"step-{step}"
    if on_main(lambda: not target.exists() or bool(is_damaged(target))):
        _write(target, write, on_main)
    on_main(lambda: _prune(target.parent, step, keep_last, best))
    return target


def _write(target: Path, write: Callable[[Path], None], on_main: Callable[[Callable[[], Any]], Any]) -> None:
    partial = target.with_name(target.name + ".tmp")
    try:
        on_main(lambda: _make_empty(partial))
        write(partial)
        on_main(lambda: _finish(partial, target))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        earlier = [n for n in steps(target.parent) if f"step-{n}" != target.name]
        rest = f"; step-{earlier[-1]} is as it was" if earlier else ""
        raise CheckpointError(f"{target} could not be saved: {reason}{rest}") from error


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def _finish(partial: Path, target: Path) -> None:
    """List what was written, and give it its name."""
    for stray in partial.glob(".*"):  # safetensors writes beside and renames; a failed one may stay
        stray.unlink()
    write_manifest(partial, only={path.name for path in partial.iterdir()} - {MANIFEST, CARD})
    if target.exists():
        _remove(target)
    partial.rename(target)
    fsync_path(target.parent)


def _prune(run_dir: Path, step: int, keep_last: int, best: int | None) -> None:
    there = steps(run_dir)
    # later steps than the one just saved were found damaged when the run resumed: they must not count as the last
    kept = {*[n for n in there if n <= step][-keep_last:], best}
    for n in there:
        if n not in kept:
            try:
                _remove(run_dir / f"step-{n}")
            except OSError as error:
                logger.warning("%s could not be removed: %s", run_dir / f"step-{n}", error.strerror)


def _remove(directory: Path) -> None:
    """Out of sight in one move, so that a kill leaves nothing that looks like a checkpoint."""
    trash = directory.with_name(directory.name + ".old.tmp")
    shutil.rmtree(trash, ignore_errors=True)
    directory.rename(trash)
    shutil.rmtree(trash)


def verify(directory) -> None:
    """Check a checkpoint against its manifest, and that it holds nothing else.

    Raises:
        ValueError: one line that names the file that is missing, extra, truncated or changed.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a checkpoint: no such directory")
    manifest = verify_manifest(directory)
    # a change that leaves the meaning alone is still a change
    if (directory / MANIFEST).read_text(encoding="utf-8") != json.dumps(manifest, indent=2) + "\n":
        raise ValueError(f"{directory / MANIFEST}: not as it was written: damaged or changed")
    extra = sorted({entry.name for entry in directory.iterdir()} - {MANIFEST, CARD, *manifest["files"]})
    if extra:
        raise ValueError(f"{directory / extra[0]} is not in {MANIFEST}: remove it")


def is_damaged(directory) -> str | None:
    """What `verify` has against a checkpoint, or None."""
    try:
        verify(directory)
    except ValueError as error:
        return str(error)
    return None


def latest(run_dir) -> Path | None:
    """The newest whole checkpoint, or None where there is no checkpoint at all; every damaged one is warned about.

    Raises:
        ValueError: all are damaged; the line is about the newest.
    """
    problems = []
    for step in reversed(steps(run_dir)):
        directory = Path(run_dir) / f"step-{step}"
        problem = is_damaged(directory)
        if problem is None:
            return directory
        logger.warning("passed over a damaged checkpoint: %s", problem)
        problems.append(problem)
    if problems:
        raise ValueError(f"{run_dir} has no checkpoint that is whole: {problems[0]}")
    return None


def best(run_dir) -> Path | None:
    """The checkpoint with the best evaluation, by what the newest whole one says, or None where none was evaluated."""
    newest = latest(run_dir)
    record = newest and read_trainer(newest)["best"]
    return Path(run_dir) / f"step-{record['step']}" if record else None


def resolve_model(directory) -> Path:
    """A directory with a config.json as it is; of a run, or its last phase, the best checkpoint, else the newest."""
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return directory
    for run in reversed([directory, *phases(directory)]):
        if found := best(run) or latest(run):
            return found
    raise ValueError(f"{directory} is not a checkpoint: it has no config.json and no step-N directory")


def read_trainer(directory) -> dict:
    """`trainer.json` of a checkpoint: step, cursor, best, metrics, config, settings, versions.

    Raises:
        ValueError: it is missing, no JSON, of another step than the directory's name says, or lacks a field.
    """
    path = Path(directory) / "trainer.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        lost = [
            name
            for name in ("step", "cursor", "best", "metrics", "config", "settings", "versions")
            if name not in state
        ]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if lost:
        raise ValueError(f"{path} has no {', '.join(lost)}: written by another version?")
    if path.parent.name != f"step-{state['step']}":
        raise ValueError(f"{path} is of step {state['step']}, in a directory of another name")
    return state


def refuse_changes(saved, now, run_dir, name: str = "") -> None:
    """Raise ValueError for the first field, however deep, that is not what the run was started with."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            if name or key not in FREE:
                refuse_changes(saved.get(key), now.get(key), run_dir, f"{name}.{key}".strip("."))
    elif saved != now:
        raise ValueError(
            f"{run_dir} was started with {name}={saved!r}, now it is {now!r}: resume with what it was started with"
        )
