"""What a run says: `metrics.jsonl` for programs, a progress bar on a terminal, a line now and then elsewhere."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ..files import write_atomically
from .writers import WRITERS, numbers_of

METRICS = "metrics.jsonl"
TIMING_FIELDS = ("seconds", "tokens_per_second")  # the only fields that differ between two equal runs
SHOWN = ("loss", "mlm_loss", "nsp_loss", "sop_loss", "clm_loss", "learning_rate", "tokens_per_second")
QUIET_SECONDS = 10.0


def read_metrics(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`. A last line that was cut off while being written is dropped.

    Raises:
        ValueError: another line is no JSON object with a whole number `step`; names file and line.
    """
    records = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # what follows the last newline: nothing, or half a record
            break
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("step is not a whole number")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is not a record of a run ({error}): remove the line") from None
        records.append(record)
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the records up to `step`, atomically."""
    path = Path(path)
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_atomically(path, "".join(map(_line, kept)))


class MetricsLog:
    """Appends records to a `metrics.jsonl`; each is in the file when `write` returns.

    `writer`, a word of `WRITERS`, gets their numbers too.
    """

    def __init__(self, path: Path, writer: str | None = None):
        self.path = Path(path)
        self.writer = writer and WRITERS[writer](self.path.parent)

    def __enter__(self) -> "MetricsLog":
        self.file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        if self.writer:
            self.writer.close()
        # what a failed flush left behind would fail again, and hide the first error
        with contextlib.suppress(OSError):
            self.file.close()

    def write(self, record: Mapping) -> None:
        """Append one record; a number that is not finite becomes null."""
        try:
            self.file.write(_line(record))
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from error
        if self.writer:
            self.writer.write(record["step"], numbers_of(record))

    def sync(self) -> None:
        """Flush to the disk: a checkpoint that survives a power cut must not survive its log."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from error


class Progress:
    """A bar on a terminal; elsewhere at most a line every ten seconds, and one for every evaluation."""

    def __init__(self, total: int | None, start: int = 0, stream=None):
        self.total, self.start, self.stream = total, start, sys.stderr if stream is None else stream
        self.bar, self.last = None, -math.inf

    def __enter__(self) -> "Progress":
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            self.bar = RichProgress(*columns, console=Console(file=self.stream))
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.start, text="")
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def show(self, record: Mapping) -> None:
        evaluated = {key: value for key, value in record.items() if key.startswith("eval_")}
        text = "  ".join(f"{key} {_short(record[key])}" for key in (*SHOWN, *evaluated) if key in record)
        if self.bar:
            self.bar.update(self.task, text=text)
            if evaluated:
                self.bar.console.print(f"step {record['step']}  {text}", highlight=False)
        elif evaluated or time.monotonic() - self.last >= QUIET_SECONDS:
            self.last = time.monotonic()
            of = "" if self.total is None else f"/{self.total}"
            print(f"step {record['step']}{of}  {text}", file=self.stream, flush=True)


def _line(record: Mapping) -> str:
    return json.dumps(jsonable(record), allow_nan=False) + "\n"


def jsonable(value):
    """What JSON can hold: a number for one of NumPy or torch, None for one that is not finite, as what is undefined."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, Mapping):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value) -> str:
    return (
        f"{value:,.0f}"
        if isinstance(value, float) and abs(value) >= 1000
        else f"{value:.4g}"
        if value is not None
        else "nan"
    )
