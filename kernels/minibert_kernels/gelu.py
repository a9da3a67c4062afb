"""The feed-forward activations with their bias: gelu(x + bias), and the gated gelu(a) ⊙ b and silu(a) ⊙ b.

    gelu (erf)   z · Φ(z)                                     slope Φ(z) + z · φ(z)
    gelu (tanh)  z · σ(2u), u = √(2/π) · (z + 0.044715 z³)     slope s + 2z · s · (1 - s) · u',  s = σ(2u)
    silu         z · σ(z)                                     slope s + z · s · (1 - s),  s = σ(z)

Gated, x + bias = [a, b] in halves. Bytes: forward reads x and writes out; backward reads x and dout, writes dx, and
sums dbias on the way. Saved: x; the activation is computed again. The bias gradient is summed in the registers of each
program, a strip of rows, then over the strips in one small second pass: no atomics, so the same bits every time.
"""

import torch

from . import reference
from ._triton import tl, triton
from .dispatch import check_device, check_floating, use_triton
from .jit import kernel
from .launch import (
    FP_FUSION,
    VARYING_ROWS,
    AotCase,
    aot_arguments,
    as_matrix,
    ceil_div,
    gelu_plan,
    multiprocessors,
    on_device,
)
from .op import Op

APPROXIMATE = {"none": "erf", "tanh": "tanh"}


@triton.jit
def _sigmoid(z):
    """σ(z) and 1 - σ(z), neither by cancellation."""
    # the bound keeps e · s finite
    e = tl.exp2(tl.minimum(-1.4426950408889634 * z, 126.0))
    # exp2 and rsqrt are one instruction each; exp and a division are five and eight. A step of Newton's method makes up
    # for the square, which doubles the error of the root
    s = tl.rsqrt(1.0 + e)
    s *= s
    s = tl.fma(s, tl.fma(-1.0 - e, s, 1.0), s)
    return s, e * s


@triton.jit
def _act_and_slope(z, ACT: tl.constexpr):
    """act(z) and its derivative, for ACT "erf", "tanh" or "silu"; z in float32."""
    if ACT == "erf":
        # With a = |z|, Φ(-a) = exp(-a²/2) · P(t), t = 1 / (1 + 0.4 a): no branch, and no cancellation where z is
        # negative. P minimises, over 0 <= a <= 14, the larger of the absolute error times max(a, 1) and a thousandth of
        # the relative one, which is 4.3e-8 (iteratively reweighted least squares in float64). In float32 z · Φ(z) is
        # right to 2.4e-7 where |z| < 8, the slope to 2.3e-7, and the negative tail to 5e-5 of itself.
        a = tl.abs(z)
        s = tl.rsqrt(0.4 * a + 1.0)
        t = s * s
        p = 0.0570869165 * t - 0.258550915
        p = p * t + 0.348256844
        p = p * t + 0.00338377991
        p = p * t + 0.19485805
        p = p * t + 0.154699444
        p = p * t + 0.000265884371
        gauss = tl.exp2(-0.7213475204444817 * (z * z))
        beyond = gauss * p  # Φ(-a)
        share = tl.where(z < 0.0, beyond, 1.0 - beyond)
        return tl.maximum(z, 0.0) - a * beyond, share + z * (gauss * 0.3989422804014327)
    if ACT == "tanh":
        square = z * z
        share, rest = _sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * square))
        slope = share + share * rest * z * (1.5957691216057308 + 0.21406444881780076 * square)
    else:
        share, rest = _sigmoid(z)
        slope = share + z * share * rest
    return z * share, slope


@kernel(varying=VARYING_ROWS)
def _bias_act_fwd_kernel(
    x_ptr, bias_ptr, out_ptr,  # [rows, cols], or [rows, 2 cols] if GATED; as long or None; [rows, cols] contiguous
    stride_x_row, stride_x_col, n_rows, n_cols,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row = col < n_cols
    in_tile = (row < n_rows)[:, None] & in_row[None, :]
    x = x_ptr + row[:, None] * stride_x_row + col[None, :] * stride_x_col
    z = tl.load(x, mask=in_tile, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + col, mask=in_row, other=0.0).to(tl.float32)[None, :]
    out, _ = _act_and_slope(z, ACT)
    if GATED:
        x = x_ptr + row[:, None] * stride_x_row + (col + n_cols)[None, :] * stride_x_col
        value = tl.load(x, mask=in_tile, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + col + n_cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
        out *= value
    tl.store(out_ptr + row[:, None] * n_cols + col[None, :], out.to(out_ptr.dtype.element_ty), mask=in_tile)


@kernel(varying=VARYING_ROWS)
def _bias_act_bwd_kernel(
    dout_ptr, x_ptr, bias_ptr, dx_ptr,  # [rows, cols], as forward three times; dx contiguous
    dbias_ptr,                          # fp32 [strips, cols or 2 cols], None without bias
    stride_dout_row, stride_dout_col, stride_x_row, stride_x_col, n_rows, n_cols,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    strip, strips = tl.program_id(0), tl.num_programs(0)
    col = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    value_col, in_row = col + n_cols, col < n_cols
    width = n_cols * 2 if GATED else n_cols
    bias, value_bias = 0.0, 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value_bias = tl.load(bias_ptr + value_col, mask=in_row, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dvalue_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in tl.range(strip, tl.cdiv(n_rows, BLOCK_M), strips, num_stages=2):
        row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_tile = (row < n_rows)[:, None] & in_row[None, :]
        x = x_ptr + row[:, None] * stride_x_row + col[None, :] * stride_x_col
        z = tl.load(x, mask=in_tile, other=0.0).to(tl.float32) + bias
        dout = dout_ptr + row[:, None] * stride_dout_row + col[None, :] * stride_dout_col
        dz = tl.load(dout, mask=in_tile, other=0.0).to(tl.float32)
        dx = dx_ptr + row[:, None] * width
        act, slope = _act_and_slope(z, ACT)
        if GATED:
            x = x_ptr + row[:, None] * stride_x_row + value_col[None, :] * stride_x_col
            value = tl.load(x, mask=in_tile, other=0.0).to(tl.float32) + value_bias
            dvalue = dz * act
            dvalue_sum += dvalue
            tl.store(dx + value_col[None, :], dvalue.to(dx_ptr.dtype.element_ty), mask=in_tile)
            dz *= value
        dz *= slope
        dbias += dz
        tl.store(dx + col[None, :], dz.to(dx_ptr.dtype.element_ty), mask=in_tile)
    if dbias_ptr is not None:
        partial = dbias_ptr + strip.to(tl.int64) * width
        tl.store(partial + col, tl.sum(dbias, axis=0), mask=in_row)
        if GATED:
            tl.store(partial + value_col, tl.sum(dvalue_sum, axis=0), mask=in_row)


def _run_forward(x: torch.Tensor, bias: torch.Tensor | None, act: str, gated: bool) -> torch.Tensor:
    out = _output(x, gated)
    if out.numel() == 0:
        return out
    cols = out.shape[-1]
    plan = gelu_plan(cols, "fwd")
    x, *strides = as_matrix(x, x.shape[-1])
    with on_device(x):
        _bias_act_fwd_kernel[(ceil_div(len(x), plan.block_m), ceil_div(cols, plan.block_n))](
            x, None if bias is None else bias.contiguous(), out, *strides, len(x), cols,
            ACT=act, GATED=gated, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            num_warps=plan.num_warps, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out


def _output(x, gated):
    """Uninitialised, of half the width if gated."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // (2 if gated else 1))


def _run_backward(
    dout: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, act: str, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, width, cols = x.new_empty(*x.shape), x.shape[-1], dout.shape[-1]
    if dx.numel() == 0:
        return dx, x.new_zeros(0 if bias is None else width, dtype=torch.float32)
    plan = gelu_plan(cols, "bwd")
    blocks = ceil_div(cols, plan.block_n)
    x, *x_strides = as_matrix(x, width)
    dout, *dout_strides = as_matrix(dout, cols)
    strips = max(1, plan.programs_per_sm * multiprocessors(x.device) // blocks)
    strips = min(strips, ceil_div(len(x), plan.block_m))
    dbias = x.new_empty(strips, 0 if bias is None else width, dtype=torch.float32)
    with on_device(x):
        _bias_act_bwd_kernel[(strips, blocks)](
            dout, x, None if bias is None else bias.contiguous(), dx, None if bias is None else dbias,
            *dout_strides, *x_strides, len(x), cols,
            ACT=act, GATED=gated, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            num_warps=plan.num_warps, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return dx, dbias.sum(0)


def _fake_backward(dout, x, bias, act, gated):
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[-1], dtype=torch.float32)


def _save(ctx, inputs, output):
    x, bias, ctx.act, ctx.gated = inputs
    ctx.save_for_backward(x, bias)


def _gradient(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = _backward(dout, x, bias, ctx.act, ctx.gated)
    return dx, None if bias is None else dbias.to(bias.dtype), None, None


_backward = Op("bias_act_bwd", _run_backward, _fake_backward)
_forward = Op(
    "bias_act_fwd", _run_forward, lambda x, bias, act, gated: _output(x, gated), save=_save, gradient=_gradient
)


def bias_gelu(x, bias, *, approximate="none", backend="auto"):
    """gelu(x + bias) (Hendrycks and Gimpel, 2016); BERT's is the erf form.

    Args:
        x: [..., F], float32, float16 or bfloat16, any strides; leading axes that have no common stride are copied.
        bias: [F], in any of those dtypes, or None.
        approximate: "none" for the erf form, "tanh" for the approximation.
        backend: "auto", "triton" or "reference".
    Returns:
        [..., F] in x.dtype, computed in float32 and rounded once.
    Raises:
        ValueError: names the argument that does not fit.
    """
    return _run("bias_gelu", x, bias, approximate, False, backend)


def bias_geglu(x, bias, *, approximate="none", backend="auto"):
    """gelu(a) ⊙ b for the halves a, b of x + bias: [..., 2F] to [..., F] (Shazeer, 2020); see `bias_gelu`.

    Raises:
        ValueError: names the argument that does not fit; the last axis of x must be even.
    """
    return _run("bias_geglu", x, bias, approximate, True, backend)


def bias_swiglu(x, bias, *, backend="auto"):
    """silu(a) ⊙ b for the halves a, b of x + bias: [..., 2F] to [..., F] (Shazeer, 2020); see `bias_gelu`.

    Raises:
        ValueError: names the argument that does not fit; the last axis of x must be even.
    """
    return _run("bias_swiglu", x, bias, None, True, backend)


def _run(op, x, bias, approximate, gated, backend):
    if approximate is not None and approximate not in APPROXIMATE:
        raise ValueError(f"approximate={approximate!r} is not one of {', '.join(APPROXIMATE)}")
    if x.ndim == 0 or x.shape[-1] == 0 or (gated and x.shape[-1] % 2):
        raise ValueError(f"x is {list(x.shape)}: expected [..., {'2F' if gated else 'F'}] with F of at least 1")
    check_floating(x=x, bias=bias)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias is {list(bias.shape)}: expected [{x.shape[-1]}], the last axis of x")
    check_device(x=x, bias=bias)
    if use_triton(op, backend, x):
        return _forward(x, bias, "silu" if approximate is None else APPROXIMATE[approximate], gated)
    options = {} if approximate is None else {"approximate": approximate}
    return getattr(reference, op)(x, None if bias is None else bias.to(x.dtype), **options)


def aot_cases(arch):
    """The default plans in bfloat16 with a float32 bias, as `AotCase`s; they are the same on every architecture."""
    for op, act, gated in (
        ("bias_gelu", "erf", False), ("bias_gelu", "tanh", False), ("bias_geglu", "erf", True),
        ("bias_swiglu", "silu", True),
    ):  # fmt: skip
        for cols in (512, 3072):
            for direction, fn in (("fwd", _bias_act_fwd_kernel), ("bwd", _bias_act_bwd_kernel)):
                plan, width = gelu_plan(cols, direction), cols * (1 + gated)
                known = dict.fromkeys(("x_ptr", "out_ptr", "dout_ptr", "dx_ptr"), "*bf16")
                known |= {"bias_ptr": "*fp32", "dbias_ptr": "*fp32", "n_rows": 4099, "n_cols": cols}
                known |= {"stride_x_row": width, "stride_x_col": 1, "stride_dout_row": cols, "stride_dout_col": 1}
                known |= {"ACT": act, "GATED": gated, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
                arguments = aot_arguments(fn, **{name: known[name] for name in fn.arg_names})
                label = f"{cols} columns" + (", tanh" if act == "tanh" else "")
                yield AotCase(
                    op=op, direction=direction, label=label, fn=fn, **arguments,
                    num_warps=plan.num_warps, num_stages=plan.num_stages,
                )  # fmt: skip
