"""Spans of tags, and what is right of them: seqeval's strict mode, CoNLL's F1.

iob1   I- inside; B- only where a span follows one of its kind
iob2   B- begins, I- goes on
iobes  B- I- E-, or S- for a single word
"""

from collections import Counter
from collections.abc import Iterable, Sequence

SCHEMES = ("iob1", "iob2", "iobes")
Span = tuple[str, int, int]  # kind, first word, last word


def scheme_of(tags: Iterable[str]) -> str:
    """The scheme that a set of tags is in: with E- or S- it is iobes, without B- iob1, else iob2."""
    marks = {tag.partition("-")[0] for tag in tags}
    if marks & {"E", "S"}:
        return "iobes"
    return "iob2" if "B" in marks or "I" not in marks else "iob1"


def spans(tags: Sequence[str], scheme: str) -> list[Span]:
    """The spans of a sentence, in order; tags that make none in this scheme are outside."""
    found: list[Span] = []
    kind, first = None, 0
    for at, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = kind is not None and name == kind and mark in ("I", "E")
        if kind is not None and not goes_on:
            if scheme != "iobes":  # there, a span without its end is none
                found.append((kind, first, at - 1))
            kind = None
        if goes_on and mark == "E":
            found.append((name, first, at))
            kind = None
        elif mark == "S" and scheme == "iobes":
            found.append((name, at, at))
        elif mark == "B" or (mark == "I" and not goes_on and scheme == "iob1"):
            kind, first = name, at
    return found


def span_scores(targets: Sequence[Sequence[str]], given: Sequence[Sequence[str]], scheme: str) -> dict:
    """precision, recall and f1 over all spans (micro), macro_f1 over their kinds, and per_class; 0.0 where 0 / 0."""
    hits, there, found = Counter(), Counter(), Counter()
    for one, other in zip(targets, given, strict=True):
        right, said = set(spans(one, scheme)), set(spans(other, scheme))
        for counter, part in ((hits, right & said), (there, right), (found, said)):
            counter.update(kind for kind, _, _ in part)
    kinds = sorted(there | found)
    per_class = {kind: _scores(hits[kind], found[kind], there[kind]) | {"support": there[kind]} for kind in kinds}
    macro = sum(row["f1"] for row in per_class.values()) / max(1, len(kinds))
    return _scores(hits.total(), found.total(), there.total()) | {"macro_f1": macro, "per_class": per_class}


def _scores(hits: int, found: int, there: int) -> dict[str, float]:
    return {
        "precision": hits / found if found else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (found + there) if found + there else 0.0,
    }
