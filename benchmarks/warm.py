"""Compile before the clock starts: the calls that later stages make, with every launch replaced by its compilation.

What a launch specialises (alignment, sizes of 1 or divisible by 16, plans) is decided by Triton itself, on the real
arguments, so Triton's cache (TRITON_CACHE_DIR) then holds what the launch will look for. Without a GPU the same calls
are made on CPU tensors for the architecture that is asked for, so that a cache made elsewhere, with the same Python and
Triton, can be carried.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from minibert.config import BertConfig
from minibert_kernels import dispatch

from . import cases, kernels, lengths, plans, training

CAPABILITY, MULTIPROCESSORS = 90, 132  # of the GPU that is not there


class AbsentGPU:
    """As much of a Triton driver as a compilation asks for."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only() -> Iterator[list[str]]:
    """Launches compile and do not run: outputs hold what the memory held. The list gets what did not compile.

    On a GPU the launcher is built, too, and the kernel loaded: one that does not fit the chip is an error here.
    """
    from triton.runtime.jit import JITFunction

    failed, launch, on_gpu = [], JITFunction.run, torch.cuda.is_available()

    def compile_launch(self, *args, grid, warmup, **options):
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
            if on_gpu:
                kernel.run  # noqa: B018  (made when it is asked for)
            return kernel
        except Exception as error:
            failed.append(f"{self.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            raise

    JITFunction.run = compile_launch
    try:
        with _on_cpu_tensors() if not on_gpu else _as_it_is():
            yield failed
    finally:
        JITFunction.run = launch


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _on_cpu_tensors() -> Iterator[None]:
    """The kernels take CPU tensors, with the plans of CAPABILITY."""
    from triton.runtime.driver import driver

    assert not dispatch.interpreting(), "TRITON_INTERPRET=1 compiles nothing"
    stand_ins = {
        "_missing": lambda *_: None, "capability": lambda device: CAPABILITY,
        "multiprocessors": lambda device: MULTIPROCESSORS,
    }  # fmt: skip
    owners = {"_missing": dispatch, "capability": sys.modules["minibert_kernels.launch"]}
    owners["multiprocessors"] = owners["capability"]
    ours = [module for name, module in sys.modules.items() if name.startswith("minibert_kernels")]
    changed = []
    for name, stand_in in stand_ins.items():
        true = getattr(owners[name], name)
        for module in ours:  # those that imported it by name have it, too
            if getattr(module, name, None) is true:
                setattr(module, name, stand_in)
                changed.append((module, name, true))
    driver.set_active(AbsentGPU())
    try:
        yield
    finally:
        for module, name, true in changed:
            setattr(module, name, true)


def units(dry: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """What later stages call, by name, in their order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    table, tokens = (cases.TINY[1:3], 64) if dry else (cases.TABLE, 65536 if device == "cuda" else None)
    for case in table:
        if case.quick or dry:
            yield (
                f"kernels {case.op} {case.name}",
                partial(kernels.warm, case, dtype, tokens or 16 * case.longest, device),
            )
    if dry:
        return
    config = BertConfig.preset("bert-base", num_hidden_layers=1)  # the layers of one model launch the same kernels
    for name in ("full", "half"):
        sizes = lengths.sample(name, *((32, 512) if device == "cuda" else (2, 256)))
        yield f"training {name}", partial(training.warm, config, sizes, dtype, device)
    yield "training, the gate's sequences", partial(training.warm, config, np.array([1, 7, 130, 23]), dtype, device)
    for key, wide, tiles in plans.first_ring():
        yield f"plans {key} {wide} {tiles}", partial(plans.warm, key, wide, tiles)
