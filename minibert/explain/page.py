"""Explanations as one HTML page that needs nothing beside it and reaches for nothing."""

import base64
import json
from collections.abc import Sequence
from html import escape

from torch import Tensor

from ..data.records import NO_TEXT
from .explanation import Explanation

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --faint: #666; --line: #ddd }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --ink: #e6e6e6; --faint: #9aa0a6; --line: #3a3f46 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: var(--ink); background: var(--ground) }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere } h2 { margin-top: 2.5rem } small, .note { color: var(--faint) }
.chips { display: flex; flex-wrap: wrap; gap: .3rem; margin: .6rem 0 }
.chip { border-radius: .3rem; padding: .1rem .4rem; text-align: center; white-space: pre-wrap; overflow-wrap: anywhere }
.chip small { display: block; font-size: 11px; color: inherit; opacity: .8 }
.scroll { overflow: auto; max-height: 44rem } table { border-collapse: collapse; font-size: 13px }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; white-space: nowrap }
meter { width: 8rem } .heads { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0 }
.heads button { font: inherit; font-size: 11px; color: inherit; background: none; padding: 3px; cursor: pointer;
  border: 2px solid var(--line); border-radius: .3rem } .heads [aria-pressed=true] { border-color: #2578dc }
canvas { display: block; image-rendering: pixelated } .heads canvas { width: 56px; height: 56px }
.map { display: grid; grid-template-columns: max-content max-content; font: 11px/18px system-ui, sans-serif }
.map div { white-space: nowrap } .map .top { display: flex; grid-column: 2 } .map .left { text-align: right }
.map .left, .map .top { padding: 0 .3rem .3rem 0; background: var(--ground) }
.map .left { position: sticky; left: 0 } .map .top { padding: 0 0 .3rem; align-items: end }
.map .left div { height: 18px } .map .top div { width: 18px; writing-mode: vertical-rl; transform: rotate(180deg) }
"""

# maps are bytes, a value times 255, in the order layer, head, row, column
SCRIPT = """
for (const part of document.querySelectorAll(".attention")) {
  const data = JSON.parse(part.querySelector("script").textContent), { layers, heads, tokens } = data;
  const maps = Uint8Array.from(atob(data.maps), c => c.charCodeAt(0)), size = tokens.length;
  const select = part.querySelector("select"), strip = part.querySelector(".heads");
  const canvas = part.querySelector(".map canvas"), readout = part.querySelector("output");
  let head = 0;
  const start = h => (Number(select.value) * heads + h) * size * size;
  const draw = (canvas, h) => {
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d"), image = context.createImageData(size, size);
    for (let i = 0; i < size * size; i++) {
      image.data.set([37, 120, 220, Math.sqrt(255 * maps[start(h) + i])], 4 * i);  // the root shows small shares too
    }
    context.putImageData(image, 0, 0);
  };
  const show = () => {
    [...strip.children].forEach((button, h) => {
      draw(button.firstChild, h);
      button.setAttribute("aria-pressed", h === head);
    });
    draw(canvas, head);
  };
  for (let h = 0; h < heads; h++) {
    const button = document.createElement("button");
    button.append(document.createElement("canvas"), `head ${h + 1}`);
    button.onclick = () => { head = h; show(); };
    strip.append(button);
  }
  canvas.style.width = canvas.style.height = `${18 * size}px`;
  canvas.onpointermove = event => {
    const [row, column] = [event.offsetY, event.offsetX].map(x => Math.min(size - 1, Math.max(0, Math.floor(x / 18))));
    const value = maps[start(head) + row * size + column] / 255;
    const where = `layer ${Number(select.value) + 1}, head ${head + 1}`;
    const [from, to] = [row, column].map(i => `${tokens[i]} (${i})`);
    readout.textContent = `${where}: ${from} looks at ${to} with ${value.toFixed(2)}`;
  };
  select.onchange = show;
  show();
}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render(explanations: Sequence[Explanation], title: str) -> str:
    """The page, an article a text; every text and token is escaped.

    It grows with layers · heads · S² · 4/3 bytes: attention maps are kept to 1/255.
    """
    return document(title, [f"<article>{''.join(article(one))}</article>" for one in explanations], script=SCRIPT)


def document(title: str, parts: Sequence[str], style: str = "", script: str = "") -> str:
    """A page that a browser shows without asking for anything else; `parts` are HTML, `title` is text."""
    head = [
        "<!doctype html>", "<html lang=en>", "<meta charset=utf-8>",
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">',
        "<meta name=viewport content='width=device-width'>", "<link rel=icon href='data:,'>",
        f"<title>{safe(title)}</title>", f"<style>{STYLE}{style}</style>", f"<h1>{safe(title)}</h1>",
    ]  # fmt: skip
    return "\n".join([*head, *parts, f"<script>{script}</script>\n" if script else ""])


def safe(text: str, most: int | None = None) -> str:
    """Any text as HTML: its middle left out where it is longer than `most` characters, what no text holds replaced."""
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]} … {text[-(most // 2) :]}"
    return escape(NO_TEXT.sub("\ufffd", text))


def article(one: Explanation) -> list[str]:
    """The parts of one text."""
    texts = " | ".join(escape(text) for text in (one.text, one.pair) if text is not None)
    return [f"<h2>{texts}</h2>", prediction(one), attribution(one), guesses(one), attention(one)]


def prediction(one: Explanation) -> str:
    if not one.predictions:
        return f"<h3>Prediction</h3><p>{escape(one.label)}: {one.score:.4f}</p>"
    what = "Prediction" if one.position is None else "Prediction for the first mask"
    rows = "".join(f"<tr><td>{escape(name)}<td><meter value={p:.4f}></meter><td>{p:.4f}" for name, p in one.predictions)
    return f"<h3>{what}</h3><div class=scroll><table>{rows}</table></div>"


def attribution(one: Explanation) -> str:
    """Words and pieces, coloured by what they add."""
    largest = max(map(abs, (*one.attributions, *(word.attribution for word in one.words)))) or 1.0
    words = [chip(word.text, word.attribution, largest) for word in one.words]
    pieces = [chip(*piece, largest) for piece in zip(one.tokens, one.attributions, strict=True)]
    label = f"“{escape(one.label)}”"
    legend = f"<span class=chip {colour(1)}>speaks for it</span><span class=chip {colour(-1)}>speaks against it</span>"
    what = "value" if one.position is None and not one.predictions else "logit"
    total = sum(one.attributions)
    return (
        f"<h3>What speaks for {label}</h3><div class=chips>{legend}</div>"
        f"<p class=note>A number is what a word, the sum of its pieces, adds to the {what} of {label}, "
        f"compared with the text in which {escape(one.baseline)} stands for every word (integrated gradients).</p>"
        f"<h4>Words</h4><div class=chips>{''.join(words)}</div><h4>Pieces</h4><div class=chips>{''.join(pieces)}</div>"
        f"<p>The {what} is {one.score:.4f}, without the words {one.baseline_score:.4f}: a difference of "
        f"{one.score - one.baseline_score:+.4f}. The numbers add up to {total:+.4f}, an error of {one.error:.0e}.</p>"
    )


def chip(text: str, value: float, largest: float) -> str:
    return (
        f'<span class=chip {colour(value / largest)} title="{escape(text)}: {value:+.6f}">{escape(text)}'
        f"<small>{value:+.2f}</small></span>"
    )


def colour(share: float) -> str:
    """The attribute of a share of the largest number, -1 to 1: translucent, for a light and a dark ground."""
    return f'style="background: rgb({"37 120 220" if share > 0 else "220 110 20"} / {0.6 * abs(share):.3f})"'


def guesses(one: Explanation) -> str:
    """A row a layer, a column a guessed position."""
    if not one.guessed:
        return "<h3>Guesses by layer</h3><p class=note>None: the model has no masked-language-model head.</p>"
    titles = "".join(f"<th>{escape(one.tokens[i])}<small> {i}</small>" for i in one.guessed)
    rows = []
    for layer, row in enumerate(one.guesses):
        name = f"layer {layer}" if layer else "embeddings"
        rows.append(f"<tr><th>{name}" + "".join(f"<td{hover(cell)}>{shown(cell, one)}" for cell in row))
    return (
        "<h3>Guesses by layer</h3><p class=note>The token, with its probability, that the masked-language-model head "
        "would put at a place if it read the state after that layer; only after the last one was it trained to.</p>"
        f"<div class=scroll><table><tr><th>{titles}{''.join(rows)}</table></div>"
    )


def hover(cell: Sequence[tuple[str, float]]) -> str:
    return f' title="{escape(", ".join(f"{token} {p:.4f}" for token, p in cell))}"'


def shown(cell: Sequence[tuple[str, float]], one: Explanation) -> str:
    """All that were kept for a mask, of which there are few; the likeliest in a table of all tokens."""
    kept = cell if len(one.guessed) < len(one.tokens) else cell[:1]
    return " ".join(f"{escape(token)} <small>{p:.2f}</small>" for token, p in kept)


def attention(one: Explanation) -> str:
    """The widget that SCRIPT brings to life."""
    layers, heads, size, _ = one.attentions.shape
    data = {"layers": layers, "heads": heads, "tokens": one.tokens, "maps": encode(one.attentions)}
    labels = "".join(f"<div>{escape(token)}</div>" for token in one.tokens)
    options = "".join(f"<option value={i}>layer {i + 1}</option>" for i in range(layers))
    return (
        "<h3>Attention</h3><p class=note>A row is what its token looks at: the shares of all tokens, which add up to "
        "1; the stronger the colour, the more.</p><div class=attention>"
        f"<script type=application/json>{in_script(data)}</script><select aria-label=layer>{options}</select>"
        "<div class=heads></div><p><output>Point at a square.</output></p><div class=scroll><div class=map>"
        f"<div class=top>{labels}</div><div class=left>{labels}</div><canvas></canvas></div></div></div>"
    )


def encode(maps: Tensor) -> str:
    return base64.b64encode((maps * 255).round().byte().numpy().tobytes()).decode()


def in_script(data: dict) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(data).replace("<", "\\u003c")
