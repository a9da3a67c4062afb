"""The launch plans of every architecture, and those of float32 on a GPU, run in the interpreter."""

import pytest
import torch
from instruments import architecture
from test_every_op import CALLS
from wide_calls import cuts, qkv, wide

import minibert_kernels as kernels
from minibert_kernels import dispatch
from minibert_kernels.attention_tile import SCHEDULE_TILE
from minibert_kernels.launch import attention_plan, attention_short_plan

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="takes the plans of other GPUs in the interpreter")
DIRECTIONS = {
    "_attention_fwd_kernel": "fwd", "_attention_bwd_dq_kernel": "dq", "_attention_bwd_dkdv_kernel": "dkdv",
    "_attention_bwd_dbias_kernel": "dbias",
}  # fmt: skip
SHORT_DIRECTIONS = {"_attention_short_fwd_kernel": "fwd", "_attention_short_bwd_kernel": "bwd"}


def attention(head_size, max_seqlen, bias):
    """A sequence that fills the largest tiles, the first tile of the next, and leaves a rest."""
    lengths = [max_seqlen, 3]
    shapes = qkv(lengths, 1, head_size) | ({"score_bias": (1, 1, max_seqlen, max_seqlen)} if bias else {})
    return wide(
        kernels.attention, shapes, {"cu_seqlens": cuts(lengths)}, max_seqlen=max_seqlen, dropout=0.1, launches=[]
    )


def check(capability, element_size, head_size, max_seqlen, bias):
    """Values and gradients with an architecture's plans, and that the launches had their tiles."""
    with architecture(capability, float32=element_size == 4) as launches:
        attention(head_size, max_seqlen, bias).check(torch.float32 if element_size == 4 else torch.float16)
    shape = head_size, element_size, capability, max_seqlen
    for launch in launches.seen:
        if launch.kernel in SHORT_DIRECTIONS:
            plan = attention_short_plan(*shape, SHORT_DIRECTIONS[launch.kernel])
            assert launch.arguments["BLOCK_S"] == plan.block_m
        else:
            direction = DIRECTIONS[launch.kernel]
            plan = attention_plan(*shape, direction, bias and direction != "dbias")
            assert (launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]) == (plan.block_m, plan.block_n)
    return {launch.kernel for launch in launches.seen}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("head_size", [24, 72, 136])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_attention_is_right_with_the_tiles_of_each_architecture(capability, head_size, bias):
    # heads of more than 128 have smaller tiles, and no short form
    launched = check(capability, 2, head_size, 147 if head_size <= 128 else 70, bias)
    assert launched == {name for name, direction in DIRECTIONS.items() if bias or direction != "dbias"}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("head_size", [24, 72, 136])
def test_attention_is_right_with_the_tiles_of_float32_on_a_gpu(head_size, bias):
    assert "_attention_bwd_dq_kernel" in check(90, 4, head_size, 51, bias)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("head_size", [24, 72])
def test_attention_is_right_where_an_architecture_has_a_short_form(capability, head_size):
    kernels_of = check(capability, 2, head_size, 51, False)
    assert "_attention_short_fwd_kernel" in kernels_of
    assert ("_attention_short_bwd_kernel" in kernels_of) == (capability == 100)


@pytest.mark.parametrize("direction", ["fwd", "dq", "dkdv", "dbias"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
def test_plans_fit_the_call(capability, direction):
    for head_size, block_d in ((1, 16), (16, 16), (37, 64), (64, 64), (65, 128), (128, 128), (129, 256), (256, 256)):
        for element_size in (2, 4):
            for max_seqlen, longest in ((1, 16), (16, 16), (17, 32), (512, 512)):
                for bias in (False, True):
                    plan = attention_plan(head_size, element_size, capability, max_seqlen, direction, bias)
                    assert plan.block_d == block_d
                    assert 16 <= plan.block_m <= longest and 16 <= plan.block_n <= longest
                    assert SCHEDULE_TILE.value % plan.block_m == SCHEDULE_TILE.value % plan.block_n == 0


def test_consumer_blackwell_has_the_plans_of_ampere():
    for head_size in (16, 64, 128, 256):
        for length in (16, 64, 128, 512):
            for direction in ("fwd", "bwd"):
                plans = {attention_short_plan(head_size, 2, chip, length, direction) for chip in (80, 120)}
                assert len(plans) == 1
            for direction in DIRECTIONS.values():
                for bias in (False, True):
                    plans = {attention_plan(head_size, 2, chip, length, direction, bias) for chip in (80, 120)}
                    assert len(plans) == 1


@pytest.mark.parametrize("name", CALLS)
def test_only_attention_depends_on_the_architecture(name):
    with architecture(80) as launches:
        CALLS[name].run()
    assert launches.seen
    assert (launches.asked > 0) == name.startswith("attention")
