"""What several tasks share: names of labels, lengths, probabilities, and what a prediction repeats of its texts."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import one_of
from .base import Example, Mistake

NOTHING = "(none)"  # in a verdict, where no class is right or none was said


def label_names(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """The distinct labels, numbers in their order, else alphabetical.

    Raises:
        ValueError: fewer than two.
    """
    names = set(labels)
    if len(names) < 2:
        seen = f"every label is {names.pop()!r}" if names else "no example has a label"
        raise ValueError(f"{where.rpartition(':')[0]}: {seen}: two classes are needed")
    try:
        return tuple(sorted(sorted(names), key=float))
    except ValueError:
        return tuple(sorted(names))


def pair_fields(texts: Sequence[str], text_column: str | None, pair_column: str | None) -> dict[str, str]:
    """The record of a text, or of a pair, under the names of its columns."""
    if len(texts) > 2 or (len(texts) == 2 and text_column and not pair_column):
        raise ValueError(f"the model reads {'one text' if text_column else 'a text or a pair'}, got {len(texts)} texts")
    if len(texts) == 2 and not pair_column:
        return dict(zip(("sentence1", "sentence2"), texts, strict=True))
    return dict(zip((text_column or "text", pair_column), texts, strict=False))


def class_of(example: Example, label: str, known: Mapping[str, int], field: str = "label") -> int:
    """The number of a class; ValueError, naming file, line and field, if the label is none."""
    if label not in known:
        one_of(f"{example.where}: {field}", label, known)
    return known[label]


def check_length(count: int, limit: int, example: Example) -> None:
    """Refuse a row of more tokens than the model takes."""
    if count > limit:
        raise ValueError(f"{example.where}: the text has {count} tokens, the model takes {limit}: use --truncate")


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def texts_of(example: Example) -> dict[str, Any]:
    """What a prediction repeats of its example."""
    return dict(example.extra) | dict(zip(("text", "text_pair"), example.texts, strict=False))


def read_again(prediction: Mapping[str, Any]) -> str:
    return " | ".join(prediction[name] for name in ("text", "text_pair") if name in prediction)


def marked(text: str, marks: Sequence[tuple[int, int, str]]) -> tuple[tuple[str, str], ...]:
    """A text cut where marks begin and end, the parts of a `Mistake`.

    marks: first character, the one behind the last, and the note; they may overlap.
    """
    cuts = sorted({0, len(text), *(end for first, last, _ in marks for end in (first, last))})
    return tuple(
        (text[a:b], ", ".join(note for first, last, note in marks if first <= a and b <= last))
        for a, b in itertools.pairwise(cuts)
    )


def distance(value: float, target: float, prediction: Mapping[str, Any]) -> Mistake | None:
    """What is wrong about a number: how far off it is."""
    error = abs(value - target)
    whole = ((read_again(prediction), ""),)
    return Mistake((error,), f"off by {error:.3g}", f"{value:.4g}", f"{target:.4g}", whole) if error else None
