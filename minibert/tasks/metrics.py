"""What predictions are worth, in plain NumPy. Conventions are scikit-learn's; undefined cases are in the docstrings."""

import math
from collections.abc import Sequence

import numpy as np


def confusion(labels, predictions, num_labels: int) -> np.ndarray:
    """C [num_labels, num_labels] int64: C[i, j] examples of class i were predicted to be j.

    Args:
        labels, predictions: [N] integers in [0, num_labels).
    Raises:
        ValueError: no examples, different lengths, or a class out of range.
    """
    labels, predictions = _pair(labels, predictions, np.int64)
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= num_labels:
            raise ValueError(f"{name} range from {values.min()} to {values.max()}: expected 0 to {num_labels - 1}")
    return np.bincount(labels * num_labels + predictions, minlength=num_labels**2).reshape(num_labels, num_labels)


def accuracy(labels, predictions) -> float:
    """Share of equal pairs."""
    labels, predictions = _pair(labels, predictions, np.int64)
    return float((labels == predictions).mean())


def precision_recall_f1(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class of a confusion table: TP / (TP + FP), TP / (TP + FN), 2 TP / (2 TP + FP + FN); 0.0 where 0 / 0."""
    hits, predicted, actual = table.diagonal(), table.sum(0), table.sum(1)
    return _ratio(hits, predicted), _ratio(hits, actual), _ratio(2 * hits, predicted + actual)


def matthews(table: np.ndarray) -> float:
    """Matthews' correlation; for more than two classes Gorodkin's (2004) R_K.

    With c correct of s examples, t_k true and p_k predicted of class k:
    (c s - Σ t_k p_k) / sqrt((s² - Σ p_k²) (s² - Σ t_k²)). 0.0 where labels or predictions are of one class only.
    """
    # python integers: the fourth powers under the root pass 2**63 at 55,000 examples
    predicted, actual = (list(map(int, table.sum(axis))) for axis in (0, 1))
    total, hits = sum(actual), int(table.trace())
    above = hits * total - sum(t * p for t, p in zip(actual, predicted, strict=True))
    below = (total**2 - sum(p * p for p in predicted)) * (total**2 - sum(t * t for t in actual))
    return float(above / below**0.5) if below else 0.0


def classification(labels, predictions, names: Sequence[str]) -> dict:
    """Everything about single-label predictions.

    precision, recall and f1 are those of the second class where there are two, else the plain mean (macro) over the
    classes that occur among labels or predictions; macro_f1 is that mean in either case.

    Args:
        labels, predictions: [N] integers in [0, len(names)).
        names: of the classes.
    Returns:
        accuracy, precision, recall, f1, macro_f1, mcc; and per_class: a dict a class with precision, recall, f1 and
        support.
    """
    table = confusion(labels, predictions, len(names))
    scores = np.stack(precision_recall_f1(table))  # [3, num_labels]
    support = table.sum(1)
    macro = scores[:, (support + table.sum(0)) > 0].mean(1)
    mean = scores[:, 1] if len(names) == 2 else macro
    words = ("precision", "recall", "f1")
    per_class = {
        name: dict(zip(words, map(float, scores[:, i]), strict=True)) | {"support": int(support[i])}
        for i, name in enumerate(names)
    }
    averages = dict(zip(words, map(float, mean), strict=True)) | {"macro_f1": float(macro[2])}
    return {"accuracy": accuracy(labels, predictions), **averages, "mcc": matthews(table), "per_class": per_class}


def multi_label(targets, predictions, names: Sequence[str]) -> dict:
    """Of labels of which an example may have any number.

    Args:
        targets, predictions: [N, L] 0 or 1.
    Returns:
        precision, recall and f1 over all pairs of example and label (micro), macro_f1, exact (the share of examples
        with every label right), and per_class as `classification`. 0.0 where 0 / 0.
    """
    targets, predictions = np.asarray(targets, dtype=bool), np.asarray(predictions, dtype=bool)
    if targets.ndim != 2 or targets.shape != predictions.shape or not len(targets):
        raise ValueError(f"targets and predictions have shapes {list(targets.shape)} and {list(predictions.shape)}")
    hits, given, there = (targets & predictions).sum(0), predictions.sum(0), targets.sum(0)
    scores = np.stack([_ratio(hits, given), _ratio(hits, there), _ratio(2 * hits, given + there)])  # [3, L]
    total = [np.array([value.sum()]) for value in (hits, given, there)]
    words = ("precision", "recall", "f1")
    micro = [_ratio(total[0], total[1]), _ratio(total[0], total[2]), _ratio(2 * total[0], total[1] + total[2])]
    per_class = {
        name: dict(zip(words, map(float, scores[:, i]), strict=True)) | {"support": int(there[i])}
        for i, name in enumerate(names)
    }
    averages = {word: float(value[0]) for word, value in zip(words, micro, strict=True)}
    exact = float((targets == predictions).all(1).mean())
    return {**averages, "macro_f1": float(scores[2].mean()), "exact": exact, "per_class": per_class}


def reliability(labels, shares, bins: int = 15) -> list[dict]:
    """Predictions by how sure they are, in `bins` of equal width: of each that has any, `count`, the mean probability
    of what was said, `confidence`, and the share that is right, `accuracy`.

    Args:
        labels: [N] classes. shares: [N, K] probabilities.
    """
    labels, shares = _classes(labels, shares)
    sure, right = shares.max(1), shares.argmax(1) == labels
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    groups = [(b, place == b) for b in range(bins) if (place == b).any()]
    return [
        {
            "from": b / bins, "to": (b + 1) / bins, "count": int(there.sum()), "confidence": float(sure[there].mean()),
            "accuracy": float(right[there].mean()),
        }
        for b, there in groups
    ]  # fmt: skip


def ece(labels, shares, bins: int = 15) -> float:
    """Expected calibration error (Naeini et al., 2015): the mean over the examples of |confidence - accuracy| in the
    bins of `reliability`."""
    rows = reliability(labels, shares, bins)
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(labels)


def brier(labels, shares) -> float:
    """Brier's (1950) score: the mean over the examples of Σ_k (p_k - [k is right])², from 0 to 2."""
    labels, shares = _classes(labels, shares)
    return float(((shares - np.eye(shares.shape[1])[labels]) ** 2).sum(1).mean())


def temperature(labels, logits) -> float:
    """The number from 0.01 to 100 by which to divide logits so that the labels become likeliest (Guo et al., 2017).

    With β = 1 / temperature, Σ log Σ_k exp(β z_k) - β z_label is convex: where its slope changes sign is bisected.
    """
    labels, logits = _classes(labels, logits)
    chosen, (low, high) = logits[np.arange(len(labels)), labels], (-math.log(100), math.log(100))
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(math.exp(middle) * (logits - logits.max(1, keepdims=True)))
        expected = (weights * logits).sum(1) / weights.sum(1)
        low, high = (low, middle) if (expected - chosen).sum() > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def auroc(labels, scores) -> float:
    """The probability that a true example scores above a false one, equal scores counting half; nan without both.

    Args:
        labels: [N] true or false. scores: [N] numbers.
    """
    labels, scores = _pair(labels, scores, np.float64)
    true = labels > 0
    n, m = int(true.sum()), int((~true).sum())
    if not n or not m:
        return float("nan")
    return float((_ranks(scores)[true].sum() - n * (n + 1) / 2) / (n * m))


def mse(targets, predictions) -> float:
    """Mean squared error."""
    targets, predictions = _pair(targets, predictions, np.float64)
    return float(((targets - predictions) ** 2).mean())


def pearson(targets, predictions) -> float:
    """Σ (x - x̄)(y - ȳ) / sqrt(Σ (x - x̄)² Σ (y - ȳ)²); nan where one side is constant, a single example included."""
    x, y = _pair(targets, predictions, np.float64)
    if (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))


def spearman(targets, predictions) -> float:
    """Pearson's correlation of the ranks, where equal values share the mean of their ranks; nan as there."""
    targets, predictions = _pair(targets, predictions, np.float64)
    return pearson(_ranks(targets), _ranks(predictions))


def regression(targets, predictions) -> dict[str, float]:
    """pearson, spearman and mse of [N] numbers."""
    return {
        "pearson": pearson(targets, predictions),
        "spearman": spearman(targets, predictions),
        "mse": mse(targets, predictions),
    }


def _classes(labels, values) -> tuple[np.ndarray, np.ndarray]:
    labels, values = np.asarray(labels), np.asarray(values, dtype=np.float64)
    if labels.ndim != 1 or values.ndim != 2 or len(labels) != len(values) or not len(labels):
        shapes = f"{list(labels.shape)} and {list(values.shape)}"
        raise ValueError(f"labels and scores have shapes {shapes}: expected [N] and [N, K], N > 0")
    return labels, values


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(len(below)), where=below > 0)


def _pair(a, b, dtype) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"labels and predictions have shapes {list(a.shape)} and {list(b.shape)}: expected the same [N], N > 0"
        )
    return a.astype(dtype), b.astype(dtype)
