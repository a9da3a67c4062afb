"""Cleaning, and the marks of equal and similar documents, against values worked out by hand."""

import random
import sys

import numpy as np
import pytest

from minibert.data import clean

WORDS = ("river", "stone", "bread", "window", "candle", "garden", "letter", "summer", "kettle", "bridge")


def test_markup_goes_and_text_stays():
    assert clean.clean_paragraph("a <b class='x'>bold</b> move<br/>here <!-- not --> &amp; now") == (
        "a bold move here & now"
    )
    assert clean.clean_paragraph("1 < 2 and 3 > 2; e\u0301\u00a0 x &lt;p&gt;") == "1 < 2 and 3 > 2; é x <p>"


def test_words_are_counted_in_both_kinds_of_writing():
    assert clean.count_words(["Two words, 3.", "it's"]) == 5  # two words 3 it s
    assert clean.count_words(["你好，世界 abc"]) == 5


def test_letters_are_a_share_of_what_is_no_blank():
    assert clean.share_of_letters(["ab 1", "…é"]) == 3 / 5
    assert clean.share_of_letters(["你好。1"]) == 0.5
    assert clean.share_of_letters([""]) == 0


def test_the_key_does_not_see_case_blanks_and_width():
    keys = {clean.document_key(clean.normal_form(text)) for text in (["Ab  c", "D"], ["ａb c d"], ["AB C D "])}
    assert len(keys) == 1
    assert clean.document_key(clean.normal_form(["ab c d."])) not in keys
    assert 0 <= clean.document_key("\ud800") < 1 << 64


def test_bands_are_as_long_as_the_threshold_allows():
    assert [clean.rows_of_a_band(t) for t in (1, 0.9, 0.8, 0.5, 0.3)] == [16, 8, 4, 2, 2]


def test_similar_documents_are_those_above_the_threshold_with_an_earlier_one():
    a, b = np.random.default_rng(0).integers(0, 1 << 32, (2, clean.SIGNATURE), dtype=np.uint32)
    nine = a.copy()
    nine[:: clean.SIGNATURE // 12] = b[:: clean.SIGNATURE // 12]  # 13 of 128 differ
    half = np.where(np.arange(clean.SIGNATURE) < 64, a, b)
    rows = np.stack([a, b, nine, half, a, b])
    assert clean.find_similar(rows, 0.85).tolist() == [False, False, True, False, True, True]
    assert clean.find_similar(rows, 1.0).tolist() == [False, False, False, False, True, True]
    assert clean.find_similar(rows[:0], 0.8).tolist() == []


def test_signatures_estimate_the_share_of_common_runs():
    pytest.importorskip("rensa", reason="needs the package rensa")
    draw = random.Random(0)
    words = [f"{draw.choice(WORDS)}{draw.randrange(1000)}" for _ in range(400)]
    changed = words.copy()
    for i in range(20, 400, 80):
        changed[i] = "other"
    runs = [{tuple(some[i : i + 5]) for i in range(396)} for some in (words, changed)]
    share = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    marks = [clean.signature(" ".join(some)) for some in (words, changed, words[:200] + words[:200:-1])]
    assert 0.8 < share < 0.95
    assert abs((marks[0] == marks[1]).mean() - share) < 0.12  # three standard deviations are 0.09
    assert (marks[0] == marks[2]).mean() < 0.55
    assert (clean.signature("two words") == clean.signature("two words")).all()


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ValueError, match=r"pip install 'minibert\[data\]'"):
        clean.minhash()
