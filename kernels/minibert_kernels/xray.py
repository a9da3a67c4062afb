"""What the compiler made of each kernel of each default launch plan, and what it must cost, without a GPU.

    python -m minibert_kernels.xray [--arch 80 90 100 120] [--only "attention bwd.*d=64"] [--gpu h200] [--json] ...

Triton compiles for a GPU that is not there, and its wheel carries NVIDIA's assembler and disassembler. A row is one
kernel on one architecture; `traffic` counts the bytes of its op beside it, and `roofline` says what the hardware
allows. Where a limit of xray_limits.json is broken, the row is named as an error, and the exit code is 1.

What was compiled and counted is kept in $MINIBERT_XRAY_CACHE, by default minibert/xray in the user's cache folder.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from . import embedding, gelu, lamb, layer_norm, masking, packing, segment
from ._triton import AVAILABLE, triton
from .attention import aot_cases as attention_cases
from .dispatch import interpreting
from .launch import FP_FUSION, AotCase
from .linear_cross_entropy import aot_cases as cross_entropy_cases
from .roofline import (
    GPUS,
    LAUNCH,
    LENGTHS,
    MATRIX_SHARE,
    MODELS,
    STEP_TOKENS,
    TYPICAL,
    kernel_work,
    occupancy,
    seconds,
    step_rows,
    step_text,
)
from .xray_text import KEY, diff, markdown, table

ARCHITECTURES = (80, 90, 100, 120)
MODULES = (gelu, layer_norm, embedding, segment, packing, masking, lamb)
CASES = (attention_cases, cross_entropy_cases, *(module.aot_cases for module in MODULES))
# the mnemonic with which each architecture multiplies matrices at full speed
MATRIX_KIND = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
LIMITS = Path(__file__).with_name("xray_limits.json")
CHUNK = 12  # kernels that a process compiles at once: the disassembler takes 0.2 s to start
# what is kept of a kernel, and of a count
FACTS = (
    "registers", "spilled_bytes", "stack", "shared_bytes", "tensor_columns", "mma", "wide_share",
)  # fmt: skip
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


@cache
def _every_case(capability):
    return [case for found in CASES for case in found(capability)]


def cases(capability: int, only: str = "") -> list[AotCase]:
    """The kernels of an architecture's default launch plans whose "op direction plan" the pattern matches."""
    return [c for c in _every_case(capability) if re.search(only, f"{c.op} {c.direction} {c.label}")]


def _source(case):
    from triton.compiler import ASTSource

    return ASTSource(case.fn, case.signature, case.constexprs, case.attrs)


def _options(case):
    return {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": FP_FUSION}


def _compile(case, capability, options):
    """The compiled kernel, and what the assembler said.

    Raises:
        RuntimeError: it does not compile; the compiler's own errors do not all cross a process border.
    """
    from triton.backends.compiler import GPUTarget

    with (
        triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), triton.knobs.cache.scope(),
        tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as log,
    ):  # fmt: skip
        # Triton's cache does not keep the assembler's report
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        triton.knobs.cache.dir = folder
        try:
            compiled = triton.compile(_source(case), target=GPUTarget("cuda", capability, 32), options=options)
        except Exception as error:
            name = f"{case.op} {case.direction} {case.label} sm_{capability}"
            raise RuntimeError(f"{name} does not compile: {type(error).__name__}: {error}") from error
    return compiled, log.getvalue()


def _disassemble(content, *options):
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [disassembler, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(cubins: list[bytes], capability: int) -> list[str]:
    """The instructions of kernels of one architecture, by one call of the disassembler."""
    codes = [_code(cubin) for cubin in cubins]
    text = _disassemble(b"".join(codes), "-ndf", "-b", f"SM{capability}{'a' if capability >= 90 else ''}")
    found, number, end = [[] for _ in cubins], 0, len(codes[0])
    for line in text.splitlines():
        place = re.match(r"\s*/\*([0-9a-f]{4,})\*/", line)
        while place and int(place[1], 16) >= end:
            number += 1
            end += len(codes[number])
        found[number].append(line)
    return ["\n".join(lines) for lines in found]


def _code(cubin):
    """The bytes of the sections .text.* of an ELF file."""
    [table] = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # name, type, flags, address, offset, size
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    texts = [header for header in headers if cubin.startswith(b".text.", headers[names][4] + header[0])]
    return b"".join(cubin[header[4] : header[4] + header[5]] for header in texts)


def _facts(cases, capability, options):
    """What rows say that takes a compiler to know; options of each case."""
    compiled = [_compile(case, capability, own) for case, own in zip(cases, options, strict=True)]
    codes = instructions([kernel.asm["cubin"] for kernel, _ in compiled], capability)
    return [_facts_of(kernel, log, code) for (kernel, log), code in zip(compiled, codes, strict=True)]


def _facts_of(compiled, log, code):
    sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled_bytes": int(sizes[2]) + int(sizes[3]), "stack": int(sizes[1]),
        "shared_bytes": compiled.metadata.shared, "tensor_columns": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "mma": dict(sorted(Counter(re.findall(r"\b([HIQOD]G?MMA|UTC\w*MMA)\b", code)).items())),
        "wide_share": wide_share(code),
    }  # fmt: skip


def wide_share(code: str) -> float | None:
    """Of the instructions of machine code that move global memory, the share that moves 16 bytes or more a thread."""
    found = re.findall(r"\b(LDG|STG|LDGSTS|UBLKCP|UTMALDG|UTMASTG)\b([.\w]*)", code)
    wide = [name.startswith("U") or bool(re.search(r"\.(128|256)\b", width)) for name, width in found]
    return round(sum(wide) / len(wide), 3) if wide else None


def compile_case(case: AotCase, capability: int, **options) -> Row:
    """Compile one case for sm_`capability` and read what came out; options override those of the launch."""
    options = _options(case) | options
    return _row(case, capability, options, _facts([case], capability, [options])[0])


def _row(case, capability, options, facts):
    warps, facts = options["num_warps"], dict(facts)
    share, limiter = occupancy(
        capability, warps, facts["registers"], facts["shared_bytes"], facts.pop("tensor_columns")
    )
    work = kernel_work(case.op, case.direction, case.label)
    if work:
        facts |= {"unit": work.unit, "bytes_per_unit": work.bytes, "flops_per_unit": work.flops}
        facts |= {"intensity": round(work.flops / work.bytes, 1)}
    return Row(
        op=case.op, direction=case.direction, plan=case.label, kernel=case.fn.__name__, arch=capability,
        num_warps=warps, num_stages=options["num_stages"], matmul=case.matmul, occupancy=round(share, 4),
        limiter=limiter, **facts,
    )  # fmt: skip


def compile_all(architectures=ARCHITECTURES, only: str = "", processes: int = 2) -> list[Row]:
    """A row for every case of every architecture, in order; only what is not in the cache is compiled.

    Plans that come to the same code, as rows of 768 and of 1,024 columns do, are compiled once.
    """
    work = [(arch, index, case) for arch in architectures for index, case in enumerate(cases(arch, only))]
    paths = [_cache_path(case, arch) for arch, _, case in work]
    facts = {path: _read(path, FACTS) for path in paths}
    jobs = []
    for arch in architectures:
        places = {path: i for (a, i, _), path in zip(work, paths, strict=True) if a == arch and facts[path] is None}
        # every so many-th: neighbours are alike, and so the jobs last about as long as each other
        count = -(-len(places) // CHUNK)
        jobs += [(arch, only, list(places.items())[first::count]) for first in range(count)]
    if jobs:
        with ProcessPoolExecutor(min(processes, len(jobs))) as pool:
            for found in pool.map(_compile_numbered, jobs):
                facts |= found
    return [_row(case, arch, _options(case), facts[path]) for (arch, _, case), path in zip(work, paths, strict=True)]


def _compile_numbered(job):
    # a kernel does not cross a process border, its number does
    arch, only, places = job
    chosen = [cases(arch, only)[index] for _, index in places]
    facts = _facts(chosen, arch, [_options(case) for case in chosen])
    found = {path: one for (path, _), one in zip(places, facts, strict=True)}
    for path, one in found.items():
        _write(path, one)
    return found


def _cache_folder() -> Path:
    own, shared = os.environ.get("MINIBERT_XRAY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "minibert" / "xray"


def _cache_path(case, capability):
    parts = (_source(case).hash(), sorted(_options(case).items()), capability, triton.__version__, _own_text())
    return _cache_folder() / f"{_digest(parts)}.json"


@cache
def _own_text():
    return Path(__file__).read_text(encoding="utf-8")


def _digest(parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read(path, names):
    """What was kept, if it has just these names; what was damaged is as good as missing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        every = found if isinstance(found, list) else [found]
        return found if every and all(set(one) == set(names) for one in every) else None
    except (OSError, ValueError, TypeError):
        return None


def _write(path, value):
    """Keep a value, whole or not at all; a cache that cannot be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps(value), encoding="utf-8")
        own.replace(path)
    except OSError:
        pass


class Counting:
    """What `traffic` counts of some ops, in a process of its own: the interpreter is decided when Triton is imported.

    It runs from construction; `result` waits for it, `stop` does not.
    """

    def __init__(self, ops):
        sources = [p for p in sorted(LIMITS.parent.glob("*.py")) if p.stem not in ("xray", "xray_text", "roofline")]
        key = _digest((triton.__version__, [(path.name, path.read_text(encoding="utf-8")) for path in sources]))
        self.paths = {op: _cache_folder() / f"traffic-{op}-{key}.json" for op in ops}
        self.found = {op: _read(path, COUNTED) for op, path in self.paths.items()}
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
                _write(self.paths[op], self.found[op])
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
    label, name = counted_label(row.op, row.plan), "forward" if row.direction == "fwd" else "backward"
    found = [c for c in counts if (c["op"], c["label"]) == (row.op, label) and c[name]]
    return dataclasses.replace(row, bytes_over_minimum=found[0][f"{name}_over_minimum"] if found else None)


def counted_label(op: str, plan: str) -> str | None:
    """The label of the call in `traffic` that reads and writes what a plan does; None where there is none.

    Widths, head sizes and lengths may differ, and float16 stands for bfloat16; what is read or written may not.
    """
    if op == "attention":
        return None if "bias" in plan else "S=128" if "short" in plan else "S=256"
    if op == "dropout_add_norm":
        return "dropout" if "dropout" in plan else ""
    if op == "linear_cross_entropy":
        return plan.replace("V=119547", "V=30522")
    if op == "mlm_mask":
        return plan.split(", ", 1)[1]
    if op == "lamb_step":
        return re.sub(" (moments|update)$", "", plan).replace("bf16", "fp16")
    return None if (op, plan) == ("pack", "1 columns") else ""


def with_time(row: Row, gpu: str | None = None, matrix_share: float = MATRIX_SHARE) -> Row:
    """The row with its predicted time and occupancy on the named GPU, or where that runs other code on `TYPICAL`'s."""
    name = gpu if gpu and GPUS[gpu].arch == row.arch else TYPICAL[row.arch]
    found, work = {"gpu": name}, kernel_work(row.op, row.direction, row.plan)
    if GPUS[name].capability != row.arch:
        capacity = occupancy(GPUS[name].capability, row.num_warps, row.registers, row.shared_bytes)
        found |= {"occupancy": round(capacity[0], 4), "limiter": capacity[1]}
    if work:
        time, bound = seconds(work, GPUS[name], work.units, LAUNCH, matrix_share)
        found |= {"predicted_us": round(1e6 * time, 1), "bound": bound}
    return dataclasses.replace(row, **found)


def load_limits(path: str | Path = LIMITS) -> dict:
    """The limits and their exceptions.

    Raises:
        ValueError: a limit is unknown, or an exception does not say match, limit, value and reason.
    """
    limits = _load(path)
    known = {"spilled_bytes", "missing_matrix_instructions", "bytes_over_minimum"}
    whole = isinstance(limits, dict) and set(limits) == {"limits", "exceptions"}
    if not whole or not isinstance(limits["limits"], dict) or set(limits["limits"]) != known:
        raise ValueError(f"{path}: expected limits ({', '.join(sorted(known))}) and exceptions")
    for exception in limits["exceptions"]:
        names = set(exception) if isinstance(exception, dict) else set()
        if names != {"match", "limit", "value", "reason"} or exception["limit"] not in known:
            raise ValueError(f"{path}: {exception} is not match, limit (one of the limits), value and reason")
        _check_pattern(exception["match"], f"{path}: match=")
    for value in (*limits["limits"].values(), *(exception["value"] for exception in limits["exceptions"])):
        if not isinstance(value, int | float):
            raise ValueError(f"{path}: a limit or value of {value!r} is no number")
    return limits


def load_rows(path: str | Path) -> list[dict]:
    """The rows of a --json, with or without --step.

    Raises:
        ValueError: the file holds something else.
    """
    found = _load(path)
    rows = found.get("rows") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(KEY) <= set(row) for row in rows):
        raise ValueError(f"{path} is no output of --json: expected a list of rows with {', '.join(KEY)}")
    return rows


def _load(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def faults(rows: list[Row], counts: list[dict], limits: dict, whole: bool = False) -> list[str]:
    """A sentence for each limit that is broken; of the whole table also for each exception that nothing needs."""
    found, needed = [], set()
    for name, limit, value, text in _measured(rows, counts):
        most = limits["limits"][limit]
        if value <= most:
            continue
        for number, exception in enumerate(limits["exceptions"]):
            if exception["limit"] == limit and re.fullmatch(exception["match"], name):
                needed.add(number)
                most = max(most, exception["value"])
        if value > most:
            found.append(f"{name} {text} (limit: {limit} of {most:g})")
    if whole:
        for number, exception in enumerate(limits["exceptions"]):
            if number not in needed:
                found.append(f"the exception {exception['match']!r} of {exception['limit']} is no longer needed")
    return found


def _measured(rows, counts):
    """(name, limit, value, what is said of it) of all that has a limit."""
    for row in rows:
        yield row.name, "spilled_bytes", row.spilled_bytes, f"spills {row.spilled_bytes} bytes"
        if row.matmul:
            kind = MATRIX_KIND[row.arch]
            yield row.name, "missing_matrix_instructions", int(kind not in row.mma), f"has no {kind} instruction"
    for count in counts:
        for direction, key in (("fwd", "forward_over_minimum"), ("bwd", "backward_over_minimum")):
            name = f"{count['op']} {direction} {count['label']}".strip()
            yield name, "bytes_over_minimum", count[key], f"moves {count[key]:.3f} times its least bytes"


def code(pattern: str, architectures, kind: str) -> str:
    """The "ptx" or "sass" of the cases whose "op direction plan" the pattern matches."""
    texts = []
    for arch in architectures:
        for case in cases(arch, pattern):
            compiled, _ = _compile(case, arch, _options(case))
            text = compiled.asm["ptx"] if kind == "ptx" else _disassemble(compiled.asm["cubin"], "-c")
            texts.append(f"// {case.op} {case.direction} {case.label} sm_{arch}\n{text.strip()}\n")
    if not texts:
        raise ValueError(f"{kind}={pattern!r} matches no kernel")
    return "\n".join(texts)


def run(
    *, only: str = "", arch=None, gpu: str | None = None, step=None, lengths=None, tokens: int = STEP_TOKENS,
    matrix_share: float = MATRIX_SHARE, as_json: bool = False, as_markdown: bool = False, diff_with: str | None = None,
    ptx: str | None = None, sass: str | None = None, limits: str | None = None, processes: int | None = None,
) -> int:  # fmt: skip
    """Print what is asked for, as the flags of `main` say; returns the exit code.

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
    ops = counted_ops(case.op for a in arch for case in cases(a, only))
    if not ops:
        raise ValueError(f"only={only!r} matches no kernel")
    counting = Counting(ops)
    try:
        rows = compile_all(arch, only, processes or os.cpu_count() or 1)
        counts = counting.result()
    finally:
        counting.stop()
    rows = [with_time(with_bytes(row, counts), gpu, matrix_share) for row in rows]
    found = [dataclasses.asdict(row) for row in rows]
    models = step or (() if only or as_json or as_markdown or diff_with else MODELS)
    gpus = (gpu,) if gpu else [name for name, known in GPUS.items() if known.arch in arch]
    steps = step_rows(models, lengths or LENGTHS, gpus, tokens, matrix_share)
    if as_json:
        print(json.dumps({"rows": found, "step": steps} if steps else found))
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
        _check_pattern(pattern or "")
    return arch


def _check_pattern(pattern, where=""):
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where}{pattern!r} is no regular expression: {error}") from None


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
    output.add_argument("--json", action="store_true", dest="as_json", help="one list of rows")
    output.add_argument("--markdown", action="store_true", dest="as_markdown", help="the tables of kernels/README.md")
    output.add_argument("--diff", metavar="OLD.json", dest="diff_with", help="say what changed since this --json")
    try:
        return run(**vars(parser.parse_args()))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"xray: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


if __name__ == "__main__":
    sys.exit(main())
