"""Every kernel compiled by every supported Triton for every architecture, held to the limits of xray_limits.json.

    python -m minibert_kernels.matrix [--tritons FOLDER] [--versions 3.6.0 ...] [--arch 90 ...] [--only PATTERN]

A Triton that FOLDER does not hold is installed there, in a folder of its own, without its dependencies. What was
compiled once is not compiled again (`xray`'s cache), so a run that was interrupted goes on where it was. The exit code
is 1 where a kernel does not compile or a limit is broken.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from ._triton import SUPPORTED, compiler_versions

LIMITED = {
    "spills": "spilled_bytes", "serialized": "serialized_matrix_instructions",
    "no matrix": "missing_matrix_instructions",
}  # fmt: skip


def installed(version: str, folder: Path) -> Path:
    """The folder that holds this Triton and nothing else, filled by pip if need be.

    Raises:
        RuntimeError: pip fails.
    """
    place = folder / version
    if not (place / "triton" / "__init__.py").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
        done = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"triton=={version} is not installed: {done.stderr.strip().splitlines()[-1:]}")
    return place


def compiled_by(version: str, folder: Path, architectures, only: str, processes: int) -> dict:
    """What `here` finds, in a process that imports this Triton: `versions`, `kernels` by architecture, `faults`.

    Raises:
        RuntimeError: the process fails, or imports another Triton.
    """
    own = [str(installed(version, folder)), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--here"]
    command += ["--arch", *map(str, architectures), "--only", only, "--processes", str(processes)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(f"Triton {version}: {done.stderr.strip().splitlines()[-1:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["versions"]["triton"] != version:
        raise RuntimeError(f"Triton {version} was asked for, and {found['versions']['triton']} was imported")
    return found


def here(architectures, only: str, processes: int) -> dict:
    """All kernels compiled by the Triton of this process."""
    from .xray import compile_all
    from .xray_limits import faults, load_limits

    failures = []
    rows = compile_all(architectures, only, processes, lambda error: failures.append(_one_line(error)))
    broken = faults(rows, [], load_limits())
    kernels = {arch: sum(row.arch == arch for row in rows) for arch in architectures}
    return {"versions": compiler_versions(), "kernels": kernels, "faults": [*failures, *broken]}


def _one_line(error):
    """Where a compiler's error says what and why; the source code is between."""
    text = " ".join(error.split())
    return text if len(text) < 320 else f"{text[:140]} ... {text[-160:]}"


def lines(version: str, found: dict) -> list[str]:
    """A line an architecture: kernels that compile, those that do not, and those beyond each limit."""
    text = []
    for arch, kernels in found["kernels"].items():
        faults = [fault for fault in found["faults"] if re.search(rf"\bsm_{arch}\b", fault)]
        cells = [kernels, sum("does not compile" in fault for fault in faults)]
        cells += [sum(f"(limit: {limit} " in fault for fault in faults) for limit in LIMITED.values()]
        text.append(f"{version:8} sm_{arch:<5}" + "".join(f"{cell:>12}" for cell in cells))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m minibert_kernels.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--tritons", type=Path, default=Path(".tritons"), metavar="FOLDER")
    parser.add_argument("--versions", nargs="+", default=SUPPORTED, help=f"by default {' '.join(SUPPORTED)}")
    parser.add_argument("--arch", type=int, nargs="+", default=(80, 90, 100, 120))
    parser.add_argument("--only", default="", metavar="PATTERN", help='of "op direction plan"')
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--here", action="store_true", help="with this process's Triton alone, as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(here(tuple(args.arch), args.only, args.processes)))
        return 0
    print(f"{'triton':8} {'arch':8}" + "".join(f"{name:>12}" for name in ("kernels", "failures", *LIMITED)))
    broken = []
    for version in args.versions:
        try:
            found = compiled_by(version, args.tritons.resolve(), args.arch, args.only, args.processes)
        except RuntimeError as error:
            broken.append(str(error))
            continue
        print("\n".join(lines(version, found)), flush=True)
        names = ", ".join(f"{name} {own}" for name, own in found["versions"].items())
        broken += [f"{names}: {fault}" for fault in found["faults"]]
    for fault in broken:
        print(f"matrix: error: {fault}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
