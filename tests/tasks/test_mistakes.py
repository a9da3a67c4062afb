"""What each task says is wrong about a prediction: how surely, what was said, what is right, what was read."""

import numpy as np
import pytest
from small import refused, small_config

from minibert.data.records import Record, as_records
from minibert.tasks import TASKS, Example, make_task, read_examples
from minibert.tasks.labels import NOTHING, marked


def judged(task, record, scores, names=("a", "b"), rows=None, **options):
    """Mistake and verdicts of one record with these scores of the head."""
    task, config = make_task(task, **options), small_config(id2label=names)
    examples = list(read_examples(task, as_records([record], "x.jsonl")))
    [prediction] = task.predict(examples, rows, scores, config)
    return task.mistake(examples[0], prediction, config), task.verdicts(examples[0], prediction, config)


def logits(*shares):
    return [np.log(np.array(shares, dtype=np.float32))]


def short(mistake):
    return mistake.how, mistake.said, mistake.right


def test_a_class_that_is_wrong_is_as_bad_as_it_is_sure():
    wrong, verdicts = judged("classification", {"sentence1": "x", "sentence2": "y", "label": "b"}, logits(0.75, 0.25))
    assert short(wrong) == ("0.750", "a", "b") and wrong.severity == pytest.approx((0.75,))
    assert wrong.parts == (("x | y", ""),)
    assert verdicts == [("b", "a", pytest.approx(0.75))]
    assert judged("classification", {"text": "x", "label": "a"}, logits(0.75, 0.25))[0] is None


def test_an_intent_that_was_not_said_is_the_least_sure_mistake():
    ask = {"text": "x", "label": "a"}
    wrong, verdicts = judged("intent", ask, logits(0.75, 0.25), threshold=0.8)
    assert short(wrong) == ("unsure", "oos", "a") and wrong.severity == (0.0,)
    assert verdicts == [("a", "oos", None)]
    assert judged("intent", ask | {"label": "oos"}, logits(0.75, 0.25))[1] == [("oos", "a", pytest.approx(0.75))]


def test_labels_that_are_missing_count_as_surely_as_those_that_are_too_many():
    given = [np.log(np.array([9, 1 / 19, 3, 1 / 9]))]  # 0.9, 0.05, 0.75, 0.1
    names = ("a", "b", "c", "d")
    wrong, verdicts = judged("multilabel", {"text": "x", "labels": ["b", "c"]}, given, names)
    assert short(wrong) == ("0.950", "a 0.900, c 0.750", "b, c") and wrong.severity == pytest.approx((0.95,))
    assert verdicts == [
        (NOTHING, "a", pytest.approx(0.9)),
        ("b", NOTHING, None),
        ("c", "c", pytest.approx(0.75)),
    ]
    assert judged("multilabel", {"text": "x", "labels": ["a", "c"]}, given, names)[0] is None


def test_a_number_is_as_wrong_as_it_is_far_off():
    wrong, verdicts = judged("regression", {"text": "x", "score": 3}, [np.array([1.25])])
    assert short(wrong) == ("off by 1.75", "1.25", "3") and wrong.severity == (1.75,) and not verdicts
    assert judged("regression", {"text": "x", "score": 3}, [np.array([3.0])])[0] is None


@pytest.mark.parametrize(
    ("score", "options", "expected"),
    [
        (4, {}, ("off by 0.2", "0.6", "0.8")),
        (4, {"loss": "contrastive"}, ("off by 0.4", "0.6", "1")),
        (3, {"loss": "contrastive"}, None),
        (3, {}, None),
    ],
)
def test_vectors_are_wrong_where_they_were_to_be_nearer_or_further(score, options, expected):
    vectors = [np.array([1.0, 0.0]), np.array([0.6, 0.8])]
    wrong, _ = judged("embedding", {"sentence1": "x", "sentence2": "y", "score": score}, vectors, **options)
    assert wrong == expected or short(wrong) == expected


TAGS = ("O", "B-PER", "I-PER", "B-LOC")
SENTENCE = {"tokens": ["Ada", "Byron", "left", "London"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]}


def tagged(tags, shares):
    """Logits [words, tags] in which each word has its tag with this probability."""
    table = np.full((len(tags), len(TAGS)), 1.0)
    for i, (tag, share) in enumerate(zip(tags, shares, strict=True)):
        table[i] *= (1 - share) / (len(TAGS) - 1)
        table[i, TAGS.index(tag)] = share
    return np.log(table)


def test_spans_that_are_wrong_are_marked_where_they_stand():
    said = tagged(("B-PER", "B-LOC", "O", "B-LOC"), (0.97, 0.5, 0.9, 0.8))
    wrong, verdicts = judged("ner", SENTENCE, [said], TAGS, scheme="iob2")
    assert short(wrong) == ("0.500", "PER: Ada, LOC: Byron", "PER: Ada Byron")
    assert wrong.parts == (
        ("Ada", "said PER, right PER"), (" ", "right PER"), ("Byron", "said LOC, right PER"), (" left London", ""),
    )  # fmt: skip
    assert verdicts == [
        (NOTHING, "PER", pytest.approx(0.97)),
        ("PER", NOTHING, None),
        (NOTHING, "LOC", pytest.approx(0.5)),
        ("LOC", "LOC", pytest.approx(0.8)),
    ]
    assert judged("ner", SENTENCE, [tagged(SENTENCE["tags"], (0.9,) * 4)], TAGS, scheme="iob2")[0] is None


def test_words_that_were_not_read_are_no_sure_mistake():
    wrong, _ = judged("ner", SENTENCE, [tagged(SENTENCE["tags"][:3], (0.9,) * 3)], TAGS, scheme="iob2")
    assert short(wrong) == ("0.000", "nothing", "LOC: London")


@pytest.mark.parametrize(
    ("intent", "slots", "expected"),
    [
        (0.9, (0.8,) * 4, None),
        (0.3, (0.8,) * 4, ("0.700", "tell", "ask")),
        (0.3, (0.8, 0.8, 0.8, 0.6), ("0.700", "tell; nothing", "ask; LOC: London")),
        (0.9, (0.8, 0.8, 0.8, 0.6), ("0.600", "nothing", "LOC: London")),
    ],
)
def test_intent_and_slots_are_one_mistake(intent, slots, expected):
    last = "O" if slots[-1] == 0.6 else "B-LOC"
    scores = [(logits(intent, 1 - intent)[0], tagged((*SENTENCE["tags"][:3], last), slots))]
    wrong, verdicts = judged("joint", SENTENCE | {"label": "ask"}, scores, TAGS, scheme="iob2", intents=("ask", "tell"))
    assert wrong == expected or short(wrong) == expected
    assert [verdict.right for verdict in verdicts] == ["ask"]
    assert wrong is None or "".join(text for text, _ in wrong.parts) == "Ada Byron left London"


def test_the_entities_of_a_relation_keep_their_numbers():
    text = "The <e2>cup</e2> holds <e1>tea</e1>."
    wrong, verdicts = judged("relation", {"text": text, "label": "b"}, logits(0.75, 0.25))
    assert wrong.parts == (("The ", ""), ("cup", "e2"), (" holds ", ""), ("tea", "e1"), (".", ""))
    assert verdicts == [("b", "a", pytest.approx(0.75))]


def asked(answer, target, **scores):
    context = "Ada Byron lived in London, not in Paris."
    answers = tuple((text, context.index(text)) for text in target)
    start = context.index(answer) if answer else None
    said = {"answer": answer, "start": start, "end": answer and start + len(answer), "score": 3.0} | scores
    task = make_task("qa", may_be_none="none" in scores)
    return task.mistake(Example(("Where?", context), answers, "x:1"), said, small_config())


def test_an_answer_is_as_wrong_as_it_shares_few_words():
    wrong = asked("London", ("in London", "London, not"))
    assert short(wrong) == ("F1 0.667", "London", "in London / London, not")
    assert wrong.severity == (pytest.approx(1 / 3), 3.0)
    assert wrong.parts[0] == ("Where?\n", "") and ("London", "right, right, said") in wrong.parts
    assert asked("London,", ("London",)) is None


def test_no_answer_is_a_mistake_where_there_is_one_and_the_surer_the_worse():
    silent, bold = asked("", ("London",), none=9.0), asked("Paris", (), none=2.5)
    assert short(silent) == ("F1 0.000", "no answer", "London") and short(bold)[1:] == ("Paris", "no answer")
    assert silent.severity == (1.0, 6.0) and bold.severity == (1.0, 0.5)
    assert asked("", (), none=9.0) is None


def test_a_choice_is_told_by_its_text():
    record = {"question": "Which?", "choices": ["sky", "rose"], "label": 1}
    wrong, verdicts = judged("choice", record, [1.0, 0.0])
    assert short(wrong) == ("0.731", "sky", "rose") and wrong.parts == (("Which? | sky | rose", ""),)
    assert verdicts == [("1", "0", pytest.approx(0.731, abs=1e-3))]


def test_a_summary_is_as_wrong_as_its_rouge_is_low():
    pytest.importorskip("rouge_score")
    record = {"sentences": ["Ada lived.", "A cat."], "summary": "Ada lived here."}
    scores = logits([0.1, 0.9], [0.8, 0.2])
    wrong, _ = judged("summary", record, scores, sentences=1)
    assert short(wrong) == ("ROUGE-1 0.800", "Ada lived.", "Ada lived here.")
    assert wrong.parts == (("Ada lived. ", "kept"), ("A cat. ", ""))


def test_a_task_that_says_nothing_of_mistakes_is_named():
    class Odd(TASKS["regression"]):
        name = "odd"
        mistake = TASKS["classification"].mistake

    example = Odd().example(Record("x:1", {"text": "a", "score": 1}))
    said = refused(lambda: Odd().mistake(example, {"value": 1.0}, small_config()))
    assert said == "odd does not say what a mistake is: give the task a method `mistake`"


def test_marks_may_overlap_and_touch():
    parts = marked("abcdef", [(1, 4, "x"), (2, 6, "y"), (0, 1, "z")])
    assert parts == (("a", "z"), ("b", "x"), ("cd", "x, y"), ("ef", "y"))
    assert marked("abc", []) == (("abc", ""),)
