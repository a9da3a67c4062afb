"""Where there is no GPU, the kernels run in Triton's interpreter: that is decided when Triton is first imported."""

import os
from contextlib import ExitStack

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tests run side by side, a process a core; the variable is for the processes that they start
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Closed, the interpreter is Triton's own."""
    from minibert_kernels import dispatch  # not before Triton's interpreter is chosen

    with ExitStack() as stack:
        if dispatch.interpreting():
            from quick_interpreter import quick

            stack.enter_context(quick())
        yield stack


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
    parser.addoption("--fuzz", type=int, default=40, metavar="N", help="seeds of each fuzz test (make test-all: 100)")


def pytest_generate_tests(metafunc):
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("--fuzz")))
