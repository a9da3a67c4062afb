"""`@kernel`: a function that Triton compiles, with a shorter way to a launch.

Triton binds and specialises the arguments of every launch, which takes the host as long as five additions of tensors.
The first launch of a variant goes that way. A later one finds what was compiled by a key that tells apart at least what
Triton does, and hands it the arguments just as Triton would. While hooks of Triton's see launches or passes of the
compiler, every launch goes Triton's way.
"""

import torch

from ._triton import AVAILABLE, triton
from .dispatch import interpreting
from .op import PLAIN

_COMPILATION = (
    "instrumentation_mode",
    "fpsan_homomorphic_casts",
)  # knobs that change the code; not all Tritons have all


def _kinds(args):
    """What Triton specialises on: dtype and alignment of tensors, range, divisibility and oneness of integers."""
    kinds = []
    add = kinds.append
    for value in args:
        kind = type(value)
        if kind is int:
            add(value if value == 1 or not -(2**31) <= value < 2**31 else "" if value & 15 else "16")
        elif kind is float or value is None:
            add(kind)
        elif isinstance(value, tuple):
            add(kind)
            kinds += _kinds(value)
        elif kind in PLAIN or isinstance(value, torch.Tensor):  # of a subclass: a slow question
            add(value.dtype)
            add(value.data_ptr() & 15)
        else:
            add((kind, value))  # True is not 1
    return kinds


def kernel(*, varying: tuple[str, ...] = ()):
    """`triton.jit` for a kernel that is launched from the host.

    Args:
        varying: integer arguments that change from batch to batch: one variant serves all their values.
    """
    if not AVAILABLE or interpreting():
        return triton.jit(do_not_specialize=varying)
    return lambda fn: Kernel(fn, do_not_specialize=varying)


if AVAILABLE:

    class Kernel(triton.JITFunction):
        """A `triton.JITFunction`. Constexprs come last in its signature, and are given by name at a launch; grids are
        tuples."""

        def __init__(self, fn, **options):
            super().__init__(fn, **options)
            self.variants = {}  # what was compiled, by device, kinds of arguments and options

        def run(self, *args, grid, warmup, **options):
            driver, knobs = triton.runtime.driver.active, triton.knobs
            # hooks of a launch, and of the passes of the compiler
            if warmup or self.pre_run_hooks or getattr(knobs.runtime, "add_stages_inspection_hook", None):
                return super().run(*args, grid=grid, warmup=warmup, **options)
            device = driver.get_current_device()
            flags = knobs.runtime.debug, *(getattr(knobs.compilation, name, None) for name in _COMPILATION)
            key = (device, flags, *_kinds(args), *options, *options.values())
            variant = self.variants.get(key)
            if variant is None:
                constexprs = [param.name for param in self.params[len(args) :]]
                assert not any(param.is_constexpr for param in self.params[: len(args)])
                compiled = super().run(*args, grid=grid, warmup=False, **options)
                if compiled is not None:  # a hook of Triton's may have compiled it elsewhere
                    self.variants[key] = compiled, constexprs
                return compiled
            compiled, constexprs = variant
            args = *args, *map(options.__getitem__, constexprs)
            x, y, z = (*grid, 1, 1)[:3]
            stream = driver.get_current_stream(device)
            compiled.run(
                x, y, z, stream, compiled.function, compiled.packed_metadata,
                compiled.launch_metadata(grid, stream, *args),
                knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *args,
            )  # fmt: skip
            return compiled
