"""Kernels compiled for a GPU that is not there, and what `xray` says of them: each compiled once, then from a cache."""

import io
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path

from . import embedding, gelu, lamb, layer_norm, masking, packing, sass, segment, xray_cache
from ._triton import compiler_versions, triton
from .attention import aot_cases as attention_cases
from .launch import FP_FUSION, AotCase
from .launches import Launches
from .linear_cross_entropy import aot_cases as cross_entropy_cases

MODULES = (gelu, layer_norm, embedding, segment, packing, masking, lamb)
CASES = (attention_cases, cross_entropy_cases, *(module.aot_cases for module in MODULES))
LAUNCHED = ", launched by "  # in the label of a case that was recorded
CHUNK = 12  # kernels that a process compiles at once: the disassembler takes 0.2 s to start
# what is kept of a kernel
FACTS = (
    "registers", "spilled_bytes", "stack", "shared_bytes", "tensor_columns", "mma", "wide_share", "serialized", "code",
    "loops",
)  # fmt: skip


@cache
def _every_case(capability):
    return [case for found in CASES for case in found(capability)]


def cases(capability: int, only: str = "") -> list[AotCase]:
    """The kernels of an architecture's default launch plans whose "op direction plan" the pattern matches."""
    return [case for case in _every_case(capability) if matches(case, only)]


def matches(case: AotCase, only: str) -> bool:
    return bool(re.search(only, f"{case.op} {case.direction} {case.label}"))


def plan_of(label: str) -> str:
    """The label of the case that a recorded one is named after; any other label as it is."""
    return label.split(LAUNCHED)[0]


def launched_cases(launches: dict[str, Launches], capability: int) -> list[AotCase]:
    """The variants among recorded launches, by what made them, that are none of the `cases`: as cases of their own.

    A label is that of the nearest of the `cases`, and who made the launch first.
    """
    known = _every_case(capability)
    seen, labels, found = {_identity(case) for case in known}, Counter(), []
    for by, variant in ((by, variant) for by, one in launches.items() for variant in one.variants):
        near = min((c for c in known if c.fn is variant.source.fn), key=lambda c: _distance(variant, c), default=None)
        case = variant.case("unknown", "fwd", f"{variant.kernel}{LAUNCHED}{by}", False)
        if near:
            case = variant.case(near.op, near.direction, f"{near.label}{LAUNCHED}{by}", near.matmul)
        if _identity(case) not in seen:
            seen.add(_identity(case))
            name = (case.op, case.direction, case.label)
            labels[name] += 1
            found.append(replace(case, label=f"{case.label} ({labels[name]})") if labels[name] > 1 else case)
    return found


def _identity(case):
    return source(case).hash(), tuple(options_of(case).values())


def _distance(variant, case):
    """In how many arguments' types and values a variant and a case differ."""
    a, b = variant.source, source(case)
    pairs = ((a.signature, b.signature), (a.constants, b.constants), (a.attrs, b.attrs))
    return sum(str(x.get(key)) != str(y.get(key)) for x, y in pairs for key in x.keys() | y.keys())


def source(case: AotCase):
    """What Triton compiles; its `hash()` names the code and all that is specialised."""
    from triton.compiler import ASTSource

    return ASTSource(case.fn, case.signature, case.constexprs, case.attrs)


def options_of(case: AotCase) -> dict:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": FP_FUSION}


def compile_kernel(case: AotCase, capability: int, options: dict):
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
            compiled = triton.compile(source(case), target=GPUTarget("cuda", capability, 32), options=options)
        except Exception as error:
            name = f"{case.op} {case.direction} {case.label} sm_{capability}"
            raise RuntimeError(f"{name} does not compile: {type(error).__name__}: {error}") from error
    return compiled, log.getvalue()


def facts(cases: Iterable[AotCase], capability: int, options: Iterable[dict]) -> list[dict]:
    """What rows say that takes a compiler to know; options of each case. Of one that fails, {"error": why}."""
    found, compiled = [], {}
    for number, (case, own) in enumerate(zip(cases, options, strict=True)):
        found.append({})
        try:
            compiled[number] = compile_kernel(case, capability, own)
        except RuntimeError as error:
            found[number] = {"error": str(error)}
    if compiled:
        codes = sass.instructions([kernel.asm["cubin"] for kernel, _ in compiled.values()], capability)
        for (number, (kernel, log)), code in zip(compiled.items(), codes, strict=True):
            found[number] = _facts_of(kernel, log, code)
    return found


def _facts_of(compiled, log, code):
    sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled_bytes": int(sizes[2]) + int(sizes[3]), "stack": int(sizes[1]),
        "shared_bytes": compiled.metadata.shared, "tensor_columns": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "mma": sass.matrix_instructions(code), "wide_share": sass.wide_share(code),
        # ptxas says so, with the reason, under C7515 and its neighbours: "(C7515) ... wgmma.mma_async instructions are
        # serialized due to ..."
        "serialized": "wgmma.mma_async instructions are serialized" in log,
        "code": sass.cost(code.splitlines()), "loops": sass.loops(code),
    }  # fmt: skip


def all_facts(
    work: list[tuple[int, AotCase]], processes: int = 2, failed: Callable[[str], None] | None = None
) -> list[dict | None]:
    """The facts of each (architecture, case), in order; only what is not in the cache is compiled.

    Plans that come to the same code, as rows of 768 and of 1,024 columns do, are compiled once.

    Args:
        failed: called with what is to be said of a kernel that does not compile; its facts are None.
    Raises:
        RuntimeError: a kernel does not compile, and there is no `failed`.
    """
    paths = [_cache_path(case, arch) for arch, case in work]
    found = {path: xray_cache.read(path, FACTS) for path in paths}
    jobs = []
    for arch in dict.fromkeys(arch for arch, _ in work):
        missing = {p: c for (a, c), p in zip(work, paths, strict=True) if a == arch and found[p] is None}
        # every so many-th: neighbours are alike, and so the jobs last about as long as each other
        count, items = -(-len(missing) // CHUNK), [(path, _by_name(case)) for path, case in missing.items()]
        jobs += [(arch, items[first::count]) for first in range(count)]
    if jobs:
        with ProcessPoolExecutor(min(processes, len(jobs))) as pool:
            for compiled in pool.map(_compile_job, jobs):
                found |= compiled
    for path in dict.fromkeys(paths):
        if "error" in found[path]:
            if failed is None:
                raise RuntimeError(found[path]["error"])
            failed(found[path]["error"])
            found[path] = None
    return [found[path] for path in paths]


def _compile_job(job):
    arch, items = job
    chosen = [_named(case) for _, case in items]
    compiled = facts(chosen, arch, [options_of(case) for case in chosen])
    found = {path: one for (path, _), one in zip(items, compiled, strict=True)}
    for path, one in found.items():
        if "error" not in one:
            xray_cache.write(path, one)
    return found


def _by_name(case):
    """A case whose kernel is a name, because a kernel does not cross a process border."""
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    return values | {"fn": (case.fn.__module__, case.fn.__name__)}


def _named(values):
    module, name = values["fn"]
    return AotCase(**values | {"fn": getattr(import_module(module), name)})


def _cache_path(case, capability):
    versions = tuple(compiler_versions().items())
    parts = (source(case).hash(), sorted(options_of(case).items()), capability, versions, _own_text())
    return xray_cache.folder() / f"{xray_cache.digest(parts)}.json"


@cache
def _own_text():
    return [Path(sys.modules[name].__file__).read_text(encoding="utf-8") for name in (__name__, sass.__name__)]


def code(pattern: str, architectures, kind: str) -> str:
    """The "ptx" or "sass" of the cases whose "op direction plan" the pattern matches."""
    texts = []
    for arch in architectures:
        for case in cases(arch, pattern):
            compiled, _ = compile_kernel(case, arch, options_of(case))
            text = compiled.asm["ptx"] if kind == "ptx" else sass.disassemble(compiled.asm["cubin"], "-c")
            texts.append(f"// {case.op} {case.direction} {case.label} sm_{arch}\n{text.strip()}\n")
    if not texts:
        raise ValueError(f"{kind}={pattern!r} matches no kernel")
    return "\n".join(texts)
