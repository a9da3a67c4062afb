"""Learning rates as pure functions of progress: the share of a run that is done, by its steps or by the clock.

Of n steps, step s (from 0) is at (s + 1) / (n + 1): progress 0 is the step before the first, 1 the one after the last.
"""

import math


def linear(left: float, decay: float, power: float) -> float:
    """A line to 0."""
    return left


def constant(left: float, decay: float, power: float) -> float:
    """1 to the end."""
    return 1.0


def cosine(left: float, decay: float, power: float) -> float:
    """Half a wave to 0 (Loshchilov & Hutter, 2017)."""
    return (1 - math.cos(math.pi * left)) / 2


def polynomial(left: float, decay: float, power: float) -> float:
    """A power of the line; 0.5 is what NVIDIA's BERT is trained with."""
    return left**power


def trapezoid(left: float, decay: float, power: float) -> float:
    """1, and at the end down by 1 - √x (Hägele et al., 2024)."""
    return 1 - math.sqrt(max(0.0, 1 - left / decay))


# what is left of the way behind the warm-up, from 1 to 0 -> share of the peak rate, from 1 to 0
SCHEDULES = {
    "linear": linear,
    "constant": constant,
    "cosine": cosine,
    "polynomial": polynomial,
    "trapezoid": trapezoid,
}


def factor(
    schedule: str, progress: float, warmup: float, *, final: float = 0.0, decay: float = 0.1, power: float = 1.0
) -> float:
    """The share of the peak rate at `progress`: up a line from 0, 1 at `warmup`, then as the schedule says to `final`.

    Args:
        progress: in [0, 1]. warmup: in [0, 1), where the peak is.
        decay: the share of the whole in which a trapezoid falls, though not before its peak. power: of the polynomial.
    """
    if progress < warmup:
        return progress / warmup
    behind = 1 - warmup
    return final + (1 - final) * SCHEDULES[schedule]((1 - progress) / behind, min(decay / behind, 1.0), power)


def micro_batches(accumulate: int, ramp: float, progress: float) -> int:
    """Micro-batches of a step: from 1 in proportion to progress, `accumulate` from `ramp` on."""
    return max(1, round(accumulate * min(1.0, progress / ramp))) if ramp else accumulate
