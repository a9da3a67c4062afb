"""Kernels in many programs: values, gradients, that no program touches what another writes, or what is not its own."""

import inspect

import pytest
import torch
from instruments import guarded, modules, without_races
from wide_calls import WIDE, lamb, mlm

from minibert_kernels import dispatch

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="looks into the interpreter")
WITHOUT_GRADIENT = {"_lamb_moments_kernel", "_lamb_update_kernel", "_mlm_mask_kernel"}


def assert_several(launches):
    """Every launch has several programs, and every strip of rows several tiles."""
    for launch in launches:
        assert max(launch.grid) > 1, f"{launch.kernel} has one program"
        if "_bwd" in launch.kernel and {"n_rows", "BLOCK_M"} <= launch.arguments.keys():
            tiles = launch.arguments["n_rows"] / launch.arguments["BLOCK_M"]
            assert tiles > launch.grid[0] > 1 or launch.grid[1:] > (1,), f"{launch.kernel} has a tile a strip"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WIDE)
def test_many_programs_give_the_reference_and_touch_nothing_of_each_other(name, dtype):
    with guarded(), without_races() as launches:
        WIDE[name].check(dtype)
    assert_several(launches.seen)
    assert {launch.kernel for launch in launches.seen} == WIDE[name].launches


def test_every_kernel_runs_in_many_programs():
    names = {
        name for module in modules() for name, value in vars(module).items()
        if name.endswith("_kernel") and inspect.isfunction(getattr(value, "fn", None))
    }  # fmt: skip
    assert names == WITHOUT_GRADIENT.union(*(call.launches for call in WIDE.values()))


def test_many_programs_of_lamb_touch_nothing_of_each_other():
    (ours, step), (theirs, reference) = lamb(), lamb()
    with guarded(*(t for tensors in ours for t in tensors)), without_races() as launches:
        step(backend="triton")
    reference(backend="reference")
    assert_several(launches.seen)
    for name, mine, other in zip(("params", "grads", "exp_avgs", "exp_avg_sqs"), ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, msg=name)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_many_programs_of_mlm_mask_touch_nothing_of_each_other(unit):
    with guarded(), without_races() as launches:
        ours = mlm(unit)(backend="triton")
    assert_several(launches.seen)
    torch.testing.assert_close(ours, mlm(unit)(backend="reference"), rtol=0, atol=0)
