"""A pretraining in phases: several runs in one, each from the weights and moments that the one before ended with."""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..config import one_of
from ..train import METRICS, phases
from ..train.checkpoint import steps
from ..train.recipes import SHARES


def typed_phases(given: Sequence[Mapping], parser) -> list[dict[str, Any]]:
    """The phases with values of the types that their flags have; what is no flag is left for `plan_phases`.

    Raises:
        ValueError: a value is of another type; names the phase.
    """
    flags = {flag.replace("-", "_") for flag in parser.flags} - {"config"}
    typed = []
    for number, phase in enumerate(given, 1):
        known = {name: value for name, value in phase.items() if name in flags}
        try:
            values = parser.parse_object({"data": ["-"], "out": "-"} | known, defaults=False).as_dict()
        except ValueError as error:
            raise ValueError(f"phase {number}: {error}") from None
        typed.append({name: values[name] if name in known else value for name, value in phase.items()})
    return typed


def plan_phases(
    given: Sequence[Mapping], options: Mapping[str, Any], may_differ: Collection[str]
) -> list[dict[str, Any]]:
    """What each phase says for itself, with its part of the steps or minutes that are given for all.

    Raises:
        ValueError: a phase says what may not differ, or has nothing to be shared out by.
    """
    if None not in (options["steps"], options["minutes"]):
        raise ValueError(f"steps={options['steps']} and minutes={options['minutes']}: give one of the two")
    for number, phase in enumerate(given, 1):
        for name in phase:
            if name in options and name not in may_differ:
                raise ValueError(f"phase {number}: {name} is the same in all phases: give it beside them")
            one_of(f"phase {number}: option", name, may_differ)
    given = [dict(phase) for phase in given]
    for name in SHARES:
        if options[name] is not None:
            given = share_out(given, name, options[name])
    return given


def share_out(given: Sequence[Mapping], name: str, total: float) -> list[dict[str, Any]]:
    """`total` steps or minutes, as `name` says, in proportion to the phases' own steps or minutes."""
    own = [[phase.get(unit) or 0 for phase in given] for unit in SHARES]
    shares = next((parts for parts in own if min(parts) > 0), None)
    if shares is None:
        raise ValueError(f"{name}={total} cannot be shared out: give every phase its steps, or every one its minutes")
    edges = [total * part / sum(shares) for part in accumulate(shares, initial=0)]
    if name == "steps":
        edges = [round(edge) for edge in edges]
    return [
        {key: value for key, value in phase.items() if key not in SHARES} | {name: last - first}
        for phase, (first, last) in zip(given, pairwise(edges), strict=True)
    ]


def refuse_other_form(path: Path, in_phases: bool) -> None:
    """A run in phases is not resumed as one without them, nor the other way round."""
    if in_phases and ((path / METRICS).exists() or steps(path)):
        raise ValueError(f"{path} holds a run without phases: resume it as that, or choose another output")
    if not in_phases and phases(path):
        raise ValueError(f"{path} holds a run in phases: resume it with those, or choose another output")
