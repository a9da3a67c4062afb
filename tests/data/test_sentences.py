import time

import pytest

from minibert.data import split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rained.", "We stayed in!", "Why?", "Because."],
        ["Dr. Smith met J. R. Jones at 3 p.m. on Jan. 5, 1999.", "They talked."],
        ["It costs 3.50 dollars, i.e. 3.14 euros, see Fig. 2 and p. 7.", "2 more came."],
        ["He said “No.”", "She left.", "(It was late.)", '"Why?"', "Nobody knew."],
        ["The U.S. Army moved.", "It left the U.S.", "The rest stayed."],
        ["Wait... what?", "Elizabeth I.", "The queen."],
        ["1. Open the box.", "2. Close it."],
        ["The answer is no.", "Some disagree."],
        ["minibert.data reads text, e.g. Wikipedia.", "Also v2.0 of it."],
        ["Visit example.com now.", "Über allem.", "Élan."],
        ["lower case. after a full stop stays"],
        ["no full stop at all"],
    ],
)
def test_sentences_end_where_a_reader_ends_them(sentences):
    assert split_sentences("  " + " ".join(sentences) + " ") == sentences


def test_chinese_and_japanese_sentences_need_no_blank():
    assert split_sentences("你好。「很好！」再见？好") == ["你好。", "「很好！」", "再见？", "好"]
    assert split_sentences("他问:“好吗?”我说好!再见｡") == ["他问:“好吗?”", "我说好!", "再见｡"]
    assert split_sentences("价格是3.14元。是吗？！") == ["价格是3.14元。", "是吗？！"]
    assert split_sentences("中文。English follows. And 中文。") == ["中文。", "English follows.", "And 中文。"]
    assert split_sentences("a!b 你?b") == ["a!b 你?b"]


def test_sentences_keep_every_character_but_blanks():
    text = "A b.  C?! “D.” e.g. F.. G… H 3. 4.\t5! 中。文"
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    assert split_sentences(" \n ") == []


def test_long_lines_without_a_sentence_are_split_in_linear_time():
    start = time.perf_counter()
    assert len(split_sentences("A. " * 300_000)) >= 1
    assert split_sentences("." * 3_000_000) == ["." * 3_000_000]
    assert split_sentences("!)" * 500_000 + "a")
    assert time.perf_counter() - start < 10
