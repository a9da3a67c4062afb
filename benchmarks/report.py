"""A record of rows as a table in the terminal, CSV, the README's tables, one self-contained HTML page; two compared."""

import base64
import csv
import html
import io
import json
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path

KEY = (
    "stage",
    "suite",
    "case",
    "model",
    "device",
    "backend",
    "tokens",
    "longest",
    "dtype",
    "threads",
    "direction",
    "provider",
)
COLUMNS = {  # a column's title and how a row fills it; columns that no row fills are left out
    "case": lambda r: r["case"],
    "direction": lambda r: r.get("direction"),
    "provider": lambda r: r["provider"],
    "dtype": lambda r: r.get("dtype"),
    "threads": lambda r: r.get("threads"),
    "fill": lambda r: r.get("fill") and f"{r['fill']:.0%}",
    "tokens a step": lambda r: r.get("step_tokens") and f"{r['step_tokens']:,}",
    "time": lambda r: duration(r["seconds"]),
    "20 to 80 %": lambda r: f"{duration(r['seconds_low'])} to {duration(r['seconds_high'])}",
    "× x + r": lambda r: _host(r) and r.get("ratio") and f"{1 / r['ratio']:.1f}",
    "× baseline": lambda r: (
        None if _host(r) else r.get("ratio") and f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
    ),
    "tokens/s": lambda r: r.get("tokens_per_second") and f"{r['tokens_per_second']:,.0f}",
    "of matrix peak": lambda r: r.get("matrix_share") and f"{r['matrix_share']:.1%}",
    "of copy peak": lambda r: r.get("bandwidth_share") and f"{r['bandwidth_share']:.1%}",
    "TFLOP/s": lambda r: r.get("flops_per_second") and f"{r['flops_per_second'] / 1e12:.3g}",
    "extra MiB": lambda r: r.get("extra_memory") and f"{r['extra_memory'] / 2**20:,.1f}",
    "energy": lambda r: r.get("joules") and f"{r['joules']:.3g} J",
    "load": lambda r: None if r.get("load") is None else f"{r['load']:.1f}",
    # the wall clock ran on while no thread of the process did: its time, and every ratio with it, is not its own
    "waited for a core": lambda r: r.get("waited") and f"DISTURBED: {r['waited']} of {r['rounds']} rounds",
    "switches": lambda r: r.get("switches"),
}
SUITES = {
    "kernels": "Kernels", "infer": "Encoder inference", "embed": "Texts to embeddings", "train": "Pretraining step",
    "data": "Data", "host": "Host time of a call", "scaling": "Scaling of a pretraining step",
}  # fmt: skip


def _host(row):
    """Whether its baseline is the barest call there is: how many times that it takes is what matters; None for no."""
    return row["suite"] == "host" or None


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    scale, unit = next((part for part in ((1, "s"), (1e-3, "ms")) if seconds >= part[0]), (1e-6, "µs"))
    return f"{seconds / scale:.3g} {unit}"


def cells(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Titles and texts of a table of rows that were timed."""
    filled = [{title: str(text) for title, fill in COLUMNS.items() if (text := fill(row)) is not None} for row in rows]
    titles = [title for title in COLUMNS if any(row.get(title) for row in filled)]
    return titles, [[row.get(title, "") for title in titles] for row in filled]


def show(record: dict) -> None:
    """Print a record, a table a suite."""
    for suite, rows in by_suite(record).items():
        titles, texts = cells([row for row in rows if "refused" not in row])
        widths = [max(map(len, column)) for column in zip(titles, *texts, strict=True)]
        print(f"\n{SUITES.get(suite, suite)}")
        for row in (titles, *texts):
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        print("\n".join(f"not timed: {line}" for line in refusals(rows)))


def merge(records: Sequence[dict]) -> dict:
    """Records of one machine as one: the peaks and rows of all; where two measured a peak, both, by number.

    Raises:
        ValueError: they are of different machines, or two rows are of the same call.
    """
    merged, peaks = dict(records[0]), {}
    for record in records:
        if differs := machine_differs(records[0], record):
            raise ValueError(f"records of different machines are not put into one table: {differs}")
        for label, peak in record["peaks"].items():
            names = (label + f" ({number})" * (number > 1) for number in count(1))
            peaks[next(name for name in names if peaks.get(name, peak) == peak)] = peak
    merged |= {"peaks": peaks, "rows": [row for record in records for row in record["rows"]]}
    by_key(merged["rows"])
    return merged


def machine_differs(one: dict, other: dict) -> str:
    """What tells the machines of two records apart, or nothing."""
    ours, theirs = (
        {"cpu": record["machine"].get("cpu"), "cores": record["machine"].get("cores"),
         "GPU": record["machine"].get("gpu", {}).get("name", "none")} for record in (one, other)
    )  # fmt: skip
    return ", ".join(
        f"{name} {ours[name]} and {theirs[name]}" for name in ours
        if None not in (ours[name], theirs[name]) and ours[name] != theirs[name]
    )  # fmt: skip


def by_key(rows: Sequence[dict]) -> dict[tuple, dict]:
    """Rows by what they are of.

    Raises:
        ValueError: two are of the same.
    """
    found: dict[tuple, dict] = {}
    for row in rows:
        if found.setdefault(key(row), row) is not row:
            raise ValueError(f"two rows are of {named(key(row))}")
    return found


def by_suite(record: dict) -> dict[str, list[dict]]:
    suites: dict[str, list[dict]] = {}
    for row in record["rows"]:
        suites.setdefault(row["suite"], []).append(row)
    return suites


def markdown(rows: Sequence[dict]) -> str:
    """A README table: a line a case, a column a provider, minibert's and the peers' speed over the baseline's."""
    rows = [row for row in rows if "ratio" in row]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = ["| lengths | precision | " + " | ".join(providers) + " |", "|---" * (2 + len(providers)) + "|"]
    groups: dict[tuple, dict] = {}
    for row in rows:
        groups.setdefault((row["case"], row.get("dtype", ""), row.get("threads")), {})[row["provider"]] = row
    for (case, dtype, threads), found in groups.items():
        texts = [
            f"{found[p]['ratio']:.2f} ({found[p]['ratio_low']:.2f} to {found[p]['ratio_high']:.2f})"
            if p in found
            else "–"
            for p in providers
        ]
        where = f"{dtype}, {threads} thread{'s' * (threads > 1)}" if threads else dtype
        lines.append(f"| {case} | {where} | " + " | ".join(texts) + " |")
    loads = [row["load"] for row in rows if row.get("load") is not None]
    if loads:
        lines += ["", f"Load of the machine meanwhile: {min(loads):.1f} to {max(loads):.1f}."]
    disturbed = sum(bool(row.get("waited")) for row in rows)
    if disturbed:
        lines += [f"{disturbed} of {len(rows)} figures were disturbed: the process waited for a core."]
    return "\n".join(lines)


def update_readme(path: Path, record: dict) -> list[str]:
    """Write each suite's table between its marks, `<!-- infer -->` and `<!-- /infer -->`.

    Returns the suites whose marks were there.
    """
    text, done = path.read_text(encoding="utf-8"), []
    for suite, rows in by_suite(record).items():
        pattern = re.compile(rf"(<!-- {suite} -->\n).*?(<!-- /{suite} -->)", re.DOTALL)
        if pattern.search(text):
            table = markdown(rows)
            text = pattern.sub(lambda found, table=table: found[1] + table + "\n" + found[2], text)
            done.append(suite)
    path.write_text(text, encoding="utf-8")
    return done


def write_csv(record: dict, path: Path) -> None:
    names = list(dict.fromkeys(name for row in record["rows"] for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(record["rows"])


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEY)


def named(key: tuple) -> str:
    return ", ".join(str(part) for part in key if part is not None)


def compare(old: dict, new: dict, least: float = 0.03) -> tuple[list[str], int]:
    """Lines that say what changed, and how many got slower, were refused, are gone, or do other work now.

    A change is one where the bands from the 20th to the 80th percentile do not overlap and the medians differ by more
    than `least`.

    Raises:
        ValueError: the records are of different machines, or one has two rows of the same call.
    """
    if differs := machine_differs(old, new):
        raise ValueError(f"records of different machines are not compared: {differs}")
    versions = [record["machine"].get("versions", {}) for record in (old, new)]
    lines = [f"version   {name} {versions[0].get(name)}, now {versions[1].get(name)}"
             for name in dict.fromkeys((*versions[0], *versions[1])) if versions[0].get(name) != versions[1].get(name)
             ]  # fmt: skip
    before, slower = by_key(old["rows"]), 0
    for own_key, row in by_key(new["rows"]).items():
        was = before.pop(own_key, None)
        name = named(own_key)
        if was is None:
            lines.append(f"new       {name}")
        elif "refused" in row or "refused" in was:
            if ("refused" in row) != ("refused" in was):
                lines.append(f"REFUSED   {name}: {row['refused']}" if "refused" in row else f"timed now {name}")
                slower += "refused" in row
        elif row.get("work", was.get("work")) != was.get("work", row.get("work")):
            lines.append(f"OTHER     {name}: a run is {row['work']}, was {was['work']}: not compared")
            slower += 1
        else:
            change = row["seconds"] / was["seconds"] - 1
            apart = row["seconds_low"] > was["seconds_high"] or row["seconds_high"] < was["seconds_low"]
            noise = (was["seconds_high"] - was["seconds_low"]) / was["seconds"]
            if apart and abs(change) > least:
                slower += change > 0
                disturbed = ", disturbed" if row.get("waited") or was.get("waited") else ""
                lines.append(f"{'SLOWER' if change > 0 else 'faster'}    {name}: {change:+.1%} "
                             f"(noise {noise:.1%}{disturbed})")  # fmt: skip
    gone = [name for name, row in before.items() if "refused" not in row]
    lines += [f"gone      {named(name)}" for name in gone]
    return lines, slower + len(gone)


TEXT = ("case", "direction", "provider", "dtype", "op", "plan", "kernel", "limiter", "bound", "gpu")  # left-aligned
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #1a1a1a }
h1, h2 { line-height: 1.2 } table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #888 } .text { text-align: left } tbody tr:hover { background: #f3f6fa }
.scroll { overflow-x: auto } .refused { color: #a33 } img { max-width: 100%; height: auto; display: block }
"""


def write_html(record: dict, path: Path, xray: Sequence[dict] = ()) -> None:
    """One page that needs nothing beside it: plots, tables, what was refused, the machine."""
    parts = []
    for suite, rows in by_suite(record).items():
        parts.append(f"<h2>{SUITES.get(suite, suite)}</h2>")
        parts += [_image(plot, title) for title, plot in plots(suite, rows, record)]
        timed = [row for row in rows if "refused" not in row]
        parts.append(_html_table(*cells(timed)))
        parts += [f"<p class=refused>not timed: {html.escape(line)}</p>" for line in refusals(rows)]
    if xray:
        titles = [name for name in xray[0] if not isinstance(xray[0][name], dict | list)] + ["mma"]
        texts = [[_plain(row.get(name)) for name in titles] for row in xray]
        parts += ["<h2>What the compiler made of each kernel</h2>", _html_table(titles, texts)]
    facts = json.dumps({name: value for name, value in record.items() if name != "rows"}, indent=1)
    parts += ["<h2>Machine and command</h2>", f"<pre>{html.escape(facts)}</pre>"]
    name = record["machine"].get("gpu", {}).get("name") or record["machine"]["cpu"]
    title = html.escape(f"minibert on {name}, {record['machine']['date']}")
    page = "\n".join(["<!doctype html>", "<html lang=en>", "<meta charset=utf-8>",
                      "<meta name=viewport content='width=device-width'>", "<link rel=icon href='data:,'>",
                      f"<title>{title}</title>", f"<style>{STYLE}</style>", f"<h1>{title}</h1>", *parts])  # fmt: skip
    path.write_text(page, encoding="utf-8")


def refusals(rows: Sequence[dict]) -> list[str]:
    """Who was not timed and why, a line a provider and reason, with how many cases it cost."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "refused" in row:
            found.setdefault((row["provider"], row["refused"]), []).append(row["case"])
    return [f"{provider}: {reason.removeprefix(provider + ': ')} ({cases[0]}"
            + (f", and {len(cases) - 1} more" if len(cases) > 1 else "") + ")"
            for (provider, reason), cases in found.items()]  # fmt: skip


def _plain(value) -> str:
    if isinstance(value, dict):
        return " ".join(f"{number} {name}" for name, number in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _html_table(titles, texts) -> str:
    kinds = [" class=text" if title in TEXT else "" for title in titles]
    head = "".join(f"<th{kind}>{html.escape(title)}" for kind, title in zip(kinds, titles, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{html.escape(text)}" for kind, text in zip(kinds, row, strict=True))
        for row in texts
    )
    return f"<div class=scroll><table><thead><tr>{head}</thead><tbody>{body}</tbody></table></div>"


def _image(figure, title: str) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(title)}' src='data:image/svg+xml;base64,{data}'>"


def plots(suite: str, rows: Sequence[dict], record: dict):
    """(title, figure) of what a suite can show: scaling curves, a roofline, bars against the baseline."""
    timed = [row for row in rows if "refused" not in row]
    if suite == "scaling":
        yield from ((f"time against {axis}", _curves(timed, axis)) for axis in dict.fromkeys(r["axis"] for r in timed))
        return
    if any("intensity" in row for row in timed):
        yield "roofline", _roofline(timed, record["peaks"])
    with_ratio = [row for row in timed if "ratio" in row]
    if with_ratio:
        yield "speed over the baseline", _bars(with_ratio)


def _bars(rows):
    import matplotlib.pyplot as plt

    groups: dict[str, dict] = {}
    for row in rows:
        words = (
            row["case"],
            row.get("direction"),
            row.get("dtype"),
            row.get("threads") and f"{row['threads']} threads",
        )
        groups.setdefault(", ".join(str(word) for word in words if word), {})[row["provider"]] = row
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    height = 0.8 / len(providers)
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.22 * len(groups) * len(providers)))
    for index, provider in enumerate(providers):
        found = [(place, group[provider]) for place, group in enumerate(groups.values()) if provider in group]
        values = [row["ratio"] for _, row in found]
        errors = [
            [row["ratio"] - row["ratio_low"] for _, row in found],
            [row["ratio_high"] - row["ratio"] for _, row in found],
        ]
        axes.barh([place + index * height for place, _ in found], values, height, xerr=errors, label=provider,
                  color=f"C{index}", error_kw={"lw": 1})  # fmt: skip
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], groups, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("times as fast as the baseline (bars: median, lines: 20th to 80th percentile)")
    axes.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _roofline(rows, peaks):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    for dtype, peak in peaks.items():
        ridge = peak["flops"] / peak["bytes"]
        xs = [ridge / 1000, ridge, ridge * 10]
        axes.plot(xs, [min(peak["flops"], x * peak["bytes"]) for x in xs], label=f"measured roof, {dtype}")
    for index, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        found = [row for row in rows if row["provider"] == provider and row.get("intensity")]
        axes.scatter([r["intensity"] for r in found], [r["flops_per_second"] for r in found], s=18, label=provider,
                     color=f"C{index + len(peaks)}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte, at least", ylabel="FLOP/s")
    axes.legend(fontsize=8)
    return figure


def _curves(rows, axis):
    """Useful tokens/s and extra memory against one axis."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["axis"] == axis]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4))
    for index, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        found = sorted((row for row in rows if row["provider"] == provider), key=lambda row: row["value"])
        xs, style = [row["value"] for row in found], {"marker": "o", "color": f"C{index}"}
        speed.plot(xs, [row["tokens_per_second"] for row in found], label=provider, **style)
        low, high = (
            [row["tokens_per_second"] * row["seconds"] / row[f"seconds_{end}"] for row in found]
            for end in ("high", "low")
        )
        speed.fill_between(xs, low, high, alpha=0.2, color=f"C{index}")
        seen = [row for row in found if row.get("extra_memory")]
        memory.plot([r["value"] for r in seen], [r["extra_memory"] / 2**20 for r in seen], **style)
    ticks = sorted({row["value"] for row in rows})
    for axes, title in ((speed, "useful tokens/s"), (memory, "MiB of activations and gradients")):
        axes.set(xscale="log", xlabel=axis, ylabel=title, ylim=(0, None))
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    speed.legend(fontsize=8)
    memory.set_visible(any(row.get("extra_memory") for row in rows))
    return figure
