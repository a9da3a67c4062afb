import logging
import os
import subprocess
import sys

import pytest
import torch

import minibert_kernels
from minibert_kernels import dispatch

CPU = torch.zeros(3)


@pytest.fixture
def compiled(monkeypatch):
    """As where Triton is not interpreted."""
    monkeypatch.setattr(dispatch, "_INTERPRETING", False)
    dispatch._say_once.cache_clear()


class OnGpu:
    """What dispatch looks at, of a tensor on a GPU that is not there."""

    def __init__(self, dtype=torch.float32):
        self.device, self.dtype = torch.device("cuda"), dtype


def test_an_unknown_backend_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="backend='fused' is not one of auto, triton, reference"):
        dispatch.use_triton("op", "fused", CPU)


def test_the_reference_is_taken_when_asked_for():
    assert not dispatch.use_triton("op", "reference", OnGpu())


def test_auto_takes_triton_on_a_gpu(compiled):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert dispatch.use_triton("op", "auto", OnGpu(dtype))
        assert dispatch.use_triton("op", "triton", OnGpu(dtype))


def test_auto_says_once_why_it_took_the_reference(compiled, caplog):
    with caplog.at_level(logging.INFO, "minibert_kernels"):
        assert not any(dispatch.use_triton("op", "auto", CPU) for _ in range(3))
        assert not dispatch.use_triton("other", "auto", OnGpu(torch.float64))
    assert [r.getMessage() for r in caplog.records] == [
        "op runs its reference: 'triton' needs CUDA tensors, got cpu",
        "other runs its reference: 'triton' takes float32, float16, bfloat16, got float64",
    ]


def test_an_explicit_triton_raises_instead_of_falling_back(compiled):
    with pytest.raises(ValueError, match="op: backend='triton' needs CUDA tensors, got cpu: use backend='reference'"):
        dispatch.use_triton("op", "triton", CPU)
    with pytest.raises(ValueError, match="op: backend='triton' takes no bias: use backend='reference'"):
        dispatch.use_triton("op", "triton", OnGpu(), unsupported="takes no bias")


@pytest.mark.skipif(not dispatch.interpreting(), reason="Triton compiles here")
def test_the_interpreter_runs_on_cpu_when_asked_for_by_name_but_not_in_bfloat16():
    assert dispatch.use_triton("op", "triton", CPU)
    assert not dispatch.use_triton("op", "auto", CPU), "it is too slow to be a default"
    with pytest.raises(ValueError, match="takes float32, float16, got bfloat16"):
        dispatch.use_triton("op", "triton", CPU.bfloat16())


def test_a_missing_triton_is_named_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(dispatch, "AVAILABLE", False)
    assert not dispatch.use_triton("op", "auto", OnGpu())
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        dispatch.use_triton("op", "triton", OnGpu())


def test_explain_says_what_auto_does(compiled):
    files = {"triton": "layer_norm.py", "reference": "reference.py"}
    supported = {"runs": "triton", "why": "the device and dtype are supported"}
    assert dispatch.explain("dropout_add_norm", "cuda") == supported | files
    missing = {"runs": "reference", "why": "'triton' needs CUDA tensors, got cpu"}
    assert dispatch.explain("dropout_add_norm", "cpu") == missing | files
    why = dispatch.explain("attention", "cuda", torch.float64)["why"]
    assert why == "'triton' takes float32, float16, bfloat16, got float64"
    assert dispatch.explain("attention_probs", "cuda")["triton"] is None


def test_an_op_that_is_switched_off_runs_its_reference_until_it_is_on_again(compiled):
    with dispatch.disabled("attention"):
        assert not dispatch.use_triton("attention", "triton", OnGpu())
        assert dispatch.use_triton("dropout_add_norm", "triton", OnGpu())
        with dispatch.disabled("dropout_add_norm"):
            assert not dispatch.use_triton("attention", "auto", OnGpu())
        assert dispatch.explain("attention", "cuda")["why"] == "'triton' is switched off by disabled('attention')"
    assert dispatch.use_triton("attention", "auto", OnGpu())


def test_an_op_without_a_kernel_cannot_be_switched_off():
    with pytest.raises(ValueError, match="op='atention' is not one of attention, "), dispatch.disabled("atention"):
        pass


def test_the_ops_import_and_run_where_triton_is_missing_alone_of_minibert():
    code = """
import sys
sys.modules["triton"] = None
import minibert_kernels as kernels, torch
x = torch.randn(5, 37)
out = kernels.dropout_add_norm(x, x, torch.ones(37), None, dropout=0.1)
q = torch.randn(5, 2, 16)
kernels.attention(q, q, q, torch.tensor([0, 2, 5], dtype=torch.int32), 3)
assert not any(name.split(".")[0] == "minibert" for name in sys.modules)
print(tuple(out.shape))
"""
    folder = os.path.dirname(os.path.dirname(minibert_kernels.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folder}
    )
    assert done.stdout.strip() == "(5, 37)", done.stderr
    assert not os.path.exists(os.path.join(folder, "__init__.py")), "transformers would import it as `kernels`"


def test_the_package_exports_the_ops_and_nothing_else():
    others = {"attention_probs", "attention_schedule"}
    assert set(minibert_kernels.__all__) == {*minibert_kernels.TRITON_OPS, *others}
    assert all(callable(getattr(minibert_kernels, name)) for name in minibert_kernels.__all__)
    for name, file in minibert_kernels.TRITON_OPS.items():
        assert getattr(minibert_kernels, name).__module__ == f"minibert_kernels.{file.removesuffix('.py')}"
