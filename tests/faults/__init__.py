"""Faults, counted: each module breaks one thing on purpose and says how often minibert held.

`python -m tests.faults` prints the table of docs/trust.md; test_faults.py tries each fault a few times.
"""

import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import damage, disk, hostile, non_finite, ranks, resuming, saving, sharing
from .common import NotHere, Tally


@dataclass(frozen=True)
class Fault:
    """A name for the table, `run(tally, count, directory)`, and how often the page and `make test` try it."""

    name: str
    run: Callable[[Tally, int, Path], None]
    full: int
    quick: int


FAULTS = (
    Fault("SIGKILL at a random moment of a save", saving.kills_while_saving, 200, 12),
    Fault("SIGKILL before each file operation of a save", saving.kills_before_each_operation, 100, 6),
    Fault("SIGKILL in a random step, resumed", resuming.kills_at_random_steps, 20, 3),
    Fault("SIGTERM or SIGINT in a random step, resumed", resuming.polite_signals, 20, 2),
    Fault("a file of a checkpoint cut off", damage.truncations, 200, 12),
    Fault("a tensor file's header changed", damage.header_mutations, 200, 12),
    Fault("a bit of a tensor flipped", damage.bit_flips, 100, 6),
    Fault("weights without manifest, cut off or with another header", damage.without_manifest, 200, 20),
    Fault("disk full", disk.full, 20, 2),
    Fault("disk read-only", disk.read_only, 5, 1),
    Fault("no permission to write", disk.without_permission, 10, 2),
    Fault("a second run on a directory", sharing.two_runs, 10, 2),
    Fault("four processes claim a directory at once", sharing.contenders, 4000, 400),
    Fault("SIGKILL to one of two processes under torchrun", ranks.killed, 10, 1),
    Fault("loss or gradient not finite, logged or not", non_finite.not_finite, 6, 6),
    Fault("the same, to be passed over", non_finite.passed_over, 6, 1),
    Fault("hostile pickle", hostile.pickles, 12, 12),
    Fault("hostile path in an index of shards", hostile.index_paths, 12, 12),
)


@dataclass(frozen=True)
class Attempt:
    tried: int
    held: int
    problems: list[str]
    seconds: float
    skipped: str | None = None


def attempt(fault: Fault, count: int) -> Attempt:
    """Try a fault `count` times, in a directory of its own."""
    tally, started, skipped = Tally(), time.monotonic(), None
    logging.disable(logging.WARNING)
    try:
        # what the runs say of their progress is of no interest
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
            fault.run(tally, count, Path(directory))
    except NotHere as reason:
        skipped = f"not tried: {reason}"
    except Exception as error:
        tally.problems.append(f"the trials themselves: {type(error).__name__}: {error}")
    finally:
        logging.disable(logging.NOTSET)
    return Attempt(tally.tried, tally.held, tally.problems, time.monotonic() - started, skipped)
