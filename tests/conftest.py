"""Where there is no GPU, the kernels run in Triton's interpreter: that is decided when Triton is first imported."""

import dataclasses
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tests run side by side, a process a core


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Without what takes half of the interpreter's time and has no effect: it exchanges all functions of its language
    at each call of a function from a kernel, although the launch has done so, and computes whether integers overflow,
    which it asserts in its debug mode alone."""
    from minibert_kernels import dispatch  # not before Triton's interpreter is chosen

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


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A directory of a small masked language model, to start fine-tuning from."""
    from small import TOKENIZER, build  # not before Triton's interpreter is chosen

    from minibert import BertForMaskedLM

    directory = tmp_path_factory.mktemp("weights")
    build(BertForMaskedLM, initializer_range=0.1).save_pretrained(directory, TOKENIZER)
    return directory


@pytest.fixture
def poisoned():
    """New memory is full of NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=100, metavar="N", help="seeds of each fuzz test (make fuzz: 2000)")


def pytest_generate_tests(metafunc):
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("--fuzz")))
