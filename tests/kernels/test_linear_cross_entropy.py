import importlib
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, LAYOUTS, arrange, check, repeat_with, values_and_gradients
from pairwise import pairwise

import minibert_kernels
from minibert_kernels import dispatch, linear_cross_entropy, reference

op = importlib.import_module("minibert_kernels.linear_cross_entropy")  # the package has the function by this name
WAYS = ("triton", "auto")  # the kernel, and torch chunk by chunk; one and the same on a GPU


def eager(way, hidden, weight, bias, labels, *, label_smoothing=0.0, reduction="mean"):
    """The op as one writes it in torch; with the kernel the bias is added after the product was rounded."""
    hidden = hidden.contiguous()  # or autograd takes a product of another accuracy
    if way == "triton":
        logits = (hidden @ weight.mT).float() + (0 if bias is None else bias.float())
    else:
        logits = F.linear(hidden, weight, bias).float()
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    if reduction == "none":
        return losses
    return losses.sum() / ((labels != -100).sum().clamp(min=1) if reduction == "mean" else 1)


@dataclass(frozen=True)
class Case:
    seed: int
    rows: int
    width: int
    vocab: int
    way: str = "triton"
    dtype: torch.dtype = torch.float32
    layouts: tuple = ("contiguous", "contiguous")
    bias: bool = True
    ignored: float = 0.3
    bounded: bool = False
    label_smoothing: float = 0.0
    reduction: str = "mean"
    chunk_rows: int | None = None

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        vocab = rng.choice([2, 3, 101, 128, 129, rng.randint(2, 900), rng.randint(2, 90), 16385])
        rows = rng.choice([0, 1, 13, rng.randint(8, 20)]) if vocab < 1000 else 3
        return cls(
            seed=seed,
            rows=rows,
            width=rng.choice([2, 8, 37, 64, rng.randint(2, 80)]),
            vocab=vocab,
            way=rng.choice(WAYS),
            dtype=rng.choice(DTYPES),
            # a weight of equal rows has no gradient but rounding
            layouts=(rng.choice(LAYOUTS), rng.choice(LAYOUTS[:-1])),
            bias=rng.random() < 0.7,
            ignored=rng.choice([0.0, 0.3, 0.85 if rows > 3 else 0.0, 1.0]),
            bounded=rng.random() < 0.5,
            label_smoothing=rng.choice([0.0, 0.0, 0.1, 0.3]),
            reduction=rng.choice(["mean", "mean", "sum", "none"]),
            chunk_rows=rng.choice([None, None, 3, 5]),
        )

    def run(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        options = {"label_smoothing": self.label_smoothing, "reduction": self.reduction}

        def kernel(**tensors):
            bound = int((tensors["labels"] != -100).sum()) if self.bounded else None
            return linear_cross_entropy(**tensors, **options, max_labels=bound, backend=self.way)[0]

        before = op.chunk_rows
        op.chunk_rows = before if self.chunk_rows is None else lambda vocab, element_size: self.chunk_rows
        try:
            with repeat_with(self, device):
                check(
                    kernel,
                    lambda **t: eager(self.way, **t, **options),
                    lambda **t: reference.linear_cross_entropy(**t, **options)[0],
                    lambda: self.inputs(device, generator),
                    draws=16 if self.rows > 3 else 40 if self.vocab < 1000 else 12,
                )
        finally:
            op.chunk_rows = before

    def inputs(self, device, generator):
        def normal(*shape, layout="contiguous", scale=1.0):
            return arrange((scale * torch.randn(shape, generator=generator)).to(device, self.dtype), layout)

        labels = torch.randint(self.vocab, (self.rows,), generator=generator)
        labels[torch.rand(self.rows, generator=generator) < self.ignored] = -100
        tensors = {
            "hidden": normal(self.rows, self.width, layout=self.layouts[0]),
            "weight": normal(self.vocab, self.width, layout=self.layouts[1], scale=2 * self.width**-0.5),
            "bias": normal(self.vocab) if self.bias else None,
            "labels": labels.to(device),
        }
        return tensors, [normal(*((self.rows,) if self.reduction == "none" else ()))]


def test_any_call_is_as_accurate_as_torch(fuzz_seed, device, poisoned):
    Case.draw(fuzz_seed).run(device)


@pytest.mark.parametrize(("vocab", "dtype", "way"), pairwise([16384, 30522, 119547], DTYPES, WAYS))
def test_values_and_gradients_at_the_vocabularies_of_berts(vocab, dtype, way, device, poisoned):
    Case(seed=vocab, rows=3, width=16, vocab=vocab, way=way, dtype=dtype, label_smoothing=0.1).run(device)


def test_a_wrong_smoothing_fails_and_prints_the_line_that_repeats_it(device, monkeypatch, few_draws):
    right = op._softmax_by_kernel
    monkeypatch.setattr(op, "_softmax_by_kernel", lambda *a: right(*a[:5], 0.2, *a[6:]))
    with pytest.raises(AssertionError, match="error") as failure:
        Case(seed=3, rows=13, width=37, vocab=101, label_smoothing=0.1).run(device)
    (line,) = failure.value.__notes__
    with pytest.raises(AssertionError, match="error"):
        eval(line.removeprefix("repeat with: "))


def test_float64_runs_in_chunks_and_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", 2 * 64 * 8)
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in inputs("cpu", rows=5, vocab=7).items()}
    labels = tensors.pop("labels").index_fill_(0, torch.tensor([1, 3]), -100)
    for reduction in op.REDUCTIONS:
        for smoothing in (0.0, 0.3):

            def loss(*t, options={"reduction": reduction, "label_smoothing": smoothing}):  # noqa: B006
                return linear_cross_entropy(*t, labels, **options)[0]

            assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in tensors.values()])


def inputs(device, rows=13, width=8, vocab=101):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator) for s in ((rows, width), (vocab, width), (vocab,)))
    labels = torch.randint(vocab, (rows,), generator=generator)
    return {n: t.to(device) for n, t in zip(("hidden", "weight", "bias", "labels"), (hidden, weight, bias, labels))}  # noqa: B905


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vocab", [7, 16500])
def test_a_row_is_correct_where_its_label_is_the_first_of_the_largest_logits(vocab, way, device):
    nan, inf = float("nan"), float("inf")
    bias = torch.zeros(10, vocab, device=device)
    bias[:, [2, vocab - 2]] = 1.0
    labels = torch.tensor([2, vocab - 2, 0, -100, 3, 2, 3, 0, 2, 3], device=device)
    bias[4:, 3] = torch.tensor([nan, nan, inf, -inf, -inf, nan], device=device)  # a NaN is above every number
    bias[5, 2], bias[6, 4], bias[9, 5] = nan, inf, inf
    for row in range(len(labels)):
        hidden, weight = torch.ones(1, 1, device=device), torch.zeros(vocab, 1, device=device)
        arguments = hidden, weight, bias[row], labels[row : row + 1]
        found = [linear_cross_entropy(*arguments, reduction="none", backend=b)[1] for b in (way, "reference")]
        assert found[0].dtype == torch.bool and found[0].item() == found[1].item(), row
    assert linear_cross_entropy(*arguments, backend=way)[1].dtype == torch.int64


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vocab", [7, 16500])
def test_extreme_logits_come_out_as_in_torch(vocab, way, device, poisoned):
    inf = float("inf")
    tensors = inputs(device, rows=9, vocab=vocab)
    tensors["labels"] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, -100], device=device)
    tensors["hidden"][0] *= 1e4
    tensors["hidden"][1] = 0.0
    tensors["hidden"][2, 0], tensors["hidden"][3, 0], tensors["hidden"][4, 0] = inf, -inf, float("nan")
    tensors["bias"][[5, 6]] = -inf  # the labels of two rows
    dout = torch.ones(9, device=device)
    for smoothing in (0.0, 0.1):
        options = {"reduction": "none", "label_smoothing": smoothing}
        ours, exact = (
            values_and_gradients(
                lambda b=b, o=options, **t: linear_cross_entropy(**t, **o, backend=b)[0], tensors, [dout]
            )
            for b in (way, "reference")
        )
        torch.testing.assert_close(ours, exact, equal_nan=True, rtol=2e-5, atol=2e-4)
    tensors["bias"][:] = -inf
    assert linear_cross_entropy(**tensors, backend=way)[0].isnan()


@pytest.mark.parametrize("way", (*WAYS, "reference"))
@pytest.mark.parametrize("rows", [0, 5])
def test_all_rows_ignored_give_zero_and_zero_gradients(rows, way, device, poisoned):
    tensors = inputs(device, rows=rows) | {"labels": torch.full((rows,), -100, device=device)}
    for options in ({}, {"max_labels": rows}, {"max_labels": 0}):
        results = values_and_gradients(
            lambda o=options, **t: linear_cross_entropy(**t, **o, backend=way), tensors, [torch.ones((), device=device)]
        )
        assert len(results) == 5 and not any(value.any() for value in results.values())


@pytest.mark.parametrize("way", (*WAYS, "reference"))
@pytest.mark.parametrize("bound", [None, 9, 13])
@pytest.mark.parametrize("reduction", op.REDUCTIONS)
def test_rows_after_the_last_label_have_no_loss_and_no_gradient(reduction, bound, way, device, poisoned):
    tensors = inputs(device)
    tensors["labels"][9:] = -100
    few = tensors | {name: tensors[name][:9] for name in ("hidden", "labels")}

    def call(**tensors):
        limit = None if bound is None else min(bound, len(tensors["labels"]))
        return linear_cross_entropy(**tensors, reduction=reduction, max_labels=limit, backend=way)

    douts = [torch.ones(n if reduction == "none" else (), device=device) for n in (13, 9)]
    static, plain = (values_and_gradients(call, t, [d]) for t, d in zip((tensors, few), douts, strict=True))
    for name in ("out", "out1", "dhidden"):
        rest = static[name][9:] if static[name].ndim else static[name][None][1:]
        assert not rest.any(), name
        static[name] = static[name][:9] if static[name].ndim else static[name]
    torch.testing.assert_close(static, plain)


def test_only_labelled_rows_enter_the_products(device, monkeypatch):
    entered = []
    right = op._softmax_by_kernel
    monkeypatch.setattr(op, "_softmax_by_kernel", lambda logits, *a: entered.append(len(logits)) or right(logits, *a))
    tensors = inputs(device)
    tensors["labels"][torch.arange(13, device=device) % 6 != 2] = -100
    for options, rows in (({}, 2), ({"max_labels": 2}, 2), ({"max_labels": 4}, 4), ({"max_labels": 13}, 13)):
        entered.clear()
        loss, correct = linear_cross_entropy(**tensors, **options, backend="triton")
        assert sum(entered) == rows
        torch.testing.assert_close((loss, correct), reference.linear_cross_entropy(**tensors))


def test_chunks_are_of_bounded_size_and_of_whole_tiles():
    for vocab, element_size, rows in (
        (30522, 2, 1024), (30522, 4, 512), (250002, 2, 128), (250002, 4, 67), (2**25, 4, 1), (64, 4, 2**18),
    ):  # fmt: skip
        assert op.chunk_rows(vocab, element_size) == rows
        assert rows == 1 or rows * vocab * element_size <= op.CHUNK_BYTES


@pytest.mark.parametrize("vocab", [77, 78])
def test_what_lies_between_rows_of_logits_is_not_read(vocab, device, poisoned):
    hidden = torch.randn(59, 16, device=device).bfloat16().requires_grad_()
    weight = torch.randn(vocab, 16, device=device).bfloat16().requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, None, torch.arange(59, device=device))
    loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{"width": 1}, {"vocab": 1}, {"rows": 1}])
def test_axes_of_one_and_a_smoothing_of_one(options, way, device, poisoned):
    tensors = inputs(device, **options)
    ours, exact = (
        values_and_gradients(
            lambda b=b, **t: linear_cross_entropy(**t, label_smoothing=1.0, backend=b),
            tensors,
            [torch.ones((), device=device)],
        )
        for b in (way, "reference")
    )
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", op.REDUCTIONS)
def test_chunks_of_any_size_give_the_same_losses_and_nearly_the_same_gradients(reduction, way, device, monkeypatch):
    tensors = inputs(device, rows=29)
    douts = [torch.randn(29 if reduction == "none" else (), device=device)]
    results = []
    for rows in (29, 4, 1):
        monkeypatch.setattr(op, "CHUNK_BYTES", rows * 128 * 4)
        call = {"reduction": reduction, "backend": way}
        results.append(values_and_gradients(lambda c=call, **t: linear_cross_entropy(**t, **c), tensors, douts))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_the_embedding_too_gets_the_sum_of_both_gradients(way, device):
    tensors = inputs(device)
    weight, ids = tensors["weight"].requires_grad_(), tensors["labels"].flip(0)

    def gradient(backend):
        hidden = F.embedding(ids, weight).tanh()
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, None, tensors["labels"], backend=backend)[0],
                                   weight)[0]  # fmt: skip

    torch.testing.assert_close(gradient(way), gradient("reference"))


@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_gives_the_same_gradient_again(way, device):
    tensors = inputs(device)
    weight = tensors["weight"].requires_grad_()
    loss, _ = linear_cross_entropy(**tensors, backend=way)
    first = torch.autograd.grad(3 * loss, weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(3 * loss, weight)[0], first)


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_formed_for_what_needs_one(reduction, wanted, device):
    tensors = inputs(device)
    one = torch.ones((), device=device)
    every = values_and_gradients(
        lambda **t: linear_cross_entropy(**t, reduction=reduction, backend="triton")[0].sum(), tensors, [one]
    )
    for name in wanted:
        tensors[name].requires_grad_()
    loss, _ = linear_cross_entropy(**tensors, reduction=reduction, backend="triton")
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.sum().backward()
    for name in ("hidden", "weight", "bias"):
        grad = tensors[name].grad
        assert (grad is not None) == (name in wanted)
        assert grad is None or torch.equal(grad, every[f"d{name}"])
    with torch.no_grad():
        assert not linear_cross_entropy(**tensors, reduction=reduction, backend="triton")[0].requires_grad


def test_small_gradients_of_a_mean_survive_float16(device):
    tensors = inputs(device, rows=512, width=16, vocab=200)
    narrow = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    scale = [torch.tensor(2.0**14, device=device)]  # as a gradient scaler has it
    ours = values_and_gradients(lambda **t: linear_cross_entropy(**t, backend="triton")[0], narrow, scale)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in narrow.items()}
    exact = values_and_gradients(lambda **t: reference.linear_cross_entropy(**t)[0], wide, scale)
    for name in ("dhidden", "dweight", "dbias"):
        error = (ours[name].double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 2**-10, (name, error)


def test_under_autocast_the_loss_is_float32_and_gradients_have_the_dtype_of_the_parameters(device):
    tensors = inputs(device)
    leaves = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    exact = reference.linear_cross_entropy(**leaves)[0]
    with torch.autocast(device, torch.float16):
        loss, _ = linear_cross_entropy(**leaves, backend="triton")
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=2e-3)
    assert all(leaves[name].grad.dtype == torch.float32 for name in ("hidden", "weight", "bias"))


def test_switched_off_it_writes_all_logits(device, monkeypatch):
    tensors = inputs(device)
    expected = reference.linear_cross_entropy(**tensors)
    monkeypatch.setattr(op, "_loop", None)
    with dispatch.disabled("linear_cross_entropy"):
        for backend in ("auto", "triton", "reference"):
            assert torch.equal(linear_cross_entropy(**tensors, backend=backend)[0], expected[0])


MEMORY = """
import sys, torch
from minibert_kernels import linear_cross_entropy

def loss_and_gradients(rows, vocab, width):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).requires_grad_() for n in (rows, vocab))
    bias, labels = torch.zeros(vocab, requires_grad=True), torch.randint(vocab, (rows,), generator=generator)
    before = peak()
    loss, correct = linear_cross_entropy(hidden, weight * width**-0.5, bias, labels, backend=sys.argv[1])
    return peak, before, loss.detach(), correct, *torch.autograd.grad(loss, (hidden, weight, bias))

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

loss_and_gradients(300, 500, 8)  # threads, code, and what else there is once
_, before, *results = loss_and_gradients(8192, 30522, int(sys.argv[2]))
torch.save((peak() - before, *results), sys.argv[3])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 768])
def test_the_loss_of_8192_tokens_takes_less_than_a_tenth_of_the_references_memory(width, tmp_path, record_property):
    results = {}
    package = Path(minibert_kernels.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(package), "CUDA_VISIBLE_DEVICES": ""}
    for backend in ("auto", "reference"):
        command = [sys.executable, "-c", MEMORY, backend, str(width), str(tmp_path / backend)]
        subprocess.run(command, env=environment, check=True)
        results[backend] = torch.load(tmp_path / backend)
    (ours, *values), (theirs, *expected) = results.values()
    record_property("MiB", (ours, theirs))
    print(f"width {width}: {ours:.0f} MiB against {theirs:.0f} MiB")
    assert ours < theirs / 10, f"{ours:.0f} MiB against {theirs:.0f} MiB"
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_captured_step_reads_nothing_on_the_host():
    tensors = inputs("cuda")
    tensors["labels"][::3] = -100
    linear_cross_entropy(**tensors)
    torch.cuda.synchronize()
    for options in ({}, {"max_labels": 9}):
        graph = torch.cuda.CUDAGraph()  # one holds one capture
        with torch.cuda.graph(graph):
            captured = linear_cross_entropy(**tensors, **options)
        graph.replay()
        torch.testing.assert_close(captured, linear_cross_entropy(**tensors))


@pytest.mark.gpu
def test_a_label_outside_of_the_vocabulary_makes_the_loss_nan_on_a_gpu():
    tensors = inputs("cuda") | {"labels": torch.arange(13, device="cuda") + 100}
    losses, correct = linear_cross_entropy(**tensors, reduction="none")
    assert losses.isfinite().tolist() == [True] + [False] * 12 and not correct[1:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5)}, r"hidden is \[5\]: expected \[N, D\]"),
        ({"weight": torch.zeros(9, 3)}, r"weight is \[9, 3\]: expected \[V, 4\] with V of at least 1"),
        ({"weight": torch.zeros(0, 4)}, r"weight is \[0, 4\]: expected \[V, 4\]"),
        ({"weight": torch.zeros(4)}, r"weight is \[4\]: expected \[V, 4\]"),
        (
            {"hidden": torch.zeros(5, 4).long(), "weight": torch.zeros(9, 4).long()},
            "hidden is torch.int64: expected one of float32, bfloat16",
        ),
        ({"weight": torch.zeros(9, 4).half()}, "weight is torch.float16, hidden is torch.float32: expected one dtype"),
        ({"bias": torch.zeros(8)}, r"bias is \[8\]: expected \[9\], as many as weight has rows"),
        ({"bias": torch.zeros(9).half()}, "bias is torch.float16, hidden is torch.float32: expected one dtype"),
        ({"labels": torch.zeros(4).long()}, r"labels is torch.int64 \[4\]: expected int64 \[5\], one a row"),
        ({"labels": torch.zeros(5)}, r"labels is torch.float32 \[5\]: expected int64 \[5\]"),
        ({"labels": torch.zeros(5, device="meta").long()}, "labels is on meta, hidden is on cpu: expected one device"),
        ({"labels": torch.tensor([0, -100, 9, 0, 0])}, r"labels has 9 at 2: expected \[0, 9\) or -100"),
        ({"labels": torch.tensor([0, -1, 0, 0, 0])}, r"labels has -1 at 1: expected \[0, 9\) or -100"),
        ({"label_smoothing": 1.1}, r"label_smoothing=1.1 is not in \[0, 1\]"),
        ({"reduction": "avg"}, "reduction='avg' is not one of mean, sum, none"),
        ({"max_labels": -1}, "max_labels=-1 is negative"),
        ({"max_labels": 2}, "max_labels=2: 5 rows have a label"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, reference"),
        (
            {"hidden": torch.zeros(5, 4).double(), "weight": torch.zeros(9, 4).double(), "backend": "triton"},
            "linear_cross_entropy: backend='triton' (takes|needs) .*: use backend='reference'",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    arguments = {
        "hidden": torch.zeros(5, 4), "weight": torch.zeros(9, 4), "bias": None, "labels": torch.zeros(5).long(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments | change)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_mode_derivatives_are_right_or_refused(backend, device):
    tensors = inputs(device)
    hidden, tangent = (
        tensors.pop("hidden").double(),
        torch.randn(13, tensors["weight"].shape[1], device=device).double(),
    )
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}

    def loss(hidden):
        return linear_cross_entropy(hidden, **tensors, backend=backend)[0]

    if backend == "auto":
        with pytest.raises(
            NotImplementedError, match="linear_cross_entropy_fwd has no forward-mode derivative: use back"
        ):
            torch.func.jvp(loss, (hidden,), (tangent,))
    else:
        _, found = torch.func.jvp(loss, (hidden,), (tangent,))
        steps = [loss(hidden + sign * 1e-5 * tangent) for sign in (1, -1)]
        torch.testing.assert_close(found, (steps[0] - steps[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_another_ignore_index_is_heeded(device):
    tensors = inputs(device) | {"labels": torch.tensor([0, 3] * 6 + [7], device=device)}
    for way in (*WAYS, "reference"):
        loss, correct = linear_cross_entropy(**tensors, ignore_index=0, reduction="none", backend=way)
        assert (loss == 0).tolist() == [True, False] * 6 + [False] and not correct[::2][:6].any()
