"""A disk that is full, read-only or not ours: one line, every earlier checkpoint intact, and the run goes on later."""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minibert import BertForPreTraining
from minibert.train import CheckpointError, verify
from minibert.train.checkpoint import save, steps

from .common import STEPS, NotHere, Tally, ended, fork, litter, new_model, refusal, run

NOBODY = 65534


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[Path]:
    """A file system in memory of that size, mounted at `place`."""
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={kib}k", "none", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def mount(*arguments) -> None:
    if shutil.which("mount") is None or subprocess.run(["mount", *arguments], capture_output=True).returncode:
        raise NotHere("no right to mount a small file system")


def assert_intact(run_dir: Path) -> None:
    """Every checkpoint is whole, and nothing else is left."""
    for step in steps(run_dir):
        verify(run_dir / f"step-{step}")
    assert not litter(run_dir), f"left behind: {litter(run_dir)}"


def assert_goes_on(run_dir: Path, whole: Path) -> None:
    """Resumed, it ends with the files of the run that nothing stopped."""
    run(run_dir, resume=True)
    for path in (whole / f"step-{STEPS}").iterdir():
        assert (run_dir / f"step-{STEPS}" / path.name).read_bytes() == path.read_bytes(), f"{path.name} differs"


def full(tally: Tally, count: int, directory: Path) -> None:
    """Disks of a few pages, and of sizes at random up to what a run nearly fits into; enlarged, the run goes on."""
    rng = random.Random(11)
    run(directory / "whole")
    size = sum(path.stat().st_size for path in (directory / "whole").rglob("*") if path.is_file())
    for n in range(count):
        pages = n // 2 + 1 if n % 2 == 0 else rng.randrange(1, size // 4096)
        with small_disk(directory / f"disk-{n}", 4 * pages) as disk:
            run_dir = disk / "run"
            (disk / "another file").write_bytes(bytes(4096))
            with tally.trial(f"disk {n}"):
                error = refusal(lambda run_dir=run_dir: run(run_dir), OSError, ValueError, names=run_dir)
                assert "No space left" in str(error), str(error)
                assert_intact(run_dir)
                mount("-o", "remount,size=64m", disk)
                assert_goes_on(run_dir, directory / "whole")


def read_only(tally: Tally, count: int, directory: Path) -> None:
    """Nothing is written, and everything can be read."""
    for n in range(count):
        with small_disk(directory / f"disk-{n}", 65536) as disk:
            run_dir, last = disk / "run", random.Random(n).choice([4, 8, 12])
            run(run_dir, steps=last)
            mount("-o", "remount,ro", disk)
            with tally.trial(f"disk {n}"):
                for resume, path in ((True, run_dir), (False, disk / "new")):
                    refusal(lambda path=path, resume=resume: run(path, resume=resume), ValueError, names=path)
                refusal(lambda run_dir=run_dir: new_model().save_pretrained(run_dir / "model"), OSError, names=run_dir)
                error = refusal(lambda run_dir=run_dir: save(run_dir, 99, print), CheckpointError, names="step-99")
                assert f"step-{last} is as it was" in str(error)
                BertForPreTraining.from_pretrained(run_dir / f"step-{last}")
                assert_intact(run_dir)
                mount("-o", "remount,rw", disk)
                run(run_dir, steps=last, resume=True)


def without_permission(tally: Tally, count: int, directory: Path) -> None:
    """A run directory that may not be written: from the beginning, or from some step on; by turns."""
    run(directory / "whole")
    for n in range(count):
        # not under `directory`, whose parents may be ours alone
        with tempfile.TemporaryDirectory() as place, tally.trial(f"directory {n}"):
            run_dir, step = Path(place) / "run", n % 2 * random.Random(n).randrange(4, STEPS - 1)
            run_dir.mkdir()
            assert ended(fork(lambda run_dir=run_dir, step=step: refused_as_nobody(run_dir, step))) == 0
            run_dir.chmod(0o755)
            assert_intact(run_dir)
            assert max(steps(run_dir), default=0) >= step // 4 * 4, "a checkpoint is lost"
            assert_goes_on(run_dir, directory / "whole")


def refused_as_nobody(run_dir: Path, step: int) -> None:
    """Train as somebody whom the directory's mode binds, and take the right to write away before that step."""
    if os.geteuid() == 0:
        for path in (run_dir.parent, run_dir):
            os.chown(path, NOBODY, NOBODY)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    model, seen = new_model(), 0

    def forbid(module, _):
        nonlocal seen
        seen += module.training
        if seen == 2 * step + 1:
            run_dir.chmod(0o555)

    model.register_forward_pre_hook(forbid)
    if step == 0:
        run_dir.chmod(0o555)
    error = refusal(lambda: run(run_dir, model=model), *((CheckpointError,) if step else (ValueError,)), names=run_dir)
    assert "Permission denied" in str(error)
