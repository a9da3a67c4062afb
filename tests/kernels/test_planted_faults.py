"""The instruments find what they are for: each fault is planted in the source of a kernel, and its instrument fails.

What a compiler sees (a spill, a product without matrix units) and what counts bytes have theirs in `planted.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_architectures
import test_every_op
import test_far_outputs
import test_precision
import torch
from instruments import planted, without_races
from triton.runtime.errors import InterpreterError
from wide_calls import WIDE

from minibert_kernels import (
    attention_long,
    attention_tile,
    dispatch,
    embedding,
    gelu,
    lamb,
    layer_norm,
    packing,
    segment,
)

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="the interpreter reads the changed source")


@dataclass(frozen=True)
class Fault:
    """A kernel, {text of its source: what is written instead}, the test that must fail, and what its message says."""

    kernel: Callable
    changes: dict
    test: Callable
    says: str


def values(name, dtype=torch.float32):
    return lambda folder: WIDE[name].check(dtype)


def races(name):
    def run(folder):
        with without_races():
            WIDE[name].run()

    return run


def far_outputs(name):
    test = test_far_outputs.test_the_last_of_2_31_elements_are_the_bits_of_the_first
    return lambda folder: test(name)


def far_inputs(name):
    test = test_every_op.test_offsets_beyond_2_31_elements_give_the_same_bits
    return lambda folder: test(test_every_op.CALLS[name], folder)


def precision(name, dtype=torch.float16):
    test = test_precision.test_sums_are_taken_in_float32_and_results_rounded_once
    return lambda folder: test(name, dtype)


def architecture(capability, bias):
    test = test_architectures.test_attention_is_right_with_the_tiles_of_each_architecture
    return lambda folder: test(capability, 24, bias)


FAULTS = {
    "a key past the end": Fault(
        attention_tile.logits, {"seen = col < length": "seen = col <= length"}, values("attention"), "error"
    ),
    "the last partial tile is dropped in backward": Fault(
        gelu._bias_act_bwd_kernel, {"tl.cdiv(n_rows, BLOCK_M)": "n_rows // BLOCK_M"}, values("bias_gelu"), "error"
    ),
    "the gradient of lse is dropped": Fault(
        attention_long._attention_bwd_dq_kernel, {"delta -= base2(": "delta -= 0.0 * base2("},
        values("attention long"), "error",
    ),
    "a factor 3 is lost in the slope of tanh": Fault(
        gelu._act_and_slope, {"0.21406444881780076": "0.07135481627260025"}, values("bias_geglu"), "error"
    ),
    "an input's offset is int32": Fault(
        gelu._bias_act_fwd_kernel,
        {"row = tl.program_id(0).to(tl.int64)": "row = tl.program_id(0)"}, far_inputs("bias_gelu"),
        "reads outside of its tensors",
    ),
    "an output's offset is int32": Fault(
        gelu._bias_act_fwd_kernel, {"out_ptr + row[:, None] * n_cols": "out_ptr + row[:, None].to(tl.int32) * n_cols"},
        far_outputs("bias_gelu"), "writes outside of its tensors",
    ),
    "a gradient's offset is int32": Fault(
        layer_norm._dropout_add_norm_bwd_kernel,
        {"offset = row[:, None] * n_cols": "offset = row[:, None].to(tl.int32) * n_cols"},
        far_outputs("dropout_add_norm"), "writes outside of its tensors",
    ),
    "a bias gradient is summed in float16": Fault(
        gelu._bias_act_bwd_kernel, {"dbias += dz": "dbias = (dbias + dz).to(tl.float16).to(tl.float32)"},
        precision("bias_gelu"), "dbias: .* of the largest value",
    ),
    "a result goes through a lower precision": Fault(
        layer_norm._dropout_add_norm_fwd_kernel,
        {"tl.store(out_ptr + offset, out.to(": "tl.store(out_ptr + offset, out.to(tl.bfloat16).to(tl.float32).to("},
        precision("layernorm"), "out: an error of .* roundings",
    ),
    "strips add to one row": Fault(
        gelu._bias_act_bwd_kernel,
        {
            "dbias_ptr + strip.to(tl.int64) * width": "dbias_ptr",
            "tl.store(partial + col, tl.sum(dbias, axis=0)":
                "tl.store(partial + col, tl.load(partial + col, mask=in_row) + tl.sum(dbias, axis=0)",
        },
        races("bias_gelu"), "share an address that one of them writes",
    ),
    "wrong by 2 % in bfloat16": Fault(
        gelu._bias_act_fwd_kernel,
        {"out.to(out_ptr.dtype.element_ty)":
            "(out * (1.02 if out_ptr.dtype.element_ty == tl.bfloat16 else 1.0)).to(out_ptr.dtype.element_ty)"},
        values("bias_gelu", torch.bfloat16), "error",
    ),
    "wrong by 2 % in the tiles of one architecture": Fault(
        attention_long._attention_bwd_dkdv_kernel,
        {"(dk * terms.scale)": "(dk * terms.scale * (1.02 if BLOCK_M == 32 and BLOCK_N == 32 else 1.0))"},
        architecture(80, True), "dk: error",
    ),
}  # fmt: skip


NARROW = {"row[:, None] * n_cols": "row[:, None].to(tl.int32) * n_cols"}
NARROW_KEY = {"key.to(tl.int64) * n_cols": "key.to(tl.int32) * n_cols"}


def far_table(folder):
    with pytest.MonkeyPatch.context() as patch:
        test_far_outputs.test_a_table_of_more_than_2_31_elements_gets_the_sums_of_its_last_rows(patch)


def narrow(kernel, changes, test, says="writes outside of its tensors"):
    return pytest.param(Fault(kernel, changes, test, says), id=f"an offset of {kernel.fn.__name__} is int32")


# an offset in int32 in each of the other kernels
NARROW_FAULTS = [
    narrow(packing._gather_rows_kernel, NARROW, far_outputs("unpack")),
    narrow(embedding._embed_norm_fwd_kernel, NARROW, far_outputs("embed_norm")),
    narrow(embedding._embed_norm_bwd_kernel, NARROW, far_outputs("embed_norm")),
    narrow(segment._store_sum, NARROW_KEY, far_table),
    narrow(
        attention_tile.pointers, {"token * strides[0]": "token.to(tl.int32) * strides[0]"}, far_outputs("attention")
    ),
    narrow(
        attention_long._attention_bwd_dbias_kernel, {"plane.to(tl.int64)": "plane"}, far_outputs("attention bias")
    ),
    narrow(
        lamb._lamb_moments_kernel, {"begin = chunk * CHUNK": "begin = (chunk * CHUNK).to(tl.int32)"},
        test_far_outputs.test_a_parameter_of_more_than_2_31_elements_is_updated_to_its_end,
        "outside of its tensors|differ|exp_avg",
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault", [*(pytest.param(fault, id=name) for name, fault in FAULTS.items()), *NARROW_FAULTS])
def test_a_planted_fault_is_found(fault, tmp_path):
    with planted(fault.kernel, fault.changes, tmp_path), pytest.raises((AssertionError, InterpreterError)) as found:
        fault.test(tmp_path)
    found.match(fault.says)
