"""What the hardware allows: the occupancy of a compiled kernel, its time on a named GPU, and that of a training step.

A time is the largest of what each limit alone would take, as if nothing else were in the way:

    memory       bytes over COPY_SHARE of the data sheet's bandwidth, which a copy reaches
    matrix       FLOPs of matrix products over MATRIX_SHARE of the dense bf16 peak (`matrix_share`)
    exponential  an exponential a score, 16 a clock and multiprocessor
    latency      LAUNCH, which no kernel is shorter than

The shares are assumptions, and vector instructions (Philox, the erf) are not counted: a time says what would bind, and
is no measurement. A step is a sum over ops, without gaps between launches, as from a CUDA graph.
"""

import re
from dataclasses import dataclass

from . import lamb

COPY_SHARE, MATRIX_SHARE = 0.9, 0.7
EXPONENTIALS = 16  # a clock and multiprocessor
LAUNCH = 3e-6
TOKENS, HEADS, LENGTH = 16384, 12, 512  # what a kernel's time is predicted for; short forms have their own length
STEP_TOKENS, LABELLED = 65536, 0.15  # of a step: tokens; and the share of tokens with a label
LENGTHS = (128, 512)  # of its sequences: those of BERT's two phases


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """What one has for its resident programs: warps, programs, bytes of shared memory, columns of tensor memory."""

    warps: int = 64
    blocks: int = 32
    shared: int
    tensor_columns: int = 0
    registers: int = 65536


# CUDA C++ Programming Guide, technical specifications per compute capability
MULTIPROCESSORS = {
    80: Multiprocessor(shared=164 << 10),
    89: Multiprocessor(shared=100 << 10, warps=48, blocks=24),
    90: Multiprocessor(shared=228 << 10),
    100: Multiprocessor(shared=228 << 10, tensor_columns=512),
    120: Multiprocessor(shared=100 << 10, warps=48, blocks=24),
}


def occupancy(
    capability: int, num_warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> tuple[float, str]:
    """Resident warps over the most there can be, and what keeps them from being more.

    Registers are handed out to warps by 256, from a quarter of the file each; shared memory by 128 bytes, with 1 KiB a
    program for the driver. A persistent grid may launch fewer programs than would fit.
    """
    sm, per_warp = MULTIPROCESSORS[capability], _round_up(32 * registers, 256)
    programs = {
        "warps": sm.warps // num_warps,
        "registers": 4 * (sm.registers // 4 // per_warp) // num_warps,
        "shared memory": sm.shared // _round_up(shared_bytes + 1024, 128),
        "blocks": sm.blocks,
        "tensor memory": sm.tensor_columns // tensor_columns if tensor_columns else sm.blocks,
    }
    limiter = min(programs, key=programs.get)
    return programs[limiter] * num_warps / sm.warps, limiter


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class GPU:
    """capability: e.g. 89; matrix: dense bf16 FLOP/s; bandwidth: bytes/s; clock: Hz."""

    capability: int
    multiprocessors: int
    matrix: float
    bandwidth: float
    clock: float

    @property
    def arch(self) -> int:
        """Of the compiled code that stands for its own: Ada, 89, has the launch plans of 80."""
        return 80 if self.capability == 89 else self.capability


# NVIDIA's data sheets and architecture white papers; matrix peaks are dense, with float32 accumulation, at this clock
GPUS = {
    "a100": GPU(capability=80, multiprocessors=108, matrix=312e12, bandwidth=2.039e12, clock=1.41e9),  # SXM, 80 GB
    "rtx4090": GPU(capability=89, multiprocessors=128, matrix=165.2e12, bandwidth=1.008e12, clock=2.52e9),
    "l40s": GPU(capability=89, multiprocessors=142, matrix=362e12, bandwidth=0.864e12, clock=2.52e9),
    "h100": GPU(capability=90, multiprocessors=132, matrix=989.4e12, bandwidth=3.35e12, clock=1.83e9),  # SXM
    "h100-pcie": GPU(capability=90, multiprocessors=114, matrix=756e12, bandwidth=2.0e12, clock=1.62e9),
    "h200": GPU(capability=90, multiprocessors=132, matrix=989.4e12, bandwidth=4.8e12, clock=1.83e9),  # SXM
    "b200": GPU(capability=100, multiprocessors=148, matrix=2250e12, bandwidth=8.0e12, clock=1.85e9),
    "rtx5090": GPU(capability=120, multiprocessors=170, matrix=209.5e12, bandwidth=1.792e12, clock=2.41e9),
}
# which of an architecture a time is predicted for where none is named
TYPICAL = {80: "a100", 90: "h200", 100: "b200", 120: "rtx5090"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a unit costs: bytes moved, FLOPs of matrix products, exponentials; and how many units a batch has."""

    bytes: float
    flops: float = 0.0
    exponentials: float = 0.0
    unit: str = "token"
    units: int = TOKENS


def seconds(work: Work, gpu: GPU, units: int = 1, launch: float = 0.0, matrix_share: float = MATRIX_SHARE):
    """The time of so many units, and the limit that binds."""
    limits = {
        "memory": units * work.bytes / (COPY_SHARE * gpu.bandwidth),
        "matrix": units * work.flops / (matrix_share * gpu.matrix),
        "exponential": units * work.exponentials / (EXPONENTIALS * gpu.multiprocessors * gpu.clock),
        "latency": launch,
    }
    bound = max(limits, key=limits.get)
    return limits[bound], bound


# matrix products and activation rows of 2 · d bytes of each attention kernel
ATTENTION = {"fwd": (2, 4), "dq": (3, 6), "dkdv": (4, 6), "dbias": (2, 4), "short fwd": (2, 4), "short bwd": (5, 7)}
# bytes an element of a row moved by forward and backward, at the types of the compiled plans
ROW_BYTES = {
    "bias_gelu": (4, 6), "bias_geglu": (6, 10), "bias_swiglu": (6, 10), "dropout_add_norm": (8, 8),
    "embed_norm": (6, 10),
}  # fmt: skip


def kernel_work(op: str, direction: str, plan: str) -> Work | None:
    """What a token, labelled row or parameter costs one kernel at least; None where the data decides."""
    number = {name: int(n) for n, name in re.findall(r"(\d+) (columns|tokens)", plan)}
    number |= {name: int(n) for name, n in re.findall(r"(d=|V=|short )(\d+)", plan)}
    if op == "attention":
        form = "short " + direction if "short " in number else direction if direction == "fwd" else plan.split()[0]
        products, rows = ATTENTION[form]
        scores, d = HEADS * number.get("short ", LENGTH), number["d="]
        return Work(bytes=HEADS * rows * 2 * d, flops=2 * products * scores * d, exponentials=scores)
    if op == "linear_cross_entropy":
        gradient, vocab = "gradient" in plan, number["V="]
        passes = 1 if not gradient else 2 if vocab <= 16384 else 3  # a wide row is read twice
        return Work(
            bytes=2 * passes * vocab, exponentials=(1 + gradient) * vocab, unit="labelled row",
            units=round(LABELLED * TOKENS),
        )  # fmt: skip
    if op == "lamb_step":
        dtype, part = plan.split(" ", 1)
        size = lamb.least_bytes(2 if dtype == "bf16" else 4, part)
        return Work(bytes=size, unit="parameter", units=MODELS["bert-base"].parameters)
    if op == "mlm_mask":
        return Work(bytes=3 * 8)
    if op == "pack":  # beside a row, where it comes from; one column is of int64 ids
        return Work(bytes=8 + (16 if number["columns"] == 1 else 4 * number["columns"]))
    if op == "segment_sum" and plan.startswith("runs"):  # written are as many rows as there are keys: not counted
        return Work(bytes=16 + (2 if plan.endswith("bf16") else 4) * number["columns"])
    if op in ROW_BYTES:
        width = ROW_BYTES[op][direction == "bwd"]
        if op == "dropout_add_norm" and "dropout" not in plan and direction == "bwd":
            width = 6  # the gradients of x and residual are one
        return Work(bytes=width * number["columns"])
    return None


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of an encoder with BERT's heads."""

    layers: int
    hidden: int
    heads: int
    inner: int
    vocab: int = 30522
    positions: int = 512

    @property
    def parameters(self) -> int:
        layer = 4 * self.hidden**2 + 2 * self.hidden * self.inner + 9 * self.hidden + self.inner
        return self.layers * layer + (self.vocab + self.positions + 2 * self.hidden) * self.hidden


MODELS = {
    "bert-base": Model(layers=12, hidden=768, heads=12, inner=3072),
    "bert-large": Model(layers=24, hidden=1024, heads=16, inner=4096),
}
VARIANTS = ("minibert", "torch sdpa", "torch eager")


def model_flops(model: Model, length: int) -> float:
    """FLOPs a token that a training step needs: each product once forward and twice backward, and no more."""
    layer = 2 * (4 * model.hidden**2 + 2 * model.hidden * model.inner) + 4 * length * model.hidden
    head = 2 * LABELLED * (model.hidden**2 + model.hidden * model.vocab)
    return 3 * (model.layers * layer + head)


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
    # forward and two products backward read and write an input and an output each
    sizes = ((d, 3 * d), (d, d), (d, model.inner), (model.inner, d))
    work["matrix products"] = Work(
        bytes=model.layers * 3 * sum(2 * (n + m) for n, m in sizes),
        flops=model.layers * 3 * sum(2 * n * m for n, m in sizes),
    )
    work["products of the head"] = Work(
        bytes=LABELLED * 3 * 2 * (3 * d + model.vocab), flops=LABELLED * 6 * (d * d + d * model.vocab)
    )
    # logits: read for the sum and again for the gradient, which is written over them; torch's log_softmax is float32
    work["loss"] = Work(bytes=LABELLED * model.vocab * (6 if fused else 36))
    work["embeddings"] = Work(bytes=2 * d * (14 if fused else 30))
    work["optimizer"] = Work(bytes=lamb.least_bytes(4) * model.parameters / tokens)
    return work


def _fused_rows(f):
    return {
        "dropout + add + norm": 2 * 8, "bias + GELU": 5 * f, "sums of residual gradients": 2 * 3, "bias gradients": 5,
    }  # fmt: skip


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


def step_rows(models, lengths, gpus, tokens: int = STEP_TOKENS, matrix_share: float = MATRIX_SHARE) -> list[dict]:
    """One row a model, length, variant and GPU: bytes and FLOPs a token by op, microseconds of the step, MFU."""
    found = []
    for name in models:
        for length in lengths:
            for variant in VARIANTS:
                work = step_work(MODELS[name], length, variant, tokens)
                for gpu in gpus:
                    times = {op: seconds(w, GPUS[gpu], matrix_share=matrix_share) for op, w in work.items()}
                    total = sum(time for time, _ in times.values())
                    ops = {
                        op: {"bytes": w.bytes, "flops": w.flops, "share": time / total, "bound": bound}
                        for (op, w), (time, bound) in zip(work.items(), times.values(), strict=True)
                    }
                    mfu = model_flops(MODELS[name], length) / (total * GPUS[gpu].matrix)
                    row = {"model": name, "length": length, "variant": variant, "gpu": gpu, "tokens": tokens}
                    found.append(row | {"ops": ops, "step_us": 1e6 * total * tokens, "mfu": mfu})
    return found


def step_text(rows: list[dict]) -> str:
    """Bytes and FLOPs by op, then time and MFU by GPU, for each model and length."""
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
    return "\n".join(lines)


def _cost(num_bytes, flops):
    return f"{num_bytes / 1e3:.0f} / {flops / 1e6:.0f}" if flops else f"{num_bytes / 1e3:.0f}"
