"""A training step, predicted: bytes, FLOPs, time and MFU of minibert's and of torch's ops on a named GPU.

A step is a sum over ops, each as long as the limit that binds it (`roofline`), without gaps between launches, as from a
CUDA graph. Where minibert's kernels are compiled beside it, their instructions count; torch's ops and what torch does
within minibert's step are known by their bytes and FLOPs alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from . import lamb
from .roofline import GPUS, LABELLED, MATRIX_SHARE, MODELS, Model, Slots, Work, kernel_work, model_flops, seconds

STEP_TOKENS = 65536
LENGTHS = (128, 512)  # of the sequences: those of BERT's two phases
FUSED_NORM, FUSED_GELU = "dropout + add + norm", "bias + GELU"
VARIANTS = ("minibert", "torch sdpa", "torch eager")


def step_work(model: Model, length: int, variant: str, tokens: int = STEP_TOKENS) -> dict[str, Work]:
    """What a token of a training step in bf16 costs, by op, over all layers.

    Bytes are activation rows of 2 · D, each input of an op read and each output written once; a dropout mask in memory
    is half a row. The variants have the same modules, the same matrix products and the same loss over labelled rows;
    "torch sdpa" runs dropout, add, norm and GELU as ops of their own, "torch eager" the attention too. AdamW is one
    fused pass over float32 states.
    """
    d, f, fused = model.hidden, model.inner / model.hidden, variant == "minibert"
    rows = _fused_rows(f) if fused else _unfused_rows(f)
    work = {op: Work(bytes=model.layers * 2 * d * n) for op, n in rows.items()}
    work["attention"] = _attention_work(model, length, variant)
    # forward and two products backward read and write an input and an output each; where x is a residual too, the
    # product that makes its gradient begins with the residual's
    sizes = ((d, 3 * d), (d, d), (d, model.inner), (model.inner, d))
    work["matrix products"] = Work(
        bytes=model.layers * (3 * sum(2 * (n + m) for n, m in sizes) + (2 * 2 * d if fused else 0)),
        flops=model.layers * 3 * sum(2 * n * m for n, m in sizes),
    )
    work["products of the head"] = Work(
        bytes=LABELLED * 3 * 2 * (3 * d + model.vocab), flops=LABELLED * 6 * (d * d + d * model.vocab)
    )
    # logits: read once, and the gradient written over them; torch's log_softmax is float32
    work["loss"] = Work(bytes=LABELLED * model.vocab * (4 if fused else 36))
    work["embeddings"] = Work(bytes=2 * d * (14 if fused else 30))
    work["optimizer"] = Work(bytes=lamb.least_bytes(4) * model.parameters / tokens)
    return work


def _fused_rows(f):
    return {FUSED_NORM: 2 * 8, FUSED_GELU: 5 * f, "bias gradients": 5}


def _unfused_rows(f):
    # a norm's backward reads its two inputs again for the gradients of its parameters
    return {
        "dropout": 2 * 5, "add": 2 * 3, "norm": 2 * 7, "GELU": 5 * f, "sums of residual gradients": 2 * 3,
        "bias gradients": 5 + f,
    }  # fmt: skip


def _attention_work(model, length, variant):
    scores = model.heads * length
    short = variant == "minibert" and length <= 128
    rows = 4 + (7 if short else 12)
    work = {"products": 2 + (5 if short else 7), "exponentials": 2 if short else 3}
    if variant == "torch eager":
        # scores are written and read by scale, softmax, dropout and both products; q, k, v and out are transposed
        rows += 4 + 20 * scores / model.hidden
        work = {"products": 6, "exponentials": 1}
    return Work(
        bytes=model.layers * rows * 2 * model.hidden,
        flops=model.layers * work["products"] * 2 * length * model.hidden,
        exponentials=model.layers * work["exponentials"] * scores,
    )


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One of minibert's kernels in a step: how often it runs, what a token costs it, and what the compiler made of it.

    row: of `xray`, or None where it was not compiled. slots: of a token, None likewise.
    """

    op: str
    name: str
    launches: int
    work: Work
    row: object = None
    slots: Slots | None = None


def step_kernels(model: Model, length: int, arch: int, rows: Sequence = ()) -> list[Kernel]:
    """The kernels of a layer's forward and backward, with the rows of those that `xray` compiled.

    Args:
        rows: `xray.Row`s; of the short form of attention those plans are taken that the architecture has.
    """
    compiled = {(row.op, row.direction, row.plan): row for row in rows if row.arch == arch}
    size, short = model.hidden // model.heads, f"short 128 d={model.hidden // model.heads} dropout"

    def attention(direction, long):
        known = ("attention", direction, short) in compiled or not rows
        return [short] if length <= 128 and known else long

    plans = [("attention", "attention", "fwd", plan) for plan in attention("fwd", [f"d={size} dropout schedule"])]
    long = [f"dq d={size} dropout schedule", f"dkdv d={size} dropout schedule"]
    plans += [("attention", "attention", "bwd", plan) for plan in attention("bwd", long)]
    for direction in ("fwd", "bwd"):
        norm, gelu = f"{model.hidden} columns, dropout", f"{model.inner} columns"
        plans += [(FUSED_NORM, "dropout_add_norm", direction, norm)] * 2
        plans += [(FUSED_GELU, "bias_gelu", direction, gelu)]
    found = []
    for step_op, op, direction, plan in dict.fromkeys(plans):
        row = compiled.get((op, direction, plan))
        work = kernel_work(op, direction, plan, length, model.heads)
        found.append(
            Kernel(
                op=step_op, name=f"{op} {direction} {plan}", work=work, row=row, slots=row and row.slots(work),
                launches=model.layers * plans.count((step_op, op, direction, plan)),
            )
        )  # fmt: skip
    return found


def step_rows(
    models, lengths, gpus, tokens: int = STEP_TOKENS, matrix_share: float = MATRIX_SHARE, rows: Sequence = ()
) -> list[dict]:
    """One row a model, length, variant and GPU: bytes and FLOPs a token by op, microseconds of the step, MFU.

    Args:
        rows: of `xray`, whose instructions count for minibert's kernels.
    """
    found = []
    for name in models:
        for length in lengths:
            for variant in VARIANTS:
                work = step_work(MODELS[name], length, variant, tokens)
                for gpu in gpus:
                    kernels = step_kernels(MODELS[name], length, GPUS[gpu].arch, rows) if variant == "minibert" else []
                    found.append(
                        {"model": name, "length": length, "variant": variant, "gpu": gpu, "tokens": tokens}
                        | _predicted(MODELS[name], length, work, GPUS[gpu], tokens, matrix_share, kernels)
                    )
    return found


def _predicted(model, length, work, gpu, tokens, matrix_share, kernels):
    """Ops, kernels, time and MFU of a step; the kernels' times take the place of their ops'."""
    times = {op: seconds(w, gpu, matrix_share=matrix_share) for op, w in work.items()}
    lines = []
    for k in kernels:
        time, bound = seconds(k.work, gpu, matrix_share=matrix_share, slots=k.slots)
        lines.append({
            "kernel": k.name, "op": k.op, "launches": k.launches, "us": 1e6 * time * tokens * k.launches,
            "bound": bound, "bytes": k.work.bytes, "flops": k.work.flops,
            "instructions": k.slots.instructions if k.slots else None,
            "loop": k.row and k.row.loop_instructions, "registers": k.row and k.row.registers,
        })  # fmt: skip
    for op in dict.fromkeys(line["op"] for line in lines):
        own = [line for line in lines if line["op"] == op]
        slowest = max(own, key=lambda line: line["us"])
        times[op] = sum(line["us"] for line in own) / 1e6 / tokens, slowest["bound"]
    total = sum(time for time, _ in times.values())
    ops = {
        op: {"bytes": w.bytes, "flops": w.flops, "share": times[op][0] / total, "bound": times[op][1]}
        for op, w in work.items()
    }
    mfu = model_flops(model, length) / (total * gpu.matrix)
    return {"ops": ops, "kernels": lines, "step_us": 1e6 * total * tokens, "mfu": mfu}


def step_text(rows: list[dict]) -> str:
    """Bytes and FLOPs by op, then time and MFU by GPU and where minibert's time goes, for each model and length."""
    lines = []
    for model, length in dict.fromkeys((row["model"], row["length"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["length"]) == (model, length)]
        by_variant = {row["variant"]: row["ops"] for row in chosen}
        lines += ["", f"{model}, {length} tokens a sequence, a training step: kB and MFLOP a token"]
        lines.append(f"  {'':28}" + "".join(f"{variant:>18}" for variant in by_variant))
        for op in dict.fromkeys(op for ops in by_variant.values() for op in ops):
            cells = (ops.get(op) for ops in by_variant.values())
            lines.append(f"  {op:28}" + "".join(f"{_cost(c['bytes'], c['flops']) if c else '–':>18}" for c in cells))
        totals = ([sum(c[name] for c in ops.values()) for name in ("bytes", "flops")] for ops in by_variant.values())
        lines.append(f"  {'sum':28}" + "".join(f"{_cost(*total):>18}" for total in totals))
        for gpu in dict.fromkeys(row["gpu"] for row in chosen):
            times = [f"{r['step_us'] / 1e3:.0f} ms, {r['mfu']:.0%}" for r in chosen if r["gpu"] == gpu]
            label = f"{gpu}: {chosen[0]['tokens']} tokens, MFU"
            lines.append(f"  {label:28}" + "".join(f"{time:>18}" for time in times))
        lines += [line for row in chosen if row["kernels"] for line in _kernel_lines(row)]
    return "\n".join(lines)


def _cost(num_bytes, flops):
    return f"{num_bytes / 1e3:.0f} / {flops / 1e6:.0f}" if flops else f"{num_bytes / 1e3:.0f}"


def _kernel_lines(row):
    """Where the time of minibert's step goes on one GPU: its kernels, then the rest by op."""
    share = f"{row['step_us'] / 1e3:.1f} ms, MFU {row['mfu']:.1%}"
    lines = ["", f"  {row['gpu']}, minibert: {share}; instructions of a warp a token, and of a trip through the loop"]
    lines.append(f"  {'':42}{'launches':>9}{'regs':>6}{'loop':>6}{'instr':>9}{'kB':>8}{'ms':>8}{'share':>7}  bound")
    for k in row["kernels"]:
        cells = [f"{k['launches']:>9}", *(f"{'-' if k[n] is None else k[n]:>6}" for n in ("registers", "loop"))]
        cells.append(f"{'-' if k['instructions'] is None else format(k['instructions'], '.1f'):>9}")
        cells += [f"{k['bytes'] / 1e3:>8.1f}", f"{k['us'] / 1e3:>8.2f}", f"{k['us'] / row['step_us']:>7.1%}"]
        lines.append(f"  {k['kernel']:42}" + "".join(cells) + f"  {k['bound']}")
    kernels = {k["op"] for k in row["kernels"]}
    for op, found in row["ops"].items():
        if op not in kernels:
            time = found["share"] * row["step_us"] / 1e3
            cells = f"{found['bytes'] / 1e3:>8.1f}{time:>8.2f}{found['share']:>7.1%}"
            lines.append(f"  {op:42}{'':30}{cells}  {found['bound']}")
    return lines
