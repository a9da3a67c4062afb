"""Launches by `minibert_kernels.jit`: outside of the interpreter, in a process of its own, with a driver that stands in
for a GPU's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minibert_kernels import _triton

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="needs triton")


@pytest.mark.parametrize("how", ["compiled", "every kind of argument"])
def test_a_launch_gives_the_launcher_what_triton_gives_it(how, tmp_path):
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launched.py")
    path = os.pathsep.join([str(Path(_triton.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), how], capture_output=True, text=True,
        env=outside | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
