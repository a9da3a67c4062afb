"""Spans of tags, and what is right of them: seqeval's strict mode, which on sound tags is CoNLL's F1.

iob1   I- inside; B- only where a span follows one of its own kind
iob2   B- begins, I- goes on
iobes  B- I- E-, or S- for a single word
"""

from collections import Counter
from collections.abc import Iterable, Sequence

SCHEMES = {"iob1": "BI", "iob2": "BI", "iobes": "BIES"}  # the marks of each, beside O
Span = tuple[str, int, int]  # kind, first word, last word


def is_tag(tag: str, scheme: str | None = None) -> bool:
    """Whether it is O, or a mark of the scheme, of any where None, and a kind: `B-city`."""
    mark, _, kind = tag.partition("-")
    return tag == "O" or (len(mark) == 1 and mark in SCHEMES[scheme or "iobes"] and kind != "")


def scheme_of(sentences: Iterable[Sequence[str]]) -> str:
    """The scheme that tags are in: with E- or S- it is iobes; else iob1 where more spans begin with I- than with B-
    behind something else than their own kind, which sound iob2 and sound iob1 never have."""
    begun = Counter()
    for tags in sentences:
        before = None
        for mark, _, kind in (tag.partition("-") for tag in tags):
            if mark in ("E", "S"):
                return "iobes"
            begun[mark] += kind != before
            before = kind if mark != "O" else None
    return "iob1" if begun["I"] > begun["B"] else "iob2"


def spans(tags: Sequence[str], scheme: str) -> list[Span]:
    """The spans of a sentence, in order; tags that make none in this scheme are outside."""
    found: list[Span] = []
    kind, first, before = None, 0, ("", "")
    for at, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        # in iob1, a B- that does not part two spans of its kind begins none, and ends no B- before it
        parts = scheme != "iob1" or (before[0] in ("B", "I") and name == before[1])
        if kind is not None and (name != kind or mark not in ("I", "E")):
            if scheme != "iobes" and (parts or (before[0], mark) != ("B", "B")):
                found.append((kind, first, at - 1))
            kind = None
        if kind is not None and mark == "E":
            found.append((kind, first, at))
            kind = None
        elif mark == "S" and scheme == "iobes":
            found.append((name, at, at))
        elif (mark == "B" and parts) or (mark == "I" and kind is None and scheme == "iob1"):
            kind, first = name, at
        before = mark, name
    return found


def span_scores(targets: Sequence[Sequence[str]], given: Sequence[Sequence[str]], scheme: str) -> dict:
    """precision, recall and f1 over all spans (micro), macro_f1 over their kinds, and per_class; 0.0 where 0 / 0."""
    hits, there, found = Counter(), Counter(), Counter()
    for one, other in zip(targets, given, strict=True):
        right, said = set(spans(one, scheme)), set(spans(other, scheme))
        for counter, part in ((hits, right & said), (there, right), (found, said)):
            counter.update(kind for kind, _, _ in part)
    kinds = sorted(there | found)
    per_class = {kind: ratios(hits[kind], found[kind], there[kind]) | {"support": there[kind]} for kind in kinds}
    macro = sum(row["f1"] for row in per_class.values()) / max(1, len(kinds))
    return ratios(hits.total(), found.total(), there.total()) | {"macro_f1": macro, "per_class": per_class}


def ratios(hits: int, found: int, there: int) -> dict[str, float]:
    """precision, recall and f1 of `hits` that are right among `found`, of `there`."""
    return {
        "precision": hits / found if found else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (found + there) if found + there else 0.0,
    }
