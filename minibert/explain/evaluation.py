"""What a fine-tuned model reaches on labelled examples, and what it gets wrong, as one HTML page."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import BertConfig
from ..tasks import Example, Task, metrics
from ..tasks.base import Mistake, Verdict
from ..tasks.labels import NOTHING
from .page import colour, document, safe

MOST = 50  # mistakes on the page
FEW = 20  # classes of a confusion matrix, and pairs of the table that stands for those of more classes
LONG, PIECES = 600, 200  # characters of a piece of a text, pieces of a text
NAME = 60  # characters of a class
SIDE = 240  # of the reliability diagram
STYLE = """
.matrix td { text-align: center; min-width: 1.6rem; border: 1px solid var(--line) } .matrix th { border: 0 }
.matrix .said { writing-mode: vertical-rl; transform: rotate(180deg); padding: .6rem .2rem }
.matrix .right, .num { text-align: right } .num { font-variant-numeric: tabular-nums } .best { font-weight: bold }
svg { overflow: visible; margin: .5rem 1rem 2.5rem 3rem; font-size: 11px; fill: currentColor }
.mistake { border-top: 1px solid var(--line); padding: .7rem 0 }
.mistake p { margin: .15rem 0; overflow-wrap: anywhere } .mistake .text { white-space: pre-wrap }
mark { color: inherit; background: rgb(220 110 20 / .25); border-radius: .2rem } mark small { padding: 0 .3rem }
"""


def render_evaluation(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
    config: BertConfig,
    title: str,
) -> str:
    """The page; every text is escaped, and what is long or many is cut: it stays below some megabytes.

    Args:
        examples, predictions: labelled, and as `Task.predict` gives them, arrays included. measured: by `Task.measure`.
    Raises:
        ValueError: the task does not say what a mistake is, see `Task.mistake`.
    """
    pairs = list(zip(examples, predictions, strict=True))
    verdicts = [verdict for pair in pairs for verdict in task.verdicts(*pair, config)]
    found = [(one, example) for example, p in pairs if (one := task.mistake(example, p, config)) is not None]
    found.sort(key=lambda pair: pair[0].severity, reverse=True)
    about = (inspect.getdoc(task) or "").partition("\n\n")[0].replace("`", "")
    parts = [f"<p>{safe(task.name)}, {len(examples):,} examples. {safe(about)}</p>", *tables(measured, task.metric)]
    return document(
        title, [*parts, confusion(verdicts, config), reliability(verdicts), *worst(found, len(pairs))], STYLE
    )


def tables(measured: Mapping[str, Any], metric: str) -> list[str]:
    """The numbers, that of the best checkpoint in bold, and a table for each dictionary of dictionaries."""
    plain = [(name, value) for name, value in measured.items() if not isinstance(value, dict)]
    found = [f"<h2>Numbers</h2>{table([], plain, metric)}"]
    for name, rows in measured.items():
        if isinstance(rows, dict) and rows:
            cells = [(row, *values.values()) for row, values in rows.items()]
            title = safe(name.replace("_", " ").capitalize())
            found.append(f"<h2>{title}</h2>{table(['', *next(iter(rows.values()))], cells)}")
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], bold: str | None = None) -> str:
    """Texts and numbers; the row that begins with `bold` is bold."""
    numeric = [isinstance(value, int | float) for value in next(iter(rows), ())]
    head = "".join(f"<th{' class=num' * n}>{safe(column)}" for column, n in zip(columns, numeric, strict=False))
    body = "".join(f"<tr{' class=best' * (row[0] == bold)}>{''.join(map(cell, row))}" for row in rows)
    return f"<div class=scroll><table><tr>{head}{body}</table></div>"


def cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f"<td class=num>{value:,.4f}" if isinstance(value, float) else f"<td class=num>{value:,}"
    return f"<td>{safe(str(value), NAME)}"


def confusion(verdicts: Sequence[Verdict], config: BertConfig) -> str:
    """The matrix of all classes where they are few, else of those in the most frequent confusions, and these."""
    counts = Counter((one.right, one.said) for one in verdicts)
    if not counts:
        return ""
    support, order = Counter(one.right for one in verdicts), config.label2id
    wrong = [(right, said, count) for (right, said), count in counts.most_common() if right != said]
    names, note, pairs = {name for pair in counts for name in pair}, "", ""
    if len(names) > FEW and not wrong:
        return f"<h2>What is taken for what</h2><p>Of {len(names):,} classes, none is taken for another.</p>"
    if len(names) > FEW:
        note = f"Of {len(names):,} classes, those that are confused most often. "
        names = list(dict.fromkeys(name for right, said, _ in wrong for name in (right, said)))[:FEW]
        rows = [(right, said, n, n / support[right]) for right, said, n in wrong[:FEW]]
        pairs = f"<h3>Most confused</h3>{table(('right', 'said', 'times', 'share of the right class'), rows)}"
    names = sorted(names, key=lambda name: (name == NOTHING, order.get(name, len(order)), name))
    head = "".join(f"<th class=said>{safe(said, NAME)}" for said in names)
    body = "".join(
        f"<tr><th class=right>{safe(right, NAME)}"
        + "".join(square(right, said, counts[right, said], support[right]) for said in names)
        for right in names
    )
    return (
        f"<h2>What is taken for what</h2><p class=note>{note}A row is the right class, a column what was said; the "
        "stronger the colour, the larger the share of the row; blue is right.</p>"
        f"<div class=scroll><table class=matrix><tr><th>{head}{body}</table></div>{pairs}"
    )


def square(right: str, said: str, count: int, support: int) -> str:
    if not count:
        return "<td>"
    share = (count / support) ** 0.5  # the root shows small shares too
    hover = f"{safe(right, NAME)} said to be {safe(said, NAME)}: {count:,} of {support:,}"
    return f'<td {colour(share if right == said else -share)} title="{hover}">{count:,}'


def reliability(verdicts: Sequence[Verdict]) -> str:
    """The share that is right by the probability that was said, a bar a bin and a dot at its mean probability."""
    said = [one for one in verdicts if one.probability is not None]
    if not said:
        return ""
    # one column, what was said: class 0 is right
    labels, shares = [int(one.right != one.said) for one in said], [[one.probability] for one in said]
    bins = metrics.reliability(labels, shares)
    most = max(one["count"] for one in bins)
    bars = "".join(bar(one, 2 + 5 * (one["count"] / most) ** 0.5) for one in bins)
    ticks = "".join(
        f"<text x={SIDE * share} y={SIDE + 16} text-anchor=middle>{share}</text>"
        f"<text x=-8 y={SIDE * (1 - share) + 4} text-anchor=end>{share}</text>"
        for share in (0, 0.5, 1)
    )
    return (
        "<h2>How sure, how often right</h2><p class=note>Of answers of probability 0.8, 8 in 10 should be right: a dot "
        "on the line; the larger, the more answers. The mean distance from the line, the expected calibration error "
        f"(ECE), is {metrics.ece(labels, shares):.4f} over {len(said):,} answers.</p>"
        f"<svg width={SIDE} height={SIDE} role=img aria-label='reliability diagram'>"
        f"<path d='M0 0V{SIDE}H{SIDE}' fill=none stroke=currentColor></path>{bars}"
        f"<path d='M0 {SIDE}L{SIDE} 0' stroke=currentColor stroke-dasharray=4></path>{ticks}"
        f"<text x={SIDE / 2} y={SIDE + 34} text-anchor=middle>probability that was said</text>"
        f"<text transform='translate(-34 {SIDE / 2}) rotate(-90)' text-anchor=middle>share that is right</text></svg>"
    )


def bar(one: Mapping[str, float], radius: float) -> str:
    """A bin of `metrics.reliability`."""
    left, width = SIDE * one["from"], SIDE * (one["to"] - one["from"]) - 1
    x, y = SIDE * one["confidence"], SIDE * (1 - one["accuracy"])
    return (
        f"<g><title>{one['count']:,} answers: said {one['confidence']:.3f}, right {one['accuracy']:.3f}</title>"
        f"<rect x={left:.1f} y={y:.1f} width={width:.1f} height={SIDE - y:.1f} fill='rgb(37 120 220 / .35)'></rect>"
        f"<circle cx={x:.1f} cy={y:.1f} r={radius:.1f} fill='rgb(37 120 220)'></circle></g>"
    )


def worst(found: Sequence[tuple[Mistake, Example]], total: int) -> list[str]:
    """The mistakes, ordered already, as many as the page shows."""
    if not found:
        return [f"<h2>Mistakes</h2><p>None: all {total:,} examples are right.</p>"]
    shown = f"Below are the {MOST} worst" if len(found) > MOST else "They are below"
    say = f"Not quite right: {len(found):,} of {total:,} examples. {shown}, the worst first."
    return [f"<h2>Worst mistakes</h2><p>{say}</p>", *(card(*pair) for pair in found[:MOST])]


def card(mistake: Mistake, example: Example) -> str:
    pieces = "".join(map(piece, mistake.parts[:PIECES])) + " …" * (len(mistake.parts) > PIECES)
    return (
        f"<section class=mistake><p><small>{safe(example.where)}</small></p><p>said <b>{safe(mistake.said, LONG)}</b> "
        f"<small>{safe(mistake.how)}</small>, right <b>{safe(mistake.right, LONG)}</b></p>"
        f"<p class=text>{pieces}</p></section>"
    )


def piece(part: tuple[str, str]) -> str:
    text, note = safe(part[0], LONG), safe(part[1], NAME)
    return f"<mark>{text}<small>{note}</small></mark>" if note else text
