"""What compiled kernels may cost: the limits of xray_limits.json, and what breaks them."""

import json
import re
from pathlib import Path

from ._triton import triton

LIMITS = Path(__file__).with_name("xray_limits.json")
KNOWN = ("spilled_bytes", "serialized_matrix_instructions", "missing_matrix_instructions", "bytes_over_minimum")
# the mnemonic with which each architecture multiplies matrices at full speed
MATRIX_KIND = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def load_limits(path: str | Path = LIMITS) -> dict:
    """The limits, and their exceptions but for those of another Triton.

    Raises:
        ValueError: a limit is unknown, or an exception does not say match, limit, value and reason; `triton` it may.
    """
    limits = load_json(path)
    whole = isinstance(limits, dict) and set(limits) == {"limits", "exceptions"}
    if not whole or not isinstance(limits["limits"], dict) or set(limits["limits"]) != set(KNOWN):
        raise ValueError(f"{path}: expected limits ({', '.join(KNOWN)}) and exceptions")
    for exception in limits["exceptions"]:
        names = set(exception) - {"triton"} if isinstance(exception, dict) else set()
        if names != {"match", "limit", "value", "reason"} or exception["limit"] not in KNOWN:
            raise ValueError(f"{path}: {exception} is not match, limit (one of the limits), value, reason (and triton)")
        check_pattern(exception["match"], f"{path}: match=")
    for value in (*limits["limits"].values(), *(exception["value"] for exception in limits["exceptions"])):
        if not isinstance(value, int | float):
            raise ValueError(f"{path}: a limit or value of {value!r} is no number")
    version = getattr(triton, "__version__", None)
    limits["exceptions"] = [one for one in limits["exceptions"] if one.get("triton", version) == version]
    return limits


def faults(rows: list, counts: list[dict], limits: dict, whole: bool = False) -> list[str]:
    """A sentence for each limit that is broken; of the whole table also for each exception that nothing needs."""
    found, needed = [], set()
    for name, limit, value, text in _measured(rows, counts):
        most = limits["limits"][limit]
        if value <= most:
            continue
        for number, exception in enumerate(limits["exceptions"]):
            if exception["limit"] == limit and re.fullmatch(exception["match"], name):
                needed.add(number)
                most = max(most, exception["value"])
        if value > most:
            found.append(f"{name} {text} (limit: {limit} of {most:g})")
    if whole:
        for number, exception in enumerate(limits["exceptions"]):
            if number not in needed:
                found.append(f"the exception {exception['match']!r} of {exception['limit']} is no longer needed")
    return found


def _measured(rows, counts):
    """(name, limit, value, what is said of it) of all that has a limit."""
    for row in rows:
        yield row.name, "spilled_bytes", row.spilled_bytes, f"spills {row.spilled_bytes} bytes"
        if row.serialized:
            yield row.name, "serialized_matrix_instructions", 1, "has serialized matrix instructions"
        if row.matmul:
            kind = MATRIX_KIND[row.arch]
            yield row.name, "missing_matrix_instructions", int(kind not in row.mma), f"has no {kind} instruction"
    for count in counts:
        for direction, key in (("fwd", "forward_over_minimum"), ("bwd", "backward_over_minimum")):
            name = f"{count['op']} {direction} {count['label']}".strip()
            yield name, "bytes_over_minimum", count[key], f"moves {count[key]:.3f} times its least bytes"


def load_json(path: str | Path):
    """Raises: ValueError: it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def check_pattern(pattern, where: str = "") -> None:
    """Raises: ValueError: it is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where}{pattern!r} is no regular expression: {error}") from None
