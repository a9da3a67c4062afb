"""Kernels with faults that `xray` must find: `python planted.py spill matrix` prints what it says of these two."""

import dataclasses
import json
import sys

import torch

from minibert_kernels import traffic, xray
from minibert_kernels._triton import tl, triton
from minibert_kernels.launch import AotCase, aot_arguments


@triton.jit
def _centre_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + place)
    x -= tl.sum(x, axis=0)[None, :] / BLOCK
    x -= tl.sum(x, axis=1)[:, None] / BLOCK
    tl.store(out_ptr + place, x)


@triton.jit
def _product_kernel(x_ptr, y_ptr, out_ptr, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + place), tl.load(y_ptr + place)
    if UNITS:
        out = tl.dot(x, y)
    else:
        out = tl.sum(x.to(tl.float32)[:, :, None] * y.to(tl.float32)[None, :, :], axis=1)
    tl.store(out_ptr + place, out)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, out_ptr, n, CALL: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    out = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(n):
        x, y = tl.load(x_ptr + i * BLOCK + place), tl.load(y_ptr + i * BLOCK + place)
        out = tl.dot(x, y, out)
        if CALL:
            tl.device_print("step", i)
    tl.store(out_ptr + place, out)


@triton.jit
def _double_kernel(x_ptr, out_ptr, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    y = tl.load(x_ptr + place) if TWICE else x
    tl.store(out_ptr + place, x + y)


def compiled(fn, label, num_warps, matmul=False, num_stages=1, **values):
    case = AotCase(
        op="planted", direction="fwd", label=label, fn=fn, **aot_arguments(fn, **values), num_warps=num_warps,
        num_stages=num_stages, matmul=matmul,
    )  # fmt: skip
    return xray.compile_case(case, 90)


def spill():
    """The same tile for one warp, of which each thread would have to hold 512 values, and for sixteen."""
    plans = (("one warp", 1), ("sixteen warps", 16))
    return [compiled(_centre_kernel, label, n, x_ptr="*fp32", out_ptr="*fp32", BLOCK=128) for label, n in plans], []


def matrix():
    """A product by elements, and by the matrix units."""
    values = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32"}
    by_elements = compiled(_product_kernel, "elements", 4, True, UNITS=False, BLOCK=16, **values)
    return [by_elements, compiled(_product_kernel, "units", 4, True, UNITS=True, BLOCK=64, **values)], []


def serialized():
    """Products in a loop that calls a function, which none of them may be under way at, and without it."""
    values = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "n": 7, "BLOCK": 64}
    plans = (("call", True), ("no call", False))
    return [compiled(_sum_kernel, label, 4, True, 2, CALL=call, **values) for label, call in plans], []


def twice():
    """An input read twice, and once."""

    def double(x, again):
        out = torch.empty_like(x)
        _double_kernel[(16,)](x, out, TWICE=again, BLOCK=64)
        return out

    x = torch.zeros(1024)
    cases = [
        traffic.Case(
            op="planted", label=label, call=lambda x, again=again: double(x, again).detach(), activations=(x,),
            forward=2 * x.nbytes, backward=0,
        )
        for label, again in (("twice", True), ("once", False))
    ]  # fmt: skip
    return [], [dataclasses.asdict(traffic.count(case)) for case in cases]


if __name__ == "__main__":
    found = {name: xray.faults(*globals()[name](), xray.load_limits()) for name in sys.argv[1:]}
    print(json.dumps(found))
