import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, LAYOUTS, SEED, Recorder, arrange, check, repeat_with, values_and_gradients
from pairwise import pairwise
from tolerance import assert_as_accurate

from minibert_kernels import layer_norm, philox, reference
from minibert_kernels.layer_norm import dropout_add_norm

NAMES = ("x", "residual", "weight", "bias")
BERT = (768, torch.bfloat16, "layernorm", 0.1)


def eager(x, residual, weight, bias, *, dropout=0.0, seed=0, rows=None, eps=1e-12, kind="layernorm", prenorm=False):
    """The op as one writes it in torch, in the dtype of x throughout."""
    total = x
    if dropout > 0.0:
        rows = torch.arange(x.numel() // x.shape[-1], device=x.device) if rows is None else rows
        keep = philox.row_keep(seed, dropout, rows, x.shape[-1]).view(x.shape)
        total = torch.where(keep, x * philox.keep_scale(dropout), 0)
    if residual is not None:
        total = total + residual.to(x.dtype)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if kind == "layernorm":
        out = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    else:
        out = F.rms_norm(total, total.shape[-1:], weight, eps)
        out = out if bias is None else out + bias
    return (out, total) if prenorm else out


def kernel(*tensors, **options):
    return dropout_add_norm(*tensors, **options, backend="triton")


def run(op, tensors, douts, **options):
    """`values_and_gradients` of (x, residual, weight, bias)."""
    return values_and_gradients(op, dict(zip(NAMES, tensors, strict=True)), douts, **options)


@dataclass(frozen=True)
class Case:
    seed: int
    shape: tuple
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype = torch.float32
    residual_dtype: torch.dtype | None = torch.float32
    layouts: tuple = ("contiguous",) * 3
    bias: bool = True
    dropout: float = 0.0
    rows: bool = False
    kind: str = "layernorm"
    prenorm: bool = False
    eps: float = 1e-12

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        cols = rng.choice(
            [1, 2, 7, 16, 37, 64, 100, 128, 257, 512, 768, 1023, rng.randint(1, 1100), rng.randint(1, 64)]
        )
        dtype = rng.choice(DTYPES)
        shape = (*rng.choice([(), (1,), (13,), (5,), (3, 2), (0,), (rng.randint(1, 40),), (2, 1, 3)]), cols)
        param_dtype, residual_dtype = (
            rng.choice([dtype, torch.float32]),
            rng.choice([None, dtype, dtype, torch.float32]),
        )
        layouts = tuple(rng.choice(LAYOUTS) for _ in range(3))
        return cls(
            seed=seed,
            shape=shape,
            dtype=dtype,
            param_dtype=param_dtype,
            residual_dtype=residual_dtype,
            layouts=layouts,
            # the sum of equal rows comes out exact in torch
            bias=rng.random() < 0.7 and layouts[2] != LAYOUTS[-1],
            dropout=rng.choice([0.0, 0.1, 0.5]),
            rows=rng.random() < 0.5,
            kind=rng.choice(layer_norm.KINDS),
            prenorm=rng.random() < 0.5,
            # a row of one or two survivors has gradients of nothing but cancellation where eps is small
            eps=rng.choice([1e-12, 1e-5]) if cols >= 16 else 0.1,
        )

    def run(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(2**62, self.shape[:-1], generator=generator).to(device) if self.rows else None
        options = {"dropout": self.dropout, "seed": self.seed, "rows": rows, "eps": self.eps, "kind": self.kind}
        with repeat_with(self, device):
            check(
                kernel, eager, reference.dropout_add_norm, lambda: self.inputs(device, generator),
                draws=1 if self.shape[-1] >= 16 else 12, prenorm=self.prenorm, **options,
            )  # fmt: skip

    def inputs(self, device, generator):
        def normal(shape, dtype, layout="contiguous"):
            return arrange(torch.randn(shape, generator=generator).to(device, dtype), layout)

        x = normal(self.shape, self.dtype, self.layouts[0])
        residual = None
        if self.residual_dtype is not None:
            residual = normal(self.shape, self.residual_dtype, self.layouts[1])
        weight = normal(self.shape[-1:], self.param_dtype)
        bias = normal(self.shape[-1:], self.param_dtype) if self.bias else None
        return dict(zip(NAMES, (x, residual, weight, bias), strict=True)), [
            normal(self.shape, self.dtype, self.layouts[2])
        ] * (1 + self.prenorm)


def test_any_call_is_as_accurate_as_torch(fuzz_seed, device, poisoned):
    Case.draw(fuzz_seed).run(device)


@pytest.mark.parametrize(
    ("cols", "dtype", "kind", "dropout"),
    pairwise([1, 37, 768, 8192], DTYPES, layer_norm.KINDS, [0.0, 0.1], always=[BERT]),
)
def test_values_and_gradients_at_the_widths_of_berts(cols, dtype, kind, dropout, device, poisoned):
    rows = 3 if cols == 8192 else 35  # more than one tile a program of the backward
    Case(
        seed=cols, shape=(rows, cols), dtype=dtype, param_dtype=dtype, residual_dtype=dtype, dropout=dropout,
        kind=kind, prenorm=True, eps=0.1 if cols == 1 else 1e-12,
    ).run(device)  # fmt: skip


def test_a_wrong_scale_of_the_survivors_fails_and_prints_the_line_that_repeats_it(device, monkeypatch, few_draws):
    monkeypatch.setattr(layer_norm, "keep_scale", lambda p: 1.0)
    with pytest.raises(AssertionError, match="error") as failure:
        Case(seed=3, shape=(13, 37), dropout=0.5).run(device)
    (line,) = failure.value.__notes__
    with pytest.raises(AssertionError, match="error"):
        eval(line.removeprefix("repeat with: "))


def inputs(device, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (shape, shape, shape[-1:], shape[-1:])
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def test_the_same_call_gives_the_same_bits_every_time(device):
    rows = 9 if device == "cpu" else 4099
    tensors = inputs(device, rows, 37)
    dout = torch.randn(rows, 37, device=device)
    first = run(kernel, tensors, [dout], dropout=0.1, seed=SEED)
    for _ in range(9 if device == "cpu" else 249):  # the interpreter runs programs one after another
        again = run(kernel, tensors, [dout], dropout=0.1, seed=SEED)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_dropout_draws_the_mask_of_the_numpy_twin(device):
    rows = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**32 + 5, 2**62 + 9, -3], device=device)
    x = torch.ones(7, 100, device=device)
    _, total = kernel(x, None, x[0], None, dropout=0.3, seed=SEED, rows=rows, prenorm=True)
    column = torch.arange(100).numpy()
    group, byte = column // 16, column % 16
    for row, kept in zip(rows.tolist(), (total != 0).tolist(), strict=True):
        words = philox.philox(SEED, group, 0, row, row >> 32)
        drawn = [(int(words[b // 4][i]) >> 8 * (b % 4)) & 0xFF for i, b in enumerate(byte)]
        assert kept == [d >= round(0.3 * 256) for d in drawn]
    torch.testing.assert_close(total.unique().cpu(), torch.tensor([0.0, 256 / (256 - 77)]))


def test_dropout_keeps_the_fraction_it_should(device):
    x = torch.ones(64, 1024, device=device)
    _, total = kernel(x, None, x[0], None, dropout=0.1, seed=SEED, prenorm=True)
    assert abs((total != 0).float().mean().item() - 0.9) < 0.01
    assert abs(total.mean().item() - 1) < 0.01


def test_the_seed_may_be_an_int_of_any_size_or_a_tensor(device):
    x, residual, weight, bias = inputs(device, 5, 37)
    for seed in (7, -7, 2**63 + 11):
        expected = reference.dropout_add_norm(x, residual, weight, bias, dropout=0.5, seed=seed)
        torch.testing.assert_close(kernel(x, residual, weight, bias, dropout=0.5, seed=seed), expected)
    seed = torch.tensor(7, device=device)
    ours = kernel(x, residual, weight, bias, dropout=0.5, seed=seed)
    assert torch.equal(ours, kernel(x, residual, weight, bias, dropout=0.5, seed=7))
    assert not torch.equal(ours, kernel(x, residual, weight, bias, dropout=0.5, seed=8))


def test_padded_packed_and_rebatched_rows_agree(device):
    x, residual, weight, bias = inputs(device, 13, 7, 37)
    ids = torch.arange(13 * 7, device=device).view(13, 7) + 2**33
    options = {"dropout": 0.3, "seed": SEED}
    padded = kernel(x, residual, weight, bias, rows=ids, **options)
    mask = torch.rand(13, 7, device=device) < 0.6
    packed = kernel(x[mask], residual[mask], weight, bias, rows=ids[mask], **options)
    assert torch.equal(packed, padded[mask])
    order = torch.randperm(13, device=device)
    rebatched = kernel(x[order], residual[order], weight, bias, rows=ids[order], **options)
    assert torch.equal(rebatched, padded[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", layer_norm.KINDS)
def test_extreme_rows_come_out_as_the_reference_has_them(kind, dtype, device, poisoned):
    x, residual, weight, bias = (t.detach() for t in inputs(device, 8, 37, dtype=dtype))
    x *= torch.tensor([1e4, 1e-4, 1, 1, 1, 1, 1, 1], device=device)[:, None]
    x[2, 3], x[3, 4], x[4, 5] = float("inf"), float("-inf"), float("nan")
    for row, value in ((5, 0.0), (6, 2.0), (7, 30000.0)):
        x[row], residual[row] = value, value
    ours, exact = (
        op(x.to(wide), residual.to(wide), weight.to(wide), bias.to(wide), kind=kind, eps=1e-5)
        for op, wide in ((kernel, dtype), (reference.dropout_add_norm, torch.float64))
    )
    same = eager(x, residual, weight, bias, kind=kind, eps=1e-5)
    assert_as_accurate(ours, same, exact)
    assert ours.isfinite().all(1).tolist() == [True, True, False, False, False, True, True, True]
    if kind == "layernorm":
        assert torch.equal(ours[5:], bias.expand(3, -1)), "the rows have no variance"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (3, 37), (3, 768), (1, 1, 1023), (5, 1024)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_row_of_equal_values_comes_out_as_the_bias(backend, shape, dtype, device, poisoned):
    _, _, weight, bias = (t.detach() for t in inputs(device, *shape, dtype=dtype))
    for value in (1000.1, -3.3e-3, 0.0) + ((2.7e6,) if dtype == torch.float32 else ()):
        x = torch.full(shape, value, device=device, dtype=dtype)
        halves = x / 2
        for total in ((x, None), (halves, halves), (torch.zeros_like(x), x)):
            out = dropout_add_norm(*total, weight, bias, dropout=0.0, backend=backend)
            assert torch.equal(out, bias.expand(shape)), value
        out = dropout_add_norm(torch.zeros_like(x), x, weight, bias, dropout=0.5, seed=SEED, backend=backend)
        assert torch.equal(out, bias.expand(shape)), value


def test_the_gradient_of_a_row_of_equal_values_is_that_of_float64(device, poisoned):
    x = torch.full((3, 768), 1000.1, device=device)
    _, dout, weight, bias = (t.detach() for t in inputs(device, *x.shape))
    ours = run(kernel, (x, None, weight, bias), [dout])
    g = dout.double() * weight.double()
    dx = 1e6 * (g - g.mean(-1, keepdim=True))  # 1e6 is 1 / sqrt(eps)
    torch.testing.assert_close(ours["dx"].double(), dx, rtol=0, atol=1e-6 * dx.abs().max().item())
    assert not ours["dweight"].any()


@pytest.mark.parametrize("cols", [37, 768, 1023])
def test_a_large_common_offset_costs_no_accuracy(cols, device, poisoned):
    x, dout, weight, bias = (t.detach() for t in inputs(device, 9, cols))
    x = x + 1e4
    tensors, wide = ((x, None, weight, bias), [t if t is None else t.double() for t in (x, None, weight, bias)])
    ours, torchs = run(kernel, tensors, [dout]), run(eager, tensors, [dout])
    exact = run(reference.dropout_add_norm, wide, [dout.double()])
    error = (ours["out"] - exact["out"]).abs().max()
    assert error <= 2e-7 * exact["out"].abs().max(), "the mean is not rounded where it is subtracted"
    for name in ("dx", "dweight"):  # of these it is
        assert_as_accurate(ours[name], torchs[name], exact[name], factor=3, name=name)


def test_float16_gradients_of_the_reference_have_statistics_of_float32(device):
    x, residual, weight, bias = (t.detach() for t in inputs(device, 5, 37, dtype=torch.float16))
    x, residual = x / 2**17, residual / 2**17  # 1 / sqrt(variance) is past float16's largest
    tensors, dout = (x, residual, weight, bias), [x]
    exact = run(reference.dropout_add_norm, [t.double() for t in tensors], [x.double()])
    ours = run(reference.dropout_add_norm, tensors, dout)
    torch.testing.assert_close(ours["dx"].double(), exact["dx"], rtol=0, atol=1e-2 * exact["dx"].abs().max().item())


def test_no_rows_give_empty_values_and_zero_gradients(device):
    x, residual, weight, bias = inputs(device, 0, 37)
    out, total = kernel(x, residual, weight, bias, dropout=0.1, prenorm=True)
    assert out.shape == total.shape == (0, 37)
    (out.sum() + total.sum()).backward()
    assert weight.grad.tolist() == bias.grad.tolist() == [0.0] * 37
    assert x.grad.shape == (0, 37)


def test_a_gradient_of_the_sum_alone_passes_through(device):
    x, residual, weight, bias = inputs(device, 5, 37)
    _, total = kernel(x, residual, weight, bias, dropout=0.5, seed=1, prenorm=True)
    total.sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))
    assert torch.equal(x.grad, torch.where(philox.row_keep(1, 0.5, torch.arange(5, device=device), 37), 2.0, 0.0))
    assert not weight.grad.any()


def test_offsets_beyond_2_31_elements_are_right_in_the_interpreter(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a CUDA device: the gpu test covers it")
    far = 2**30 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * far, dtype=torch.float16)  # 6 GB of holes
    x, residual, weight, bias = (t.detach() for t in inputs("cpu", 3, 3, dtype=torch.float16))
    for strides in ((far, 1), (1, far)):
        spread = memory.as_strided((3, 3), strides).copy_(x)
        options = {"dropout": 0.5, "prenorm": True}
        near = run(kernel, (x, residual, weight, bias), (x, x), **options)
        distant = run(kernel, (spread, spread, weight, bias), (spread, spread), **options)
        both = run(kernel, (x, x, weight, bias), (x, x), **options)
        assert all(torch.equal(distant[name], both[name]) for name in both)
        assert not torch.equal(near["out"], both["out"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_2_31_elements_are_right_on_a_gpu(dtype):
    rows, cols = 2**21 + 7, 1024
    x = torch.randn(rows, cols, device="cuda", dtype=dtype)
    weight, bias = torch.randn(2, cols, device="cuda")
    ids = torch.arange(rows, device="cuda")
    full = run(kernel, (x, x, weight, bias), (x,), dropout=0.1, rows=ids)
    last = slice(-9, None)
    few = run(kernel, (x[last], x[last], weight, bias), (x[last],), dropout=0.1, rows=ids[last])
    assert all(torch.equal(full[name][last], few[name]) for name in ("out", "dx", "dresidual"))


@pytest.mark.parametrize("kind", layer_norm.KINDS)
def test_the_reference_passes_gradcheck_with_dropout(kind):
    tensors = [t.detach().double().requires_grad_() for t in inputs("cpu", 3, 7)]
    for dropout in (0.0, 0.4):
        assert torch.autograd.gradcheck(
            lambda *t, p=dropout: reference.dropout_add_norm(*t, dropout=p, seed=4, kind=kind, prenorm=True), tensors
        )


def test_the_default_backend_compiles_to_one_graph(device):
    tensors = inputs(device, 5, 37)
    compiled = torch.compile(dropout_add_norm, fullgraph=True, backend="aot_eager")
    graph, plain = (op(*tensors, dropout=0.5, seed=3) for op in (compiled, dropout_add_norm))
    torch.testing.assert_close(graph, plain)
    torch._dynamo.reset()


def test_under_autocast_the_output_has_the_dtype_of_x(device):
    x, residual, weight, bias = inputs(device, 5, 37)
    linear = torch.nn.Linear(37, 37, device=device)
    with torch.autocast(device, torch.float16):
        out = kernel(linear(x), residual, weight, bias)
        exact = reference.dropout_add_norm(linear(x), residual, weight, bias)
    out.float().sum().backward()
    assert out.dtype == torch.float16
    assert linear.weight.grad.dtype == residual.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(out, exact, atol=4e-3, rtol=2e-3)  # the kernel rounds the sum to float16


def test_the_gradient_of_dx_is_dresidual_where_nothing_is_dropped(device):
    x, residual, weight, bias = inputs(device, 5, 37)
    kernel(x, residual, weight, bias).square().sum().backward()
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr(), "an in-place change of one would change the other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "batchnorm"}, "kind='batchnorm' is not one of layernorm, rmsnorm"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"residual": torch.zeros(4, 8)}, r"residual is \[4, 8\], x is \[5, 8\]"),
        ({"weight": torch.zeros(7)}, r"weight is \[7\]: expected \[8\]"),
        ({"bias": torch.zeros(8, 1)}, r"bias is \[8, 1\]: expected \[8\]"),
        ({"rows": torch.arange(4)}, r"rows is torch.int64 \[4\]: expected int64, one for each row"),
        ({"rows": torch.arange(5.0)}, r"rows is torch.float32"),
        ({"weight": torch.zeros(8, device="meta")}, "weight is on meta, x is on cpu"),
        ({"x": torch.zeros(())}, r"x is \[\]"),
        ({"x": torch.zeros(3, 0)}, r"x is \[3, 0\]"),
        ({"seed": torch.zeros(2), "dropout": 0.1}, r"seed is torch.float32 \[2\]"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, reference"),
        (
            {"x": torch.zeros(5, 8).double(), "backend": "triton"},
            "dropout_add_norm: backend='triton' (takes|needs) .*: use backend='reference'",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    arguments = {"x": torch.zeros(5, 8), "residual": None, "weight": torch.ones(8), "bias": None} | change
    with pytest.raises(ValueError, match=message):
        dropout_add_norm(**arguments)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_not_floating_is_named(name, dtype, backend, device):
    tensors = dict(zip(NAMES, inputs(device, 5, 8), strict=True))
    tensors[name] = torch.ones(tensors[name].shape, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=rf"{name} is {dtype}: expected one of float32, bfloat16, float16, float64"):
        dropout_add_norm(**tensors, backend=backend)


@pytest.mark.parametrize("kind", layer_norm.KINDS)
def test_parameters_and_counters_of_any_stride_give_the_same_bits(kind, device, poisoned):
    x, residual, weight, bias = inputs(device, 5, 37)
    rows = torch.arange(100, 105, device=device)
    options = {"dropout": 0.3, "kind": kind}
    plain, strided = (
        run(kernel, (x, residual, weight, bias), [x], rows=rows, seed=seed, **options)
        for weight, bias, rows, seed in (
            (weight, bias, rows, torch.tensor(9, device=device)),
            (
                *(arrange(t.detach()[None], "every second column")[0] for t in (weight, bias)),
                torch.stack([rows, -rows], 1)[:, 0],
                torch.tensor([-1, 9], device=device)[1],
            ),
        )
    )
    assert all(torch.equal(plain[name], strided[name]) for name in plain)


def test_batches_of_any_number_of_rows_run_the_same_code(device, monkeypatch):
    names = ("_dropout_add_norm_fwd_kernel", "_dropout_add_norm_bwd_kernel")
    recorders = [Recorder(getattr(layer_norm, name)) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        monkeypatch.setattr(layer_norm, name, recorder)
    for rows in (1, 2, 16, 17, 4096, 4099):
        run(kernel, inputs(device, rows, 64), [torch.ones(rows, 64, device=device)], dropout=0.1)
    assert [recorder.variants() for recorder in recorders] == [1, 1]
    assert not any(tensors["rows_ptr"] is not None for recorder in recorders for tensors in recorder.calls), "counted"


def test_rows_too_wide_for_the_kernel_run_the_reference(device):
    x, weight = torch.randn(2, 8193, device=device), torch.ones(8193, device=device)
    with pytest.raises(ValueError, match="takes up to 8192 columns, got 8193"):
        kernel(x, None, weight, None)
    torch.testing.assert_close(
        dropout_add_norm(x, None, weight, None).std(-1, correction=0), torch.ones(2, device=device)
    )
