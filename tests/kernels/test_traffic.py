"""Bytes moved, counted in the interpreter."""

import dataclasses

import pytest
import torch

from minibert_kernels import dispatch, traffic, xray
from minibert_kernels._triton import tl, triton

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="counts in the interpreter")


@pytest.mark.slow  # `make xray` holds them to the same limits
@pytest.mark.parametrize("case", traffic.cases(), ids=lambda case: f"{case.op} {case.label}")
def test_default_plans_move_hardly_more_than_the_minimum(case):
    found = traffic.count(case)
    assert found.forward_over_minimum >= 1 and (found.backward_over_minimum >= 1 or not case.backward)
    assert xray.faults([], [dataclasses.asdict(found)], xray.load_limits()) == []
    assert found.saved >= 0


def test_every_op_with_a_kernel_is_counted():
    from minibert_kernels import TRITON_OPS

    assert {case.op for case in traffic.cases()} == set(TRITON_OPS)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, stride, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column * stride, mask=column < n)
    if TWICE:
        x += tl.load(x_ptr + column * stride, mask=column < n)
    tl.store(out_ptr + column, x, mask=column < n)


def copied(n, stride=1, twice=False, programs=4):
    """Bytes that a copy of n float32 moves."""
    x, out = torch.zeros(n * stride + 8), torch.zeros(n + 8)
    x, out = (t[(-t.data_ptr() // 4) % 8 :] for t in (x, out))  # at the border of a sector
    with traffic.counted() as counted:
        _copy_kernel[(programs,)](x, out, n, stride, TWICE=twice, BLOCK=64)
    return counted.bytes


def test_a_copy_reads_and_writes_each_sector_once():
    assert copied(256) == 2 * 256 * 4
    assert copied(100) == 2 * 416, "the last sector of 32 bytes is moved whole"


def test_what_a_program_reads_again_counts_again():
    assert copied(256, twice=True) == 3 * 256 * 4


def test_every_second_element_moves_whole_sectors():
    assert copied(256, stride=2) == 3 * 256 * 4


def test_what_several_programs_read_counts_once():
    assert copied(256, stride=0) == 32 + 256 * 4


def test_the_patches_are_gone_afterwards():
    from triton.runtime import interpreter

    before = interpreter.InterpreterBuilder.create_masked_load, interpreter.GridExecutor.__call__
    with pytest.raises(ZeroDivisionError), traffic.counted():
        _ = 1 / 0
    assert before == (interpreter.InterpreterBuilder.create_masked_load, interpreter.GridExecutor.__call__)
