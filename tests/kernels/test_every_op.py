"""What holds for every op with a kernel, whatever it computes: one call of each is in the table at the top."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import harness
import pytest
import torch
from harness import SEED, arrange, values_and_gradients
from instruments import guarded
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import minibert_kernels as kernels
from minibert_kernels import dispatch, embedding, masking, packing, segment
from minibert_kernels.op import Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@dataclass(frozen=True)
class Call:
    """One call of an op: shapes of the tensors that get a gradient, tensors that get none, and options."""

    op: Callable
    shapes: dict
    fixed: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def tensors(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        return {name: t.to(DEVICE, dtype) for name, t in drawn.items()} | self.fixed

    def run(self, backend="triton", dtype=torch.float32, op=None, tensors=None):
        """Values and gradients by name; of other tensors than its own, if there are any."""
        op, douts = op or self.op, [torch.tensor(1.5, device=DEVICE)] * 3

        def call(**tensors):
            return op(**tensors, **self.options, backend=backend)

        def expanded(**tensors):
            outs = call(**tensors)
            outs = outs if isinstance(outs, tuple) else (outs,)
            for i, out in enumerate(outs):
                douts[i] = torch.linspace(-1, 1, max(out.numel(), 1), device=DEVICE)[: out.numel()].view(out.shape)
            return outs

        return values_and_gradients(expanded, self.tensors(dtype) if tensors is None else tensors, douts)


QKV = {"q": (13, 2, 16), "k": (13, 2, 16), "v": (13, 2, 16)}
GROUPED = {"q": (13, 2, 16), "k": (13, 1, 16), "v": (13, 1, 16)}
CUTS = {"cu_seqlens": ints(0, 5, 5, 13, dtype=torch.int32)}
IDS = ints(3, 9, 9, 0, 40, 7, 2, 9, 11)
CALLS = {
    "dropout_add_norm": Call(
        kernels.dropout_add_norm, {"x": (9, 37), "residual": (9, 37), "weight": (37,), "bias": (37,)},
        options={"dropout": 0.3, "seed": SEED, "prenorm": True},
    ),
    "bias_gelu": Call(kernels.bias_gelu, {"x": (9, 37), "bias": (37,)}),
    "bias_geglu": Call(kernels.bias_geglu, {"x": (9, 38), "bias": (38,)}, options={"approximate": "tanh"}),
    "bias_swiglu": Call(kernels.bias_swiglu, {"x": (9, 38), "bias": (38,)}),
    "attention": Call(kernels.attention, QKV, CUTS, {"max_seqlen": 8, "dropout": 0.3, "seed": SEED}),
    "attention long": Call(
        kernels.attention, GROUPED | {"score_bias": (1, 2, 140, 140)}, CUTS,
        {"max_seqlen": 140, "dropout": 0.3, "seed": SEED, "causal": True, "return_lse": True},
    ),
    "embed_norm": Call(
        kernels.embed_norm, {"word": (41, 37), "position": (9, 37), "type": (2, 37), "weight": (37,), "bias": (37,)},
        {"ids": IDS, "type_ids": IDS % 2, "positions": ints(*range(9))}, {"dropout": 0.3, "seed": SEED},
    ),
    "linear_cross_entropy": Call(
        kernels.linear_cross_entropy, {"hidden": (9, 16), "weight": (41, 16), "bias": (41,)}, {"labels": IDS},
        {"label_smoothing": 0.1, "max_labels": 9},
    ),
    "linear_cross_entropy none": Call(
        kernels.linear_cross_entropy, {"hidden": (9, 16), "weight": (41, 16), "bias": (41,)}, {"labels": IDS},
        {"reduction": "none", "max_labels": 9},
    ),
    "select_rows": Call(kernels.select_rows, {"x": (9, 37)}, {"rows": ints(1, 4, 4, 8)}),
    "pack": Call(
        kernels.pack, {"x": (2, 5, 37)}, {"mask": ints(1, 1, 1, 0, 0, 1, 1, 1, 1, 0).view(2, 5).bool()},
        {"num_tokens": 7},
    ),
    "unpack": Call(kernels.unpack, {"x": (13, 37)}, CUTS, {"max_seqlen": 8}),
}  # fmt: skip
# what a kernel indexes by number, where the calls of the table leave it to its default
COUNTERS = {
    "dropout_add_norm": {"rows": ints(4, 0, 7, 2**33, 2, 3, 1, 6, 5)},
    "embed_norm": {"rows": ints(4, 0, 7, 2**33, 2, 3, 1, 6, 5)},
    "attention": {"seq_ids": ints(5, 2**33, 0), "schedule": ints((2, 0), (0, 0), (-1, -1), dtype=torch.int32)},
    "attention long": {"seq_ids": ints(5, 2**33, 0), "schedule": ints((2, 0), (0, 0), (-1, -1), dtype=torch.int32)},
}  # fmt: skip
MLM_MASK = Call(
    kernels.mlm_mask, {},
    CUTS | {
        "ids": torch.arange(13, device=DEVICE) + 5, "special": torch.arange(20, device=DEVICE) < 5,
        "ordinary": torch.arange(5, 20, device=DEVICE), "continues": torch.arange(20, device=DEVICE) % 4 == 0,
        "seq_ids": ints(5, 2**33, 0), "epochs": ints(1, 0, 2),
    },
    {"max_seqlen": 8, "mask_id": 4, "rate": 0.5, "unit": "word", "seed": SEED},
)  # fmt: skip
# ops without a gradient: mlm_mask, and lamb_step, which works in place on lists; their own files have these tests
WITHOUT_GRADIENT = {"mlm_mask", "lamb_step"}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def test_every_op_with_a_kernel_is_in_the_table():
    assert {call.op.__name__ for call in CALLS.values()} | WITHOUT_GRADIENT == set(kernels.TRITON_OPS)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def strided(x):
    """The values of x, where x[0], x[1], ... are no neighbours in memory."""
    return torch.stack([x, torch.zeros_like(x), torch.ones_like(x)], dim=1)[:, 0]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [(n, t) for n, c in (*CALLS.items(), ("mlm_mask", MLM_MASK)) for t in (*c.fixed, *COUNTERS.get(n, ()), *c.shapes)],
)
def test_a_tensor_may_have_any_stride(name, tensor):
    call = CALLS.get(name, MLM_MASK)
    plain = call.tensors() | COUNTERS.get(name, {})
    assert_equal(call.run(tensors=plain | {tensor: strided(plain[tensor])}), call.run(tensors=plain))


KERNELS = {
    "embed_norm": (embedding, ("_embed_norm_fwd_kernel", "_embed_norm_bwd_kernel")),
    "segment_sum": (segment, ("_segment_sum_kernel", "_crossing_runs_kernel")),
    "gather_rows": (packing, ("_gather_rows_kernel",)),
    "mlm_mask": (masking, ("_mlm_mask_kernel",)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_batches_of_any_number_of_tokens_run_the_same_code(name, monkeypatch):
    module, names = KERNELS[name]
    launches = [harness.Recorder(getattr(module, kernel)) for kernel in names]
    for kernel, launch in zip(names, launches, strict=True):
        monkeypatch.setattr(module, kernel, launch)
    tables = {name: torch.zeros(n, 64, device=DEVICE) for name, n in (("word", 41), ("position", 16), ("type", 2))}
    vector, special = torch.zeros(64, device=DEVICE), torch.arange(41, device=DEVICE) < 5
    for n in (1, 2, 16, 17, 4096, 4099):
        ids, x = torch.zeros(n, dtype=torch.int64, device=DEVICE), torch.zeros(n, 64, device=DEVICE)
        if name == "embed_norm":
            arguments = {"ids": ids, "type_ids": ids, "positions": ids, "weight": vector, "bias": vector} | tables
            values_and_gradients(lambda **t: kernels.embed_norm(**t, backend="triton"), arguments, [x])
        elif name == "segment_sum":
            segment.segment_sum(x.repeat(100, 1), ids.repeat(100), n)
        elif name == "gather_rows":
            kernels.select_rows(x, ids, backend="triton")
            kernels.unpack(x, ints(0, n, dtype=torch.int32), n, backend="triton")
        else:
            cuts, options = ints(0, 1, dtype=torch.int32), {"mask_id": 4, "special": special, "ordinary": IDS}
            kernels.mlm_mask(ids, cuts, 16, **options, backend="triton")
    assert [launch.variants() for launch in launches] == [1] * len(launches)


class Recorder(TorchDispatchMode):
    """Remembers the calls of our registered ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minibert":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_registered_ops_pass_opcheck_forward_and_backward(call):
    with Recorder() as recorder:
        call.run()
    assert len(recorder.calls) >= 2, "a forward and a backward op"
    for i, (func, args) in enumerate(recorder.calls):
        # the first is the forward; backward ops have no gradient of their own
        args = (
            a.detach().requires_grad_(i == 0 and a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args
        )
        torch.library.opcheck(func, tuple(args))


def test_a_compiled_graph_gives_the_same_bits(call):
    compiled = torch.compile(call.op, fullgraph=True, backend="aot_eager")
    assert_equal(call.run(op=compiled), call.run())
    torch._dynamo.reset()


def test_an_exported_program_runs_the_op(call):
    class Module(torch.nn.Module):
        def forward(self, tensors):
            return call.op(**tensors, **call.options, backend="triton")

    tensors = call.tensors()
    program = torch.export.export(Module(), (tensors,))
    assert "minibert." in str(program.graph)
    ours, plain = program.module()(tensors), Module()(tensors)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


def test_fake_tensors_get_shapes_strides_and_dtypes_of_the_real_ones(call):
    def describe(results):
        return {name: (t.shape, t.stride(), t.dtype) for name, t in results.items()}

    real = call.run(dtype=torch.float16)
    with FakeTensorMode() as mode:
        fixed = {name: mode.from_tensor(t) for name, t in call.fixed.items()}
        fake = Call(call.op, call.shapes, fixed, call.options).run(dtype=torch.float16)
    assert describe(fake) == describe(real)


def test_activation_checkpointing_gives_the_same_bits(call):
    def checkpointed(**arguments):
        return checkpoint(call.op, **arguments, use_reentrant=False)

    assert_equal(call.run(op=checkpointed), call.run())


def test_inference_mode_gives_the_same_bits(call):
    plain = call.op(**call.tensors(), **call.options, backend="triton")
    with torch.inference_mode():
        ours = call.op(**call.tensors(), **call.options, backend="triton")
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_under_autocast_gradients_keep_the_dtype_of_the_parameters(call):
    with torch.autocast(DEVICE, torch.float16):
        results = call.run()
    for name in call.shapes:
        assert results[f"d{name}"].dtype == torch.float32
        assert results[f"d{name}"].isfinite().all()


def test_the_same_call_gives_the_same_bits_every_time(call):
    first = call.run()
    for _ in range(249 if DEVICE == "cuda" else 4):  # the interpreter runs programs one after another
        assert_equal(call.run(), first)


@pytest.mark.gpu
def test_long_attention_gives_the_same_bits_every_time():
    qkv = dict.fromkeys("qkv", (1025, 2, 64))
    options = {"max_seqlen": 1025, "dropout": 0.1, "seed": SEED}
    call = Call(kernels.attention, qkv, {"cu_seqlens": ints(0, 1025, dtype=torch.int32)}, options)
    first = call.run(dtype=torch.bfloat16)
    for _ in range(250):
        assert_equal(call.run(dtype=torch.bfloat16), first)


def test_an_eager_call_and_the_registered_op_give_the_same_bits(call, monkeypatch):
    with Recorder() as recorder:
        registered = call.run()
    assert len(recorder.calls) >= 2, "a forward and a backward op"
    if isinstance(vars(sys.modules[call.op.__module__]).get("_forward"), Op):
        monkeypatch.setattr(CustomOpDef, "__call__", None)  # an eager call goes past the dispatcher
    assert_equal(call.run(), registered)
    with torch.no_grad():
        ours = call.op(**call.tensors(), **call.options, backend="triton")
    for out, theirs in zip(ours if isinstance(ours, tuple) else (ours,), registered.values(), strict=False):
        assert torch.equal(out, theirs)


@pytest.mark.parametrize("layout", ["wide rows", "misaligned", "transposed", "one row expanded"])
def test_a_gradient_may_come_in_any_layout(call, layout):
    tensors = {name: t.requires_grad_() if name in call.shapes else t for name, t in call.tensors().items()}
    outs = call.op(**tensors, **call.options, backend="triton")
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out.requires_grad]
    arranged = [arrange(torch.randn(out.shape, device=DEVICE), layout) for out in outs]
    found, expected = (
        torch.autograd.grad(outs, [tensors[name] for name in call.shapes], douts, retain_graph=True)
        for douts in (arranged, [dout.contiguous() for dout in arranged])
    )
    assert_equal(dict(zip(call.shapes, found, strict=True)), dict(zip(call.shapes, expected, strict=True)))


@pytest.mark.skipif(DEVICE == "cuda", reason="sees the accesses in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_access_leaves_the_tensors_of_its_launch(call, dtype):
    with guarded():
        call.run(dtype=dtype)


def first(outs):
    return outs[0] if isinstance(outs, tuple) else outs


def second_order(op, x):
    """The gradient of a sum of a gradient."""
    x = x.clone().requires_grad_()
    dx = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)[0]
    return torch.autograd.grad(dx.square().sum(), x)[0]


TRANSFORMS = {
    "jvp": lambda op, x: torch.func.jvp(op, (x,), (torch.ones_like(x),))[1],
    "forward AD": lambda op, x: forward_ad.unpack_dual(op(forward_ad.make_dual(x, torch.ones_like(x)))).tangent,
    "grad": lambda op, x: torch.func.grad(lambda x: op(x).sum())(x),
    "vmap": lambda op, x: torch.func.vmap(torch.func.grad(lambda x: op(x).sum()))(torch.stack([x, x])),
    "second order": second_order,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_that_a_kernel_cannot_follow_is_refused_with_a_remedy(call, transform):
    tensors = call.tensors()
    name = next(iter(call.shapes))

    def run(backend):
        def op(x):
            return first(call.op(**tensors | {name: x}, **call.options, backend=backend))

        with forward_ad.dual_level() if transform == "forward AD" else nullcontext():
            return TRANSFORMS[transform](op, tensors[name])

    if transform == "second order" and call.op in (kernels.pack, kernels.unpack):
        # a gradient that is the op itself
        return assert_equal({"x": run("triton")}, {"x": run("reference")})
    with pytest.raises(NotImplementedError, match="use backend='reference'"):
        run("triton")
    if call.op is kernels.linear_cross_entropy:  # which runs an op of its own on a CPU, too
        with pytest.raises(NotImplementedError, match="use backend='reference'"):
            run("auto")
        assert run("reference").isfinite().all() and run("reference").any()


def test_an_op_that_is_switched_off_runs_its_reference(call):
    reference = call.run(backend="reference")
    with dispatch.disabled(call.op.__name__):
        assert_equal(call.run(), reference)
    with Recorder() as recorder:
        call.run()
    assert recorder.calls


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is off where there is a GPU")
def test_offsets_beyond_2_31_elements_give_the_same_bits(call, tmp_path):
    far = 2**30 + 16
    size = far * 48
    memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=torch.float16)
    near = call.run(dtype=torch.float16)

    def distant(**tensors):
        moved = {}
        for i, (name, t) in enumerate(tensors.items()):
            moved[name] = t
            if name in call.shapes and t.ndim > 1:
                strides = (far, *torch.empty(t.shape[1:]).stride())
                view = memory.as_strided(t.shape, strides, storage_offset=4096 * i)
                view.copy_(t.detach())
                moved[name] = Far.apply(t, view)
        return call.op(**moved)

    with guarded(memory):  # an offset that wraps around is refused, where it would end the process
        ours = call.run(dtype=torch.float16, op=distant)
    assert_equal(ours, near)
    os.truncate(tmp_path / "holes", 0)


class Far(torch.autograd.Function):
    """The same values elsewhere in memory; the gradient comes back as it is."""

    @staticmethod
    def forward(ctx, x, view):
        return view.detach()

    @staticmethod
    def backward(ctx, dout):
        return dout, None


@pytest.mark.gpu
def test_a_captured_graph_replays_with_a_new_seed(call):
    seed = torch.tensor(1, device="cuda")
    options = call.options | ({"seed": seed} if "seed" in call.options else {})
    tensors = call.tensors()

    def step():
        return call.op(**tensors, **options, backend="triton")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0)
