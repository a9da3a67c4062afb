"""The host suite: in a process of its own, outside the interpreter, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from minibert_kernels import _triton, launches

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="needs triton")
ROOT = Path(__file__).parents[2]


def suite(tmp_path, *options):
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "host", "--out", str(tmp_path), *options]
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=outside | own)


def test_a_call_s_host_time_stands_beside_the_barest_call_s(tmp_path):
    done = suite(tmp_path, "--tiny", "--rounds", "2", "--op", "^bias_gelu|^inference")
    assert done.returncode == 0, done.stderr
    [record] = tmp_path.glob("*.json")
    rows = json.loads(record.read_text())["rows"]
    timed = {(r["case"], r.get("direction"), r["provider"]): r for r in rows if "refused" not in r}
    for direction in ("fwd", "bwd"):
        assert {
            ("bias_gelu", direction, name) for name in ("minibert", "torch gelu", "empty Function", "x + r")
        } <= set(timed)
    assert ("inference, batch 1, 2 layers", None, "minibert") in timed
    for row in timed.values():
        assert row["timing"] == "CPU time" and 0 < row["seconds_low"] <= row["seconds"] and "load" in row
    whole, part = (timed[name, way, "minibert"]["seconds"] for name, way in (
        ("inference, batch 1, 2 layers", None), ("bias_gelu", "fwd")))  # fmt: skip
    assert whole > part, "a step has two of them"
    assert "× x + r" in done.stdout and "× baseline" not in done.stdout


def test_the_interpreter_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launches, "interpreting", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        main(["host", "--out", str(tmp_path), "--tiny", "--device", "cpu"])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "benchmarks: error: host: launches are recorded with Triton's compiler: unset TRITON_INTERPRET"
    )
