"""Which steps must not reach the weights."""

import math
from collections.abc import Mapping

MEMORY = 0.98  # of the running mean of the loss: about fifty steps


class Guard:
    """Knows a bad step by its numbers: not finite, or a loss above `spike` times the mean of the last fifty or so.

    Args:
        skip: how many bad steps in a row are passed over; one more is an error.
        spike: None looks for what is not finite only.
    """

    def __init__(self, skip: int, spike: float | None):
        self.skip, self.spike = skip, spike
        self.state = {"mean": None, "skipped": 0}

    def fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and this norm of the gradient, if anything."""
        mean = self.state["mean"]
        if not math.isfinite(norm):
            return f"the norm of the gradient is {norm}"
        if self.spike is not None and mean is not None and loss > self.spike * mean:
            return f"loss is {loss:.4g}, above {self.spike:g} times its mean of {mean:.4g},"
        return None

    def passes(self) -> bool:
        """Count a bad step; true where it may be passed over."""
        self.state["skipped"] += 1
        return self.state["skipped"] <= self.skip

    def good(self, loss: float) -> None:
        """Take in the loss of a step that was made."""
        mean = self.state["mean"]
        self.state = {"mean": loss if mean is None else MEMORY * mean + (1 - MEMORY) * loss, "skipped": 0}

    def load(self, state: Mapping) -> None:
        self.state |= state
