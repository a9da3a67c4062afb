"""Fixtures of the kernel tests."""

import harness
import pytest
import torch

from minibert_kernels import dispatch


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def few_draws(monkeypatch):
    """A test that must fail repeats its comparison with twice as many draws, not with sixteen times as many."""
    monkeypatch.setattr(harness, "MORE", 2)


@pytest.fixture(autouse=True)
def interpreted_bfloat16(request):
    """The interpreter takes bfloat16, as `instruments` emulates it, but where a test asks what users are told."""
    if not dispatch.interpreting() or request.path.name == "test_dispatch.py":
        yield
        return
    from instruments import bfloat16

    with bfloat16():
        yield
