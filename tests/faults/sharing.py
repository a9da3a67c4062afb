"""Many processes and one run directory: one holds it, the others are told so."""

import os
import time
from pathlib import Path

from minibert.train import claim

from .common import Tally, ended, fork, kill, refusal

CONTENDERS = 4


def two_runs(tally: Tally, count: int, directory: Path) -> None:
    """A second run is refused, with the pid of the first; killed, the first holds the directory no longer."""
    directory = directory / "run"
    for n in range(count):
        reader, writer = os.pipe()

        def hold(writer=writer):
            with claim(directory):
                os.write(writer, b"x")
                time.sleep(60)

        pid = fork(hold)
        with tally.trial(f"second run {n}"):
            assert os.read(reader, 1) == b"x"
            refusal(lambda: claim(directory).__enter__(), ValueError, names=f"in use by another process (pid {pid})")
            kill(pid)
            with claim(directory):
                pass
        os.close(reader), os.close(writer)


def contenders(tally: Tally, count: int, directory: Path) -> None:
    """Processes that claim the directory at once, again and again, while it is made and removed: never two inside."""
    run_dir, inside = directory / "run", directory / "inside"

    def contend(times: int) -> None:
        for _ in range(times):
            try:
                with claim(run_dir):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    assert run_dir.is_dir()
                    inside.unlink()
            except ValueError:
                pass

    pids = [fork(lambda: contend(count // CONTENDERS)) for _ in range(CONTENDERS)]
    tally.tried = count // CONTENDERS * CONTENDERS
    for n, pid in enumerate(pids):
        with tally.trial(f"contender {n}", counts=False):
            assert ended(pid) == 0, "it was let in beside another, or failed"
            tally.held += count // CONTENDERS
