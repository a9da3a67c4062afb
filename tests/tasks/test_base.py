"""What all tasks share: how examples are read, split and drawn, and how a task is chosen, answers and is kept."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from small import PIECES, TOKENIZER, build, refused

from minibert import BertForMaskedLM, BertForSequenceClassification
from minibert.config import BertConfig
from minibert.data.records import Record, as_records
from minibert.tasks import TASKS, Example, base, draw_examples, make_task, read_examples, split_examples, task_of


def labelled(counts):
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Example((f"text {i}",), label, f"x.csv:{i + 2}") for i, label in enumerate(labels)]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_disjoint_complete_in_order_and_stratified(seed):
    whole = labelled({"a": 61, "b": 37, "c": 5, "d": 1})
    first, second = split_examples(whole, 0.2, seed)
    assert sorted(first + second, key=whole.index) == whole and not {e.where for e in first} & {e.where for e in second}
    assert first == sorted(first, key=whole.index) and second == sorted(second, key=whole.index)
    assert Counter(example.target for example in second) == {"a": 12, "b": 7, "c": 1}
    assert any(example.target == "d" for example in first), "a single row stays where it can be learnt"


def test_a_split_is_a_pure_function_of_the_seed():
    whole = labelled({"a": 30, "b": 30})
    splits = [[example.where for example in split_examples(whole, 0.25, seed)[1]] for seed in (3, 3, 4, -1, 2**40)]
    assert splits[0] == splits[1] and len(set(map(tuple, splits))) == 4


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_neither_part_of_a_split_loses_a_label(fraction):
    for part in split_examples(labelled({"a": 40, "b": 2}), fraction, 0):
        assert {example.target for example in part} == {"a", "b"}


@pytest.mark.parametrize("kind", [float, str, lambda number: (str(number % 3),)])
def test_numbers_lists_and_labels_that_are_all_different_are_split_as_one(kind):
    whole = [Example(("t",), kind(i), f"x:{i}") for i in range(40)]
    first, second = split_examples(whole, 0.25, 0)
    assert (len(first), len(second)) == (30, 10)


@pytest.mark.parametrize("seed", range(5))
def test_examples_of_one_group_stay_on_one_side(seed):
    whole = [Example(("t",), "ab"[i % 2], f"x:{i}", group=f"article {i // 7}") for i in range(91)]
    first, second = split_examples(whole, 0.3, seed)
    assert not {e.group for e in first} & {e.group for e in second}
    assert len({e.group for e in second}) == 4 and len(first) + len(second) == 91


def test_so_many_examples_as_asked_for_are_drawn_in_their_order():
    whole = labelled({"a": 41})
    draws = [draw_examples(whole, 7, seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and all(len(drawn) == 7 for drawn in draws)
    assert all(drawn == sorted(drawn, key=whole.index) for drawn in draws)
    assert draw_examples(whole, None, 1) == draw_examples(whole, 41, 1) == draw_examples(whole, 99, 1) == whole


def test_a_record_that_is_no_example_is_said_and_passed_over():
    records = [Record(f"x:{i}", {"text": text, "label": "a"}) for i, text in enumerate(("one", " ", "three"))]
    errors = []
    examples = list(read_examples(make_task("classification"), records, errors.append))
    assert [example.where for example in examples] == ["x:0", "x:2"]
    assert [str(error) for error in errors] == ["x:1: text=' ' is not a text"]
    assert refused(lambda: list(read_examples(make_task("classification"), records))) == str(errors[0])


def test_an_id_is_that_of_one_record_of_a_file():
    rows = [("a:1", 1), ("a:2", "1"), ("a:3", 1), ("b:1", 1), ("b:2", None), ("b:3", None)]
    records = [Record(where, {"sentences": ["one"], "summary": "one", "id": name}) for where, name in rows]
    errors = []
    assert len(list(read_examples(make_task("summary"), records, errors.append))) == 5
    assert [str(error) for error in errors] == ["a:3: id=1 is the id of an earlier record, too"]
    texts = [Record(f"a:{i}", {"text": "one", "label": "a", "id": 1}) for i in range(2)]
    assert len(list(read_examples(make_task("classification"), texts))) == 2, "a column that nobody reads"


RELATION = "<e1>a</e1> made <e2>b</e2>"


@pytest.mark.parametrize(
    ("name", "record", "other", "strange", "message"),
    [
        ("classification", {"text": "a", "label": "x"}, {"label": "y"}, {"label": "z"}, "label='z' is not one of x, y"),
        ("intent", {"text": "a", "label": "x"}, {"label": "y"}, {"label": "z"}, "label='z' is not one of x, y"),
        ("multilabel", {"text": "a", "labels": "x"}, {"labels": "y"}, {"labels": "z"}, "labels='z' is not one of x, y"),
        ("relation", {"text": RELATION, "label": "x"}, {"label": "y"}, {"label": "z"}, "label='z' is not one of x, y"),
        (
            "ner", {"tokens": ["a"], "tags": ["O"]}, {"tags": ["B-x"]}, {"tags": ["I-y"]},
            "tags='I-y' is not one of B-x, O",
        ),
        (
            "joint", {"tokens": ["a"], "tags": ["O"], "label": "x"}, {"tags": ["B-x"], "label": "y"}, {"label": "z"},
            "label='z' is not one of x, y",
        ),
        (
            "joint", {"tokens": ["a"], "tags": ["O"], "label": "x"}, {"tags": ["B-x"], "label": "y"}, {"tags": ["I-y"]},
            "tags='I-y' is not one of B-x, O",
        ),
        (
            "choice", {"question": "a", "choices": ["b", "c"], "label": 0}, {"label": 1}, {"choices": ["b", "c", "d"]},
            "choices has 3 texts, expected 2",
        ),
        (
            "embedding", {"sentence1": "a", "sentence2": "b", "score": 1}, {"score": 2}, {"score": 9},
            "label=9 is not from 0 to scale=5",
        ),
    ],
)  # fmt: skip
def test_what_the_examples_learned_from_do_not_know_is_no_example_afterwards(name, record, other, strange, message):
    task, rows = make_task(name), [record, record | other]
    config = BertConfig(**task.config(list(read_examples(task, as_records(rows)))))
    learned, errors = make_task(name, **config.task_specific_params), []
    records = as_records([*rows, record | strange])
    assert len(list(read_examples(learned, records, errors.append, config))) == 2
    assert [str(error) for error in errors] == [f"records:3: {message}"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("intents", {}, "did you mean 'intent'?"),
        ("intent", {"treshold": 0.5}, "unknown intent option key 'treshold': did you mean 'threshold'?"),
        ("regression", {"threshold": 0.5}, "unknown regression option key 'threshold'"),
        ("classification", {"max_length": 2}, "max_length=2 is not a whole number from 3"),
        ("classification", {"max_length": 7.5}, "max_length=7.5 is not a whole number from 3"),
    ],
)
def test_tasks_and_options_that_are_none_are_refused_with_the_nearest(name, options, message):
    assert message in refused(lambda: make_task(name, **options))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_made_again_from_what_the_config_keeps_of_it(name):
    task = make_task(name, max_length=17, truncate=True)
    kept = json.loads(json.dumps(task.kept()))
    config = BertConfig(**kept)
    again = make_task(config.finetuning_task, **config.task_specific_params)
    assert type(again) is type(task) is TASKS[name] and json.loads(json.dumps(again.kept())) == kept


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "classification"),
        ({"id2label": ("LABEL_0",)}, "regression"),
        ({"problem_type": "regression", "id2label": ("u", "v", "w")}, "regression"),
        ({"problem_type": "single_label_classification"}, "classification"),
        ({"problem_type": "multi_label_classification"}, "multilabel"),
        ({"finetuning_task": "mrpc", "task_specific_params": {"text-generation": {"top_k": 5}}}, "classification"),
    ],
)
def test_a_classifier_of_hugging_face_says_its_task_by_its_problem(changes, name, tmp_path):
    build(BertForSequenceClassification, **changes).save_pretrained(tmp_path, TOKENIZER)
    assert task_of(BertForSequenceClassification.from_pretrained(tmp_path)) == make_task(name)


def test_a_model_that_was_saved_says_its_task_with_its_options(tmp_path):
    task = make_task("intent", threshold=0.25, out_of_scope="none", max_length=9, text_column="query")
    build(BertForSequenceClassification, id2label=("x", "y", "z"), **task.kept()).save_pretrained(tmp_path, TOKENIZER)
    assert task_of(BertForSequenceClassification.from_pretrained(tmp_path)) == task


def test_a_model_without_the_head_of_a_task_says_so():
    assert refused(lambda: task_of(build(BertForMaskedLM))) == (
        "BertForMaskedLM is the head of no task: fine-tune it first"
    )


def texts(count):
    return [Example((" ".join(PIECES[5 + i % 7 : 6 + i % 7 + i % 11]),), where=f"x:{i}") for i in range(count)]


@pytest.fixture(scope="module")
def model():
    return build(BertForSequenceClassification, id2label=("x", "y", "z")).eval()


def test_predictions_come_as_examples_are_read_a_chunk_at_a_time(model):
    seen = []
    stream = (seen.append(example) or example for example in texts(40))
    answers = base.predict(make_task("classification"), model, TOKENIZER, stream, chunk=7)
    for number in range(40):
        assert next(answers)["text"] == texts(40)[number].texts[0]
        assert number < len(seen) <= number - number % 7 + 7
    assert next(answers, None) is None


def test_a_prediction_is_that_of_its_text_alone_and_leaves_training_as_it_was(model, monkeypatch):
    monkeypatch.setattr(base, "BATCH_TOKENS", 30)
    task, examples = make_task("classification"), texts(23)
    model.train()
    together = list(base.predict(task, model, TOKENIZER, examples))
    assert model.training
    model.eval()
    for example, answer in zip(examples, together, strict=True):
        [alone] = base.predict(task, model, TOKENIZER, [example])
        np.testing.assert_allclose(answer["logits"], alone["logits"], rtol=1e-4, atol=1e-5)
        assert answer["label"] == alone["label"]
    assert not model.training


def test_what_is_fitted_is_measured_and_kept(model):
    """Threshold: texts without `dogs` are out of scope, and the probabilities are what they are."""
    whole = [dataclasses.replace(e, target="x" if "dogs" in e.texts[0] else "oos") for e in texts(31)]
    task, before = make_task("intent"), model.config
    try:
        assert base.evaluate(task, model, TOKENIZER, whole)["threshold"] == 0.0 and model.config is before
        fitted = base.evaluate(task, model, TOKENIZER, whole, fit=True)
        assert fitted["threshold"] > 0 and task_of(model) == dataclasses.replace(task, threshold=fitted["threshold"])
        assert base.evaluate(task_of(model), model, TOKENIZER, whole) == fitted
    finally:
        model.config = before


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("multilabel", "threshold", "abc", "threshold='abc' is not a number"),
        ("qa", "threshold", True, "threshold=True is not a number"),
        ("intent", "threshold", float("nan"), "threshold=nan is not a number"),
        ("summary", "sentences", "3", "sentences='3' is not a whole number"),
        ("summary", "sentences", 2.5, "sentences=2.5 is not a whole number"),
        ("embedding", "normalize", 1, "normalize=1 is not true or false"),
    ],
)
def test_an_option_of_another_type_is_refused(name, option, value, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **{option: value})
