"""Every op beside what one would call otherwise, forward and backward: the table of `cases`, and who takes part.

A provider gets the tensors packed and lays them out as it likes, outside the clock. What is timed is first judged on a
few sequences that take the same launch plan: output and gradients, without dropout, against float64.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import minibert_kernels
from minibert_kernels import reference
from minibert_kernels.reference import SequenceLayout

from .cases import BOTH, TABLE, Draw, OpCase, Problem, Tensors, gate_sizes, sizes_of
from .gate import Once, Refused, judge
from .measure import Case, alone_on_side_stream, on_device
from .peers import compiled_call


@dataclass(frozen=True)
class Bound:
    """A provider's call on the tensors of a problem.

    Args:
        leaves: what gradients are taken of, by the problem's names, in the provider's own layout.
        run: gives the output. inward, outward: from the packed layout to the provider's, and back.
    """

    leaves: Tensors
    run: Callable[[], Tensor]
    inward: Callable[[Tensor], Tensor] = lambda x: x
    outward: Callable[[Tensor], Tensor] = lambda x: x


Provider = Callable[[Problem, Tensors, float], Bound]


def minibert(problem: Problem, tensors: Tensors, dropout: float, backend: str = "auto") -> Bound:
    options = {"backend": backend} | ({"dropout": dropout, "seed": 1} if dropout else {})
    return Bound(tensors, lambda: problem.call(minibert_kernels, tensors, **options))


def torch_eager(problem: Problem, tensors: Tensors, dropout: float, compiled: bool = False) -> Bound:
    """What one writes by hand."""
    if problem.op == "attention":
        return padded_attention(problem, tensors, partial(plain_attention, dropout=dropout))
    if problem.op not in BY_HAND:
        return Bound(tensors, lambda: problem.call(reference, tensors))
    call, options = BY_HAND[problem.op], problem.options | ({"dropout": dropout} if dropout else {})
    call = compile_once(call) if compiled else call
    return Bound(tensors, lambda: call(**tensors, **options))


_compiled: dict[Callable, Callable] = {}


def compile_once(call: Callable) -> Callable:
    """`call` under torch.compile, with sizes left open, so that the gate's serves the clock too."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward is run more than once
    if call not in _compiled:
        _compiled[call] = compiled_call(call, dynamic=True)
    return _compiled[call]


def by_hand_norm(x, residual, weight, bias, dropout=0.0):
    x = F.dropout(x, dropout) if dropout else x
    return F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, 1e-12)


def by_hand_embeddings(ids, type_ids, positions, word, position, type, weight, bias, dropout=0.0):
    total = F.embedding(ids, word) + F.embedding(type_ids, type) + F.embedding(positions, position)
    return F.dropout(F.layer_norm(total, weight.shape, weight, bias, 1e-12), dropout)


def by_hand_gated(act, x, bias):
    gate, value = (x + bias).chunk(2, dim=-1)
    return act(gate) * value


def by_hand_unpack(x, cu_seqlens, max_seqlen):
    valid = torch.arange(max_seqlen, device=x.device) < cu_seqlens.diff()[:, None]
    padded = x.new_zeros(*valid.shape, *x.shape[1:])
    padded[valid] = x
    return padded


BY_HAND = {
    "dropout_add_norm": by_hand_norm,
    "bias_gelu": lambda x, bias: F.gelu(x + bias),
    "bias_geglu": partial(by_hand_gated, F.gelu),
    "bias_swiglu": partial(by_hand_gated, F.silu),
    "embed_norm": by_hand_embeddings,
    "linear_cross_entropy": lambda hidden, weight, bias, labels, max_labels: F.cross_entropy(
        F.linear(hidden, weight, bias).float(), labels
    ),
    "select_rows": lambda x, rows: x[rows],
    "pack": lambda x, mask, num_tokens: x[mask],
    "unpack": by_hand_unpack,
}


def padded_attention(problem: Problem, tensors: Tensors, call: Callable) -> Bound:
    """`call(q, k, v, mask)` on [B, H, S, d]; the mask, true at keys, is None where nothing is padded."""
    borders, longest = tensors["cu_seqlens"], problem.options["max_seqlen"]
    layout = SequenceLayout(borders, longest, len(tensors["q"]))

    def inward(x):
        return layout.pad(x).transpose(1, 2).contiguous()

    leaves = {name: inward(tensors[name].detach()).requires_grad_() for name in "qkv"}
    mask = None if layout.full else layout.valid[:, None, None, :]
    return Bound(leaves, lambda: call(*leaves.values(), mask), inward, lambda x: layout.unpad(x.transpose(1, 2)))


def plain_attention(q, k, v, mask, dropout):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    probs = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
    return F.dropout(probs, dropout) @ v


def sdpa(problem: Problem, tensors: Tensors, dropout: float, backend: str) -> Bound:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    warnings.filterwarnings("ignore", module=__name__)  # why a backend cannot: it is refused, and the row says so

    def call(q, k, v, mask):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    return padded_attention(problem, tensors, call)


def flex_attention(problem: Problem, tensors: Tensors, dropout: float) -> Bound:
    from torch.nn.attention import flex_attention as flex

    if dropout:
        raise Refused("flex_attention: has no dropout")
    sizes, longest = tensors["cu_seqlens"].diff(), problem.options["max_seqlen"]
    block_mask = None
    if int(sizes.min()) < longest:
        block_mask = flex.create_block_mask(
            lambda b, h, q, k: k < sizes[b], len(sizes), None, longest, longest, device=sizes.device
        )
    attend = compile_once(flex.flex_attention)
    return padded_attention(problem, tensors, lambda q, k, v, mask: attend(q, k, v, block_mask=block_mask))


def varlen_attention(problem: Problem, tensors: Tensors, dropout: float) -> Bound:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise Refused("varlen_attn: has no dropout")
    q, k, v, borders, longest = *tensors.values(), problem.options["max_seqlen"]
    return Bound(tensors, lambda: varlen_attn(q, k, v, borders, borders, longest, longest))


def flash_attention(problem: Problem, tensors: Tensors, dropout: float) -> Bound:
    from flash_attn import flash_attn_varlen_func

    q, k, v, borders, longest = *tensors.values(), problem.options["max_seqlen"]
    return Bound(
        tensors,
        lambda: flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, dropout_p=dropout),
    )


def liger(problem: Problem, tensors: Tensors, dropout: float) -> Bound:
    from liger_kernel.transformers import functional

    if problem.op == "linear_cross_entropy":
        hidden, weight, bias, labels = tensors.values()
        return Bound(tensors, lambda: functional.liger_fused_linear_cross_entropy(hidden, weight, labels, bias))
    if dropout or "residual" in tensors:
        raise Refused("liger: its LayerNorm neither drops nor adds")
    return Bound(tensors, lambda: functional.liger_layer_norm(*tensors.values(), 1e-12))


HALF_ONLY = ("sdpa flash", "sdpa cudnn", "varlen_attn", "flash-attn")  # on a GPU
SDPA = {
    "sdpa flash": partial(sdpa, backend="FLASH_ATTENTION"),
    "sdpa efficient": partial(sdpa, backend="EFFICIENT_ATTENTION"),
    "sdpa cudnn": partial(sdpa, backend="CUDNN_ATTENTION"),
    "sdpa math": partial(sdpa, backend="MATH"),
}
ATTENTIONS = SDPA | {
    "flex_attention": flex_attention, "varlen_attn": varlen_attention, "flash-attn": flash_attention,
}  # fmt: skip


def providers_of(op: str, backend: str) -> dict[str, Provider]:
    """Who takes part in an op, by name."""
    found: dict[str, Provider] = {"minibert": partial(minibert, backend=backend), "torch eager": torch_eager}
    if op == "attention":
        return found | ATTENTIONS
    if op in BY_HAND:
        found["torch compiled"] = partial(torch_eager, compiled=True)
    if op in ("dropout_add_norm", "linear_cross_entropy"):
        found["liger"] = liger
    return found


class Gate:
    """What every provider of a case is judged by: output and gradients of a small problem, by the reference in float64,
    and in lower precision how far torch's own ops are from them."""

    def __init__(self, case: OpCase, dtype: torch.dtype, device: str):
        self.problem = case.make(gate_sizes(case), dtype.itemsize, Draw(device, seed=1))
        self.once = Once()  # both directions are judged together
        self.dtype, self.truth = dtype, self.outcome(self._reference, torch.float64)
        lower = dtype != torch.float32 and self.problem.wanted
        self.same = self.outcome(torch_eager, dtype) if lower else None
        if self.same and self.same["output"].ndim == 0:
            self.same["output"] = self.same["output"].to(dtype)  # what a loss was computed in

    @staticmethod
    def _reference(problem, tensors, dropout):
        return Bound(tensors, lambda: problem.call(reference, tensors))

    def outcome(self, provider: Provider, dtype: torch.dtype) -> Tensors:
        """Output and gradients, in the packed layout."""
        problem, tensors = self.problem, self.problem.cast(dtype)
        if problem.op == "lamb_step":
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        bound = provider(problem, tensors, 0.0)
        out = bound.run()
        found = {"output": bound.outward(out.detach())}
        if problem.wanted:
            packed = found["output"]
            slope = (
                Draw(packed.device.type, seed=2).normal(*packed.shape).to(out.dtype) if packed.ndim else packed * 0 + 1
            )
            leaves = [bound.leaves[name] for name in problem.wanted]
            gradients = torch.autograd.grad(out, leaves, bound.inward(slope))
            # attention's leaves have the output's layout, all others the problem's own
            found |= {f"grad {name}": bound.outward(d) for name, d in zip(problem.wanted, gradients, strict=True)}
        return found

    def check(self, name: str, provider: Provider, half_only: bool) -> None:
        """Raise `Refused` where the provider differs; in lower precision its float32 twin is judged first."""
        if self.same is not None and not half_only:
            judge(f"{name} in float32", self.outcome(provider, torch.float32), self.truth)
        judge(name, self.outcome(provider, self.dtype), self.truth, self.same)


def build(name: str, provider: Provider, problem: Problem, gate: Gate, direction: str) -> Callable[[], object]:
    """Judge a provider, then its call: forward as in training, backward alone, or both."""
    on_gpu = next(iter(problem.tensors.values())).is_cuda
    if not on_gpu and name in ("liger", "varlen_attn", "flash-attn", "sdpa efficient", "sdpa cudnn"):
        raise Refused(f"{name}: needs a GPU")
    # a backward that is captured must have had its forward on the stream that captures
    with alone_on_side_stream() if on_gpu else nullcontext():
        gate.once(name, lambda: gate.check(name, provider, on_gpu and name in HALF_ONLY))
        bound = provider(problem, problem.cast(gate.dtype), problem.dropout)
        leaves = [bound.leaves[wanted] for wanted in problem.wanted]
        if direction == "fwd":
            return bound.run
        out = bound.run()
        slope = torch.randn_like(out) if out.ndim else torch.ones_like(out)
    if direction == BOTH:
        return lambda: torch.autograd.grad(bound.run(), leaves, slope)
    return lambda: torch.autograd.grad(out, leaves, slope, retain_graph=True)


def baseline_of(case: OpCase, device: str) -> str:
    if case.op != "attention":
        return "torch eager"
    # flash takes no mask on a GPU
    return "sdpa flash" if case.fill == "full" or device == "cpu" else "sdpa efficient"


def cases(
    *, table: Sequence[OpCase] = TABLE, dtypes: Sequence[torch.dtype], tokens: int, device: str = "cpu",
    backend: str = "auto", only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Case]:  # fmt: skip
    """A case for every line of the table, precision and direction."""
    for dtype in dtypes:
        for case in table:
            gate = Gate(case, dtype, device)
            problem = case.make(sizes_of(case, tokens), dtype.itemsize, Draw(device))
            for direction, work in problem.works.items():
                yield Case(
                    suite="kernels", name=f"{case.op} {case.name}",
                    labels={"dtype": str(dtype).removeprefix("torch."), "direction": direction},
                    work=work, baseline=baseline_of(case, device), clock=on_device,
                    providers={
                        name: partial(build, name, provider, problem, gate, direction)
                        for name, provider in providers_of(case.op, backend).items() if only(name)
                    },
                )  # fmt: skip
