"""One training or inference step, seen through: time, bytes, launches, memory, and what makes the host wait."""

from .measure import Options, profile_step, run_steps
from .step import Step, synthetic_batch
from .watch import count_traffic, find_syncs, ranges

__all__ = [
    "Options",
    "Step",
    "count_traffic",
    "find_syncs",
    "profile_step",
    "ranges",
    "run_steps",
    "synthetic_batch",
]
