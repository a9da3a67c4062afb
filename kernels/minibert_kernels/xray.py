"""What the compiler made of each kernel of each default launch plan, without a GPU.

    python -m minibert_kernels.xray [--arch 80 90 100 120] [--only "attention bwd.*d=64"] [--json | --markdown]

Triton compiles for a GPU that is not there, and its wheel carries NVIDIA's assembler and disassembler. A row is one
kernel on one architecture: registers a thread, bytes spilled, stack, shared memory, matrix instructions by kind. A
spill, or a product without the matrix instructions of its architecture, is named as an error, and the exit code is 1.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import minibert_kernels

from . import embedding, gelu, lamb, layer_norm, masking, packing, segment
from ._triton import AVAILABLE, triton
from .attention import aot_cases as attention_cases
from .dispatch import interpreting
from .launch import FP_FUSION, AotCase
from .linear_cross_entropy import aot_cases as cross_entropy_cases

ARCHITECTURES = (80, 90, 100, 120)
MODULES = (gelu, layer_norm, embedding, segment, packing, masking, lamb)
CASES = (attention_cases, cross_entropy_cases, *(module.aot_cases for module in MODULES))
# the mnemonic with which each architecture multiplies matrices at full speed
MATRIX_KIND = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled kernel; sizes in bytes, registers a thread, shared memory a program."""

    op: str
    direction: str
    label: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    stack: int
    shared: int
    matmul: bool
    matrix: dict = field(default_factory=dict)

    def faults(self) -> list[str]:
        """What a default plan may not have, one sentence each."""
        name, found = f"{self.op} {self.direction} {self.label} on sm_{self.arch}", []
        if self.spills:
            found.append(f"{name} spills {self.spills} bytes")
        if self.matmul and MATRIX_KIND[self.arch] not in self.matrix:
            found.append(f"{name} has no {MATRIX_KIND[self.arch]} instruction")
        return found


def cases(capability: int, only: str = "") -> list[AotCase]:
    """The kernels of an architecture's default launch plans whose "op direction label" the pattern matches."""
    every = (case for found in CASES for case in found(capability))
    return [case for case in every if re.search(only, f"{case.op} {case.direction} {case.label}")]


def compile_case(case: AotCase, capability: int, **options) -> Row:
    """Compile one case for sm_`capability` and read what came out; options override those of the launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": FP_FUSION} | options
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(io.StringIO()) as log:
        # the assembler's report is not cached
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Row(
        op=case.op, direction=case.direction, label=case.label, kernel=case.fn.__name__, arch=capability,
        num_warps=options["num_warps"], num_stages=options["num_stages"], shared=compiled.metadata.shared,
        matmul=case.matmul, matrix=_matrix_instructions(compiled.asm["cubin"]), **_assembler_report(log.getvalue()),
    )  # fmt: skip


def _assembler_report(log: str) -> dict:
    sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    return {"registers": int(registers[1]), "spills": int(sizes[2]) + int(sizes[3]), "stack": int(sizes[1])}


def _matrix_instructions(cubin: bytes) -> dict:
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return dict(sorted(Counter(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", sass)).items()))


def compile_all(architectures=ARCHITECTURES, only: str = "", processes: int = 2) -> list[Row]:
    """A row for every case of every architecture, in order."""
    work = [(arch, only, index) for arch in architectures for index in range(len(cases(arch, only)))]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_compile_numbered, work, chunksize=4))


def _compile_numbered(work):
    # a kernel does not cross a process border, its number does
    arch, only, index = work
    return compile_case(cases(arch, only)[index], arch)


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    header = ("op", "case", "sm", "warps", "stages", "registers", "spills", "stack", "shared", "matrix")
    cells = [(r.op, f"{r.direction} {r.label}", r.arch, r.num_warps, r.num_stages, r.registers, r.spills, r.stack,
              r.shared, _matrix_text(r)) for r in rows]  # fmt: skip
    widths = [max(len(str(row[i])) for row in (header, *cells)) for i in range(len(header))]
    return "\n".join("  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)) for row in (header, *cells))


def markdown(rows: list[Row], counts: list[dict]) -> str:
    """The tables of kernels/README.md: bytes an op (`traffic`), and what became of each plan on each architecture."""
    lines = ["| op | case | file | lines | fwd bytes / minimum | bwd bytes / minimum | saved bytes a token |"]
    lines.append("|---" * 7 + "|")
    for c in counts:
        file = Path(sys.modules[getattr(minibert_kernels, c["op"]).__module__].__file__)
        lines.append(
            f"| `{c['op']}` | {c['label'] or '–'} | `{file.name}` | {len(file.read_text().splitlines())} "
            f"| {c['forward_over_minimum']:.3f} | {c['backward_over_minimum'] or '–'} | {c['saved']:g} |"
        )
    architectures = sorted({r.arch for r in rows})
    found = {}
    for r in rows:
        cell = f"{r.registers} / {r.spills} / {r.shared}" + (f" / {_matrix_text(r)}" if r.matmul else "")
        found.setdefault((r.op, f"{r.direction}, {r.label}", r.kernel), {})[r.arch] = cell
    lines += ["", "| op | plan | kernel | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |"]
    lines.append("|---" * (3 + len(architectures)) + "|")
    for (op, plan, kernel), by_arch in found.items():
        numbers = " | ".join(by_arch.get(arch, "–") for arch in architectures)
        lines.append(f"| `{op}` | {plan} | `{kernel}` | {numbers} |")
    return "\n".join(lines)


def _matrix_text(row: Row) -> str:
    return " ".join(f"{n} {kind}" for kind, n in row.matrix.items()) or "-"


def _counts() -> list[dict]:
    """What `traffic` counts, in a process of its own: the interpreter is decided when Triton is imported."""
    command = [sys.executable, "-m", "minibert_kernels.traffic", "--json"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m minibert_kernels.xray", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help='of "op direction label", as the table has them')
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--processes", type=int, default=2, help="compile with this many")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one list of rows")
    output.add_argument(
        "--markdown", action="store_true", help="the tables of kernels/README.md, with the bytes that `traffic` counts"
    )
    args = parser.parse_args()
    if not AVAILABLE or interpreting():
        reason = "unset TRITON_INTERPRET" if AVAILABLE else "install triton (Linux only)"
        print(f"xray: error: needs Triton's compiler: {reason}", file=sys.stderr)
        return 2
    rows = compile_all(args.arch, args.only, args.processes)
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        print(markdown(rows, _counts()) if args.markdown else table(rows))
    faults = [fault for row in rows for fault in row.faults()]
    for fault in faults:
        print(f"xray: error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
