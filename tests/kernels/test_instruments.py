"""The instruments themselves, on kernels of a few lines."""

import pytest
import torch
from instruments import bfloat16, few_programs, guarded, to_bfloat16, to_float32, without_races
from quick_interpreter import quick
from test_every_op import CALLS
from triton.runtime.errors import InterpreterError

from minibert_kernels import dispatch
from minibert_kernels._triton import tl, triton

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="instruments of the interpreter")


@triton.jit
def _shift_kernel(x_ptr, out_ptr, n, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + READ, mask=at < n)
    tl.store(out_ptr + at + WRITE, x, mask=at < n)


@triton.jit
def _all_to_one_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def shift(x, out, read=0, write=0):
    _shift_kernel[(4,)](x, out, 64, READ=read, WRITE=write, BLOCK=16)


def test_an_access_outside_of_a_launchs_tensors_is_refused_before_it_happens():
    x, out = torch.ones(64), torch.zeros(80)
    for read, write, verb in ((1, 0, "reads"), (-1, 0, "reads"), (0, 17, "writes"), (0, -1, "writes")):
        with guarded(), pytest.raises(InterpreterError, match=f"_shift_kernel: program .* {verb} outside"):
            shift(x, out[8:72], read, write)
    with guarded():
        shift(x, out[8:72])
    assert out.sum() == 64


def test_programs_that_share_what_one_writes_race():
    x = torch.zeros(80)
    with without_races():
        shift(x, x)
        shift(x, torch.zeros(80), read=8)
    with pytest.raises(AssertionError, match=r"_shift_kernel: programs \[0, 1\] share an address"), without_races():
        shift(x, x, read=8)  # a program reads what its neighbour writes
    with pytest.raises(AssertionError, match="share an address"), without_races():
        _all_to_one_kernel[(2,)](x)  # an atomic: in which order they add decides the bits


@triton.jit
def _count_kernel(out_ptr, n, BLOCK: tl.constexpr):
    for at in tl.range(tl.program_id(0), n, 2):
        tl.store(out_ptr + at, at)


@triton.jit
def _write_and_read_kernel(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, at)
    tl.store(x_ptr + at, tl.load(x_ptr + BLOCK - 1 - at))


def test_a_program_that_reads_what_it_wrote_races():
    with pytest.raises(AssertionError, match="reads what other threads of it have written"), without_races():
        _write_and_read_kernel[(1,)](torch.zeros(16, dtype=torch.int32), BLOCK=16)


def test_few_programs_run_both_ends_of_a_grid_and_of_a_loop():
    out, all_of_it = torch.zeros(1000, dtype=torch.int32), torch.zeros(100, dtype=torch.int32)
    with few_programs(ends=3):
        _count_kernel[(2,)](out, 1000, BLOCK=1)
        _count_kernel[(2,)](all_of_it, 100, BLOCK=1)
    assert out.nonzero().squeeze(1).tolist() == [1, 2, 3, 4, 5, *range(994, 1000)]
    assert all_of_it.tolist() == list(range(100))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, product_ptr, sum_ptr, dot_ptr, less_ptr, wide_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(product_ptr + at, x * y)
    tl.store(sum_ptr + at, x + 1.25)
    tl.store(dot_ptr + at, tl.dot(x, y).to(tl.bfloat16))
    tl.store(less_ptr + at, x < y)
    tl.store(wide_ptr + at, tl.exp(x.to(tl.float32)) * tl.where(x < 0, x, y))


def test_bfloat16_in_the_interpreter_is_that_of_torch():
    x, y = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    product, total, dot = (torch.empty_like(x) for _ in range(3))
    less, wide = torch.empty(16, 16, dtype=torch.bool), torch.empty(16, 16)
    with bfloat16():
        _arithmetic_kernel[(1,)](x, y, product, total, dot, less, wide, BLOCK=16)
    assert torch.equal(product, x * y)
    assert torch.equal(total, x + 1.25)
    assert torch.equal(less, x < y)
    assert torch.equal(dot, (x.float() @ y.float()).bfloat16())
    torch.testing.assert_close(wide, x.float().exp() * torch.where(x < 0, x, y).float())


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan_and_infinity():
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 65504.0, 3.4e38, float("inf"), -float("inf"), 1e-40, -0.0])
    values = torch.cat([values, torch.randn(1000)])
    bits = to_bfloat16(values.numpy())
    assert torch.equal(torch.from_numpy(bits.view("int16")), values.bfloat16().view(torch.int16))
    assert torch.equal(torch.from_numpy(to_float32(bits)), values.bfloat16().float())
    assert torch.from_numpy(to_float32(to_bfloat16(torch.tensor([float("nan")]).numpy()))).isnan().all()


@pytest.mark.parametrize("name", ["attention", "bias_geglu", "embed_norm", "linear_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_quick_interpreter_gives_the_bits_of_triton_s_own(name, dtype, quick_interpreter):
    quicks = CALLS[name].run(dtype=dtype)
    quick_interpreter.close()
    try:
        owns = CALLS[name].run(dtype=dtype)
    finally:
        quick_interpreter.enter_context(quick())
    assert quicks.keys() == owns.keys()
    for key in owns:
        assert torch.equal(quicks[key], owns[key]), key
