"""What the compiler made of each kernel of each default launch plan, and what it must cost, without a GPU.

    python -m minibert_kernels.xray [--arch 80 90 100 120] [--only "attention bwd.*d=64"] [--gpu h200] [--json] ...

Triton compiles for a GPU that is not there, and its wheel carries NVIDIA's assembler and disassembler. A row is one
kernel on one architecture; `traffic` counts the bytes of its op beside it, and `roofline` says what the hardware
allows. Where a limit of xray_limits.json is broken, the row is named as an error, and the exit code is 1.

What was compiled and counted is kept in $MINIBERT_XRAY_CACHE, by default minibert/xray in the user's cache folder.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import xray_cache
from ._triton import AVAILABLE, compiler_versions
from .dispatch import interpreting
from .launch import AotCase
from .roofline import GPUS, LAUNCH, MATRIX_SHARE, MODELS, TYPICAL, Slots, Work, kernel_work, occupancy, seconds, slots
from .step import LENGTHS, STEP_TOKENS, step_rows, step_text
from .xray_compile import all_facts, cases, code, facts, launched_cases, matches, options_of, plan_of, source
from .xray_limits import LIMITS, check_pattern, faults, load_json, load_limits
from .xray_text import KEY, diff, markdown, table

ARCHITECTURES = (80, 90, 100, 120)
INSTRUMENTS = ("launches", "matrix", "roofline", "sass", "step")  # and xray's own: files that no kernel depends on
# what is kept of a count
COUNTED = (
    "op", "label", "forward", "forward_over_minimum", "backward", "backward_over_minimum", "saved",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled kernel.

    Args:
        plan: what tells the plans of an op and direction apart.
        arch: e.g. 90 for sm_90.
        registers: a thread. spilled_bytes, stack: likewise. shared_bytes: a program.
        occupancy: resident warps over the most there can be. limiter: what keeps them from being more.
        mma: matrix instructions in the code, by kind.
        wide_share: of the instructions that read or write global memory, those of 16 bytes or more a thread.
        serialized: whether ptxas had each matrix instruction wait for the one before (its message C7515).
        code, loops: the `sass.cost` of all instructions, each run once, and of a trip through each innermost loop.
        padding: elements of the tiles over those that exist.
        bytes_over_minimum: of the op and direction, all kernels together, as `traffic` counts them; None where it does
            not.
        bytes_per_unit, flops_per_unit, intensity: what a `unit` (a token, a labelled row, a parameter) costs, by
            `roofline.kernel_work`, and their quotient; FLOPs of matrix products. None where there is no formula.
        gpu, predicted_us, bound: the time of a batch on a GPU that runs this code, and the limit that binds.
    """

    op: str
    direction: str
    plan: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    stack: int
    shared_bytes: int
    occupancy: float
    limiter: str
    matmul: bool
    mma: dict = field(default_factory=dict)
    wide_share: float | None = None
    serialized: bool = False
    code: dict = field(default_factory=dict)
    loops: list = field(default_factory=list)
    padding: float = 1.0
    bytes_over_minimum: float | None = None
    unit: str | None = None
    bytes_per_unit: float | None = None
    flops_per_unit: float | None = None
    intensity: float | None = None
    gpu: str | None = None
    predicted_us: float | None = None
    bound: str | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {self.plan} sm_{self.arch}"

    @property
    def loop_instructions(self) -> int | None:
        """Of a trip through the longest innermost loop; None where there is none."""
        return max((loop["instructions"] for loop in self.loops), default=None)

    def slots(self, work: Work) -> Slots | None:
        """What a unit of this work takes of the code."""
        return slots(work, self.code, self.loops, self.padding) if self.code else None


def compile_case(case: AotCase, capability: int, **options) -> Row:
    """Compile one case for sm_`capability` and read what came out; options override those of the launch.

    Raises:
        RuntimeError: it does not compile.
    """
    options = options_of(case) | options
    [found] = facts([case], capability, [options])
    if "error" in found:
        raise RuntimeError(found["error"])
    return _row(case, capability, options, found)


def _row(case, capability, options, facts):
    warps, facts = options["num_warps"], dict(facts)
    share, limiter = occupancy(
        capability, warps, facts["registers"], facts["shared_bytes"], facts.pop("tensor_columns")
    )
    work = kernel_work(case.op, case.direction, plan_of(case.label))
    if work:
        facts |= {"unit": work.unit, "bytes_per_unit": work.bytes, "flops_per_unit": work.flops}
        facts |= {"intensity": round(work.flops / work.bytes, 1)}
    return Row(
        op=case.op, direction=case.direction, plan=case.label, kernel=case.fn.__name__, arch=capability,
        num_warps=warps, num_stages=options["num_stages"], matmul=case.matmul, occupancy=round(share, 4),
        limiter=limiter, padding=_padding(case), **facts,
    )  # fmt: skip


def _padding(case):
    """Columns, or dimensions of a head, of a kernel's tiles over those of its plan."""
    values = {case.fn.arg_names[place[0]]: value for place, value in source(case).constants.items() if len(place) == 1}
    columns = re.search(r"(?:d=)?(\d+)( columns)?", plan_of(case.label)) if case.op != "attention" else None
    if case.op == "attention":
        return values["BLOCK_D"] / values["HEAD_SIZE"]
    if columns and columns[2] and isinstance(values.get("BLOCK_N"), int):
        return -(-int(columns[1]) // values["BLOCK_N"]) * values["BLOCK_N"] / int(columns[1])
    return 1.0


def compile_all(
    architectures=ARCHITECTURES, only: str = "", processes: int = 2, failed=None, more: dict | None = None
) -> list[Row]:
    """A row for every case of every architecture, in order; only what is not in the cache is compiled.

    Args:
        more: cases beside those of the ops, by architecture.
        failed: called with what is to be said of a kernel that does not compile, which then has no row.
    Raises:
        RuntimeError: a kernel does not compile, and there is no `failed`.
    """
    more = more or {}
    work = [
        (arch, case) for arch in architectures
        for case in (*cases(arch, only), *(c for c in more.get(arch, ()) if matches(c, only)))
    ]  # fmt: skip
    found = zip(work, all_facts(work, processes, failed), strict=True)
    return [_row(case, arch, options_of(case), facts) for (arch, case), facts in found if facts]


class Counting:
    """What `traffic` counts of some ops, in a process of its own: the interpreter is decided when Triton is imported.

    It runs from construction; `result` waits for it, `stop` does not.
    """

    def __init__(self, ops):
        sources = [
            path for path in sorted(LIMITS.parent.glob("*.py"))
            if path.stem not in INSTRUMENTS and not path.stem.startswith("xray")
        ]  # fmt: skip
        texts = [(path.name, path.read_text(encoding="utf-8")) for path in sources]
        key = xray_cache.digest((compiler_versions()["triton"], texts))
        self.paths = {op: xray_cache.folder() / f"traffic-{op}-{key}.json" for op in ops}
        self.found = {op: xray_cache.read(path, COUNTED) for op, path in self.paths.items()}
        self.missing = [op for op, found in self.found.items() if found is None]
        pattern = rf"^({'|'.join(self.missing)}) "
        command = [sys.executable, "-m", "minibert_kernels.traffic", "--json", "--only", pattern]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        self.process = subprocess.Popen(command, env=environment, **options) if self.missing else None

    def result(self) -> list[dict]:
        if self.process:
            out, err = self.process.communicate()
            if self.process.returncode:
                raise RuntimeError(f"minibert_kernels.traffic failed: {err.strip().splitlines()[-1]}")
            counts = json.loads(out)
            for op in self.missing:
                self.found[op] = [count for count in counts if count["op"] == op]
                xray_cache.write(self.paths[op], self.found[op])
        return [count for found in self.found.values() for count in found]

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def counted_ops(found) -> list[str]:
    """The ops that `traffic` counts for kernels of these ops: one kernel gathers for three."""
    ops = dict.fromkeys(found)
    return [*ops, *(("select_rows", "unpack") if "pack" in ops else ())]


def with_bytes(row: Row, counts: list[dict]) -> Row:
    """The row with the bytes that its op and direction move, over the minimum, if a call of its form was counted."""
    label, name = counted_label(row.op, plan_of(row.plan)), "forward" if row.direction == "fwd" else "backward"
    found = [c for c in counts if (c["op"], c["label"]) == (row.op, label) and c[name]]
    return dataclasses.replace(row, bytes_over_minimum=found[0][f"{name}_over_minimum"] if found else None)


def counted_label(op: str, plan: str) -> str | None:
    """The label of the call in `traffic` that reads and writes what a plan does; None where there is none.

    Widths, head sizes and lengths may differ, and float16 stands for bfloat16; what is read or written may not.
    """
    if op == "attention":
        form = "S=128" if "short" in plan else "S=256 grouped" if "group" in plan else "S=256"
        return None if "bias" in plan else form
    if op == "dropout_add_norm":
        return "dropout" if "dropout" in plan else ""
    if op == "linear_cross_entropy":
        return plan
    if op == "mlm_mask":
        return plan.split(", ", 1)[1]
    if op == "lamb_step":
        return re.sub(" (moments|update)$", "", plan).replace("bf16", "fp16")
    return None if (op, plan) == ("pack", "1 columns") else ""


def with_time(row: Row, gpu: str | None = None, matrix_share: float = MATRIX_SHARE) -> Row:
    """The row with its predicted time and occupancy on the named GPU, or where that runs other code on `TYPICAL`'s."""
    name = gpu if gpu and GPUS[gpu].arch == row.arch else TYPICAL[row.arch]
    found, work = {"gpu": name}, kernel_work(row.op, row.direction, plan_of(row.plan))
    if GPUS[name].capability != row.arch:
        capacity = occupancy(GPUS[name].capability, row.num_warps, row.registers, row.shared_bytes)
        found |= {"occupancy": round(capacity[0], 4), "limiter": capacity[1]}
    if work:
        time, bound = seconds(work, GPUS[name], work.units, LAUNCH, matrix_share, row.slots(work))
        found |= {"predicted_us": round(1e6 * time, 1), "bound": bound}
    return dataclasses.replace(row, **found)


def load_rows(path: str | Path) -> list[dict]:
    """The rows of a --json, which is an object with `rows`, or was a list of them.

    Raises:
        ValueError: the file holds something else.
    """
    found = load_json(path)
    rows = found.get("rows") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(KEY) <= set(row) for row in rows):
        raise ValueError(f"{path} is no output of --json: expected a list of rows with {', '.join(KEY)}")
    return rows


def run(
    *, only: str = "", arch=None, gpu: str | None = None, step=None, lengths=None, tokens: int = STEP_TOKENS,
    matrix_share: float = MATRIX_SHARE, as_json: bool = False, as_markdown: bool = False, diff_with: str | None = None,
    ptx: str | None = None, sass: str | None = None, limits: str | None = None, processes: int | None = None,
    launches=None,
) -> int:  # fmt: skip
    """Print what is asked for, as the flags of `main` say; returns the exit code.

    Args:
        launches: from an architecture to recorded `Launches`, by name: their variants are compiled, too.
    Raises:
        ValueError: an option is wrong, or there is no compiler here.
        RuntimeError: a kernel does not compile, or cannot be counted.
    """
    arch = _check(only, arch, gpu, step, (ptx, sass), lengths, tokens, matrix_share, processes)
    if as_json + as_markdown + (diff_with is not None) > 1:
        raise ValueError("json, markdown and diff exclude each other: one of them is printed")
    if ptx is not None or sass is not None:
        print(code(sass if ptx is None else ptx, arch, "sass" if ptx is None else "ptx"))
        return 0
    limits, old = load_limits(limits or LIMITS), load_rows(diff_with) if diff_with else None
    more = {a: launched_cases(launches(a), a) for a in arch} if launches else {}
    ops = counted_ops(case.op for a in arch for case in (*cases(a), *more.get(a, ())) if matches(case, only))
    if not ops:
        raise ValueError(f"only={only!r} matches no kernel")
    counting = Counting(ops)
    try:
        rows = compile_all(arch, only, processes or os.cpu_count() or 1, more=more)
        counts = counting.result()
    finally:
        counting.stop()
    rows = [with_time(with_bytes(row, counts), gpu, matrix_share) for row in rows]
    found = [dataclasses.asdict(row) for row in rows]
    models = step or (() if only or as_json or as_markdown or diff_with else MODELS)
    gpus = (gpu,) if gpu else [name for name, known in GPUS.items() if known.arch in arch]
    steps = step_rows(models, lengths or LENGTHS, gpus, tokens, matrix_share, rows)
    if as_json:
        versions = {"versions": compiler_versions()}
        print(json.dumps(versions | {"rows": found} | ({"step": steps} if steps else {})))
    elif diff_with:
        kept = [r for r in old if r["arch"] in arch and re.search(only, f"{r['op']} {r['direction']} {r['plan']}")]
        print(diff(kept, found))
    else:
        print(markdown(rows, counts) if as_markdown else table(rows))
        print(step_text(steps), end="\n" if steps else "")
    broken = faults(rows, counts, limits, whole=not only and set(arch) == set(ARCHITECTURES))
    for fault in broken:
        print(f"xray: error: {fault}", file=sys.stderr)
    return 1 if broken else 0


def _check(only, arch, gpu, step, patterns, lengths, tokens, matrix_share, processes):
    """Raise the ValueError of a wrong option; returns the architectures."""
    if not AVAILABLE or interpreting():
        reason = "unset TRITON_INTERPRET" if AVAILABLE else "install triton (Linux only)"
        raise ValueError(f"needs Triton's compiler: {reason}")
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu={gpu!r} is not one of {', '.join(GPUS)}")
    arch = tuple(dict.fromkeys(arch or ([GPUS[gpu].arch] if gpu else ARCHITECTURES)))
    choices = (("arch", arch, ARCHITECTURES), ("step", step or (), MODELS))
    for name, values, known in choices:
        for value in values:
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, known))}")
    if gpu and GPUS[gpu].arch not in arch:
        raise ValueError(f"gpu={gpu!r} runs the code of sm_{GPUS[gpu].arch}, which is not in arch={list(arch)}")
    for name, value in (("tokens", tokens), ("processes", processes or 1), *(("lengths", n) for n in lengths or ())):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if not 0 < matrix_share <= 1:
        raise ValueError(f"matrix_share={matrix_share}: expected at most 1, and above 0")
    if all(pattern is not None for pattern in patterns):
        raise ValueError("ptx and sass exclude each other: one of them is printed")
    for pattern in (only, *patterns):
        check_pattern(pattern or "")
    return arch


def main() -> int:
    """The command; `minibert xray` takes the same flags."""
    parser = argparse.ArgumentParser(prog="python -m minibert_kernels.xray", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help='of "op direction plan", as the table has them')
    parser.add_argument("--arch", type=int, nargs="+", help=f"by default {ARCHITECTURES}, or that of --gpu")
    parser.add_argument("--gpu", help=f"predict times on one of {', '.join(GPUS)}")
    parser.add_argument("--step", nargs="+", metavar="MODEL", help=f"predict training steps of {', '.join(MODELS)}")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"of the sequences of --step, by default {LENGTHS}")
    parser.add_argument("--tokens", type=int, default=STEP_TOKENS, help="of a --step")
    parser.add_argument("--matrix-share", type=float, default=MATRIX_SHARE, help="of the matrix peak that is reached")
    parser.add_argument("--ptx", metavar="PATTERN", help="print the PTX of the kernels that match, and no table")
    parser.add_argument("--sass", metavar="PATTERN", help="print their machine code")
    parser.add_argument("--limits", metavar="FILE", help="instead of xray_limits.json")
    parser.add_argument("--processes", type=int, help="compile with this many, by default one a core")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", dest="as_json", help="one object: versions, rows and steps")
    output.add_argument("--markdown", action="store_true", dest="as_markdown", help="the tables of kernels/README.md")
    output.add_argument("--diff", metavar="OLD.json", dest="diff_with", help="say what changed since this --json")
    try:
        return run(**vars(parser.parse_args()))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"xray: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


if __name__ == "__main__":
    sys.exit(main())
