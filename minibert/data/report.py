"""What a prepared corpus holds: counts, unknown rate and lengths, as numbers and as a picture."""

import json
from pathlib import Path

import numpy as np

EDGES = np.array(sorted({1 << k for k in range(25)} | {3 << k for k in range(24)}))  # tokens: 1 2 3 4 6 8 12 16 …


class Lengths:
    """A histogram of token counts: how many were at most EDGES[i], and more than the edge before."""

    def __init__(self):
        self.count = np.zeros(len(EDGES) + 1, dtype=np.int64)

    def add(self, lengths: np.ndarray) -> None:
        self.count += np.bincount(np.searchsorted(EDGES, lengths), minlength=len(self.count))

    def table(self) -> dict[str, int]:
        """Up to so many tokens: so many times; without the empty ends."""
        there = np.flatnonzero(self.count)
        names = [*map(str, EDGES), "more"]
        return {names[i]: int(self.count[i]) for i in range(there[0], there[-1] + 1)} if len(there) else {}


def describe_part(counts: dict[str, int], sentences: Lengths, documents: Lengths) -> dict:
    """The entry of one store in report.json."""
    rate = counts["unknown"] / counts["tokens"]
    lengths = {"tokens_of_a_sentence": sentences.table(), "tokens_of_a_document": documents.table()}
    return counts | {"unknown_rate": round(rate, 6)} | lengths


def figure_class() -> type:
    """matplotlib without a screen; without the package a ValueError says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs one more package: pip install 'minibert[viz]'") from None
    return Figure


def draw_report(folder: Path) -> None:
    """Draw two histograms of report.json, of sentences and documents, as lengths.png beside it."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    figure = figure_class()(figsize=(9, 3.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("sentence", "document"), strict=True):
        tables = {name: part[f"tokens_of_a_{kind}"] for name, part in report["stores"].items()}
        known = [name for name in [*map(str, EDGES), "more"] if any(name in table for table in tables.values())]
        bottom = np.zeros(len(known))
        for name, table in tables.items():
            height = np.array([table.get(edge, 0) for edge in known])
            axes.bar(range(len(known)), height, bottom=bottom, label=name, width=0.9)
            bottom += height  # the stores of a split lie on top of each other
        axes.set_xticks(range(len(known)), known, rotation=60, fontsize=7)
        axes.set(xlabel=f"tokens of a {kind}, at most", ylabel=f"{kind}s")
        if len(tables) > 1:
            axes.legend()
    figure.savefig(folder / "lengths.png", dpi=150, metadata={"Software": None})
