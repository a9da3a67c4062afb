"""Which implementation a call gets, and why.

`backend="auto"` takes Triton where the call is supported and the reference elsewhere; an explicit `"triton"` raises
instead of falling back; `"reference"` is always possible.
"""

import logging
import os
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import torch

from ._triton import AVAILABLE, triton
from .launch import posing

BACKENDS = ("auto", "triton", "reference")
# the ops with a kernel beside their reference, and its file; each takes backend=
TRITON_OPS = {
    "attention": "attention.py",
    "bias_geglu": "gelu.py",
    "bias_gelu": "gelu.py",
    "bias_swiglu": "gelu.py",
    "dropout_add_norm": "layer_norm.py",
    "embed_norm": "embedding.py",
    "lamb_step": "lamb.py",
    "linear_cross_entropy": "linear_cross_entropy.py",
    "mlm_mask": "masking.py",
    "pack": "packing.py",
    "select_rows": "packing.py",
    "unpack": "packing.py",
}
REFERENCE = "reference.py"
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
log = logging.getLogger("minibert_kernels")
# decided when Triton was imported; a constant, because torch.compile does not trace the reading of an environment
_INTERPRETING = AVAILABLE and triton.knobs.runtime.interpret
_CHECKED = os.environ.get("MINIBERT_CHECK") == "1"  # likewise


def interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on CPU tensors."""
    return _INTERPRETING


_disabled: frozenset[str] = frozenset()


@contextmanager
def disabled(*ops: str):
    """Run these ops by their reference, whatever backend is asked for: to bisect a difference, or to measure what one
    kernel is worth in a whole step. Acts on calls in any thread; backward follows its forward.

    Raises:
        ValueError: an op has no Triton kernel.
    """
    global _disabled
    for op in ops:
        if op not in TRITON_OPS:
            raise ValueError(f"op={op!r} is not one of {', '.join(TRITON_OPS)}")
    before, _disabled = _disabled, _disabled | set(ops)
    try:
        yield
    finally:
        _disabled = before


def is_disabled(op: str) -> bool:
    """Whether `disabled` has switched `op` off."""
    return op in _disabled


def use_triton(op: str, backend: str, *tensors, unsupported: str | None = None) -> bool:
    """Whether `op` runs its Triton kernel on `tensors`.

    Args:
        unsupported: what about this call the kernel cannot do, or None.
    Raises:
        ValueError: backend is unknown, or is "triton" and the kernel cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "reference" or op in _disabled:
        return False
    device, dtype = tensors[0].device, tensors[0].dtype
    reason = unsupported or _missing(device.type, dtype, backend == "triton" and interpreting())
    if reason is None:
        return True
    if backend == "triton":
        raise ValueError(f"{op}: backend='triton' {reason}: use backend='reference'")
    if not torch.compiler.is_compiling():
        _say_once(op, reason)
    return False


def on_host(tensor) -> bool:
    """Whether a tensor's values can be looked at now, without waiting for a device."""
    # a tensor under a transform of torch.func may stand for many
    hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or posing()
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not hidden


def check_sequences(cu_seqlens, num_rows, max_seqlen, *, from_zero=False) -> None:
    """Raise the ValueError of borders int32 [B + 1] that go down, leave rows 0 .. num_rows, or are further apart than
    max_seqlen. On a GPU that would wait for it, and is done with MINIBERT_CHECK=1 in the environment alone.

    Args:
        from_zero: the first border may be nothing else.
    """
    if not (on_host(cu_seqlens) or _CHECKED and _readable(cu_seqlens)):
        return
    borders = cu_seqlens.tolist()
    if borders[0] < 0 or (from_zero and borders[0] > 0) or borders[-1] > num_rows:
        least = "0" if from_zero else "at least 0"
        raise ValueError(
            f"cu_seqlens begins at {borders[0]} and ends at {borders[-1]}: expected {least}, and at most {num_rows}, "
            "the rows there are"
        )
    lengths = [end - begin for begin, end in pairwise(borders)]
    if min(lengths, default=0) < 0:
        raise ValueError("cu_seqlens goes down: expected where each sequence begins, in order")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}: the longest sequence has {max(lengths)} tokens")


def _readable(tensor):
    """Whether a tensor's values can be looked at, if only after a wait for its device."""
    if type(tensor) is not torch.Tensor or tensor.is_meta or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_device(**tensors) -> None:
    """Raise the ValueError of a tensor, by name, that is not None and not on the device of the first."""
    first, *others = tensors
    device = tensors[first].device
    for name in others:
        if tensors[name] is not None and tensors[name].device != device:
            raise ValueError(f"{name} is on {tensors[name].device}, {first} is on {device}: expected one device")


def check_floating(**tensors) -> None:
    """Raise the ValueError of a tensor, by name, that is not None and of no dtype that an op computes in."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise ValueError(f"{name} is {tensor.dtype}: expected one of {expected}")


def explain(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict:
    """What `backend="auto"` runs for `op`, of `minibert_kernels`, on tensors of `device`, why, and the file of each
    implementation."""
    if op not in TRITON_OPS:
        return {
            "runs": "reference",
            "why": "has no kernel of its own",
            "triton": None,
            "reference": REFERENCE,
        }
    reason = f"is switched off by disabled({op!r})" if op in _disabled else None
    reason = reason or _missing(torch.device(device).type, dtype, False)
    why = "the device and dtype are supported" if reason is None else f"'triton' {reason}"
    runs = "triton" if reason is None else "reference"
    return {"runs": runs, "why": why, "triton": TRITON_OPS[op], "reference": REFERENCE}


def _missing(device_type: str, dtype: torch.dtype, interpret: bool) -> str | None:
    if not AVAILABLE:
        return "needs the package triton, which is not installed"
    if device_type != "cuda" and not interpret and not posing():
        return f"needs CUDA tensors, got {device_type}"
    allowed = (torch.float32, torch.float16) + ((torch.bfloat16,) if not interpret else ())
    if dtype.is_floating_point and dtype not in allowed:  # ids are moved and masked too
        *taken, got = (str(d).removeprefix("torch.") for d in (*allowed, dtype))
        return f"takes {', '.join(taken)}, got {got}"
    return None


@cache
def _say_once(op: str, reason: str) -> None:
    log.info("%s runs its reference: 'triton' %s", op, reason)
