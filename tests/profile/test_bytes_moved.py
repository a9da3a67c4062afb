"""Bytes of an op are those of its tensors, and stand beside a time only where they belong to it."""

import pytest
import torch
from small import build
from torch.nn import functional as F
from torch.profiler import record_function

from minibert.model import BertForPreTraining
from minibert.profile import Step, count_traffic, synthetic_batch
from minibert.profile.measure import _profiler, op_table, within_steps
from minibert.profile.watch import Traffic

X, ROW = torch.rand(7, 5), torch.rand(5)
WIDE, BIAS = torch.rand(11, 5), torch.rand(11)
IDS = torch.tensor([3, 3, 10])
F32, I64 = 4, 8
KNOWN = {
    "two in, one out": (lambda: X + X.flip(0), "aten::add", 3 * 35 * F32),
    "the same tensor twice is read once": (lambda: X + X, "aten::add", 2 * 35 * F32),
    "a row that is broadcast is read once": (lambda: X * ROW, "aten::mul", (35 + 5 + 35) * F32),
    "an expanded axis is stored once": (lambda: X * ROW.expand(7, 5), "aten::mul", (35 + 5 + 35) * F32),
    "in place: read and written": (lambda: X.clone().mul_(2), "aten::mul_", 2 * 35 * F32),
    "a copy: one read, one written": (lambda: torch.empty(7, 5).copy_(X), "aten::copy_", 2 * 35 * F32),
    "a fill only writes": (lambda: torch.empty(7, 5).fill_(1), "aten::fill_", 35 * F32),
    "into out: written, not read": (lambda: torch.add(X, 1, out=torch.empty(7, 5)), "aten::add", 2 * 35 * F32),
    "half as wide": (lambda: X.bfloat16() * 2, "aten::mul", 2 * 35 * 2),
    "a matrix product": (lambda: X @ WIDE.t(), "aten::mm", (35 + 55 + 77) * F32),
    "a lookup reads the rows it takes": (lambda: F.embedding(IDS, WIDE), "aten::embedding", 2 * 15 * F32 + 3 * I64),
    "new memory has not been written": (lambda: torch.empty_like(X).new_empty(7), "aten::empty_like", 0),
    "a view moves nothing": (lambda: X.view(5, 7).t(), "aten::view", 0),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_bytes_are_those_counted_by_hand(name, inference):
    call, op, expected = KNOWN[name]
    with torch.inference_mode(inference), Traffic() as traffic:
        call()
    assert traffic.bytes[op] == expected


def test_inference_counts_a_layer_by_its_parts():
    with torch.inference_mode(), Traffic() as traffic:
        F.linear(X, WIDE, BIAS)
    assert traffic.bytes == {"aten::addmm": (35 + 55 + 11 + 77) * F32}


def test_adamw_moves_seven_times_the_parameters():
    model = build(BertForPreTraining)
    step = Step(model, synthetic_batch(model.config, model.objective, batch_size=3, length=9))
    step()
    traffic = count_traffic(step)
    tensors, sizes = len(list(model.parameters())), sum(p.numel() for p in model.parameters())
    assert traffic.bytes["aten::_fused_adamw_"] == 7 * sizes * F32 + tensors * F32  # and its step, a number a tensor


def profiled(call, steps=3):
    with _profiler(False) as profiler:
        for _ in range(steps):
            with record_function("step"):
                call()
    return within_steps(profiler.events())


def rows(call, traffic, steps=3):
    table = op_table(profiled(call, steps), {"step"}, steps, False, traffic, 1e9)
    return {row["op"]: row for row in table}


def watched(call):
    with Traffic() as traffic:
        call()
    return traffic


def test_bytes_and_time_give_a_rate_and_its_share_of_a_copy():
    row = rows(lambda: X @ WIDE.t(), watched(lambda: X @ WIDE.t()))["aten::mm"]
    assert row["calls"] == 1 and row["bytes"] == (35 + 55 + 77) * F32
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["total_ms"] * 1e3 / 1e9)
    assert row["of_copy"] == pytest.approx(row["gb_per_s"] * 1e9 / 1e9)
    assert row["flops"] == 2 * 7 * 5 * 11


def test_an_op_that_was_called_another_number_of_times_has_no_bytes():
    call = lambda: (X @ WIDE.t(), X @ WIDE.t())  # noqa: E731
    assert rows(call, watched(lambda: X @ WIDE.t()))["aten::mm"]["bytes"] is None


@torch.library.custom_op("minibert_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def test_bytes_of_ops_inside_another_are_its_own():
    call = lambda: (twice(X), X + X)  # noqa: E731
    table = rows(call, watched(call))
    assert table["minibert_test::twice"]["bytes"] == 2 * 35 * F32
    assert table["aten::add"]["calls"] == 2 and table["aten::add"]["bytes"] == 2 * 35 * F32
    seen = table["aten::add"]["bytes"] / table["aten::add"]["gb_per_s"] / 1e6
    assert seen < table["aten::add"]["total_ms"]  # the call inside counts for the op around it
