"""Compile before the clock starts: the calls that later stages make, with every launch recorded and then compiled.

What a launch specialises (alignment, sizes of 1 or divisible by 16, plans) is decided by Triton itself, on the real
arguments, so Triton's cache (TRITON_CACHE_DIR) then holds what the launch will look for. Without a GPU the same calls
are made on CPU tensors as for one of CAPABILITY, so that a cache made elsewhere, with the same Python and Triton, can
be carried.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from minibert.config import BertConfig
from minibert_kernels.launch import capability, multiprocessors
from minibert_kernels.launches import Variant, recorded

from . import cases, kernels, lengths, plans, training

CAPABILITY, MULTIPROCESSORS = 90, 132  # of the GPU that is not there
_compiled: set[tuple] = set()


def chip() -> tuple[int, int]:
    """Capability and multiprocessors of the GPU, or of the one that is not there."""
    if not torch.cuda.is_available():
        return CAPABILITY, MULTIPROCESSORS
    device = torch.device("cuda", torch.cuda.current_device())
    return capability(device), multiprocessors(device)


@contextmanager
def compile_only() -> Iterator[list[str]]:
    """Launches compile and do not run: outputs hold what the memory held. The list gets what did not compile."""
    failed: list[str] = []
    launches = None
    try:
        with recorded(*chip()) as launches:
            yield failed
    finally:
        for variant in launches.variants if launches else ():
            try:
                compile_variant(variant)
            except Exception as error:
                failed.append(f"{variant.kernel}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def compile_variant(variant: Variant) -> None:
    """Into Triton's cache; on a GPU with its launcher, and loaded: one that does not fit the chip is an error here."""
    from triton import compile
    from triton.backends.compiler import GPUTarget

    key = variant.source.hash(), str(sorted(variant.options.items()))
    if key in _compiled:
        return
    kernel = compile(variant.source, target=GPUTarget("cuda", chip()[0], 32), options=variant.options)
    if torch.cuda.is_available():
        kernel.run  # noqa: B018  (made when it is asked for)
    _compiled.add(key)


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
