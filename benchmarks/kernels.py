"""Every op beside what one would call otherwise, forward and backward: the table of `cases`, and who takes part.

A provider gets the tensors packed and lays them out as it likes, outside the clock. Its output and gradients are first
judged against float64, without dropout: on a few uneven sequences, and on the very tensors that are timed.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import minibert_kernels
from minibert.model.encoder import SCHEDULED
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


SCORES = 1 << 28  # of attention that a reference makes at a time
Provider = Callable[[Problem, Tensors, float], Bound]


def minibert(problem: Problem, tensors: Tensors, dropout: float, backend: str = "auto") -> Bound:
    options = {"backend": backend} | ({"dropout": dropout, "seed": 1} if dropout else {})
    if problem.op == "attention" and problem.options["max_seqlen"] > SCHEDULED:  # once a batch, as the encoder does it
        options["schedule"] = minibert_kernels.attention_schedule(tensors["cu_seqlens"], len(tensors["q"]))
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
    layout = SequenceLayout(borders, longest, len(tensors["q"]), whole=True)

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


def torch_varlen(problem: Problem, tensors: Tensors, dropout: float, kernel: str) -> Bound:
    """The packed kernels behind torch's SDPA, called by their ATen names: FlashAttention-2, memory-efficient, cuDNN."""
    q, k, v, borders, longest = *tensors.values(), problem.options["max_seqlen"]
    cuts = borders, borders, longest, longest
    if kernel == "flash":
        return Bound(tensors, lambda: torch.ops.aten._flash_attention_forward(q, k, v, *cuts, dropout, False, False)[0])
    if kernel == "cudnn":
        return Bound(tensors, lambda: torch.ops.aten._cudnn_attention_forward(q, k, v, None, *cuts, True, dropout)[0])
    q, k, v = (x[None] for x in (q, k, v))
    call = torch.ops.aten._efficient_attention_forward
    return Bound(tensors, lambda: call(q, k, v, None, *cuts, dropout, 0, True)[0][0])


def transformer_engine(problem: Problem, tensors: Tensors, dropout: float) -> Bound:
    from transformer_engine.pytorch import DotProductAttention

    q, k, v, borders, longest = *tensors.values(), problem.options["max_seqlen"]
    attend = DotProductAttention(
        q.shape[1], q.shape[2], attention_dropout=dropout, qkv_format="thd", attn_mask_type="padding"
    )
    names = ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")
    cuts = dict(zip(names, (borders, borders, longest, longest), strict=True))
    return Bound(tensors, lambda: attend(q, k, v, **cuts).view(q.shape))


def liger(problem: Problem, tensors: Tensors, dropout: float) -> Bound:
    from liger_kernel.transformers import functional

    if problem.op == "linear_cross_entropy":
        hidden, weight, bias, labels = tensors.values()
        return Bound(tensors, lambda: functional.liger_fused_linear_cross_entropy(hidden, weight, labels, bias))
    if dropout or "residual" in tensors:
        raise Refused("liger: its LayerNorm neither drops nor adds")
    return Bound(tensors, lambda: functional.liger_layer_norm(*tensors.values(), 1e-12))


HALF_ONLY = (  # on a GPU
    "sdpa flash", "sdpa cudnn", "torch flash varlen", "torch cudnn varlen", "varlen_attn", "flash-attn",
    "transformer engine",
)  # fmt: skip
GPU_ONLY = (
    *(name for name in HALF_ONLY if name != "sdpa flash"), "sdpa efficient", "torch efficient varlen", "liger",
)  # fmt: skip
SDPA = {
    "sdpa flash": partial(sdpa, backend="FLASH_ATTENTION"),
    "sdpa efficient": partial(sdpa, backend="EFFICIENT_ATTENTION"),
    "sdpa cudnn": partial(sdpa, backend="CUDNN_ATTENTION"),
    "sdpa math": partial(sdpa, backend="MATH"),
}
ATTENTIONS = SDPA | {
    "torch flash varlen": partial(torch_varlen, kernel="flash"),
    "torch efficient varlen": partial(torch_varlen, kernel="efficient"),
    "torch cudnn varlen": partial(torch_varlen, kernel="cudnn"),
    "flex_attention": flex_attention, "varlen_attn": varlen_attention, "flash-attn": flash_attention,
    "transformer engine": transformer_engine,
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
    """What every provider of a case is judged by, output and gradients without dropout: a small problem, uneven and in
    float32 too, so that a wrong formula is seen; and the very problem that is timed, in its own precision.

    The truth is the reference in float64; in lower precision a provider may be so far from it as torch's own ops are.
    """

    def __init__(self, case: OpCase, dtype: torch.dtype, device: str, timed: Problem):
        self.dtype, self.once = dtype, Once()  # both directions are judged together
        self.small = Judge(case.make(gate_sizes(case), dtype.itemsize, Draw(device, seed=1)), dtype)
        self.timed = Judge(timed, dtype)

    def check(self, name: str, provider: Provider, half_only: bool) -> Tensor:
        """The output of the timed problem without dropout.

        Raises:
            Refused: the provider differs; in lower precision its float32 twin is judged first.
        """
        if self.dtype != torch.float32 and self.small.problem.wanted and not half_only:
            self.small(f"{name} in float32", provider, torch.float32)
        self.small(name, provider, self.dtype)
        return self.timed(f"{name}, as timed", provider, self.dtype)["output"]


class Judge:
    """A problem and its true results, made when they are first asked for."""

    def __init__(self, problem: Problem, dtype: torch.dtype):
        self.problem, self.dtype, self.once = problem, dtype, Once()

    def __call__(self, name: str, provider: Provider, dtype: torch.dtype) -> Tensors:
        truth = self.once("truth", lambda: by_sequences(self.problem, _reference, torch.float64))
        same = None
        if dtype != torch.float32 and self.problem.wanted:
            same = self.once("same", lambda: by_sequences(self.problem, torch_eager, dtype))
            if same["output"].ndim == 0:
                same["output"] = same["output"].to(dtype)  # what a loss was computed in
        found = outcome(self.problem, provider, dtype)
        judge(name, found, truth, same)
        return found


def _reference(problem, tensors, dropout):
    return Bound(tensors, lambda: problem.call(reference, tensors))


def outcome(problem: Problem, provider: Provider, dtype: torch.dtype, rows: slice = slice(None)) -> Tensors:
    """Output and gradients, in the packed layout; `rows` of the whole problem are those that this one is a part of."""
    tensors = problem.cast(dtype)
    if problem.op == "lamb_step":
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    bound = provider(problem, tensors, 0.0)
    out = bound.run()
    found = {"output": bound.outward(out.detach())}
    if problem.wanted:
        packed = found["output"]
        slope = packed * 0 + 1
        if packed.ndim:  # the same for a row, whatever part of the problem it is seen in
            width = packed[0].numel()
            start = (rows.start or 0) * width
            slope = torch.arange(start, start + packed.numel(), device=packed.device).double()
            slope = (slope * 2.399963).sin().view(packed.shape).to(out.dtype)
        leaves = [bound.leaves[name] for name in problem.wanted]
        gradients = torch.autograd.grad(out, leaves, bound.inward(slope))
        # attention's leaves have the output's layout, all others the problem's own
        found |= {f"grad {name}": bound.outward(d) for name, d in zip(problem.wanted, gradients, strict=True)}
    return found


def by_sequences(problem: Problem, provider: Provider, dtype: torch.dtype) -> Tensors:
    """`outcome`; that of attention from a few sequences at a time, because these providers keep all scores."""
    if problem.op != "attention":
        return outcome(problem, provider, dtype)
    borders = problem.tensors["cu_seqlens"]
    cuts, longest = borders.tolist(), problem.options["max_seqlen"]
    count = max(SCORES // (longest**2 * problem.tensors["q"].shape[1]), 1)
    parts = []
    for first in range(0, len(cuts) - 1, count):
        last = min(first + count, len(cuts) - 1)
        rows = slice(cuts[first], cuts[last])
        tensors = {name: problem.tensors[name][rows] for name in "qkv"}
        tensors["cu_seqlens"] = borders[first : last + 1] - borders[first]
        parts.append(outcome(replace(problem, tensors=tensors), provider, dtype, rows))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def judge_dropout(name: str, dropped: Tensor, exact: Tensor) -> None:
    """Raise Refused where dropout leaves the output as it is without: 0.1 moves it by about a third of its size."""
    moved = float((dropped.double() - exact.double()).norm() / exact.double().norm())
    if not moved > 0.05:
        raise Refused(f"{name}: dropout moves the output by {moved:.1%} of its size: it does not act")


def build(name: str, provider: Provider, problem: Problem, gate: Gate, direction: str) -> Callable[[], object]:
    """Judge a provider, then its call: forward as in training, backward alone, or both."""
    on_gpu = next(iter(problem.tensors.values())).is_cuda
    if not on_gpu and name in GPU_ONLY:
        raise Refused(f"{name}: needs a GPU")
    # a backward that is captured must have had its forward on the stream that captures
    with alone_on_side_stream() if on_gpu else nullcontext():
        exact = gate.once(name, lambda: gate.check(name, provider, on_gpu and name in HALF_ONLY))
        bound = provider(problem, problem.cast(gate.dtype), problem.dropout)
        if problem.dropout:
            judge_dropout(name, bound.outward(bound.run().detach()), exact)
        leaves = [bound.leaves[wanted] for wanted in problem.wanted]
        if direction == "fwd":
            return bound.run
        out = bound.run()
        slope = torch.randn_like(out) if out.ndim else torch.ones_like(out)
    if direction == BOTH:
        return lambda: torch.autograd.grad(bound.run(), leaves, slope)
    return lambda: torch.autograd.grad(out, leaves, slope, retain_graph=True)


def warm(case: OpCase, dtype: torch.dtype, tokens: int, device: str) -> None:
    """Every call that minibert makes in a case, for its compilations: as the gate makes it, and as it is timed."""
    small, drawn = case.make(gate_sizes(case), dtype.itemsize, Draw(device)), sizes_of(case, tokens)
    for problem, precision, dropout in (
        (small, torch.float32, False), (small, dtype, False),
        (case.make(drawn, dtype.itemsize, Draw(device)), dtype, False),
        (case.make(drawn, dtype.itemsize, Draw(device)), dtype, True),
    ):  # fmt: skip
        bound = minibert(problem, problem.cast(precision), problem.dropout * dropout, "triton")
        out = bound.run()
        if problem.wanted:
            torch.autograd.grad(out, [bound.leaves[name] for name in problem.wanted], torch.zeros_like(out))


def baseline_of(case: OpCase, device: str, dtype: torch.dtype) -> str:
    if case.op != "attention":
        return "torch eager"
    # FlashAttention-2 where its packed form runs; SDPA's takes no mask on a GPU
    if device == "cuda" and case.fill != "full" and dtype != torch.float32:
        return "torch flash varlen"
    return "sdpa flash" if case.fill == "full" or device == "cpu" else "sdpa efficient"


def cases(
    *, table: Sequence[OpCase] = TABLE, dtypes: Sequence[torch.dtype], tokens: int, device: str = "cpu",
    backend: str = "auto", only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Case]:  # fmt: skip
    """A case for every line of the table, precision and direction."""
    for dtype in dtypes:
        for case in table:
            problem = case.make(sizes_of(case, tokens), dtype.itemsize, Draw(device))
            gate = Gate(case, dtype, device, problem)
            for direction, work in problem.works.items():
                yield Case(
                    suite="kernels", name=f"{case.op} {case.name}",
                    labels={"dtype": str(dtype).removeprefix("torch."), "direction": direction},
                    work=work, baseline=baseline_of(case, device, dtype), clock=on_device,
                    providers={
                        name: partial(build, name, provider, problem, gate, direction)
                        for name, provider in providers_of(case.op, backend).items() if only(name)
                    },
                )  # fmt: skip
