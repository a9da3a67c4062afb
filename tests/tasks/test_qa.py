"""Extractive question answering: windows, characters, the best span, the scores of SQuAD and when to give no answer."""

import collections
import json
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest
from toy import finetune, save_weights, say, words_tokenizer

from minibert.config import BertConfig
from minibert.data.records import Record
from minibert.data.rows import Row
from minibert.data.sources import Source
from minibert.tasks.base import read_examples, split_examples
from minibert.tasks.qa import QuestionAnswering, best_of, exact, f1

SQUAD = Path(__file__).resolve().parents[3] / "shared/data/labelled/squad/dev-v1.1.rebuilt.json"
CONFIG = BertConfig(vocab_size=300, id2label=("start", "end"))


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer("the", "cat", "café", "cafe", "who", "saw", "##s")


def record(context, *answers, question="who saw the cat?", **fields):
    found = [{"text": text, "answer_start": context.index(text)} for text in answers]
    return Record("a.json: question 'q7'", {"question": question, "context": context, "answers": found} | fields)


def label_scores(rows, examples):
    """The scores of a model that knows the answers, and says [CLS] where a window has none."""
    for row in rows:
        scores = np.zeros((len(row.ids), 2), dtype=np.float32)
        scores[row.label, [0, 1]] = 9.0 if row.label != [0, 0] else 5.0
        yield scores


def answers(task, tokenizer, records, config=CONFIG):
    examples = [task.example(one) for one in records]
    rows = task.encode(tokenizer, examples, config)
    return list(task.predict(examples, rows, list(label_scores(rows, examples)), config))


def test_windows_hold_every_token_of_the_context_and_each_answer_whole_in_one(tokenizer):
    draw = random.Random(3)
    for _ in range(300):
        words = ["".join(draw.choices("abcxyz", k=draw.randrange(1, 4))) for _ in range(draw.randrange(1, 60))]
        context = " ".join(words)
        first = draw.randrange(len(words))
        last = min(len(words) - 1, first + draw.randrange(3))
        start = len(" ".join([*words[:first], ""]))
        answer = " ".join(words[first : last + 1])
        limit = draw.randrange(22, 40)
        task = QuestionAnswering(max_length=limit, stride=draw.randrange(1, 50), max_answer=9)
        given = [{"text": answer, "answer_start": start}]
        example = task.example(Record("a:1", {"question": "who saw?", "context": context, "answers": given}))
        rows = task.encode(tokenizer, [example], CONFIG)
        [(ids, offsets)] = tokenizer.encode_with_offsets([context])
        seen, found = set(), []
        for row in rows:
            before, inside = row.extra
            assert len(row.ids) <= limit and len(row.ids) == len(row.types) == before + len(inside) + 1
            assert row.types == [0] * before + [1] * (len(inside) + 1)
            at = offsets.index(tuple(inside[0]))
            assert row.ids[before:-1] == ids[at : at + len(inside)]
            seen.update(range(at, at + len(inside)))
            if row.label != [0, 0]:
                one, other = (inside[i - before] for i in row.label)
                found.append(context[one[0] : other[1]])
            else:  # an answer that is there in part only is none
                assert inside[0][0] > start or inside[-1][1] < start + len(answer)
        assert seen == set(range(len(ids)))
        assert found and set(found) == {answer}


def test_windows_begin_a_stride_apart(tokenizer):
    task = QuestionAnswering(max_length=30, stride=8, max_answer=5)
    rows = task.encode(tokenizer, [task.example(record("x " * 50, question="who?"))], CONFIG)
    assert [int(row.extra[1][0, 0]) // 2 for row in rows] == [0, 8, 16, 24, 32]
    assert [len(row.extra[1]) for row in rows] == [25, 25, 25, 25, 50 - 32]


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("Le CAFÉ, the Cat.", "CAFÉ"),
        ("Le cafe\u0301 x", "cafe\u0301"),
        ("(The “Cat’s” x)", "“Cat’s”"),
        ("x\u200by cat", "x\u200by"),
        ("İx  \t the\n\ncat .", "the\n\ncat"),
        ("中文字 x", "文"),
        ("[SEP] the [MASK] cat", "[MASK]"),
        ("a 😀 cat", "😀"),
    ],
)
def test_an_answer_is_a_piece_of_the_context_as_it_was_written(tokenizer, context, answer):
    said = answers(QuestionAnswering(), tokenizer, [record(context, answer)])[0]
    assert said["answer"] == answer == context[said["start"] : said["end"]]


def test_an_answer_within_a_token_is_learned_as_that_token(tokenizer):
    said = answers(QuestionAnswering(), tokenizer, [record("who saw cats", "at")])[0]
    assert said["answer"] == "cat"


def test_the_best_span_is_the_best_of_all_that_are_short_enough():
    rng = np.random.default_rng(4)
    for _ in range(300):
        count, before, longest = rng.integers(1, 30), int(rng.integers(2, 6)), int(rng.integers(1, 12))
        scores = rng.standard_normal((before + count + 1, 2)).astype(np.float32)
        scores[:before] = scores[-1] = 99  # the question and [SEP] are no answers
        offsets = np.stack([np.arange(count) * 3, np.arange(count) * 3 + 2], 1)
        row = Row([0] * len(scores), [0] * len(scores), extra=(before, offsets))
        found = QuestionAnswering(max_answer=longest).best_span(row, scores)
        body = scores[before:-1]
        pairs = [(i, j) for i in range(count) for j in range(i, min(count, i + longest))]
        i, j = max(pairs, key=lambda pair: body[pair[0], 0] + body[pair[1], 1])
        assert found == (pytest.approx(float(body[i, 0] + body[j, 1])), 3 * i, 3 * j + 2)


def squad_scores(said: str, truths: list[str]) -> tuple[float, float]:
    """Exact match and F1 by the rules that SQuAD 2.0 publishes, one after the other."""

    def words(text):
        text = "".join(" " if c.isspace() else c.lower() for c in text)
        text = "".join(c for c in text if c not in string.punctuation)
        return [word for word in re.sub(r"\b(?:an|a|the)\b", " ", text).split() if word]

    truths = [truth for truth in truths if words(truth)] or [""]
    matches, overlaps = [], []
    for truth in truths:
        ours, theirs = words(said), words(truth)
        matches.append(1.0 if ours == theirs else 0.0)
        left, shared = list(theirs), 0
        for word in ours:
            if word in left:
                left.remove(word)
                shared += 1
        if not ours or not theirs:
            overlaps.append(matches[-1])
        elif not shared:
            overlaps.append(0.0)
        else:
            precision, recall = shared / len(ours), shared / len(theirs)
            overlaps.append(2 * precision * recall / (precision + recall))
    return max(matches), max(overlaps)


def test_scores_are_those_of_squad():
    draw = random.Random(5)
    words = "the The a an A. cat Cat cat's - ! “ naïve ÉTÉ été 3.5 $5 the-cat 中 a1 U.S. _ —"
    parts = [*words.split(), "\u00a0", "\t"]

    def text():
        return "".join(draw.choice(parts) + draw.choice([" ", " ", "", "  "]) for _ in range(draw.randrange(6)))

    for _ in range(1000):
        truths = [text() for _ in range(draw.randrange(4))]
        said = draw.choice([*truths, text(), text(), ""])
        pairs = [(truth, 0) for truth in truths]
        match, overlap = squad_scores(said, truths)
        assert best_of(exact, said, pairs) == match, (said, truths)
        assert best_of(f1, said, pairs) == pytest.approx(overlap), (said, truths)


@pytest.mark.parametrize(
    ("said", "truths", "match", "overlap"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("big cat", ["the cat", "cat dog cow"], 0, 2 / 3),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("cat", ["the", "cat"], 1, 1),
    ],
)
def test_scores_worked_by_hand(said, truths, match, overlap):
    pairs = [(truth, 0) for truth in truths]
    assert best_of(exact, said, pairs) == match and best_of(f1, said, pairs) == pytest.approx(overlap)


def test_the_threshold_is_the_best_there_is():
    rng, task = np.random.default_rng(6), QuestionAnswering(may_be_none=True)
    for case in range(100):
        count = int(rng.integers(1, 12))
        kinds = [[("cat", 0)], [("the big cat", 0), ("dog", 0)], []]
        examples = [task.example(record("the big cat dog")) for _ in range(count)]
        targets = [kinds[i] for i in rng.integers(0, 3, count)]
        examples = [type(e)(e.texts, tuple(t)) for e, t in zip(examples, targets, strict=True)]
        none = rng.integers(-3, 4, count) if case % 2 else rng.standard_normal(count)  # equal gaps, too
        spans = rng.choice(["cat", "big cat", "dog", "x", "the"], count)
        predictions = [{"none": float(n), "score": 0.0, "span": str(s)} for n, s in zip(none, spans, strict=True)]

        def mean(threshold, examples=examples, predictions=predictions):
            given = [p | {"answer": "" if p["none"] - p["score"] > threshold else p["span"]} for p in predictions]
            return task.measure(examples, given, CONFIG)["f1"]

        best = max(mean(t) for n in none for t in (n - 1e-9, n, n + 1e-9))
        assert mean(task.fitted(examples, predictions, CONFIG).threshold) == pytest.approx(best)


def test_no_answer_is_given_above_the_threshold_only(tokenizer):
    one = record("the cat saw", "cat")
    gaps = []
    for threshold in (-100.0, 100.0):
        said = answers(QuestionAnswering(may_be_none=True, threshold=threshold), tokenizer, [one])[0]
        gaps.append(said)
    assert (gaps[0]["answer"], gaps[0]["start"], gaps[0]["span"]) == ("", None, "cat")
    assert (gaps[1]["answer"], gaps[1]["start"], gaps[1]["end"]) == ("cat", 4, 7)
    assert "none" not in answers(QuestionAnswering(), tokenizer, [one])[0]


def test_the_score_of_no_answer_is_the_lowest_of_all_windows(tokenizer):
    task = QuestionAnswering(max_length=20, stride=5, max_answer=3, may_be_none=True)
    example = task.example(record("x " * 20))
    rows = task.encode(tokenizer, [example], CONFIG)
    scores = [np.full((len(row.ids), 2), float(i), dtype=np.float32) for i, row in enumerate(rows, 1)]
    said = next(task.predict([example], rows, scores, CONFIG))
    assert len(rows) > 2 and said["none"] == 2.0 and said["score"] == 2.0 * len(rows)


def test_questions_without_an_answer_are_recognised_and_labelled_cls(tokenizer):
    task = QuestionAnswering()
    some, none, bare = (task.example(one) for one in (record("the cat", "cat"), record("the cat"), record("the cat")))
    bare = type(bare)(bare.texts)  # nobody said
    assert not task.config([some, bare])["task_specific_params"]["may_be_none"]
    assert task.config([some, none])["task_specific_params"]["may_be_none"]
    labels = [row.label for row in task.encode(tokenizer, [some, none, bare], CONFIG)]
    assert labels == [[8, 8], [0, 0], None]


def test_a_question_that_leaves_no_room_is_refused_by_name_or_cut(tokenizer):
    long = record("x " * 40, question="who saw " * 20)
    task = QuestionAnswering(max_length=40, max_answer=10)
    with pytest.raises(
        ValueError,
        match="^a.json: question 'q7': the question has 40 tokens, which leaves 0 of 40 for its context, fewer than "
        "max_answer=10: use --truncate$",
    ):
        task.encode(tokenizer, [task.example(long)], CONFIG)
    cut = QuestionAnswering(max_length=40, max_answer=10, truncate=True)
    rows = cut.encode(tokenizer, [cut.example(long)], CONFIG)
    assert {row.types.count(0) for row in rows} == {40 - 10 - 1} and len(rows[0].ids) == 40
    # a context that is short needs less room
    assert len(task.encode(tokenizer, [task.example(record("x y", question="who saw " * 17))], CONFIG)) == 1


def test_a_context_without_words_is_refused_by_name(tokenizer):
    task = QuestionAnswering()
    with pytest.raises(ValueError, match=r"^a.json: question 'q7': context='\\u200b\\u200b' holds no words$"):
        task.encode(tokenizer, [task.example(record("\u200b\u200b"))], CONFIG)


@pytest.mark.parametrize(
    "given",
    [
        [{"text": "cat", "answer_start": 3}],
        [{"text": "", "answer_start": 0}],
        [{"text": "saw", "answer_start": -3}],
        [{"text": "cat", "answer_start": 4.9}],
        [{"text": "cat", "answer_start": 10**400}],
        [{"text": "cat", "answer_start": float("inf")}],
        [{"text": 5, "answer_start": 4}],
        [{"text": "cat"}],
        {"text": ["cat"], "answer_start": []},
        ["cat"],
        7,
    ],
)
def test_an_answer_that_does_not_stand_in_the_context_is_refused_by_name(given):
    with pytest.raises(ValueError, match="^a.json: question 'q7': answers") as error:
        QuestionAnswering().example(record("the cat saw", answers=given))
    assert "\n" not in str(error.value)


def test_answers_may_be_an_object_of_lists():
    given = {"text": ["cat", "the cat"], "answer_start": [4, 0]}
    assert QuestionAnswering().example(record("the cat", answers=given)).target == (("cat", 4), ("the cat", 0))
    assert QuestionAnswering().example(record("the cat", answers={"text": [], "answer_start": []})).target == ()


@pytest.mark.parametrize("option", ["stride", "max_answer"])
@pytest.mark.parametrize("value", [0, -1, "8", 1.5])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"^{option}={value!r} is not a positive whole number$"):
        QuestionAnswering(**{option: value})


def test_questions_of_an_article_or_of_a_context_stay_together():
    task, titles, contexts = QuestionAnswering(), [f"t{i}" for i in range(9)], [f"the cat {i}" for i in range(12)]
    for records in (
        [record(f"the cat {i}", "cat", title=title) for i in range(5) for title in titles],
        [record(context, "cat", title="") for context in contexts for _ in range(4)],
    ):
        train, held = split_examples([task.example(one) for one in records], 0.25, 7)
        assert train and held and not {e.group for e in train} & {e.group for e in held}


def test_the_answers_of_squad_are_found_again_in_their_windows():
    if not SQUAD.is_file():
        pytest.skip("needs SQuAD in ../shared")
    from minibert.data.tokenizer import Tokenizer
    from minibert.demo import minilm_directory

    tokenizer = Tokenizer.from_pretrained(minilm_directory())
    task, config = QuestionAnswering(max_answer=60), CONFIG.replace(vocab_size=tokenizer.vocab_size)
    examples = list(read_examples(task, Source((SQUAD,)).records()))
    assert len(examples) == 10570 and len({example.group for example in examples}) == 48
    rows = task.encode(tokenizer, examples, config)
    said = list(task.predict(examples, rows, list(label_scores(rows, examples)), config))
    # all but those that begin or end within a token
    same = np.mean([p["answer"] == e.target[0][0] for p, e in zip(said, examples, strict=True)])
    assert same > 0.99
    assert task.measure(examples, said, config)["exact_match"] > 0.99


def toy_squad(count: int, seed: int) -> str:
    """Who is what? The animal, or the colour; when, nobody says."""
    draw, articles = random.Random(seed), collections.defaultdict(list)
    for number in range(count):
        who, what = draw.choice(["cat", "dog", "cow", "hen"]), draw.choice(["red", "blue", "green"])
        context = f"Look : the {who} is {what} ."
        asked = draw.choice(["who", "what", "when"])
        text = {"who": who, "what": what}.get(asked)
        found = [] if text is None else [{"text": text, "answer_start": context.index(text)}]
        question = {"id": str(number), "question": f"{asked} ?", "answers": found, "is_impossible": not found}
        articles[f"article {number % 8}"].append({"context": context, "qas": [question]})
    data = [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles.items()]
    return json.dumps({"version": "v2.0", "data": data})


def test_a_small_model_learns_answers_and_when_there_is_none(tmp_path, capsys):
    (tmp_path / "train.json").write_text(toy_squad(240, 1))
    (tmp_path / "test.json").write_text(toy_squad(60, 2))
    words = ["look", "the", "is", "who", "what", "when", "cat", "dog", "cow", "hen", "red", "blue", "green"]
    init = save_weights(tmp_path / "init", words_tokenizer(*words))
    results = finetune("qa", tmp_path / "train.json", init, tmp_path / "run", epochs=12)
    assert results["valid"]["f1"] > 0.95
    run, file = tmp_path / "run", tmp_path / "test.json"
    measured = say(capsys, "evaluate", "--model", run, "--data", file)
    assert min(measured["exact_match"], measured["answered_f1"], measured["unanswerable_f1"]) > 0.95
    texts = [f"{asked} ? ||| Look : the COW is blue ." for asked in ("who", "what", "when")]
    said = say(capsys, "predict", "--model", run, *texts)["predictions"]
    assert [one["answer"] for one in said] == ["COW", "blue", ""]
    assert (said[0]["start"], said[0]["end"]) == (11, 14)
