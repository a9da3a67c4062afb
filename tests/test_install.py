"""What is pinned and what is allowed fits what torch itself requires, and a module runs as the command does."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minibert_kernels._triton import REQUIRED_BY_TORCH, SUPPORTED

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
PINS = {canonicalize_name(name): version for name, version in PINNED}


def allowed() -> dict[str, Requirement]:
    """What setup.py requires, by name."""
    listed = re.findall(r'^\s+"(\w+[><=~].*?)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    return {requirement.name: requirement for requirement in map(Requirement, listed)}


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def test_the_pinned_triton_is_the_one_that_the_pinned_torch_requires():
    assert PINS["triton"] == REQUIRED_BY_TORCH[minor(PINS["torch"])]
    assert PINS["triton"] in SUPPORTED


def test_torch_installed_here_requires_what_the_table_says():
    required = [Requirement(text) for text in metadata.requires("torch") or () if text.startswith("triton")]
    if not required:
        pytest.skip("this build of torch requires no triton")
    fits = [triton for triton in SUPPORTED if required[0].specifier.contains(triton)]
    assert fits == [REQUIRED_BY_TORCH[minor(metadata.version("torch"))]]


def test_setup_allows_just_the_versions_that_were_tried():
    ranges = allowed()
    for torch, triton in REQUIRED_BY_TORCH.items():
        assert ranges["torch"].specifier.contains(f"{torch}.0") and triton in SUPPORTED
    for triton in SUPPORTED:
        assert ranges["triton"].specifier.contains(triton)
    numbers = [int(torch.split(".")[1]) for torch in REQUIRED_BY_TORCH]
    for number in (min(numbers) - 1, max(numbers) + 1):
        assert not ranges["torch"].specifier.contains(f"2.{number}.0")
    numbers = [int(triton.split(".")[1]) for triton in SUPPORTED]
    for number in (min(numbers) - 1, max(numbers) + 1):
        assert not ranges["triton"].specifier.contains(f"3.{number}.0")


def test_every_pin_is_within_what_setup_allows():
    ranges = allowed()
    assert {"torch", "triton", "numpy", "tokenizers", "safetensors"} <= set(ranges)
    for name, requirement in ranges.items():
        assert requirement.specifier.contains(PINS[name]), f"{name}=={PINS[name]} is not {requirement.specifier}"


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "minibert", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: minibert VERB" in done.stdout
