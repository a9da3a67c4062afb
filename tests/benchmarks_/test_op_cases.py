"""The kernel suite: who computes an op is timed, who computes something else is refused by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import minibert_kernels
from benchmarks import cases, kernels, training
from benchmarks.cases import BOTH, TABLE, TINY, Draw
from benchmarks.gate import Refused
from benchmarks.kernels import Bound, Gate
from benchmarks.measure import Peaks, measure
from minibert.config import BertConfig
from minibert_kernels import roofline, traffic

PEAKS = Peaks(flops=1e18, bytes=1e18)


def case_of(op, **changes):
    [found] = [case for case in TINY if case.op == op]
    return found


def gate_of(op, dtype, tokens=32):
    case = case_of(op)
    problem = case.make(cases.sizes_of(case, tokens), dtype.itemsize, Draw("cpu"))
    return Gate(case, dtype, "cpu", problem), problem


def judged(op, provider, dtype=torch.float32, name="candidate", tokens=32):
    return gate_of(op, dtype, tokens)[0].check(name, provider, half_only=False)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.op)
def test_every_op_is_timed_in_each_direction_and_nobody_of_ours_is_refused(case):
    found = [
        row
        for one in kernels.cases(table=[case], dtypes=[torch.float32], tokens=32, backend="triton",
                                 only=lambda name: name in ("minibert", "torch eager", "sdpa flash"))
        for row in measure(one, rounds=1, peaks=PEAKS)
    ]  # fmt: skip
    assert {row["direction"] for row in found} == set(case.make(np.array([4]), 4, Draw("cpu")).works)
    assert not [row for row in found if "refused" in row], found
    assert {row["provider"] for row in found} >= {"minibert", "torch eager"}


def test_the_table_has_every_op_that_has_a_kernel():
    assert {case.op for case in TABLE} == set(minibert_kernels.TRITON_OPS)


def test_the_least_bytes_of_lamb_are_those_that_the_kernels_are_held_to():
    [timed] = {case.make(np.array([4]), 4, Draw("cpu")).works["fwd"].bytes / 999 for case in TINY if "lamb" in case.op}
    counted = {case.forward / case.activations[0].numel() for case in traffic.cases() if case.label.startswith("fp32")}
    assert counted == {timed} == {roofline.kernel_work("lamb_step", "fwd", "fp32 without trust ratio").bytes}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("op", [case.op for case in TINY if case.op not in ("mlm_mask", "lamb_step")])
def test_what_torch_does_by_hand_is_accepted(op, dtype):
    judged(op, kernels.torch_eager, dtype)


def by_hand(call):
    """A provider with the signature of `kernels.BY_HAND`."""
    return lambda problem, tensors, dropout: Bound(tensors, lambda: call(**tensors, **problem.options))


WRONG = {
    "mask": ("attention", lambda problem, tensors, dropout: kernels.padded_attention(
        problem, tensors, lambda q, k, v, mask: kernels.plain_attention(q, k, v, None, 0.0))),
    "gelu": ("bias_gelu", by_hand(lambda x, bias: F.gelu(x + bias, approximate="tanh"))),
    "dropped bias": ("dropout_add_norm", by_hand(lambda x, residual, weight, bias: kernels.by_hand_norm(
        x, residual, weight, bias * 0))),
    "head": ("linear_cross_entropy", by_hand(lambda hidden, weight, bias, labels, max_labels: F.cross_entropy(
        hidden @ weight.T + 0 * bias, labels))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("fault", WRONG)
def test_what_computes_something_else_is_refused_by_name(fault, dtype):
    op, provider = WRONG[fault]
    with pytest.raises(Refused, match=f"a wrong {fault}.* differs by"):
        judged(op, provider, dtype, f"a wrong {fault}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_wrong_on_the_timed_tensors_alone_is_refused(dtype):
    def cuts(problem, tensors, dropout):
        def attend(q, k, v, mask):
            if len(q) > 6:  # more sequences than the gate's own problem has
                v = torch.cat([v[:6], v[6:] * 0])
            return kernels.plain_attention(q, k, v, mask, 0.0)

        return kernels.padded_attention(problem, tensors, attend)

    with pytest.raises(Refused, match="cuts, as timed: output differs by"):
        judged("attention", cuts, dtype, "cuts", tokens=8 * 16)
    judged("attention", cuts, dtype, "cuts", tokens=6 * 16)


def test_results_of_some_sequences_at_a_time_are_those_of_all(monkeypatch):
    _, problem = gate_of("attention", torch.float32, tokens=7 * 16)
    whole = kernels.by_sequences(problem, kernels._reference, torch.float64)
    monkeypatch.setattr(kernels, "SCORES", 2 * 16 * 16)
    parts = kernels.by_sequences(problem, kernels._reference, torch.float64)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], msg=name)


def test_who_is_timed_with_dropout_has_to_drop():
    gate, problem = gate_of("attention", torch.float32)
    problem = replace(problem, dropout=0.1)

    def forgets(problem, tensors, dropout):
        return kernels.torch_eager(problem, tensors, 0.0)

    kernels.build("by hand", kernels.torch_eager, problem, gate, "fwd")
    with pytest.raises(Refused, match="forgets: dropout moves the output by 0.0%"):
        kernels.build("forgets", forgets, problem, gate, "fwd")


def test_sequences_of_many_lengths_with_dropout_come_first():
    assert all("varlen" in case.name and "dropout" in case.name and case.fill != "full" for case in TABLE[:3])
    sizes = cases.sizes_of(TABLE[0], 65536)
    assert 0.8 < sizes.sum() / 65536 < 1.1 and sizes.max() <= 512 and len(set(sizes)) > 100


def test_a_step_has_the_flops_that_mfu_is_predicted_with():
    config, length, count = BertConfig.preset("bert-base", vocab_size=30528), 128, 32
    predicted = round(0.15 * count * length)
    ours = training.step_flops(config, [length] * count, predicted) - 6 * count * config.hidden_size**2  # the pooler
    theirs = roofline.model_flops(roofline.MODELS["bert-base"], length) * count * length
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_wrong_gradient_is_refused_though_the_output_is_right():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dx):
            return 2 * dx

    with pytest.raises(Refused, match="grad x differs"):
        judged("bias_gelu", by_hand(lambda x, bias: F.gelu(Doubled.apply(x) + bias)))


def test_what_needs_a_gpu_says_so_here():
    rows = [
        row
        for one in kernels.cases(table=[case_of("attention")], dtypes=[torch.float32], tokens=32,
                                 only=lambda name: name in kernels.GPU_ONLY)
        for row in measure(one, rounds=1, peaks=PEAKS)
    ]  # fmt: skip
    wanted = {f"{name}: needs a GPU" for name in kernels.GPU_ONLY if name != "liger"}
    assert len(rows) == 2 * len(wanted) and {row["refused"] for row in rows} == wanted


def test_bytes_and_flops_are_those_a_hand_computes():
    def works(maker, sizes, **options):
        return getattr(cases, maker)(**options)(np.array(sizes), 2, Draw("cpu")).works

    found = works("attention", [3, 5], heads=2, head_size=4)
    assert found["fwd"].bytes == 4 * 8 * 2 * 4 * 2 and found["bwd"].bytes == 2 * found["fwd"].bytes
    assert found["fwd"].flops == 2 * 2 * 2 * 4 * (9 + 25) and found["bwd"].flops == 2.5 * found["fwd"].flops
    found = works("norm", [8], width=16, dropout=0.1)
    assert found["fwd"].bytes == found["bwd"].bytes == 4 * 8 * 16 * 2
    found = works("activation", [8], op="bias_geglu", width=16)
    assert found["fwd"].bytes == 3 * 8 * 16 * 2 and found["bwd"].bytes == 5 * 8 * 16 * 2
    [found] = works("cross_entropy", [100], width=16, vocab=50).values()
    assert found.flops == 3 * 2 * 15 * 16 * 50 and found.bytes == 2 * 2 * (15 * 16 + 50 * 16 + 50)


def test_both_directions_of_the_loss_are_one_call():
    assert list(case_of("linear_cross_entropy").make(np.array([9]), 4, Draw("cpu")).works) == [BOTH]
