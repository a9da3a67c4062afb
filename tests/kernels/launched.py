"""What `Kernel.run` hands to a launcher, beside what Triton would: run by test_jit.py in a process of its own.

A driver stands in for a GPU's, so that launchers are called and nothing runs.
"""

import itertools
import sys
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from minibert_kernels.jit import kernel

calls = []  # (launcher, whatever it was given)


@kernel(varying=("n",))
def touch(x_ptr, other_ptr, n, stride, scale, group, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at * stride, scale + group[1], mask=at < n)


class Own(torch.Tensor):
    pass


class Launcher:
    def __init__(self, source=None, metadata=None):
        pass

    def __call__(self, *given):
        calls.append((self, given))


class Driver:
    launcher_cls, device = Launcher, 0
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (object(), name, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 7 + device


def same(first, second):
    """Whether two launches go to one launcher with the same arguments; launch metadata is made for each."""
    (launcher, given), (other, given_too) = first, second
    return launcher is other and len(given) == len(given_too) and all(
        a is b or (i != 6 and a == b and type(a) is type(b)) or (i == 6 and type(a) is type(b))
        for i, (a, b) in enumerate(zip(given, given_too, strict=True))
    )  # fmt: skip


def check(args, grid, options, long_way):
    """Launch twice as the package does and once as Triton does; the second launch must not go Triton's way."""
    del calls[:]
    touch[grid](*args, **options)
    long_way.clear()
    touch[grid](*args, **options)
    assert not long_way, "the second launch was bound by Triton again"
    triton.JITFunction.run(touch, *args, grid=grid, warmup=False, **options)
    assert len(calls) == 3 and same(calls[0], calls[2]) and same(calls[1], calls[2]), (args, options)


def main(compiled):
    driver, long_way = Driver(), []
    triton.runtime.driver.set_active(driver)
    bind = triton.JITFunction.run

    def counted(self, *args, **options):
        long_way.append(args)
        return bind(self, *args, **options)

    triton.JITFunction.run = counted
    x, half = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    if compiled:
        # a real CompiledKernel, whose module is loaded by the driver above
        check((x, None, 5, 16, 0.5, (x, 3)), (2,), {"WIDE": True, "BLOCK": 16, "num_warps": 4}, long_way)
        check((x, None, 9, 16, 0.7, (x, 3)), (3, 2), {"WIDE": True, "BLOCK": 16, "num_warps": 4}, long_way)
    else:
        import triton.compiler as compiler

        compiler.compile = lambda source, **_: SimpleNamespace(
            run=Launcher(), function=object(), packed_metadata=object(), launch_metadata=lambda *_: None,
        )  # fmt: skip
        options = {"WIDE": (True, False), "num_warps": (4, 8)}
        for pointer, other, n, stride, scale, group, (wide, warps), device in itertools.product(
            (x, x[1:], half, torch.nn.Parameter(x), x.as_subclass(Own)), (None, half[1:]), (1, 16, 5, 2**31),
            (1, True, 16, 17, -17, 2**31, 2**33), (0.5, 1.0), ((None, 3), (x, 16), (x, 1)),
            itertools.product(*options.values()), (0, 1),
        ):  # fmt: skip
            driver.device = device
            given = {"WIDE": wide, "BLOCK": 16, "num_warps": warps}
            check((pointer, other, n, stride, scale, group), (1, 1, n % 7 + 1), given, long_way)
        known = len(touch.variants)
        for _ in range(3):
            touch[(1,)](torch.zeros(64).as_subclass(Own), None, 5, 16, 0.5, (x, 16), WIDE=True, BLOCK=16, num_warps=4)
        assert len(touch.variants) == known, "a tensor is part of the key"


if __name__ == "__main__":
    main(sys.argv[1] == "compiled")
