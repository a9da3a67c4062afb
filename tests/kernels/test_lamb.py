import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from harness import DTYPES, repeat_with
from tolerance import FORWARD, assert_as_accurate

from minibert_kernels import lamb
from minibert_kernels.lamb import lamb_step

NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs")


def eager(
    params, grads, exp_avgs, exp_avg_sqs, *, lr, step, betas, eps, weight_decay, bias_correction, trust_clip, adapt
):
    """The step as one writes it in torch, with weights in their own dtype and moments in float32."""
    steps = step.tolist() if isinstance(step, torch.Tensor) and step.ndim else [float(step)] * len(params)
    for w, g, m, v, t in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        m.copy_(betas[0] * m + (1 - betas[0]) * g)
        v.copy_(betas[1] * v + (1 - betas[1]) * g.to(v.dtype) ** 2)
        scale = [1 - beta**t if bias_correction else 1 for beta in betas]
        u = m / scale[0] / ((v / scale[1]).sqrt() + eps) + weight_decay * w
        norms = w.to(u.dtype).norm(), u.norm()
        ratio = (norms[0] / norms[1]).item() if adapt and norms[0] > 0 and norms[1] > 0 else 1.0
        ratio = min(ratio, trust_clip or math.inf) if adapt else ratio
        w.sub_((float(lr) * ratio * u).to(w.dtype))


def pooled(op, tensors, **options):
    """{name and dtype: every element} of what op makes of copies of `tensors`."""
    copies = [[at_same_alignment(t) for t in tensors[name]] for name in NAMES]
    op(*copies, **options)
    found = {}
    for name, values in zip(NAMES, copies, strict=True):
        for value, original in zip(values, tensors["params"], strict=True):
            found.setdefault(f"{name} of {original.dtype}", []).append(value.flatten())
    return {name: torch.cat(values) for name, values in found.items()}


def at_same_alignment(t):
    memory = torch.full((t.numel() + 8,), float("nan"), dtype=t.dtype, device=t.device)
    offset = t.data_ptr() % 16 // t.element_size()
    return memory[offset : offset + t.numel()].view(t.shape).copy_(t)


@dataclass(frozen=True)
class Case:
    seed: int
    shapes: tuple
    dtypes: tuple = (torch.float32,)
    misaligned: bool = False
    fresh: bool = False
    step: int = 3
    many_steps: bool = False
    lr_on_device: bool = False
    options: dict = field(default_factory=dict)

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        sizes = [
            (),
            (0,),
            (1,),
            (7,),
            (13, 7),
            (3, 0, 2),
            (37, 5, 2),
            (1023,),
            (1024,),
            (1025,),
            (rng.randint(1, 3000),),
        ]
        shapes = [rng.choice(sizes) for _ in range(rng.randint(0, 6))]
        if rng.random() < 0.15:
            shapes.append(rng.choice([(lamb.CHUNK,), (lamb.CHUNK + 1,), (2, lamb.CHUNK - 1)]))
        return cls(
            seed=seed,
            shapes=tuple(shapes),
            dtypes=tuple(rng.sample(DTYPES, rng.choice([1, 1, 2]))),
            misaligned=rng.random() < 0.3,
            fresh=rng.random() < 0.3,
            step=rng.choice([1, 2, 10, 1000, 100_000]),
            many_steps=rng.random() < 0.3,
            lr_on_device=rng.random() < 0.3,
            options={
                "betas": rng.choice([(0.9, 0.999), (0.9, 0.999), (0.0, 0.0), (0.5, 0.95)]),
                "eps": rng.choice([1e-6, 1e-3]),
                "weight_decay": rng.choice([0.0, 0.01, 0.5]),
                "bias_correction": rng.random() < 0.8,
                "trust_clip": rng.choice([None, None, 0.7, 10.0]),
                "adapt": rng.random() < 0.7,
            },
        )

    def run(self, device):
        with repeat_with(self, device):
            tensors = self.tensors(device)
            lr, step = 0.1, self.step
            if self.many_steps:
                step = self.step + torch.arange(len(self.shapes), dtype=torch.float32, device=device)
            defaults = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True}
            options = defaults | {"trust_clip": None, "adapt": True} | self.options | {"step": step}
            wide = {name: [t.double() for t in values] for name, values in tensors.items()}
            ours = pooled(
                lamb_step, tensors, **options, lr=torch.tensor(lr, device=device) if self.lr_on_device else lr,
                backend="triton",
            )  # fmt: skip
            torchs = pooled(eager, tensors, lr=lr, **options)
            exact = pooled(lamb_step, wide, lr=lr, **options, backend="reference")
            # float64 knows one dtype
            exact = {name: torch.cat([t.flatten() for t in self.of(name, exact)]) for name in ours}
            for name in ours:
                assert_as_accurate(ours[name], torchs[name], exact[name], factor=FORWARD, name=name)

    def of(self, name, exact):
        """The parts of the float64 results that belong to tensors of the dtype in `name`."""
        kind, dtype = name.split(" of ")
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = exact[f"{kind} of torch.float64"].split(sizes)
        return [part for i, part in enumerate(parts) if str(self.dtype(i)) == dtype]

    def dtype(self, i):
        return self.dtypes[i % len(self.dtypes)]

    def tensors(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        result = {name: [] for name in NAMES}
        for i, shape in enumerate(self.shapes):
            for name in NAMES:
                values = torch.randn(shape, generator=generator)
                if name.startswith("exp"):
                    # squares below the gradients', as after steps with smaller ones
                    values = torch.zeros(shape) if self.fresh else values.square() + 0.1 if name[-1] == "s" else values
                dtype = self.dtype(i) if name in ("params", "grads") else torch.float32
                values = values.to(device, dtype)
                memory = values.new_empty(values.numel() + 1)[int(self.misaligned) :][: values.numel()]
                result[name].append(memory.view(shape).copy_(values))
        return result


def test_any_call_is_as_accurate_as_torch(fuzz_seed, device, poisoned):
    Case.draw(fuzz_seed).run(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapt", [True, False])
def test_the_tensors_of_a_bert(adapt, dtype, device, poisoned):
    shapes = (
        (997, 128),
        (128, 128),
        (384, 128),
        (512, 128),
        (128, 512),
        (128,),
        (384,),
        (512,),
        (2, 128),
        (2,),
        (997,),
    )
    Case(seed=1, shapes=shapes, dtypes=(dtype,), options={"adapt": adapt}).run(device)


def test_more_chunks_than_a_block_has_are_summed(device, monkeypatch, poisoned):
    monkeypatch.setattr(lamb, "CHUNK", 64)
    monkeypatch.setattr(lamb, "BLOCK", 16)
    lamb._kept_table.cache_clear()
    Case(seed=2, shapes=((13,), (64 * 37 + 5,), (1,), (65,))).run(device)
    lamb._kept_table.cache_clear()


def test_a_wrong_correction_of_the_bias_fails_and_prints_the_line_that_repeats_it(device, monkeypatch, few_draws):
    monkeypatch.setattr(lamb, "math", SimpleNamespace(log=lambda beta: 1.01 * math.log(beta), inf=math.inf))
    with pytest.raises(AssertionError, match="params of torch.float32: error") as failure:
        Case(seed=3, shapes=((13, 37),)).run(device)
    (line,) = failure.value.__notes__
    with pytest.raises(AssertionError, match="error"):
        eval(line.removeprefix("repeat with: "))


def make(device, *shapes, dtype=torch.float32, seed=0):
    """(params, grads, exp_avgs, exp_avg_sqs)."""
    tensors = Case(seed=seed, shapes=shapes, dtypes=(dtype,)).tensors(device)
    return [tensors[name] for name in NAMES]


def kernel(*tensors, **options):
    lamb_step(*tensors, backend="triton", **{"lr": 0.1, "step": 3} | options)


def test_the_step_is_that_of_the_formula(device):
    params, grads, exp_avgs, exp_avg_sqs = make(device, (2,))
    for tensors, values in (
        (params, [3.0, 4.0]),
        (grads, [2.0, -1.0]),
        (exp_avgs, [0.0, 0.0]),
        (exp_avg_sqs, [0.0, 0.0]),
    ):
        tensors[0].copy_(torch.tensor(values))
    kernel(params, grads, exp_avgs, exp_avg_sqs, step=1, weight_decay=0.5)
    # both moments cancel in the first step: u = sign(g) + w / 2 = (2.5, 1)
    expected = torch.tensor([3.0, 4.0]) - 0.1 * 5 / math.hypot(2.5, 1.0) * torch.tensor([2.5, 1.0])
    torch.testing.assert_close(params[0].cpu(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(exp_avgs[0].cpu(), torch.tensor([0.2, -0.1]))
    torch.testing.assert_close(exp_avg_sqs[0].cpu(), torch.tensor([0.004, 0.001]))


def test_the_step_of_a_tensor_is_as_long_as_the_rate_times_the_tensor(device):
    tensors = make(device, (37, 13), (5,), (20_001,))
    before = [p.clone() for p in tensors[0]]
    kernel(*tensors, lr=0.02)
    for old, new in zip(before, tensors[0], strict=True):
        assert ((new - old).norm() / old.norm()).item() == pytest.approx(0.02, rel=1e-4)


def test_without_trust_ratio_it_is_adamw(device):
    params, _, exp_avgs, exp_avg_sqs = make(device, (37, 13), (5,))
    twins = [p.clone() for p in params]
    for zeros in exp_avgs + exp_avg_sqs:
        zeros.zero_()
    optimizer = torch.optim.AdamW(twins, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)
    for step in range(1, 6):
        _, grads, _, _ = make(device, (37, 13), (5,), seed=step)
        for p, g in zip(twins, grads, strict=True):
            p.grad = g
        optimizer.step()
        options = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "adapt": False}
        kernel(params, grads, exp_avgs, exp_avg_sqs, step=step, **options)
    torch.testing.assert_close(params, twins)


def test_a_tensor_or_an_update_of_zeros_has_a_ratio_of_one(device):
    tensors = make(device, (13,), (7,), (1030,))
    params, grads, exp_avgs, exp_avg_sqs = tensors
    params[0].zero_()
    for t in (grads[1], exp_avgs[1], exp_avg_sqs[1], params[2], grads[2], exp_avgs[2], exp_avg_sqs[2]):
        t.zero_()
    kept = params[1].clone()
    kernel(*tensors, step=1, weight_decay=0.0, betas=(0.0, 0.0))
    torch.testing.assert_close(params[0], -0.1 * grads[0].sign(), rtol=1e-4, atol=1e-5)
    assert torch.equal(params[1], kept) and not params[2].any()


def test_the_trust_ratio_is_clipped(device):
    ours, free = (make(device, (37, 13)) for _ in range(2))
    old = ours[0][0].clone()
    kernel(*free, adapt=False, lr=0.1 * 0.25)
    kernel(*ours, trust_clip=0.25)
    assert (old - ours[0][0]).norm() < 0.1 * old.norm()
    torch.testing.assert_close(ours[0][0], free[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_tensor_and_where_the_reference_has_it(dtype, device):
    def run(backend):
        tensors = make(device, (13,), (13,), (13,), (13,), (5,), dtype=dtype)
        params, grads, exp_avgs, _ = tensors
        grads[0][3], grads[1][2], params[2][1], exp_avgs[3][0] = math.inf, math.nan, -math.inf, math.nan
        lamb_step(*tensors, lr=0.1, step=2, backend=backend)
        return tensors[0]

    ours, theirs = run("triton"), run("reference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert [bool(p.isfinite().all()) for p in ours] == [False, False, False, False, True]


def test_nothing_beside_the_tensors_is_written(device):
    memory = torch.full((4, 3, 1100), 7.0, device=device)
    shapes = slice(3, 1030), slice(5, 12)
    tensors = [[plane[i, part] for i, part in enumerate(shapes)] for plane in memory]
    kernel(*tensors)
    for plane in memory:
        assert torch.equal(plane[0, :3], plane[2, :3]) and torch.equal(plane[0, 1030:], plane[2, 1030:])
        assert torch.equal(plane[1, 12:], plane[2, 12:]) and torch.equal(plane[1, :5], plane[2, :5])
    assert not (memory[0, 0, 3:1030] == 7).any()


def test_the_same_call_gives_the_same_bits_every_time(device):
    first = make(device, (37, 13), (16_390,), (5,))
    kernel(*first)
    for _ in range(4 if device == "cpu" else 49):  # the interpreter runs programs one after another
        again = make(device, (37, 13), (16_390,), (5,))
        kernel(*again)
        assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))


def test_the_result_does_not_depend_on_the_tensors_beside_it(device):
    together, alone = make(device, (37, 13), (16_390,), (5,)), make(device, (37, 13), (16_390,), (5,))
    kernel(*together)
    for i in range(3):
        kernel(*([tensors[i]] for tensors in alone))
    assert all(torch.equal(a, b) for x, y in zip(together, alone, strict=True) for a, b in zip(x, y, strict=True))


def test_rate_and_step_are_read_on_the_device(device):
    numbers, scalars, each = (make(device, (37, 13), (5,)) for _ in range(3))
    kernel(*numbers, lr=0.25, step=7)
    lr, step = torch.tensor(0.25, device=device), torch.tensor(7.0, device=device)
    kernel(*scalars, lr=lr, step=step)
    kernel(*each, lr=lr, step=step.expand(2))
    for other in (scalars, each):
        assert all(torch.equal(a, b) for a, b in zip(numbers[0], other[0], strict=True))


def test_a_tensor_of_many_steps_gives_each_tensor_its_own(device):
    ours = make(device, (37, 13), (0,), (5,))
    kernel(*ours, step=torch.tensor([1.0, 2.0, 50.0], device=device))
    for i, step in ((0, 1), (2, 50)):
        alone = make(device, (37, 13), (0,), (5,))
        kernel(*([tensors[i]] for tensors in alone), step=step)
        assert torch.equal(ours[0][i], alone[0][i])


def test_addresses_are_kept_while_the_tensors_stay_and_read_again_when_they_move(device):
    tensors = make(device, (37, 13), (5,))
    lamb._kept_table.cache_clear()
    for _ in range(3):
        kernel(*tensors)
    assert lamb._kept_table.cache_info()[:2] == (2, 1)
    moved = [[t.clone() for t in part] for part in tensors]
    kernel(*moved)
    assert lamb._kept_table.cache_info()[:2] == (2, 2)
    kernel(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors[0], moved[0], strict=True))


def test_a_table_filled_by_value_is_the_one_that_is_copied(device):
    sizes, addresses = (5, 16_385, 1), tuple(2**47 - 16 * i for i in range(12))
    copied, by_value = (lamb._table(sizes, addresses, torch.device(device), by_value) for by_value in (False, True))
    assert torch.equal(copied, by_value) and copied.dtype == torch.int64
    assert copied.tolist() == [0, 1, 3, *sizes, *addresses]


def test_no_tensors_and_empty_ones_are_fine(device):
    kernel([], [], [], [])
    kernel(*make(device, (0,), (3, 0)))


def test_parameters_that_want_gradients_are_updated_in_place(device):
    tensors = make(device, (5,))
    p = tensors[0][0].requires_grad_()
    old, version = p.detach().clone(), p._version
    kernel(*tensors)
    assert not torch.equal(p, old) and p._version > version and p.is_leaf


@pytest.mark.gpu
def test_a_captured_step_follows_rate_and_step_and_needs_no_call_before():
    lr, step = torch.tensor(0.1, device="cuda"), torch.tensor(1.0, device="cuda")
    ours, plain = make("cuda", (37, 13), (5,)), make("cuda", (37, 13), (5,))
    kernel(*make("cuda", (37, 13), (5,)))  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(*ours, lr=lr, step=step)
    for i, rate in enumerate((0.1, 0.03, 0.01), start=1):
        lr.fill_(rate)
        step.fill_(i)
        graph.replay()
        kernel(*plain, lr=lr, step=step)
    assert all(torch.equal(a, b) for x, y in zip(ours, plain, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step=0 is not positive: the first is 1"),
        ({"step": torch.ones(3)}, r"step is \[3\]: expected \[\] or \[2\]"),
        ({"lr": torch.ones(2)}, r"lr is \[2\]: expected \[\]"),
        ({"lr": -0.1}, "lr=-0.1 is not a number from 0"),
        ({"lr": math.nan}, "lr=nan is not a number from 0"),
        ({"lr": torch.ones((), device="meta")}, r"lr is on meta, params\[0\] on cpu"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) are not in \[0, 1\)"),
        ({"eps": -1e-6}, "eps=-1e-06 is not a number from 0"),
        ({"weight_decay": -1}, "weight_decay=-1 is not a number from 0"),
        ({"trust_clip": 0.0}, "trust_clip=0.0 is not positive"),
        ({"grads": [torch.ones(3, 4)]}, "grads has 1 tensors, params has 2"),
        ({"grads": [torch.ones(3, 4), torch.ones(6)]}, r"grads\[1\] is torch.float32 \[6\]: expected .* \[5\]"),
        ({"grads": [torch.ones(3, 4).half(), torch.ones(5)]}, r"grads\[0\] is torch.float16 \[3, 4\]: expected"),
        ({"exp_avgs": [torch.ones(3, 4), torch.ones(5).half()]}, r"exp_avgs\[1\] is torch.float16 \[5\]: expected"),
        ({"exp_avg_sqs": [torch.ones(4, 3).T, torch.ones(5)]}, r"exp_avg_sqs\[0\] has strides \[1, 3\]: expected"),
        ({name: [torch.ones(3, 4).long(), torch.ones(5)] for name in NAMES}, r"params\[0\] is torch.int64: expected "),
        ({"params": [torch.ones(3, 4), torch.ones(10)[::2]]}, r"params\[1\] has strides \[2\]"),
        ({"grads": [torch.ones(3, 4), torch.ones(5, device="meta")]}, r"grads\[1\] is on meta, params\[0\] on cpu"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, reference"),
    ],
)  # fmt: skip
def test_an_argument_that_does_not_fit_is_named(change, message):
    arguments = {name: [torch.ones(3, 4), torch.ones(5)] for name in NAMES} | {"lr": 0.1, "step": 1} | change
    with pytest.raises(ValueError, match=message):
        lamb_step(**arguments)


def test_what_the_kernel_cannot_take_runs_the_reference_or_is_said(device):
    wide = [[t.double() for t in part] for part in make(device, (37, 13))]
    with pytest.raises(ValueError, match="lamb_step: backend='triton' takes .*, got float64"):
        kernel(*wide)
    before = wide[0][0].clone()
    lamb_step(*wide, lr=0.1, step=1)
    assert not torch.equal(before, wide[0][0])
    many = [[torch.ones((), device=device)] * 8193] * 4
    with pytest.raises(ValueError, match="lamb_step: backend='triton' takes up to 8192 tensors, got 8193"):
        kernel(*many)
