"""LAMB (You et al., 2020, algorithm 2), one step of all tensors together, in place. For each tensor w with gradient g:

    m = beta1 · m + (1 - beta1) · g,   v = beta2 · v + (1 - beta2) · g²
    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay · w
    w -= lr · ratio · u,   ratio = |w| / |u|, or 1 where either norm is 0

Two launches: the first updates the moments and writes each chunk's part of |w|² and |u|²; the second adds the parts of
its tensor in a fixed order (no atomics: the same bits every time), computes u again and updates w. Without trust ratio
the first does it all. Bytes of an element of a float32 parameter: 24 and 16, where the least, which is what it takes
without trust ratio, is 28 (`least_bytes`); to store u instead of computing it again would cost as much.

Tensors reach the kernels as addresses in one int64 table, which is kept for as long as they stay where they are. New
addresses cost about 0.2 ms for the 200 tensors of BERT-base, beside 0.5 ms for the checks of any call, and one copy
from pinned memory, which nobody waits for; while a CUDA graph is captured, some small kernels instead of the copy.
"""

import math
from functools import lru_cache
from itertools import accumulate

import torch

from . import reference
from ._triton import tl, triton
from .dispatch import check_floating, use_triton
from .jit import kernel
from .launch import FP_FUSION, AotCase, aot_arguments, on_device

CHUNK = 16384  # elements of one tensor that a program updates
BLOCK = 1024
MAX_TENSORS = 8192
# reads and writes of a parameter or its gradient, and of float32 moments, in each kernel
ACCESSES = {"moments": (2, 4), "update": (2, 2), "without trust ratio": (3, 4)}


def least_bytes(element_size: int, kernel: str = "without trust ratio") -> int:
    """Bytes of an element of a parameter that one kernel moves.

    By default they are also the least of a step with or without trust ratio: each input read once, each output written
    once, and so of AdamW in one pass.

    Args:
        element_size: bytes of an element of a parameter and of its gradient.
        kernel: of ACCESSES.
    """
    own, moments = ACCESSES[kernel]
    return own * element_size + moments * 4


@triton.jit
def _find(table_ptr, n_tensors, TENSORS: tl.constexpr):
    """Which tensor this program's chunk belongs to, and its number among that tensor's."""
    chunk, index = tl.program_id(0), tl.arange(0, TENSORS)
    first = tl.load(table_ptr + index, mask=index < n_tensors, other=0x7FFFFFFFFFFFFFFF)
    tensor = tl.sum((first <= chunk).to(tl.int32), 0) - 1
    return tensor, chunk - tl.load(table_ptr + tensor)


@triton.jit
def _pointers(table_ptr, n_tensors, tensor, like_ptr, ALIGNED: tl.constexpr):
    """Size of a tensor, and where it, its gradient and its moments lie."""
    row = table_ptr + n_tensors + tensor
    size = tl.load(row)
    w_ptr = tl.load(row + n_tensors).to(like_ptr.dtype)
    g_ptr = tl.load(row + 2 * n_tensors).to(like_ptr.dtype)
    m_ptr = tl.load(row + 3 * n_tensors).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(row + 4 * n_tensors).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        w_ptr, g_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
    return size, w_ptr, g_ptr, m_ptr, v_ptr


@triton.jit
def _unbiases(step, log_beta1, log_beta2):
    """1 / (1 - beta ** step) twice; in float64, because the difference cancels."""
    step = step.to(tl.float64)
    unbias1, unbias2 = 1.0 / (1.0 - tl.exp(step * log_beta1)), 1.0 / (1.0 - tl.exp(step * log_beta2))
    return unbias1.to(tl.float32), unbias2.to(tl.float32)


@triton.jit
def _direction(w, m, v, unbias1, unbias2, eps, weight_decay):
    return m * unbias1 / (tl.sqrt(v * unbias2) + eps) + weight_decay * w


@kernel()
def _lamb_moments_kernel(
    like_ptr, table_ptr,  # a parameter, for its dtype; int64 [6, n_tensors], see _table
    step_ptr, lr_ptr, partials_ptr,  # fp32 [n_tensors] or scalar, fp32 scalar, fp32 [2, chunks] with ADAPT
    n_tensors, stride_step, rest1, rest2, log_beta1, log_beta2, eps, weight_decay,  # rest is 1 - beta
    ADAPT: tl.constexpr, ALIGNED: tl.constexpr, TENSORS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, chunk = _find(table_ptr, n_tensors, TENSORS)
    size, w_ptr, g_ptr, m_ptr, v_ptr = _pointers(table_ptr, n_tensors, tensor, like_ptr, ALIGNED)
    unbias1, unbias2 = _unbiases(tl.load(step_ptr + tensor * stride_step), log_beta1, log_beta2)
    lr = tl.load(lr_ptr)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, size)
    whole = begin + (end - begin) // BLOCK * BLOCK
    w_square, u_square = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    # whole blocks first, then the one that needs a mask
    for masked in tl.static_range(2):
        for at in range(whole if masked else begin, end if masked else whole, BLOCK):
            element = at + tl.arange(0, BLOCK)
            inside = element < end if masked else tl.full([BLOCK], True, tl.int1)
            w = tl.load(w_ptr + element, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + element, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(m_ptr + element, mask=inside, other=0.0)
            v = tl.load(v_ptr + element, mask=inside, other=0.0)
            m = m * (1 - rest1) + g * rest1
            v = v * (1 - rest2) + g * g * rest2
            tl.store(m_ptr + element, m, mask=inside)
            tl.store(v_ptr + element, v, mask=inside)
            u = _direction(w, m, v, unbias1, unbias2, eps, weight_decay)
            if ADAPT:
                w_square += w * w
                u_square += tl.where(inside, u * u, 0.0)
            else:
                tl.store(w_ptr + element, (w - lr * u).to(w_ptr.dtype.element_ty), mask=inside)
    if ADAPT:
        tl.store(partials_ptr + tl.program_id(0), tl.sum(w_square, 0))
        tl.store(partials_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(u_square, 0))


@kernel()
def _lamb_update_kernel(
    like_ptr, table_ptr, step_ptr, lr_ptr, partials_ptr,
    n_tensors, stride_step, log_beta1, log_beta2, eps, weight_decay, trust_clip,  # trust_clip may be None
    ALIGNED: tl.constexpr, TENSORS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, chunk = _find(table_ptr, n_tensors, TENSORS)
    size, w_ptr, _, m_ptr, v_ptr = _pointers(table_ptr, n_tensors, tensor, like_ptr, ALIGNED)
    unbias1, unbias2 = _unbiases(tl.load(step_ptr + tensor * stride_step), log_beta1, log_beta2)
    first, chunks = tl.program_id(0) - chunk, tl.cdiv(size, CHUNK)
    w_square, u_square = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in range(0, chunks, BLOCK):
        part = at + tl.arange(0, BLOCK)
        w_square += tl.load(partials_ptr + first + part, mask=part < chunks, other=0.0)
        u_square += tl.load(partials_ptr + tl.num_programs(0) + first + part, mask=part < chunks, other=0.0)
    w_norm, u_norm = tl.sqrt(tl.sum(w_square, 0)), tl.sqrt(tl.sum(u_square, 0))
    both = (w_norm > 0) & (u_norm > 0)
    ratio = tl.where(both, w_norm, 1.0) / tl.where(both, u_norm, 1.0)
    if trust_clip is not None:
        ratio = tl.where(ratio > trust_clip, trust_clip, ratio)  # NaN stays
    rate = tl.load(lr_ptr) * ratio
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, size)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for masked in tl.static_range(2):
        for at in range(whole if masked else begin, end if masked else whole, BLOCK):
            element = at + tl.arange(0, BLOCK)
            inside = element < end if masked else tl.full([BLOCK], True, tl.int1)
            w = tl.load(w_ptr + element, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(m_ptr + element, mask=inside, other=0.0)
            v = tl.load(v_ptr + element, mask=inside, other=0.0)
            u = _direction(w, m, v, unbias1, unbias2, eps, weight_decay)
            tl.store(w_ptr + element, (w - rate * u).to(w_ptr.dtype.element_ty), mask=inside)


def _first_chunks(sizes):
    """Number of the first chunk of each tensor, and of all chunks."""
    return [0, *accumulate(-(-size // CHUNK) for size in sizes)]


def _table(sizes, addresses, device, by_value=False):
    """int64 [6, n] on the device: first chunk, size, and addresses of parameter, gradient and moments of n tensors."""
    values = [*_first_chunks(sizes)[:-1], *sizes, *addresses]
    if by_value:
        table = torch.zeros(len(values), dtype=torch.int64, device=device)
        torch._foreach_add_(list(table.unbind()), values)
        return table
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


_kept_table = lru_cache(maxsize=32)(_table)


@torch.library.custom_op("minibert::lamb_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def _step(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    lr: torch.Tensor,
    step: torch.Tensor,
    betas: list[float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    trust_clip: float | None,
    adapt: bool,
) -> None:
    device, sizes = params[0].device, tuple(p.numel() for p in params)
    addresses = tuple(t.data_ptr() for tensors in (params, grads, exp_avgs, exp_avg_sqs) for t in tensors)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # a graph keeps what its kernels get by value, but no memory of the host
        table = _table(sizes, addresses, device, by_value=True)
    else:
        table = _kept_table(sizes, addresses, device)
    chunks = _first_chunks(sizes)[-1]
    partials = lr.new_empty(2, chunks) if adapt else None
    # beta ** step is exp(step * log(beta)): without correction, or with beta 0, it is exp(-inf)
    log_betas = [math.log(beta) if bias_correction and beta > 0 else -math.inf for beta in betas]
    shared = (params[0], table, step, lr, partials, len(params), step.stride(0) if step.ndim else 0)
    options = {
        "ALIGNED": all(address % 16 == 0 for address in addresses), "TENSORS": triton.next_power_of_2(len(params)),
        "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": FP_FUSION,
    }  # fmt: skip
    with on_device(params[0]):
        _lamb_moments_kernel[(chunks,)](
            *shared, *(1 - beta for beta in betas), *log_betas, eps, weight_decay, ADAPT=adapt, **options
        )
        if adapt:
            _lamb_update_kernel[(chunks,)](*shared, *log_betas, eps, weight_decay, trust_clip, **options)


@_step.register_fake
def _(*_):
    return None


@torch.no_grad()
def lamb_step(
    params, grads, exp_avgs, exp_avg_sqs, *, lr, step, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
    bias_correction=True, trust_clip=None, adapt=True, backend="auto",
):  # fmt: skip
    """One step of LAMB (You et al., 2020, algorithm 2), in place.

    Args:
        params: n contiguous tensors of any shapes, float32, float16 or bfloat16. They are updated.
        grads: n like params. exp_avgs, exp_avg_sqs: n float32 tensors of the same shapes; they are updated.
        lr: a number, or a scalar on the device.
        step: how many steps this one makes, from 1; a number, or float32 on the device: a scalar, or [n], one a tensor.
        bias_correction: divide the moments by 1 - beta ** step.
        trust_clip: the largest trust ratio, None for any.
        adapt: scale each tensor's step by its trust ratio |w| / |u|; without, this is AdamW.
        backend: "auto", "triton" or "reference". Tensors of float64 need the reference, and float64 moments.
    Raises:
        ValueError: names the argument, and the index of the tensor, that does not fit.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, lr, step, betas, eps, weight_decay, trust_clip)
    some = {i: p.dtype for i, p in enumerate(params) if p.numel()}
    unsupported = f"takes up to {MAX_TENSORS} tensors, got {len(params)}" if len(params) > MAX_TENSORS else None
    if not all(use_triton("lamb_step", backend, params[i], unsupported=unsupported) for i in some):
        return reference.lamb_step(
            params, grads, exp_avgs, exp_avg_sqs, lr=lr, step=step, betas=betas, eps=eps, weight_decay=weight_decay,
            bias_correction=bias_correction, trust_clip=trust_clip, adapt=adapt,
        )  # fmt: skip
    for dtype in dict.fromkeys(some.values()):
        chosen = [i for i in some if some[i] == dtype]
        lists = ([tensors[i] for i in chosen] for tensors in (params, grads, exp_avgs, exp_avg_sqs))
        scalars = (_as_float32(value, chosen, params[0].device) for value in (lr, step))
        _step(*lists, *scalars, list(betas), eps, weight_decay, bias_correction, trust_clip, adapt)


def _as_float32(value, chosen, device):
    """A number, or a tensor of which one element for each chosen tensor is meant, as the kernels read it."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=torch.float32, device=device)
    if value.ndim and len(chosen) < len(value):
        value = torch.stack([value[i] for i in chosen])
    return value.to(torch.float32)


def _check(params, grads, exp_avgs, exp_avg_sqs, lr, step, betas, eps, weight_decay, trust_clip):
    for name, value, shapes in (("lr", lr, ([],)), ("step", step, ([], [len(params)]))):
        if isinstance(value, torch.Tensor) and list(value.shape) not in shapes:
            raise ValueError(f"{name} is {list(value.shape)}: expected {' or '.join(map(str, shapes))}")
    if not isinstance(step, torch.Tensor) and step < 1:
        raise ValueError(f"step={step} is not positive: the first is 1")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} are not in [0, 1)")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not isinstance(value, torch.Tensor) and not value >= 0:
            raise ValueError(f"{name}={value} is not a number from 0")
    if trust_clip is not None and not trust_clip > 0:
        raise ValueError(f"trust_clip={trust_clip} is not positive")
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors, params has {len(params)}")
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for i, p in enumerate(params):
        check_floating(**{f"params[{i}]": p})
        wide = torch.promote_types(p.dtype, torch.float32)
        for name, tensors in lists.items():
            misfit = _misfit(tensors[i], p.shape, wide if name.startswith("exp") else p.dtype, params[0].device)
            if misfit:
                raise ValueError(f"{name}[{i}] {misfit}")
    for name, value in (("lr", lr), ("step", step)):
        if isinstance(value, torch.Tensor) and params and value.device != params[0].device:
            raise ValueError(f"{name} is on {value.device}, params[0] on {params[0].device}: expected one device")


def _misfit(tensor, shape, dtype, device):
    if tensor.shape != shape or tensor.dtype != dtype:
        return f"is {tensor.dtype} {list(tensor.shape)}: expected {dtype} {list(shape)} as its parameter"
    if not tensor.is_contiguous():
        return f"has strides {list(tensor.stride())}: expected a contiguous tensor"
    return None if tensor.device == device else f"is on {tensor.device}, params[0] on {device}: expected one device"


def aot_cases(capability):
    """Parameters in bfloat16 and float32, 200 tensors; the same on every architecture."""
    known = {"table_ptr": "*i64", "step_ptr": "*fp32", "lr_ptr": "*fp32", "n_tensors": 200, "stride_step": 1}
    known |= dict.fromkeys(("rest1", "rest2", "log_beta1", "log_beta2", "eps", "weight_decay"), 0.1)
    known |= {"trust_clip": None, "ALIGNED": True, "TENSORS": 256, "CHUNK": CHUNK, "BLOCK": BLOCK}
    kernels = {"moments": _lamb_moments_kernel, "update": _lamb_update_kernel, "all": _lamb_moments_kernel}
    for dtype in ("bf16", "fp32"):
        for part, fn in kernels.items():
            adapt = {"ADAPT": part != "all", "partials_ptr": None if part == "all" else "*fp32"}
            values = known | adapt | {"like_ptr": f"*{dtype}"}
            arguments = aot_arguments(fn, **{name: values[name] for name in fn.arg_names})
            label = f"{dtype} {'without trust ratio' if part == 'all' else part}"
            yield AotCase(op="lamb_step", direction="fwd", label=label, fn=fn, **arguments, num_warps=4, num_stages=1)
