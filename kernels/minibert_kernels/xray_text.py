"""The rows of `xray` as text: an aligned table, the tables of kernels/README.md, and what two of them differ in."""

from pathlib import Path

from ._triton import compiler_versions
from .dispatch import TRITON_OPS
from .roofline import HEADS, LENGTH, TOKENS

KEY = ("op", "direction", "plan", "kernel", "arch")  # which row of an old table is which of a new one
DIFFED = (
    "num_warps", "num_stages", "registers", "instructions", "loop", "spilled_bytes", "stack", "shared_bytes",
    "occupancy", "limiter", "wide_share", "mma", "serialized", "bytes_over_minimum",
)  # fmt: skip


def table(rows: list) -> str:
    """The rows as aligned text, and below what the times are of."""
    lines = [list(COLUMNS), *([str(cell(row)) for cell in COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust if name in ("kernel", "limiter", "mma", "bound") else str.rjust for name in COLUMNS]
    text = [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)).rstrip()
        for cells in lines
    ]
    if gpus := dict.fromkeys(f"{row.gpu} (sm_{row.arch})" for row in rows if row.gpu):
        batch = f"{TOKENS} tokens, {HEADS} heads, sequences of {LENGTH}, or BERT-base's parameters"
        text += ["", f"us: {batch}, on {', '.join(gpus)}"]
        text += ["compiled by " + ", ".join(f"{name} {version}" for name, version in compiler_versions().items())]
    return "\n".join(text)


def _or_dash(value, form=""):
    return "-" if value is None else format(value, form)


def _rounded(number):
    """123, 45.6k, 7.8M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


# of the text table: what a row says under each heading
COLUMNS = {
    "kernel": lambda r: f"{r.op} {r.direction} {r.plan}", "sm": lambda r: r.arch, "warps": lambda r: r.num_warps,
    "stages": lambda r: r.num_stages, "regs": lambda r: r.registers, "spill": lambda r: r.spilled_bytes,
    "instr": lambda r: r.code.get("instructions", "-"), "loop": lambda r: _or_dash(r.loop_instructions),
    "stack": lambda r: r.stack, "shared": lambda r: r.shared_bytes, "occ": lambda r: f"{r.occupancy:.0%}",
    "limiter": lambda r: r.limiter.split()[0], "mma": lambda r: _matrix_text(r),
    "wide": lambda r: _or_dash(r.wide_share, ".0%"), "bytes": lambda r: _or_dash(r.bytes_over_minimum, ".3f"),
    "FLOP": lambda r: "-" if r.flops_per_unit is None else _rounded(r.flops_per_unit),
    "FLOP/B": lambda r: _or_dash(r.intensity, "g"), "us": lambda r: _or_dash(r.predicted_us, ".1f"),
    "bound": lambda r: r.bound or "-",
}  # fmt: skip


def markdown(rows: list, counts: list[dict]) -> str:
    """The tables of kernels/README.md: bytes an op (`traffic`), and what became of each plan on each architecture."""
    lines = ["| op | case | file | lines | fwd bytes / minimum | bwd bytes / minimum | saved bytes a token |"]
    lines.append("|---" * 7 + "|")
    for c in counts:
        file = Path(__file__).with_name(TRITON_OPS[c["op"]])
        lines.append(
            f"| `{c['op']}` | {c['label'] or '–'} | `{file.name}` | {len(file.read_text().splitlines())} "
            f"| {c['forward_over_minimum']:.3f} | {c['backward_over_minimum'] or '–'} | {c['saved']:g} |"
        )
    architectures = sorted({r.arch for r in rows})
    found = {}
    for r in rows:
        cell = f"{r.registers} / {r.spilled_bytes} / {r.shared_bytes} / {r.occupancy:.0%}"
        cell += f" / {_matrix_text(r)}" if r.matmul else ""
        found.setdefault((r.op, f"{r.direction}, {r.plan}", r.kernel), {})[r.arch] = cell
    lines += ["", "| op | plan | kernel | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |"]
    lines.append("|---" * (3 + len(architectures)) + "|")
    for (op, plan, kernel), by_arch in found.items():
        numbers = " | ".join(by_arch.get(arch, "–") for arch in architectures)
        lines.append(f"| `{op}` | {plan} | `{kernel}` | {numbers} |")
    return "\n".join(lines)


def _matrix_text(row) -> str:
    text = " ".join(f"{n} {kind}" for kind, n in row.mma.items()) or "-"
    return f"{text} serialized" if row.serialized else text


def diff(old: list[dict], new: list[dict]) -> str:
    """A line for each row that changed, is new or is gone."""
    by_name = [{tuple(row[k] for k in KEY): row | _lengths(row) for row in rows} for rows in (old, new)]
    lines = []
    for key, row in by_name[1].items():
        name, before = f"{' '.join(key[:3])} sm_{key[4]}", by_name[0].get(key)
        if before is None:
            lines.append(f"new      {name}")
            continue
        changes = [_change(k, before.get(k), row.get(k)) for k in DIFFED if before.get(k) != row.get(k)]
        if changes:
            lines.append(f"changed  {name}: {', '.join(changes)}")
    lines += [f"gone     {' '.join(key[:3])} sm_{key[4]}" for key in by_name[0] if key not in by_name[1]]
    return "\n".join(lines) or "no difference"


def _lengths(row):
    """Instructions of the code, and of a trip through its longest loop."""
    loop = max((loop["instructions"] for loop in row.get("loops", ())), default=None)
    return {"instructions": row.get("code", {}).get("instructions"), "loop": loop}


def _change(key, before, after):
    if isinstance(before, dict) or isinstance(after, dict):
        before, after = (" ".join(f"{n} {kind}" for kind, n in (x or {}).items()) or "none" for x in (before, after))
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (before, after))
    return f"{key} {before} → {after}" + (f" ({after - before:+.4g})" if numbers else "")
