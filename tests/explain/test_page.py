"""The page: it holds the numbers, shows any text as text, and asks for nothing from elsewhere."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from minibert.explain import Explanation, Word, render

HOSTILE = """</script><script>document.title="taken"</script> <img src=x onerror=alert(1)> " ' &amp;"""


def explanation(**changes) -> Explanation:
    """Of two tokens, one layer and two heads, written by hand."""
    maps = torch.tensor([[[[0.25, 0.75], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]]])
    values = {
        "text": "good [MASK]", "pair": None, "tokens": ("good", "[MASK]"), "types": (0, 0),
        "offsets": ((0, 4), (5, 11)), "predictions": (("positive", 0.75), ("negative", 0.25)), "label": "positive",
        "position": None, "baseline": "[PAD]", "score": 1.5, "baseline_score": 0.25, "attributions": (1.5, -0.25),
        "words": (Word("good", 0, 1, 1.5), Word("[MASK]", 1, 2, -0.25)), "attentions": maps,
        "guessed": (1,), "guesses": (((("lamp", 0.5), ("film", 0.125)),), ((("soup", 0.625), ("film", 0.25)),)),
    }  # fmt: skip
    return Explanation(**values | changes)


class Page(HTMLParser):
    """What a browser makes of it: elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.shown, self.scripts = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)
        elif self.cdata_elem is None:
            self.shown += data


def test_the_page_says_the_numbers_and_what_they_mean():
    page = Page(render([explanation()], "Inside runs/x"))
    for text in ("Inside runs/x", "good", "+1.50", "-0.25", "adds to the logit of “positive”", "[PAD] stands for"):
        assert text in page.shown
    assert "a difference of +1.2500. The numbers add up to +1.2500, an error of 0e+00." in page.shown
    titles = [attributes["title"] for _, attributes in page.elements if "title" in attributes]
    assert "good: +1.500000" in titles and "soup 0.6250, film 0.2500" in titles


def test_the_stronger_a_word_the_stronger_its_colour():
    page = render([explanation()], "x")
    assert 'rgb(37 120 220 / 0.600)" title="good: +1.5' in page
    assert 'rgb(220 110 20 / 0.100)" title="[MASK]: -0.25' in page


def test_maps_are_kept_by_layer_head_row_and_column():
    [data, _] = Page(render([explanation()], "x")).scripts
    data = json.loads(data)
    assert (data["layers"], data["heads"], data["tokens"]) == (1, 2, ["good", "[MASK]"])
    assert list(base64.b64decode(data["maps"])) == [64, 191, 255, 0, 128, 128, 0, 255]


def test_any_text_is_shown_as_text_wherever_it_comes():
    def page_of(text):
        words = (Word(text, 0, 1, 1.0), Word("b", 1, 2, 0.0))
        one = explanation(
            text=text, pair=text, tokens=(text, "b"), predictions=((text, 1.0),), label=text, baseline=text,
            words=words, guesses=((((text, 0.5),),),) * 2, guessed=(0,),
        )  # fmt: skip
        return Page(render([one], text))

    tame, page = page_of("§"), page_of(HOSTILE)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in tame.elements]
    assert page.shown.count(HOSTILE) == tame.shown.count("§") > 10
    assert json.loads(page.scripts[0])["tokens"][0] == HOSTILE


def test_nothing_comes_from_elsewhere():
    page = Page(render([explanation()], "x"))
    assert not [tag for tag, attributes in page.elements if {"src", "srcset"} & set(attributes) or tag == "iframe"]
    assert [a["href"] for _, a in page.elements if "href" in a] == ["data:,"]
    [policy] = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")


def test_what_is_not_there_is_said():
    page = Page(render([explanation(guessed=(), guesses=()), explanation(predictions=())], "x")).shown
    assert "the model has no masked-language-model head" in page
    assert "positive: 1.5000" in page and "adds to the value of “positive”" in page


def show_in_a_browser(page, width, folder):
    """The page as a browser has it when it is loaded; it must not complain, nor show nothing."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = (
        f"chromium --headless --no-sandbox --disable-gpu --enable-logging=stderr --user-data-dir={folder}/profile "
        f"--window-size={width},1600 --screenshot={folder}/page.png --dump-dom"
    )
    address = (folder / "page.html").as_uri()
    done = subprocess.run([*command.split(), address], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr and (folder / "page.png").stat().st_size > 10_000
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the path")
@pytest.mark.parametrize("width", (1200, 400))
def test_a_browser_shows_the_page_without_a_complaint(width, tmp_path):
    shown = show_in_a_browser(render([explanation(), explanation(text=HOSTILE)], HOSTILE), width, tmp_path)
    assert len(re.findall(r"<button[^>]*>(?:<canvas[^>]*></canvas>)head [12]</button>", shown)) == 4
