"""What is not equal is not timed: a provider's results are judged before the clock starts.

In float32 a result may differ from the reference by rounding alone, so that a wrong formula is found: on the weights of
`peers.random_weights`, a tanh GELU in place of the erf form in a single layer is four times the limit, and what merely
rounds otherwise a seventh of it. In lower precision it may be FACTOR times as far from the float32 truth as the
reference itself is in that precision.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

VALUE_LIMIT, GRADIENT_LIMIT = 1e-5, 2e-4  # float32; the worst element, over the largest of the reference
FACTOR = 2.0  # lower precision; root mean square, against the reference's own


class Refused(ValueError):
    """A provider that is not timed, and why."""


class Once:
    """What was made under a key, or the error that this ended with: nobody is built or judged twice."""

    def __init__(self):
        self._kept: dict[Hashable, tuple[Any, Exception | None]] = {}

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            try:
                self._kept[key] = make(), None
            except Exception as error:
                self._kept[key] = None, error
        made, error = self._kept[key]
        if error is not None:
            raise error
        return made


def judge(
    name: str, actual: dict[str, Tensor], truth: dict[str, Tensor], same: dict[str, Tensor] | None = None
) -> float:
    """The largest error of a provider's results over its limit, at most 1.

    Args:
        name: of the provider, for the message.
        actual, truth: tensors by what they are; gradients have names that begin with "grad ". truth is float32 or
            float64.
        same: the reference's results in the provider's precision, where that is below float32.
    Raises:
        Refused: a tensor is missing, has another shape, is not finite, or differs by more than the limit.
    """
    worst = 0.0
    for what, want in truth.items():
        got = actual.get(what)
        if got is None:
            raise Refused(f"{name}: gives no {what}")
        if got.shape != want.shape:
            raise Refused(f"{name}: {what} has shape {list(got.shape)}, expected {list(want.shape)}")
        if not got.isfinite().all():
            raise Refused(f"{name}: {what} is not finite")
        want = want.double()
        if same is None:
            limit = GRADIENT_LIMIT if what.startswith("grad ") else VALUE_LIMIT
            error = float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-12))
        else:
            # one number may be right by luck: half of its last place is always granted
            eps = torch.finfo(same[what].dtype).eps
            rounding = want.to(same[what].dtype).double() - want if want.numel() > 1 else want * eps / 2
            limit = FACTOR * max(_rms(same[what].double() - want), _rms(rounding), 1e-12)
            error = _rms(got.double() - want)
        if not error <= limit:
            raise Refused(f"{name}: {what} differs by {error:.1e}, the limit is {limit:.1e}")
        worst = max(worst, error / limit)
    return worst


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def grouped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by parameter name as one vector a layer, for `judge`: some of a layer, the key bias's above all, are
    zero but for rounding and have no scale of their own."""
    groups: dict[str, list[Tensor]] = {}
    for name in sorted(gradients):
        parts = name.split(".")
        place = ".".join(parts[: 1 + next((i for i, part in enumerate(parts) if part.isdigit()), 0)])
        groups.setdefault(f"grad {place}", []).append(gradients[name].flatten())
    return {place: torch.cat(members) for place, members in groups.items()}
