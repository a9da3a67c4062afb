"""Triton, or stand-ins that let the kernel files import where it is missing (torch's CPU wheel, not on Linux)."""

import re
import subprocess
from functools import cache

try:
    import triton
    import triton.language as tl
except ImportError:

    class triton:
        knobs = None

        @staticmethod
        def jit(fn=None, **options):
            return fn or (lambda fn: fn)

    class tl:
        class constexpr:
            def __init__(self, value):
                self.value = value


AVAILABLE = triton.knobs is not None
# the Triton that each torch requires, and all that every kernel is compiled with (`make triton-matrix`)
REQUIRED_BY_TORCH = {"2.11": "3.6.0", "2.13": "3.7.1", "2.14": "3.8.0"}
SUPPORTED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


@cache
def compiler_versions() -> dict[str, str]:
    """The versions that decide what a kernel becomes: of Triton, and of the assemblers that it calls.

    `ptxas` makes the code of sm_80 and sm_90, `ptxas-blackwell` that of sm_100 and up; from Triton 3.9 on also that of
    sm_90. TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH take the place of those in Triton's wheel. Empty without
    Triton.
    """
    if not AVAILABLE:
        return {}
    found = {"triton": triton.__version__}
    for name in ("ptxas", "ptxas-blackwell"):
        try:
            path = getattr(triton.knobs.nvidia, name.replace("-", "_")).path
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            found[name] = re.search(r"\bV(\d[\d.]*)", text)[1]
        except (RuntimeError, OSError, subprocess.CalledProcessError, AttributeError, TypeError):
            found[name] = "not found"
    return found
