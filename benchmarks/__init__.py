"""Benchmarks beside the reference implementations: `python -m benchmarks --help`. Nothing imports them."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler writes two lines for every measured allocation
