"""Triton, or stand-ins that let the kernel files import where it is missing (torch's CPU wheel, not on Linux)."""

try:
    import triton
    import triton.language as tl
except ImportError:

    class triton:
        knobs = None

        @staticmethod
        def jit(fn):
            return fn

    class tl:
        constexpr = None


AVAILABLE = triton.knobs is not None
