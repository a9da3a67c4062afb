"""What the hardware allows: the occupancy of a compiled kernel, and its time on a named GPU.

A time is the largest of what each limit alone would take, as if nothing else were in the way:

    memory       bytes over COPY_SHARE of the data sheet's bandwidth, which a copy reaches
    matrix       FLOPs of matrix products over MATRIX_SHARE of the dense bf16 peak (`matrix_share`)
    issue        instructions of all warps over ISSUE_SHARE of the slots: four a clock and multiprocessor
    exponential  instructions of the special function units, 16 threads a clock and multiprocessor; of a kernel whose
                 instructions are not known, an exponential a score
    latency      LAUNCH, which no kernel is shorter than

Instructions are those of the compiled code (`slots`). The shares are assumptions: a time says what would bind, and is
no measurement.
"""

import re
from dataclasses import dataclass

from . import lamb
from .launch import cross_entropy_plan

COPY_SHARE, MATRIX_SHARE, ISSUE_SHARE = 0.9, 0.7, 0.8
SCHEDULERS, EXPONENTIALS, WARP = 4, 16, 32  # of a multiprocessor: issues and threads' exponentials a clock
LAUNCH = 3e-6
TOKENS, HEADS, LENGTH = 16384, 12, 512  # what a kernel's time is predicted for; short forms have their own length
LABELLED = 0.15  # share of the tokens that have a label


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


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What a unit takes of all warps together: instructions, and those of the special function unit."""

    instructions: float
    mufu: float


def slots(work: Work, code: dict, loops: list[dict], padding: float = 1.0) -> Slots | None:
    """What a unit of work takes of the compiled code, or None where the code does not say how much a trip does.

    How often a loop runs follows from what a trip does, and what there is to do: FLOPs of matrix products, or else
    bytes of global memory. Instructions outside of the loops are counted only of a kernel that has none.

    Args:
        code, loops: `sass.cost` of all instructions, and of a trip through each innermost loop.
        padding: elements of the tiles over those that exist.
    """
    kind, lanes = ("flops", 1) if work.flops else ("bytes", WARP)
    pieces = [loop for loop in loops if loop[kind]] or [code]
    if work.flops:  # of two loops over keys, one is for what needs a mask
        pieces = [min(pieces, key=lambda piece: piece["instructions"] / max(piece[kind], 1))]
    done = sum(piece[kind] for piece in pieces) * lanes
    if not done:
        return None
    trips = padding * getattr(work, kind) / done
    return Slots(
        instructions=trips * sum(piece["instructions"] for piece in pieces),
        mufu=trips * sum(piece["mufu"] for piece in pieces),
    )


def seconds(
    work: Work, gpu: GPU, units: int = 1, launch: float = 0.0, matrix_share: float = MATRIX_SHARE,
    slots: Slots | None = None,
):  # fmt: skip
    """The time of so many units, and the limit that binds."""
    clocks = gpu.multiprocessors * gpu.clock
    exponentials = slots.mufu * WARP if slots else work.exponentials
    limits = {
        "memory": units * work.bytes / (COPY_SHARE * gpu.bandwidth),
        "matrix": units * work.flops / (matrix_share * gpu.matrix),
        "issue": units * slots.instructions / (ISSUE_SHARE * SCHEDULERS * clocks) if slots else 0.0,
        "exponential": units * exponentials / (EXPONENTIALS * clocks),
        "latency": launch,
    }
    bound = max(limits, key=limits.get)
    return limits[bound], bound


# of each attention kernel: matrix products, and activation rows of 2 · d bytes a head of queries and a K/V head
ATTENTION = {
    "fwd": (2, 2, 2), "dq": (3, 4, 2), "dkdv": (4, 2, 4), "dbias": (2, 2, 2), "short fwd": (2, 2, 2),
    "short bwd": (5, 3, 4),
}  # fmt: skip
# bytes an element of a row moved by forward and backward, at the types of the compiled plans
ROW_BYTES = {
    "bias_gelu": (4, 6), "bias_geglu": (6, 10), "bias_swiglu": (6, 10), "dropout_add_norm": (8, 8),
    "embed_norm": (6, 10),
}  # fmt: skip


def kernel_work(op: str, direction: str, plan: str, length: int = LENGTH, heads: int = HEADS) -> Work | None:
    """What a token, labelled row or parameter costs one kernel at least; None where the data decides.

    Args:
        length: of the sequences of a long form; a short form has its own. heads: of attention.
    """
    number = {name: int(n) for n, name in re.findall(r"(\d+) (columns|tokens)", plan)}
    number |= {name: int(n) for name, n in re.findall(r"(d=|V=|short |group )(\d+)", plan)}
    if op == "attention":
        form = "short " + direction if "short " in number else direction if direction == "fwd" else plan.split()[0]
        products, rows, kv_rows = ATTENTION[form]
        scores, d = heads * number.get("short ", length), number["d="]
        rows = heads * rows + heads / number.get("group ", 1) * kv_rows
        return Work(bytes=rows * 2 * d, flops=2 * products * scores * d, exponentials=scores)
    if op == "linear_cross_entropy":
        gradient, vocab = "gradient" in plan, number["V="]
        again = gradient and cross_entropy_plan(vocab).block < vocab  # a wide row is read twice
        return Work(
            bytes=2 * (1 + gradient + again) * vocab, exponentials=(1 + again) * vocab, unit="labelled row",
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
    if op == "segment_sum" and not plan.startswith("crossing"):
        tables, key = (3, 2) if "three tables" in plan else (1, 4)
        # written are as many rows as there are keys: not counted
        row = 0 if plan.startswith("keys") else (2 if "bf16" in plan else 4) * number["columns"]
        return Work(bytes=tables * (8 + key + row))
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


def model_flops(model: Model, length: int) -> float:
    """FLOPs a token that a training step needs: each product once forward and twice backward, and no more."""
    layer = 2 * (4 * model.hidden**2 + 2 * model.hidden * model.inner) + 4 * length * model.hidden
    head = 2 * LABELLED * (model.hidden**2 + model.hidden * model.vocab)
    return 3 * (model.layers * layer + head)
