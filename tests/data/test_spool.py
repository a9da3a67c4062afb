"""Examples and rows on disk are read as those of a list."""

import subprocess
import sys
from pathlib import Path

import pytest
from toy_start import toy_start

from minibert.data.rows import Row
from minibert.data.spool import Part, Spool, take
from minibert.tasks.base import Example

ITEMS = [Example(("a", "b" * n), ("x", n), f"file:{n}", None, {"id": n}) for n in range(7)]


@pytest.mark.parametrize("items", [ITEMS, [Row([n], [0], (1,), n, [2], extra=(n, "t")) for n in range(7)], []])
def test_what_is_spooled_comes_back_in_any_order_and_as_often_as_asked(items):
    spool = Spool(iter(items))
    assert list(spool) == list(spool) == items and len(spool) == len(items)
    for index in (3, 0, 6, -1, -7) if items else ():
        assert spool[index] == items[index]
    for index in (len(items), -len(items) - 1):
        with pytest.raises(IndexError):
            spool[index]


def test_parts_are_views():
    spool = Spool(ITEMS)
    assert list(spool[1:6:2]) == ITEMS[1:6:2] and list(spool[:-1]) == ITEMS[:6]
    part = Part(spool, [5, 0, 5])
    assert part[-1] == ITEMS[5] and list(part[1:]) == [ITEMS[0], ITEMS[5]]
    for index in (len(part), -len(part) - 1):
        with pytest.raises(IndexError):
            part[index]
    assert list(part) == [ITEMS[5], ITEMS[0], ITEMS[5]] and len(part) == 3
    assert take(ITEMS, [1, 0]) == [ITEMS[1], ITEMS[0]]
    assert isinstance(take(spool, [1]), Part)


def test_what_is_taken_from_the_middle_of_a_walk_does_not_disturb_it():
    spool = Spool(ITEMS)
    walked = []
    for item in spool:
        assert spool[0] == ITEMS[0]
        walked.append(item)
    assert walked == ITEMS


FITTED = """
import resource, sys
from minibert.cli import main
file, init, out = sys.argv[1:]
flags = ["--train", file, "--valid-fraction", "0.01", "--init", init, "--out", out, "--steps", "2"]
assert main(["finetune", *flags]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_ten_times_the_training_examples_need_no_more_memory(tmp_path):
    """In a list 180,000 examples and their rows have over 250 MB, as strings and integers of Python."""
    start, peaks = toy_start(tmp_path / "start", "red blue green cat dog bird"), []
    for count in (20_000, 200_000):
        file = tmp_path / f"{count}.tsv"
        lines = (f"{'red' if n % 2 else 'blue'} cat dog bird green cat dog {n}\t{n % 2}\n" for n in range(count))
        file.write_text("text\tlabel\n" + "".join(lines))
        call = [sys.executable, "-c", FITTED, str(file), str(start), str(tmp_path / f"run-{count}")]
        result = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 80, peaks
