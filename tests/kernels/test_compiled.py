"""The kernels compiled for four architectures, without a GPU: in a process of its own, outside the interpreter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minibert_kernels import _triton, xray

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="needs triton")
KERNELS = Path(xray.__file__).parents[1]
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def python(*arguments, tmp_path, **environment):
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path,
        env=outside | {"PYTHONPATH": str(KERNELS), "TRITON_CACHE_DIR": str(tmp_path / "cache")} | environment,
    )  # fmt: skip


def compile_plans(tmp_path, *options):
    done = python("-m", "minibert_kernels.xray", "--json", *options, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for row in rows:
        assert row["spills"] == 0 and row["registers"] > 0, row
        assert set(row["matrix"]) == ({MATRIX[row["arch"]]} if row["op"] == "attention" else set()), row
    return {(row["op"], row["arch"]) for row in rows}, len(rows)


def test_the_plans_of_bert_base_compile_for_four_architectures_without_a_spill(tmp_path):
    found, _ = compile_plans(tmp_path, "--only", "d=64|768 columns, dropout")
    assert found == {(op, arch) for op in ("attention", "dropout_add_norm", "embed_norm") for arch in MATRIX}


@pytest.mark.slow
def test_every_default_plan_compiles_for_four_architectures_without_a_spill(tmp_path):
    _, count = compile_plans(tmp_path)
    assert count >= 100


def test_a_planted_spill_and_a_missing_matrix_instruction_are_found(tmp_path):
    code = """
import dataclasses
from minibert_kernels import xray
case = xray.cases(90, "dropout_add_norm bwd 768 columns")[0]
print(*xray.compile_case(case, 90, maxnreg=32).faults(), sep="\\n")
print(*xray.compile_case(dataclasses.replace(case, matmul=True), 90).faults(), sep="\\n")
"""
    done = python("-c", code, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    spill, matrix = done.stdout.splitlines()
    assert spill.startswith("dropout_add_norm bwd 768 columns on sm_90 spills ")
    assert int(spill.split()[-2]) > 64
    assert matrix == "dropout_add_norm bwd 768 columns on sm_90 has no HGMMA instruction"


def test_the_interpreter_is_refused_in_one_line(tmp_path):
    done = python("-m", "minibert_kernels.xray", tmp_path=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "xray: error: needs Triton's compiler: unset TRITON_INTERPRET"


def test_tables_have_a_line_a_row_and_a_column_an_architecture():
    common = {"op": "attention", "label": "d=64", "num_warps": 4, "num_stages": 2, "spills": 0, "stack": 0}
    rows = [
        xray.Row(
            direction=direction, kernel=f"_{direction}_kernel", arch=arch, registers=arch + 1, shared=512, matmul=True,
            matrix={"HMMA": 8}, **common,
        )
        for arch in (80, 120)
        for direction in ("fwd", "bwd")
    ]  # fmt: skip
    text = xray.table(rows).splitlines()
    assert len(text) == 5 and " ".join(text[1].split()) == "attention fwd d=64 80 4 2 81 0 0 512 8 HMMA"
    counts = [
        {
            "op": "attention",
            "label": "S=128",
            "forward_over_minimum": 1.008,
            "backward_over_minimum": 1,
            "saved": 1032.0,
        }
    ]
    ops, plans = (part.splitlines() for part in xray.markdown(rows, counts).split("\n\n"))
    assert re.fullmatch(r"\| `attention` \| S=128 \| `attention.py` \| \d+ \| 1.008 \| 1 \| 1032 \|", ops[2])
    assert plans == [
        "| op | plan | kernel | sm_80 | sm_120 |",
        "|---|---|---|---|---|",
        "| `attention` | fwd, d=64 | `_fwd_kernel` | 81 / 0 / 512 / 8 HMMA | 121 / 0 / 512 / 8 HMMA |",
        "| `attention` | bwd, d=64 | `_bwd_kernel` | 81 / 0 / 512 / 8 HMMA | 121 / 0 / 512 / 8 HMMA |",
    ]
