"""Learning rates as pure functions of the step: what a resumed run computes is what the first run would have."""


def warmup_linear(step: int, total: int, warmup: int) -> float:
    """A tent: 1 at step `warmup`, and on the lines to 0 at step -1 and at step `total`.

    So every step from 0 to total - 1 has a factor in (0, 1], the first and the last included.
    """
    return _warm(step, warmup) if step < warmup else (total - step) / (total - warmup)


def warmup_constant(step: int, total: int, warmup: int) -> float:
    """Up as in `warmup_linear`, then 1."""
    return _warm(step, warmup)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


# name -> (step from 0, total steps, warm-up steps) -> factor of the peak learning rate
SCHEDULES = {"linear": warmup_linear, "constant": warmup_constant}
