import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, LAYOUTS, Recorder, arrange, check, repeat_with, values_and_gradients
from pairwise import pairwise

from minibert_kernels import bias_geglu, bias_gelu, bias_swiglu, gelu, reference

OPS = {"bias_gelu": bias_gelu, "bias_geglu": bias_geglu, "bias_swiglu": bias_swiglu}


def eager(op, x, bias, **options):
    """The op as one writes it in torch, in the dtype of x throughout."""
    return getattr(reference, op)(x, None if bias is None else bias.to(x.dtype), **options)


@dataclass(frozen=True)
class Case:
    seed: int
    op: str
    shape: tuple
    dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype | None = torch.float32
    layouts: tuple = ("contiguous",) * 2
    approximate: str = "none"

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        cols = rng.choice([1, 2, 7, 16, 37, 64, 100, 257, 512, 513, 1030, rng.randint(1, 1100), rng.randint(1, 64)])
        dtype = rng.choice(DTYPES)
        return cls(
            seed=seed,
            op=rng.choice(list(OPS)),
            shape=(*rng.choice([(), (1,), (13,), (3, 2), (0,), (rng.randint(1, 70),), (2, 1, 3)]), cols),
            dtype=dtype,
            bias_dtype=rng.choice([None, dtype, dtype, torch.float32]),
            layouts=tuple(rng.choice(LAYOUTS) for _ in range(2)),
            approximate=rng.choice(["none", "tanh"]),
        )

    def run(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        options = {} if self.op == "bias_swiglu" else {"approximate": self.approximate}
        width = self.shape[-1] * (1 if self.op == "bias_gelu" else 2)

        def normal(shape, dtype, layout="contiguous"):
            return arrange((2 * torch.randn(shape, generator=generator)).to(device, dtype), layout)

        def draw():
            x = normal((*self.shape[:-1], width), self.dtype, self.layouts[0])
            bias = None if self.bias_dtype is None else normal((width,), self.bias_dtype)
            return {"x": x, "bias": bias}, [normal(self.shape, self.dtype, self.layouts[1])]

        with repeat_with(self, device):
            check(
                lambda **tensors: OPS[self.op](**tensors, **options, backend="triton"),
                lambda **tensors: eager(self.op, **tensors, **options),
                lambda **tensors: eager(self.op, **tensors, **options),
                draw,
                draws=1 if self.shape[-1] >= 16 else 12,
            )


def test_any_call_is_as_accurate_as_torch(fuzz_seed, device, poisoned):
    Case.draw(fuzz_seed).run(device)


@pytest.mark.parametrize(("cols", "op", "dtype"), pairwise([3072, 4096, 32768], list(OPS), DTYPES))
def test_values_and_gradients_at_the_widths_of_berts(cols, op, dtype, device, poisoned):
    rows = 3 if cols == 32768 else 35
    Case(seed=cols, op=op, shape=(rows, cols), dtype=dtype, bias_dtype=torch.float32).run(device)


def test_a_wrong_activation_fails_and_prints_the_line_that_repeats_it(device, monkeypatch, few_draws):
    monkeypatch.setattr(gelu, "APPROXIMATE", {"none": "tanh", "tanh": "erf"})
    with pytest.raises(AssertionError, match="error") as failure:
        Case(seed=3, op="bias_gelu", shape=(13, 37)).run(device)
    (line,) = failure.value.__notes__
    with pytest.raises(AssertionError, match="error"):
        eval(line.removeprefix("repeat with: "))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_extreme_inputs_come_out_as_in_torch(approximate, dtype, device):
    values = [0.0, -0.0, 1e4, -1e4, 6e4, -6e4, 30.0, -30.0, float("inf"), -float("inf"), float("nan"), 1e-7, -1e-7]
    x = torch.tensor([values], device=device, dtype=dtype)
    ours, torchs = (
        values_and_gradients(op, {"x": x, "bias": None}, [torch.ones_like(x)])
        for op in (
            lambda x, bias: bias_gelu(x, bias, approximate=approximate, backend="triton"),
            lambda x, bias: F.gelu(x, approximate=approximate),
        )
    )
    known = ~x.isinf()  # torch's own results at infinity, inf or nan, differ between its loops
    for name in ("out", "dx"):
        torch.testing.assert_close(ours[name][known], torchs[name][known], equal_nan=True)
    assert not ours["out"][~known].isfinite().any()


def exact_gelu(z):
    """Erf gelu and its slope in float64, without cancellation where z is negative."""
    z = z.double()
    share, density = torch.erfc(-z * 0.5**0.5) / 2, torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    return z * share, share + z * density


def test_erf_gelu_and_its_slope_are_right_to_four_parts_in_ten_million(device):
    x = torch.cat([torch.linspace(-8, 8, 100_001), torch.logspace(-9, 0, 5_000), -torch.logspace(-9, 0, 5_000)])
    x = x.view(-1, 111).to(device)
    ours = values_and_gradients(lambda x: bias_gelu(x, None, backend="triton"), {"x": x}, [torch.ones_like(x)])
    for name, exact in zip(("out", "dx"), exact_gelu(x), strict=True):
        assert (ours[name] - exact).abs().max() <= 4e-7, name


def test_the_negative_tail_of_erf_gelu_does_not_cancel(device):
    x = torch.linspace(-12.5, -1, 4_096, device=device)[None]
    ours = values_and_gradients(lambda x: bias_gelu(x, None, backend="triton"), {"x": x}, [torch.ones_like(x)])
    out, slope = exact_gelu(x)
    assert ((ours["out"] - out) / out).abs().max() <= 1e-4
    assert ((ours["dx"] - slope) / slope).abs().max() <= 1e-4


def test_the_bias_gradient_adds_up_over_more_rows_than_a_program_has(device):
    rows = 700
    x, bias = torch.zeros(rows, 16, device=device), torch.zeros(16, device=device)
    results = values_and_gradients(
        lambda x, bias: bias_gelu(x, bias, backend="triton"), {"x": x, "bias": bias}, [torch.ones_like(x)]
    )
    assert torch.equal(results["dbias"], torch.full_like(bias, rows * 0.5))


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (bias_gelu, {"approximate": "erf"}, "approximate='erf' is not one of none, tanh"),
        (bias_gelu, {"x": torch.zeros(())}, r"x is \[\]: expected \[..., F\]"),
        (bias_gelu, {"x": torch.zeros(3, 0)}, r"x is \[3, 0\]: expected \[..., F\]"),
        (bias_geglu, {"x": torch.zeros(3, 7)}, r"x is \[3, 7\]: expected \[..., 2F\]"),
        (bias_swiglu, {"x": torch.zeros(3, 7)}, r"x is \[3, 7\]: expected \[..., 2F\]"),
        (bias_gelu, {"bias": torch.zeros(7)}, r"bias is \[7\]: expected \[8\]"),
        (bias_gelu, {"bias": torch.zeros(8, device="meta")}, "bias is on meta, x is on cpu"),
        (bias_gelu, {"backend": "cuda"}, "backend='cuda' is not one of auto, triton, reference"),
        (
            bias_gelu,
            {"x": torch.zeros(5, 8).double(), "backend": "triton"},
            "bias_gelu: backend='triton' (takes|needs) .*: use backend='reference'",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_named(op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**{"x": torch.zeros(5, 8), "bias": None} | change)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["x", "bias"])
@pytest.mark.parametrize("op", OPS)
def test_a_tensor_that_is_not_floating_is_named(op, name, dtype, backend, device):
    tensors = {"x": torch.ones(5, 8, device=device), "bias": torch.ones(8, device=device)}
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(ValueError, match=rf"{name} is {dtype}: expected one of float32, bfloat16, float16, float64"):
        OPS[op](**tensors, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_a_bias_of_any_stride_gives_the_same_bits(op, device, poisoned):
    x, bias = torch.randn(13, 38, device=device), torch.randn(38, device=device)
    dout = x if op == "bias_gelu" else x[:, 19:]
    spread = arrange(bias[None], "every second column")[0]
    plain, strided = (
        values_and_gradients(lambda x, bias: OPS[op](x, bias, backend="triton"), {"x": x, "bias": b}, [dout])
        for b in (bias, spread)
    )
    assert all(torch.equal(plain[name], strided[name]) for name in plain)


def test_batches_of_any_number_of_rows_run_the_same_code(device, monkeypatch):
    names = ("_bias_act_fwd_kernel", "_bias_act_bwd_kernel")
    recorders = [Recorder(getattr(gelu, name)) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        monkeypatch.setattr(gelu, name, recorder)
    for rows in (1, 2, 16, 17, 4096, 4099):
        x, bias = torch.zeros(rows, 64, device=device), torch.zeros(64, device=device)
        values_and_gradients(lambda x, bias: bias_gelu(x, bias, backend="triton"), {"x": x, "bias": bias}, [x])
    assert [recorder.variants() for recorder in recorders] == [1, 1]
