"""What the kernel tests share: inputs in every layout, values with their gradients, and the judge."""

from contextlib import contextmanager

import torch
from tolerance import BACKWARD, FORWARD, assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

SEED = 0x1234_5678_9ABC
MORE = 16  # times the draws, where the first few do not fit the tolerance
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ("contiguous", "wide rows", "misaligned", "transposed", "every second column", "one row expanded")


def arrange(x, layout):
    """The values of x [..., D] (of its first row, for the expanded layout) in other strides, with NaN between them."""
    if x.ndim < 2 or layout == "contiguous":
        return x
    if layout == "one row expanded":
        return x[(slice(1),) * (x.ndim - 1)].expand(x.shape)
    wide = x.new_full((*x.shape[:-1], x.shape[-1] * 2 + 16), float("nan"))
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every second column":
        view = wide[..., : 2 * x.shape[-1] : 2]
    else:
        offset = 8 if layout == "wide rows" else 1
        view = wide[..., offset : offset + x.shape[-1]]
    return view.copy_(x)


def values_and_gradients(op, tensors, douts, **options):
    """{name: tensor} of what op returns ("out", "out1", ...) and of the gradients ("d" + name).

    Args:
        tensors: {name: tensor or None}, passed by name; those of a floating dtype get a gradient.
        douts: one gradient for each floating output, cast to its dtype.
    """
    leaves = {
        name: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    outs = op(**leaves, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    named = {f"out{i or ''}": out for i, out in enumerate(outs)}
    smooth = [out for out in outs if out.requires_grad]
    if not smooth:
        return named
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(smooth, list(wanted.values()), [d.to(o.dtype) for d, o in zip(douts, smooth)])  # noqa: B905
    return {k: v.detach() for k, v in named.items()} | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def widen(tensors):
    """The same inputs in float64."""
    return {k: t.double() if t is not None and t.is_floating_point() else t for k, t in tensors.items()}


def check(kernel, eager, reference, draw, *, draws=1, **options):
    """Hold `kernel` to the tolerance: torch's own error (`eager`, in the inputs' dtype) against `reference` in float64.

    The largest error of a few elements is luck. So the results of several draws are pooled, and where they do not fit
    the tolerance they are judged again among those of MORE times as many.

    Args:
        draw: () to (tensors, douts), as `values_and_gradients` takes them.
        draws: how many to begin with.
    """
    pool = [draw() for _ in range(draws)]
    try:
        judge(kernel, eager, reference, pool, **options)
    except AssertionError:
        pool += [draw() for _ in range((MORE - 1) * draws)]
        judge(kernel, eager, reference, pool, **options)


def judge(kernel, eager, reference, draws, **options):
    ours, torchs = (pooled(op, draws, **options) for op in (kernel, eager))
    exact = pooled(reference, [(widen(t), [d.double() for d in douts]) for t, douts in draws], **options)
    assert ours.keys() == exact.keys()
    for name in ours:
        if exact[name].is_floating_point():
            factor = BACKWARD if name.startswith("d") else FORWARD
            assert_as_accurate(ours[name], torchs[name], exact[name], factor=factor, name=name)
        else:
            assert torch.equal(ours[name], exact[name]), name


def pooled(op, draws, **options):
    results = [values_and_gradients(op, tensors, douts, **options) for tensors, douts in draws]
    return {name: torch.stack([r[name] for r in results]) for name in results[0]}


class Recorder:
    """In the place of a kernel: keeps the arguments of its launches, by name."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **named):
        names = self.kernel.arg_names
        self.calls.append(dict(zip(names, args, strict=False)) | {k: v for k, v in named.items() if k in names})

    def variants(self):
        """How many kernels a GPU would compile for these launches."""
        backend = make_backend(GPUTarget("cuda", 90, 32))
        compiled = JITFunction(self.kernel.fn, do_not_specialize=self.kernel.kwargs["do_not_specialize"])
        bind = create_function_from_signature(compiled.signature, compiled.params, backend)
        return len({str(bind(**call)[1]) for call in self.calls})


@contextmanager
def repeat_with(case, device):
    """On failure, the one line that repeats it."""
    try:
        yield
    except BaseException as error:
        emulated = device == "cpu" and "bfloat16" in repr(case)
        error.add_note(f"repeat with: {case!r}.run({device!r}){' inside instruments.bfloat16()' * emulated}")
        raise


class Names(TorchDispatchMode):
    """The names of the operators that torch runs inside, in order."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

    def like(self, *words):
        return [name for name in self.seen if any(word in name for word in words)]
