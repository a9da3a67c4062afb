"""Machine code, read: what NVIDIA's disassembler, which is part of Triton's wheel, prints of compiled kernels."""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from ._triton import triton

GLOBAL = r"\b(LDG|STG|LDGSTS|UBLKCP|UTMALDG|UTMASTG)\b([.\w]*)"
# FLOPs of a warp: of a matrix instruction of its own, or its quarter of a warp group's
WARP_PRODUCT = {"HMMA": (r"\bHMMA\.(\d\d)(\d)(\d+)\b", 1), "HGMMA": (r"\bHGMMA\.(\d+)x(\d+)x(\d+)\b", 4)}
SHORTEST_LOOP = 16  # instructions: what is shorter waits for a barrier


def disassemble(content: bytes, *options: str) -> str:
    """What nvdisasm prints of a cubin, or with "-b" of bare machine code."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [disassembler, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(cubins: list[bytes], capability: int) -> list[str]:
    """The instructions of kernels of one architecture, a line each, by one call of the disassembler."""
    codes = [_code(cubin) for cubin in cubins]
    text = disassemble(b"".join(codes), "-ndf", "-b", f"SM{capability}{'a' if capability >= 90 else ''}")
    found, number, end = [[] for _ in cubins], 0, len(codes[0])
    for line in text.splitlines():
        place = _address(line)
        while place is not None and place >= end:
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


def _address(line):
    found = re.match(r"\s*/\*([0-9a-f]{4,})\*/", line)
    return int(found[1], 16) if found else None


def wide_share(code: str) -> float | None:
    """Of the instructions of machine code that move global memory, the share that moves 16 bytes or more a thread."""
    found = re.findall(GLOBAL, code)
    wide = [name.startswith("U") or bool(re.search(r"\.(128|256)\b", width)) for name, width in found]
    return round(sum(wide) / len(wide), 3) if wide else None


def matrix_instructions(code: str) -> dict[str, int]:
    """How many there are, by kind."""
    return dict(sorted(Counter(re.findall(r"\b([HIQOD]G?MMA|UTC\w*MMA)\b", code)).items()))


def cost(lines: list[str]) -> dict[str, int]:
    """What a warp does in these lines, each run once.

    Returns: `instructions`, those of the special function unit (`mufu`), FLOPs of matrix products (`flops`; 0 where the
    instruction does not say its shape, as UTCHMMA), and bytes of global memory that a thread asks for (`bytes`).
    """
    code = "\n".join(line for line in lines if _address(line) is not None)
    flops = sum(
        2 * int(m) * int(n) * int(k) // share
        for pattern, share in WARP_PRODUCT.values()
        for m, n, k in re.findall(pattern, code)
    )
    return {
        "instructions": sum(not re.search(r"\*/\s+NOP\b", line) for line in code.splitlines()),
        "mufu": len(re.findall(r"\bMUFU\b", code)),
        "flops": flops,
        "bytes": sum(_width(suffix) for _, suffix in re.findall(GLOBAL, code)),
    }


def _width(suffix):
    """Bytes that a thread moves by an access with this suffix."""
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", suffix)
    return int(found[1]) // 8 if found else 4


def loops(code: str) -> list[dict[str, int]]:
    """The `cost` of a trip through each innermost loop."""
    lines = [line for line in code.splitlines() if _address(line) is not None]
    place = {_address(line): number for number, line in enumerate(lines)}
    spans = []
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA\S*\s+(?:\S+,\s*)*0x([0-9a-f]+)", line)
        begin = place.get(int(target[1], 16)) if target else None
        if begin is not None and end - begin + 1 >= SHORTEST_LOOP:
            spans.append((begin, end))
    inner = [
        (begin, end) for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]  # fmt: skip
    return [cost(lines[begin : end + 1]) for begin, end in sorted(set(inner))]
