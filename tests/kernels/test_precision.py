"""How precise a result is, counted in roundings: of 16-bit inputs, held to float64 computed from the same bits.

A sum in float32 is 2**13 times finer than one in float16, and that is seen here in every float32 result (parameters'
gradients, statistics, losses); a 16-bit result that was computed in float32 is off by half a unit in the last place.
"""

from functools import partial

import pytest
import torch
from harness import values_and_gradients, widen
from wide_calls import COLS, ROWS, Wide, cuts, ids, qkv, wide

import minibert_kernels as kernels
from minibert_kernels import dispatch

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="counts roundings of the interpreter")
BITS = {torch.float16: 11, torch.bfloat16: 8}  # of a significand
FINE = 2.0**-17  # of the largest value: what a sum of a thousand terms in float32 keeps, and one in float16 cannot
NORM = {"x": (ROWS, COLS), "weight": (COLS,), "bias": (COLS,)}
# nothing that an op rounds on its way by intention: the sum before a norm, probabilities, logits
CALLS = {
    "layernorm": wide(kernels.dropout_add_norm, NORM, {"residual": None}, launches=[]),
    "rmsnorm": wide(kernels.dropout_add_norm, NORM, {"residual": None}, kind="rmsnorm", launches=[]),
    "bias_gelu": wide(kernels.bias_gelu, {"x": (ROWS, COLS), "bias": (COLS,)}, launches=[]),
    "bias_gelu tanh": wide(
        kernels.bias_gelu, {"x": (ROWS, COLS), "bias": (COLS,)}, approximate="tanh", launches=[]
    ),
    "bias_geglu": wide(kernels.bias_geglu, {"x": (ROWS, 2 * COLS), "bias": (2 * COLS,)}, launches=[]),
    "bias_swiglu": wide(kernels.bias_swiglu, {"x": (ROWS, 2 * COLS), "bias": (2 * COLS,)}, launches=[]),
}  # fmt: skip


def both(call, tensors, douts):
    """(ours, exact), by name."""
    kernel, reference = (partial(call.floating, backend) for backend in ("triton", "reference"))
    return values_and_gradients(kernel, tensors, douts), values_and_gradients(
        reference, widen(tensors), [d.double() for d in douts]
    )


def assert_fine(ours, exact, name):
    error = (ours.double() - exact).abs().max() / exact.abs().max()
    assert error <= FINE, f"{name}: {error:.2g} of the largest value, a float32 sum has at most {FINE:.2g}"


def assert_rounded_once(ours, exact, name):
    """Off by half a unit in the last place at most, or by what float32 loses where terms cancel."""
    unit = torch.exp2(exact.abs().clamp(min=2.0**-14).log2().floor() + 1 - BITS[ours.dtype])
    allowed = 0.505 * unit + exact.abs().max() * 2.0**-20
    excess = ((ours.double() - exact).abs() / allowed).max()
    assert excess <= 1, f"{name}: an error of {excess:.3g} roundings to {ours.dtype}"


@pytest.mark.parametrize("dtype", BITS, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_sums_are_taken_in_float32_and_results_rounded_once(name, dtype):
    call = CALLS[name]
    ours, exact = both(call, *call.draw(dtype, parameters=torch.float32))
    assert {key for key, result in ours.items() if result.dtype == torch.float32} == {
        f"d{key}" for key, shape in call.shapes.items() if len(shape) == 1
    }
    for key, result in ours.items():
        (assert_fine if result.dtype == torch.float32 else assert_rounded_once)(result, exact[key], key)


def test_gradients_of_float32_tables_are_fine_where_the_result_is_of_16_bits():
    shapes = {"word": (41, COLS), "position": (64, COLS), "type": (2, COLS), "weight": (COLS,), "bias": (COLS,)}
    tokens = {"ids": ids(ROWS, 41), "type_ids": ids(ROWS, 2), "positions": ids(ROWS, 64)}
    call = Wide(kernels.embed_norm, shapes, tokens, {"dropout": 0.3})
    tensors = call.tensors()
    dout = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1)).half()
    with torch.autocast("cpu", torch.float16):
        ours = values_and_gradients(partial(call.floating, "triton"), tensors, [dout])
    exact = values_and_gradients(partial(call.floating, "reference"), widen(tensors), [dout.double()])
    for key, result in ours.items():
        (assert_rounded_once if key == "out" else assert_fine)(result, exact[key], key)


@pytest.mark.parametrize("dtype", BITS, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("max_seqlen", [16, 139])
def test_lse_of_16_bit_inputs_is_fine(dtype, max_seqlen):
    lengths = [max_seqlen, 3]
    call = wide(
        kernels.attention, qkv(lengths, 2, 16), {"cu_seqlens": cuts(lengths)}, max_seqlen=max_seqlen,
        return_lse=True, launches=[],
    )  # fmt: skip
    ours, exact = both(call, *call.draw(dtype))
    assert_fine(ours["out1"], exact["out1"], "lse")


@pytest.mark.parametrize("dtype", BITS, ids=["float16", "bfloat16"])
def test_loss_and_gradients_of_exact_logits_are_fine(dtype):
    call = Wide(
        kernels.linear_cross_entropy, {"hidden": (131, 16), "weight": (41, 16)}, {"bias": None, "labels": ids(131, 41)},
        {"reduction": "none"},
    )  # fmt: skip
    tensors, douts = call.draw(dtype)
    tensors |= {name: tensors[name].sign() for name in call.shapes}  # their products are small integers
    ours, exact = both(call, tensors, douts)
    assert ours["out"].dtype == torch.float32
    assert_fine(ours["out"], exact["out"], "loss")
