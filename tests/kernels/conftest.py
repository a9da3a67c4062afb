"""Fixtures of the kernel tests."""

import dataclasses

import pytest
import torch

from minibert_kernels import dispatch


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Without what takes half of the interpreter's time and has no effect: it exchanges all functions of its language
    at each call of a function from a kernel, although the launch has done so, and computes whether integers overflow,
    which it asserts in its debug mode alone."""
    if not dispatch.interpreting():
        yield
        return
    from triton.runtime import interpreter

    done = set()

    def call(self, *args, **kwargs):
        names = self.fn.__globals__
        languages = frozenset(name for name in ("tl", "core") if name in names)
        if languages - {"tl"} - done:  # Triton's own functions, which it never takes back
            interpreter._patch_lang(self.fn)
            done.update(languages)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield


@pytest.fixture(autouse=True)
def interpreted_bfloat16(request):
    """The interpreter takes bfloat16, as `instruments` emulates it, but where a test asks what users are told."""
    if not dispatch.interpreting() or request.path.name == "test_dispatch.py":
        yield
        return
    from instruments import bfloat16

    with bfloat16():
        yield
