import random
import warnings

import pytest

from minibert.tasks.spans import SCHEMES, is_tag, scheme_of, span_scores, spans

metrics = pytest.importorskip("seqeval.metrics")
schemes = pytest.importorskip("seqeval.scheme")
THEIRS = {"iob1": schemes.IOB1, "iob2": schemes.IOB2, "iobes": schemes.IOBES}
KINDS = ("city", "time", "x-y")


def broken(draw: random.Random, scheme: str) -> list[str]:
    """Any tags of the scheme, in any order, often of one kind in a row."""
    tags, kind = [], KINDS[0]
    for _ in range(draw.randrange(1, 12)):
        kind = draw.choice(KINDS) if draw.random() < 0.4 else kind
        mark = draw.choice("O" + SCHEMES[scheme])
        tags.append("O" if mark == "O" else f"{mark}-{kind}")
    return tags


def sound(draw: random.Random, scheme: str) -> tuple[list[str], list]:
    """Tags of spans, and the spans: some side by side, of one kind and of two."""
    tags, found, last = [], [], None
    for _ in range(draw.randrange(1, 6)):
        kind, length, at = draw.choice((None, *KINDS)), draw.randrange(1, 4), len(tags)
        if kind is None:
            tags += ["O"] * length
        else:
            marks = ["B"] + ["I"] * (length - 1)
            if scheme == "iob1" and kind != last:
                marks[0] = "I"
            if scheme == "iobes":
                marks[-1] = "E" if length > 1 else "S"
            tags += [f"{mark}-{kind}" for mark in marks]
            found.append((kind, at, at + length - 1))
        last = kind
    return tags, found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_spans_are_those_of_seqeval_however_broken_the_tags(scheme):
    draw = random.Random(scheme)
    for _ in range(1000):
        tags = broken(draw, scheme)
        theirs = [(e.tag, e.start, e.end - 1) for e in schemes.Entities([tags], THEIRS[scheme]).entities[0]]
        assert spans(tags, scheme) == theirs, tags


@pytest.mark.parametrize("scheme", SCHEMES)
def test_spans_of_sound_tags_are_those_they_were_made_of(scheme):
    draw = random.Random(scheme)
    for _ in range(1000):
        tags, found = sound(draw, scheme)
        assert spans(tags, scheme) == found, tags
        assert sorted(metrics.sequence_labeling.get_entities(tags)) == sorted(found)  # CoNLL's own reading


@pytest.mark.parametrize("cases", [200, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores_are_those_of_seqeval(scheme, cases):
    draw = random.Random(scheme)
    for case in range(cases):
        make = (lambda: broken(draw, scheme)) if case % 2 else (lambda: sound(draw, scheme)[0])
        targets = [make() for _ in range(draw.randrange(1, 4))]
        given = [
            [tag if draw.random() < 0.7 else draw.choice(broken(draw, scheme)) for tag in tags] for tags in targets
        ]
        ours, how = span_scores(targets, given, scheme), {"mode": "strict", "scheme": THEIRS[scheme]}
        if not ours["per_class"]:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = metrics.classification_report(targets, given, output_dict=True, **how)
            for name in ("precision", "recall", "f1"):
                theirs = getattr(metrics, f"{name}_score")(targets, given, **how)
                assert ours[name] == pytest.approx(theirs, abs=1e-12)
        assert ours["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"], abs=1e-12)
        assert list(ours["per_class"]) == [name for name in report if not name.endswith(" avg")]
        for kind, row in ours["per_class"].items():
            theirs = report[kind]
            assert row["support"] == theirs["support"]
            for name, other in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
                assert row[name] == pytest.approx(theirs[other], abs=1e-12)


def test_sentences_without_a_span_score_zero_and_not_nan():
    none = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "macro_f1": 0.0, "per_class": {}}
    assert span_scores([["O", "O"], ["O"]], [["O", "O"], ["O"]], "iob2") == none


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scheme_is_recognised_also_where_some_tags_are_broken(scheme):
    draw = random.Random(scheme)
    for _ in range(1000):
        sentences = [sound(draw, scheme)[0] for _ in range(30)]
        stray = {"iob1": "B-city", "iob2": "I-city", "iobes": "B-city"}[scheme]
        assert scheme_of([*sentences, [stray, "O"]]) == scheme


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("O O", "iob2"),
        ("B-a O", "iob2"),
        ("O I-a I-a", "iob1"),
        ("I-a B-a", "iob1"),
        ("B-a I-a", "iob2"),
        ("B-a I-b", "iob2"),  # as many one way as the other
        ("S-a O", "iobes"),
        ("B-a E-a", "iobes"),
    ],
)
def test_the_scheme_of_a_single_sentence(tags, scheme):
    assert scheme_of([tags.split()]) == scheme


def test_a_tag_is_a_mark_of_its_scheme_and_a_kind():
    assert all(is_tag(tag) for tag in ("O", "B-a", "I-a", "E-a", "S-a", "B-a-b"))
    assert not any(is_tag(tag) for tag in ("", "B", "B-", "-a", "NN", "o", "BI-a", "U-a", "O-a"))
    assert is_tag("S-a", "iobes") and not is_tag("S-a", "iob2") and not is_tag("E-a", "iob1")
