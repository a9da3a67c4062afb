import importlib
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tolerance import BACKWARD, FORWARD, assert_as_accurate
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from minibert_kernels import attention, philox, reference
from minibert_kernels.launch import attention_plan

op = importlib.import_module("minibert_kernels.attention")
SEED = 0x1234_5678_9ABC
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
LAYOUTS = ("contiguous", "fused projection", "heads first", "dims first", "misaligned", "every second dim")


def kernel(*arguments, **options):
    return attention(*arguments, backend="triton", **options)


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def inputs(device, lengths=(5, 0, 17, 1), heads=2, head_size=16, dtype=torch.float32, seed=0):
    """q, k, v as views of one fused projection that ask for gradients, an output gradient and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    qkv, dout = torch.randn(2, sum(lengths), 3, heads, head_size, generator=generator).to(device, dtype)
    q, k, v = (x.requires_grad_() for x in qkv.unbind(1))
    return (q, k, v, offsets(lengths, device), max(lengths, default=0)), dout[:, 0]


def values_and_gradients(call, arguments, dout, **options):
    q, k, v, *rest = arguments
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = call(*leaves, *rest, **options)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def references(arguments, dout, **options):
    """The reference in the dtype of the arguments, at its worst, and in float64.

    A sum over few terms may come out exact by luck; torch is measured on four orders of the head's dims, and each
    element is the one furthest from float64.
    """
    qkv, rest = arguments[:3], arguments[3:]
    exact = values_and_gradients(reference.attention, (*(x.double() for x in qkv), *rest), dout.double(), **options)
    worst = {name: x.to(dout.dtype) for name, x in exact.items()}
    for shift in range(4):
        rolled = [x.detach().roll(shift, -1) for x in (*qkv, dout)]
        for name, x in values_and_gradients(reference.attention, (*rolled[:3], *rest), rolled[3], **options).items():
            x = x.roll(-shift, -1)
            further = (x - exact[name]).abs() >= (worst[name] - exact[name]).abs()
            worst[name] = torch.where(further | ~x.isfinite(), x, worst[name])
    return worst, exact


def check(arguments, dout, **options):
    ours = values_and_gradients(kernel, arguments, dout, **options)
    torchs, exact = references(arguments, dout, **options)
    assert_as_accurate(ours["out"], torchs["out"], exact["out"], factor=FORWARD)
    # of the fused projection: dq and dk are differences of nearly equal numbers, whose error comes from those of dv
    fused = [torch.stack([x["dq"], x["dk"], x["dv"]], 1) for x in (ours, torchs, exact)]
    assert_as_accurate(*fused, factor=BACKWARD, name="gradient of [T, 3, H, d]")


@dataclass(frozen=True)
class Case:
    seed: int
    lengths: tuple
    heads: int = 2
    head_size: int = 16
    dtype: torch.dtype = torch.float32
    layouts: tuple = ("fused projection",) * 4
    dropout: float = 0.0
    seq_ids: bool = False
    scale: float | None = None
    causal: bool = False
    window: int | None = None
    slack: int = 0

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        lengths = rng.choice(
            [(), (0,), (13, 7), (16,), (17, 0, 32), (33, 1), (70,), (64, 9), (3, 2, 1, 0, 5)]
            + [(rng.randint(2, 25), *(rng.randint(0, 25) for _ in range(rng.randint(0, 2))))] * 6
        )
        return cls(
            seed=seed,
            lengths=lengths,
            heads=rng.choice([1, 1, 2, 3]),
            head_size=rng.choice([16, 32, 64, 128, 24, 37, 80, rng.randint(16, 128)]),
            dtype=rng.choice(DTYPES),
            layouts=tuple(rng.choice(LAYOUTS) for _ in range(4)),
            dropout=rng.choice([0.0, 0.0, 0.1, 0.5]),
            seq_ids=rng.random() < 0.5,
            scale=rng.choice([None, None, 0.3, 1.0]),
            causal=rng.random() < 0.3,
            window=rng.choice([None, None, 1, 3, 20]),
            slack=rng.choice([0, 0, 1, 60]),
        )

    def run(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        shape = sum(self.lengths), self.heads, self.head_size
        tensors = torch.randn(4, *shape, generator=generator).to(device)
        tensors[0] *= self.head_size**-0.5 / (self.scale or self.head_size**-0.5)  # scores of about 1
        q, k, v, dout = (arrange(x.to(self.dtype), y) for x, y in zip(tensors, self.layouts, strict=True))
        seq_ids = torch.randint(-(2**62), 2**62, (len(self.lengths),), generator=generator).to(device)
        check(
            (q, k, v, offsets(self.lengths, device), max(self.lengths, default=0) + self.slack), dout,
            dropout=self.dropout, seed=self.seed << 30, seq_ids=seq_ids if self.seq_ids else None, scale=self.scale,
            causal=self.causal, window=self.window,
        )  # fmt: skip


def arrange(x, layout):
    """The values of x [T, H, d] in other strides, with NaN between them."""
    tokens, heads, dims = x.shape
    if layout == "contiguous":
        return x
    nan = {"dtype": x.dtype, "device": x.device, "fill_value": float("nan")}
    if layout == "fused projection":
        view = torch.full((tokens, 3, heads, dims), **nan)[:, 1]
    elif layout == "heads first":
        view = torch.full((heads, tokens, dims), **nan).transpose(0, 1)
    elif layout == "dims first":
        view = torch.full((dims, heads, tokens), **nan).permute(2, 1, 0)
    elif layout == "misaligned":
        view = torch.full((tokens, heads, dims + 3), **nan)[..., 1 : dims + 1]
    else:
        view = torch.full((tokens, heads, 2 * dims), **nan)[..., ::2]
    return view.copy_(x)


@pytest.mark.parametrize("seed", range(120))
def test_any_call_is_as_accurate_as_torch(seed, device, poisoned):
    case = Case.draw(seed)
    try:
        case.run(device)
    except BaseException as error:
        error.add_note(f"repeat with: {case!r}.run({device!r})")
        raise


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_values_and_gradients_at_the_head_sizes_of_berts(head_size, dtype, dropout, device, poisoned):
    Case(seed=head_size, lengths=(130, 7, 64), heads=1, head_size=head_size, dtype=dtype, dropout=dropout).run(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_bfloat16_values_and_gradients_of_long_sequences(head_size, dropout):
    lengths = (512, 1, 0, 300, 1024, 77)
    Case(seed=1, lengths=lengths, heads=12, head_size=head_size, dtype=torch.bfloat16, dropout=dropout).run("cuda")


def test_a_wrong_kernel_is_seen(device, monkeypatch):
    monkeypatch.setattr(op, "threshold", lambda p: philox.threshold(p) + 1)
    with pytest.raises(AssertionError, match="error"):
        Case(seed=0, lengths=(32, 13), dropout=0.5).run(device)


def test_the_same_call_gives_the_same_bits_250_times(device):
    arguments, dout = inputs(device, (9,), 1)
    first = values_and_gradients(kernel, arguments, dout, dropout=0.3, seed=SEED)
    for _ in range(249):
        again = values_and_gradients(kernel, arguments, dout, dropout=0.3, seed=SEED)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_draws_the_mask_of_the_numpy_twin(p, device):
    length, heads, seq_ids = 100, 2, np.array([7, (5 << 32) + 3, -2])
    q = torch.zeros(3 * length, heads, length, device=device)
    v = torch.eye(length, device=device).repeat(3, 1)[:, None].expand(-1, heads, -1)
    seq_tensor = torch.from_numpy(seq_ids).to(device)
    out = kernel(q, q, v, offsets([length] * 3, device), length, dropout=p, seed=SEED, seq_ids=seq_tensor)
    kept = (out != 0).view(3, length, heads, length).transpose(1, 2).cpu().numpy()

    seq, head, row, col = np.ogrid[:3, :heads, :length, :length]
    words = philox.philox(SEED, (head << 22) + col // 16, row, seq_ids[seq], seq_ids[seq] >> 32)
    word = np.select([col % 16 // 4 == i for i in range(4)], words)
    assert np.array_equal(kept, (word >> (8 * (col % 4)) & 0xFF) >= philox.threshold(p))
    assert abs(kept.mean() - (1 - p)) < 0.01
    assert torch.allclose(out[out != 0], torch.tensor(philox.keep_scale(p) / length, device=device), rtol=1e-5)


def test_the_seed_may_be_an_int_of_any_size_or_a_tensor(device):
    arguments, _ = inputs(device)
    out = kernel(*arguments, dropout=0.5, seed=-3)
    assert torch.equal(out, kernel(*arguments, dropout=0.5, seed=2**64 - 3))
    assert torch.equal(out, kernel(*arguments, dropout=0.5, seed=torch.tensor(-3, device=device)))
    assert not torch.equal(out, kernel(*arguments, dropout=0.5, seed=-3 + (1 << 40)))


def test_packed_padded_and_rebatched_sequences_agree(device):
    lengths, longest, ids = (5, 17, 11), 17, torch.tensor([3, 1 << 40, 8], device=device)
    arguments, dout = inputs(device, lengths)
    options = {"dropout": 0.4, "seed": SEED}
    packed = values_and_gradients(kernel, arguments, dout, seq_ids=ids, **options)
    rows = [slice(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(3)]

    # padded: the padding of each row is a sequence of its own
    slots = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)]).to(device)
    padded = [torch.ones(3 * longest, 2, 16, device=device).index_copy(0, slots, x) for x in (*arguments[:3], dout)]
    cuts = offsets([n for length in lengths for n in (length, longest - length)], device)
    padded_ids = torch.stack([ids, ids + 100], 1).flatten()
    apart = values_and_gradients(kernel, (*padded[:3], cuts, longest), padded[3], seq_ids=padded_ids, **options)
    # re-batched: in another order, without the second
    order = torch.cat([torch.arange(sum(lengths), device=device)[rows[i]] for i in (2, 0)])
    fewer = [x[order] for x in (*arguments[:3], dout)]
    cuts = offsets([lengths[2], lengths[0]], device)
    other = values_and_gradients(kernel, (*fewer[:3], cuts, longest), fewer[3], seq_ids=ids[[2, 0]], **options)
    for name, expected in packed.items():
        assert torch.equal(apart[name][slots], expected), name
        assert torch.equal(other[name], expected[order]), name


def check_cancelling(arguments, dout, largest_score, **options):
    """As `check` where gradients are differences of equal numbers: torch, which keeps the probabilities, is no measure.

    The error of a probability that is computed again is the rounding of its score, that of delta the rounding of out.
    """
    q, k, v = (x.detach().double() for x in arguments[:3])
    ours = values_and_gradients(kernel, arguments, dout, **options)
    torchs, exact = references(arguments, dout, **options)
    assert_as_accurate(ours["out"], torchs["out"], exact["out"])
    grain = torch.finfo(dout.dtype).eps + largest_score * torch.finfo(torch.float32).eps
    dprobs = torch.einsum("thd,shd->hts", dout.double().abs(), v.abs()).max() * philox.keep_scale(options["dropout"])
    scale, rows = q.shape[-1] ** -0.5, arguments[4]
    sizes = {"dq": scale * k.abs().max() * dprobs, "dk": rows * scale * q.abs().max() * dprobs, "dv": rows * dprobs}
    for name, size in sizes.items():
        assert (ours[name] - exact[name]).abs().max() <= 2 * grain * size, name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_come_out_as_the_reference_has_them(dtype, dropout, device, poisoned):
    (q, k, v, *rest), dout = inputs(device, (37, 20), dtype=dtype)
    q, k = q.detach() * 100, k.detach() * 30
    largest_score = torch.einsum("thd,shd->hts", q.double(), k.double()).abs().max().item() / 4
    assert largest_score > 1e4
    check_cancelling((q, k, v, *rest), dout, largest_score, dropout=dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_one_key_returns_its_value(dtype, dropout, device, poisoned):
    arguments, dout = inputs(device, (1, 0, 37, 1), dtype=dtype)
    check_cancelling(arguments, dout, 10.0, dropout=dropout, window=0)
    assert torch.equal(kernel(*arguments, window=0), arguments[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_infinities_and_nan_pass_through_as_in_torch(which, value, device, poisoned):
    (*qkv, cu_seqlens, longest), _ = inputs(device, (37, 20))
    qkv = [x.detach().clone() for x in qkv]
    qkv[which][3, 1, 5] = value
    ours = kernel(*qkv, cu_seqlens, longest)
    # the product, not torch's fused kernel, which has a zero where a row is not a number
    q, k, v = (x.view(-1, 2, 16).transpose(0, 1)[:, :37] for x in qkv)
    expected = ((q @ k.mT * 0.25).softmax(-1) @ v).transpose(0, 1)
    assert torch.allclose(ours[:37], expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not expected.isfinite().all() or which == 1
    assert ours[37:].isfinite().all()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens_give_empty_values_and_gradients(lengths, device):
    arguments, dout = inputs(device, lengths)
    results = values_and_gradients(kernel, arguments, dout, dropout=0.1)
    assert all(x.shape == (0, 2, 16) for x in results.values())


def test_offsets_beyond_2_31_elements_are_right_in_the_interpreter(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a CUDA device: the gpu test covers it")
    far = 2**30 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * far, dtype=torch.float16)  # 6 GB of holes
    arguments, dout = inputs("cpu", (3,), 3, 3, torch.float16)
    near = values_and_gradients(kernel, arguments, dout, dropout=0.2)
    with torch.no_grad():
        for strides in ((far, 16, 1), (3, far, 1), (3, 16, far)):
            q, k, v, dout_far = (
                memory.as_strided((3, 3, 3), strides, storage_offset=100 * i).copy_(x)
                for i, x in enumerate((*arguments[:3], dout))
            )
            with torch.enable_grad():
                distant = values_and_gradients(kernel, (q, k, v, *arguments[3:]), dout_far, dropout=0.2)
            assert all(torch.equal(distant[name], near[name]) for name in near), strides


@pytest.mark.gpu
def test_offsets_beyond_2_31_elements_are_right_on_a_gpu():
    sequences, length, heads, head_size = 1400, 512, 16, 64  # 2.2e9 elements of q, k and v
    qkv = torch.randn(sequences * length, 3, heads, head_size, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(sequences * length, heads, head_size, device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(sequences, device="cuda")
    cuts = offsets([length] * sequences, "cuda")
    last = slice(-2 * length, None)
    full = values_and_gradients(kernel, (*qkv.unbind(1), cuts, length), dout, dropout=0.1, seq_ids=ids)
    few = values_and_gradients(
        kernel, (*qkv[last].unbind(1), cuts[:3], length), dout[last], dropout=0.1, seq_ids=ids[-2:]
    )
    assert all(torch.equal(full[name][last], few[name]) for name in few)


def test_the_registered_ops_pass_opcheck(device):
    (q, k, v, cu_seqlens, longest), dout = inputs(device)
    seed, seq_ids = torch.tensor(3, device=device), torch.arange(4, device=device)
    for dropout, ids, left, right in ((0.5, seq_ids, None, None), (0.0, None, 3, 0)):
        options = (cu_seqlens, ids, seed if dropout else None, longest, 0.25, dropout, left, right)
        torch.library.opcheck(op._forward, (q, k, v, *options))
        qkv = [x.detach() for x in (q, k, v)]
        torch.library.opcheck(op._backward, (dout, *qkv, *op._forward(*qkv, *options), *options))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4, "seed": 4}, {"causal": True}, {"window": 2}])
def test_the_reference_passes_gradcheck(options):
    (q, k, v, *rest), _ = inputs("cpu", (3, 0, 5), 2, 3)
    tensors = [x.detach().double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: reference.attention(*qkv, *rest, **options), tensors)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_gives_the_same_bits(backend, device):
    arguments, dout = inputs(device)
    compiled = torch.compile(kernel, fullgraph=True, backend=backend)
    for seed in (3, 4, torch.tensor(3, device=device)):
        options = {"dropout": 0.5, "seed": seed, "causal": True}
        graph, plain = (values_and_gradients(call, arguments, dout, **options) for call in (compiled, kernel))
        assert all(torch.equal(graph[name], plain[name]) for name in plain)
    torch._dynamo.reset()


def test_under_autocast_the_kernel_runs_in_the_dtype_of_autocast(device):
    (q, k, v, *rest), dout = inputs(device)
    with torch.autocast(device, torch.float16):
        out = kernel(q, k, v.half(), *rest)
    dq, dk = torch.autograd.grad(out, (q, k), dout.half())
    half = values_and_gradients(kernel, (q.half(), k.half(), v.half(), *rest), dout)
    assert out.dtype == torch.float16 and dq.dtype == dk.dtype == torch.float32
    assert torch.equal(out, half["out"]) and torch.equal(dq, half["dq"].float())


def test_an_exported_program_runs_the_op(device):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, cu_seqlens):
            return kernel(q, k, v, cu_seqlens, 17, dropout=0.5, seed=3)

    arguments = tuple(x.detach() for x in inputs(device)[0][:4])
    program = torch.export.export(Attention(), arguments)
    assert "minibert.attention_fwd" in str(program.graph)
    assert torch.equal(program.module()(*arguments), Attention()(*arguments))


def test_fake_tensors_get_shapes_strides_and_dtypes_of_the_real_ones(device):
    def run():
        q, k, v = torch.zeros(2, 13, 3, 37, dtype=torch.float16, device=device, requires_grad=True).permute(2, 1, 0, 3)
        out = kernel(q, k, v, torch.zeros(2, dtype=torch.int32, device=device), 13, dropout=0.5)
        return [(x.shape, x.stride(), x.dtype) for x in (out, *torch.autograd.grad(out.sum(), (q, k, v)))]

    with FakeTensorMode():
        fake = run()
    assert fake == run()


def test_activation_checkpointing_draws_the_same_mask(device):
    arguments, dout = inputs(device)

    def checkpointed(*arguments, **options):
        return checkpoint(lambda *t: kernel(*t, **options), *arguments, use_reentrant=False)

    ours, plain = (values_and_gradients(call, arguments, dout, dropout=0.5, seed=3) for call in (checkpointed, kernel))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 8)}, r"q is \[5, 8\]: expected \[T, H, d\]"),
        ({"q": torch.zeros(5, 2, 0)}, r"q is \[5, 2, 0\]"),
        ({"k": torch.zeros(5, 1, 8)}, r"k is torch.float32 \[5, 1, 8\]: expected q's torch.float32 \[5, 2, 8\]"),
        ({"v": torch.zeros(5, 2, 8).half()}, r"v is torch.float16 \[5, 2, 8\]"),
        ({"v": torch.zeros(5, 2, 8, device="meta")}, "v is on meta, q is on cpu"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens is torch.int64 \[2\]: expected int32 \[B \+ 1\]"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens is torch.int32 \[0\]"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "cu_seqlens is on meta, q is on cpu"),
        ({"max_seqlen": 0}, "max_seqlen=0"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"window": -1}, "window=-1 is negative"),
        ({"seq_ids": torch.arange(2)}, r"seq_ids is torch.int64 \[2\]: expected int64 \[1\], one a sequence"),
        ({"seq_ids": torch.arange(1.0)}, r"seq_ids is torch.float32 \[1\]"),
        ({"seed": torch.zeros(2), "dropout": 0.1}, r"seed is torch.float32 \[2\]"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, reference"),
        ({"score_bias": torch.zeros(1, 1, 5, 5), "backend": "triton"}, "'triton' takes no score_bias"),
        ({"scale": -1.0, "backend": "triton"}, "'triton' takes scale > 0, got -1.0"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    arguments = {"q": torch.zeros(5, 2, 8), "cu_seqlens": cu_seqlens, "max_seqlen": 5} | change
    arguments = {"k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)} | arguments
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_what_the_kernel_cannot_do_runs_the_reference(device):
    (q, k, v, *rest), _ = inputs(device, head_size=130)
    with pytest.raises(ValueError, match="'triton' takes head sizes up to 128, got 130"):
        kernel(q, k, v, *rest)
    assert torch.equal(attention(q, k, v, *rest), reference.attention(q, k, v, *rest))
    bias = torch.randn(1, 2, 17, 17, device=device)
    out = attention(q, k, v, *rest, score_bias=bias)
    assert not torch.equal(out, attention(q, k, v, *rest))
    assert torch.equal(out, reference.attention(q, k, v, *rest, score_bias=bias))


@pytest.mark.parametrize("direction", ["fwd", "dq", "dkdv"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
def test_plans_fit_the_call(capability, direction):
    for head_size, block_d in ((1, 16), (16, 16), (37, 64), (64, 64), (65, 128), (128, 128)):
        for element_size in (2, 4):
            for max_seqlen, longest in ((1, 16), (16, 16), (17, 32), (512, 512)):
                plan = attention_plan(head_size, element_size, capability, max_seqlen, direction)
                assert plan.block_d == block_d
                assert 16 <= plan.block_m <= longest and 16 <= plan.block_n <= longest
