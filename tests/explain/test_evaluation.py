"""The page of an evaluation: numbers, what is taken for what, how sure and how often right, the worst mistakes."""

import re
import shutil

import numpy as np
import pytest
from small import small_config
from test_page import HOSTILE, Page, show_in_a_browser

from minibert.explain import evaluation, render_evaluation
from minibert.tasks import Example, make_task


def answers(names, pairs, text="text {}"):
    """Examples of classes and logits with which each pair (right, said, probability) comes out."""
    examples, scores = [], []
    for number, (right, said, sure) in enumerate(pairs, 2):
        shares = np.full(len(names), (1 - sure) / (len(names) - 1))
        shares[names.index(said)] = sure
        examples.append(Example((text.format(number),), right, f"test.csv:{number}"))
        scores.append(np.log(shares))
    return examples, scores


def page_of(task, examples, scores, names, title="runs/x on test.csv", **options):
    task, config = make_task(task, **options), small_config(id2label=names)
    predictions = list(task.predict(examples, [None] * len(examples), scores, config))
    measured = task.measure(examples, predictions, config)
    return render_evaluation(task, examples, predictions, measured, config, title)


def rows_of(page, kind=""):
    """The cells of each row of each table whose attributes hold `kind`, as text."""
    tables = re.findall(rf"<table[^>]*{kind}[^>]*>(.*?)</table>", page, re.DOTALL)
    return [[re.findall(r"<t[dh][^>]*>([^<]*)", row) for row in table.split("<tr")[1:]] for table in tables]


FEW = [("a", "a", 0.9), ("a", "b", 0.6), ("b", "b", 0.8), ("b", "c", 0.95), ("a", "b", 0.7), ("c", "c", 0.9)]


def test_the_page_holds_the_numbers_and_counts_what_is_taken_for_what():
    page = page_of("classification", *answers("abc", FEW), tuple("abc"))
    numbers, per_class, matrix = rows_of(page)
    assert numbers[1] == ["accuracy", "0.5000"] and "<tr class=best><td>accuracy" in page
    assert per_class[1] == ["a", "1.0000", "0.3333", "0.5000", "3"]
    assert matrix == [["", "a", "b", "c"], ["a", "1", "2", ""], ["b", "", "1", "1"], ["c", "", "", "1"]]
    assert 'title="a said to be b: 2 of 3"' in page
    assert "classification, 6 examples. One class of a text or a pair;" in Page(page).shown


def test_the_surest_mistake_is_the_worst_and_what_is_right_is_no_mistake():
    page = Page(page_of("classification", *answers("abc", FEW), tuple("abc"))).shown
    assert re.findall(r"test\.csv:\d+", page) == ["test.csv:5", "test.csv:6", "test.csv:3"]
    assert "said c 0.950, right b" in page and "Not quite right: 3 of 6 examples. They are below" in page
    right = Page(page_of("classification", *answers("ab", [("a", "a", 0.9), ("b", "b", 0.9)]), ("a", "b"))).shown
    assert "None: all 2 examples are right." in right


def test_probabilities_are_compared_with_what_is_right():
    pairs = [("a", "a", 0.9)] * 3 + [("b", "a", 0.9)] + [("b", "b", 0.6)] * 2
    page = Page(page_of("classification", *answers("ab", pairs), ("a", "b"), calibrate=True)).shown
    assert "4 answers: said 0.900, right 0.750" in page and "2 answers: said 0.600, right 1.000" in page
    assert "(ECE), is 0.2333 over 6 answers" in page and "ece0.2333" in page  # (4 · 0.15 + 2 · 0.4) / 6


def test_of_many_classes_those_are_shown_that_are_confused():
    names = tuple(f"class-{i:03}" for i in range(150))
    pairs = [(name, name, 0.9) for name in names] + [(names[7], names[140], 0.5)] * 3 + [(names[9], names[2], 0.5)]
    page = page_of("classification", *answers(names, pairs), names)
    [matrix], confused = rows_of(page, "matrix"), rows_of(page)[-1]
    assert matrix[0] == ["", names[2], names[7], names[9], names[140]] and matrix[2] == [names[7], "", "1", "", "3"]
    assert confused[1:] == [[names[7], names[140], "3", "0.7500"], [names[9], names[2], "1", "0.5000"]]
    page = page_of("classification", *answers(names, pairs[:150]), names)
    assert not rows_of(page, "matrix") and "Of 150 classes, none is taken for another." in page
    pairs = [(names[i], names[(i + 1) % 150], 0.5) for i in range(150)]
    page = page_of("classification", *answers(names, pairs), names)
    assert len(rows_of(page, "matrix")[0]) == len(rows_of(page)[-1]) == evaluation.FEW + 1


def test_only_the_worst_mistakes_are_shown_and_long_texts_are_cut():
    pairs = [("a", "b", 0.5 + i / 1000) for i in range(1, 200)]
    page = page_of("classification", *answers("ab", pairs, "{} " + "long " * 50_000), ("a", "b"))
    assert page.count("<section") == evaluation.MOST == 50 and len(page) < 100_000
    assert "199 of 199 examples. Below are the 50 worst" in page
    assert "test.csv:200<" in page and "test.csv:150<" not in page
    words = Example(
        ("w",) * 3000,
        ("B-x", "O") * 1500,
        "n:1",
        extra={"text": "w " * 3000, "at": [(2 * i, 2 * i + 1) for i in range(3000)]},
    )
    page = page_of("ner", [words], [np.array([[0.0, 1.0]] * 3000)], ("B-x", "O"), scheme="iob2")
    assert page.count("<mark>") == evaluation.PIECES / 2 and "nothing" in page


def test_numbers_without_classes_have_no_matrix_and_no_diagram():
    examples = [Example(("x",), float(i), f"t:{i}") for i in range(3)]
    page = page_of("regression", examples, [np.array([2.0 * i]) for i in range(3)], ("value",))
    assert "<svg" not in page and "matrix>" not in page and page.index("off by 2") < page.index("off by 1")
    assert "Not quite right: 2 of 3" in page


def hostile(text):
    """A page on which a text stands wherever one can: text, class, place and title."""
    examples, scores = answers((text, "b"), [(text, "b", 0.75), ("b", text, 0.5), ("b", "b", 0.9)], text + "{}")
    examples = [Example(e.texts, e.target, text + e.where) for e in examples]
    return page_of("classification", examples, scores, (text, "b"), text)


def test_any_text_is_shown_as_text_wherever_it_comes():
    short = HOSTILE[:40] + "\"'&"
    tame, page = Page(hostile("§")), Page(hostile(short))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in tame.elements] and not page.scripts
    assert page.shown.count(short) == tame.shown.count("§") > 8


def test_what_utf8_cannot_hold_does_not_break_the_page():
    page = hostile("half \ud800 a pair, and \0")
    assert "half \ufffd a pair, and \ufffd" in page and page.encode()


def test_nothing_comes_from_elsewhere():
    page = Page(hostile("x"))
    assert not [tag for tag, attributes in page.elements if {"src", "srcset"} & set(attributes)]
    assert [a["href"] for _, a in page.elements if "href" in a] == ["data:,"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the path")
@pytest.mark.parametrize("width", (1200, 400))
def test_a_browser_shows_the_page_without_a_complaint(width, tmp_path):
    shown = show_in_a_browser(hostile(HOSTILE), width, tmp_path)
    assert shown.count("<section") == 2 and "<circle" in shown and "<title>taken" not in shown
