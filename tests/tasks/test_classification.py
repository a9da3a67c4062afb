"""Texts and pairs: columns and labels are found, and what is said of them is measured as others measure it."""

import json
import math

import numpy as np
import pytest
import torch
from small import TOKENIZER, refused, small_config

from minibert.data.records import Record
from minibert.tasks import Example, make_task
from minibert.tasks.finetune import learnable
from minibert.tasks.labels import label_names, softmax


def read(name, fields, **options):
    return make_task(name, **options).example(Record("x.csv:7", fields))


@pytest.mark.parametrize(
    ("header", "given", "expected"),
    [
        ("text,label", {}, (("text",), "label")),
        ("label,sentence", {}, (("sentence",), "label")),
        ("idx,sentence1,sentence2,score", {}, (("sentence1", "sentence2"), "score")),
        ("idx,question,sentence,label", {}, (("question", "sentence"), "label")),
        ("premise,hypothesis,gold_label", {}, (("premise", "hypothesis"), "gold_label")),
        ("text,category", {}, (("text",), "category")),
        ("text,intent", {}, (("text",), "intent")),
        ("text,other", {}, (("text",), None)),
        ("text,label", {"label_column": ""}, (("text",), None)),
        ("text,other,label", {"pair_column": "other"}, (("text", "other"), "label")),
        ("a,b,c", {"text_column": "b", "pair_column": "a", "label_column": "c"}, (("b", "a"), "c")),
    ],
)
def test_usual_column_names_are_found(header, given, expected):
    example = read("classification", {name: name for name in header.split(",")}, **given)
    assert (example.texts, example.target) == expected and example.where == "x.csv:7"


@pytest.mark.parametrize(
    ("name", "fields", "target"),
    [
        ("classification", {"score": "3", "category": "a"}, "a"),
        ("classification", {"intent": "a", "label": "b"}, "b"),
        ("intent", {"category": "a", "intent": "b"}, "b"),
        ("multilabel", {"label": "a", "labels": "b|c"}, ("b", "c")),
        ("regression", {"label": "0", "score": "3.5"}, 3.5),
    ],
)
def test_of_several_usual_columns_the_one_that_a_task_is_called_after_is_its_label(name, fields, target):
    assert read(name, {"text": "t"} | fields).target == target


@pytest.mark.parametrize(
    ("learned", "given", "message"),
    [
        ({"sentence1": "a", "sentence2": "b"}, {"text": "a"}, "a text alone, the model reads pairs"),
        ({"text": "a"}, {"premise": "a", "hypothesis": "b"}, "a pair, the model reads single texts"),
    ],
)
def test_a_model_of_pairs_reads_no_single_texts_nor_the_reverse(learned, given, message):
    examples = [read("classification", learned | {"label": label}) for label in "ab"]
    task = make_task("classification", **make_task("classification").config(examples)["task_specific_params"])
    assert task.example(Record("x.csv:7", learned)).texts == tuple(learned.values())
    assert refused(lambda: task.example(Record("x.csv:7", given))) == f"x.csv:7: {message}"
    held_out = read("classification", given | {"label": "a"})  # by a task that does not know yet
    assert refused(lambda: task.check(held_out, small_config(id2label=("a", "b")))) == f"x.csv:7: {message}"


@pytest.mark.parametrize(
    ("name", "fields", "options", "message"),
    [
        ("classification", {"a": "1", "b": "2"}, {}, "its columns are a, b: name the text with --text-column"),
        ("classification", {"txt": "a"}, {"text_column": "text"}, "no column 'text' among txt: did you mean 'txt'?"),
        ("classification", {"text": "a"}, {"label_column": "txt"}, "no column 'txt' among text: did you mean 'text'?"),
        ("classification", {"text": "a", "label": " "}, {}, "label=' ' is not a label"),
        ("classification", {"text": "a", "label": True}, {}, "label=True is not a label"),
        ("multilabel", {"text": "a"}, {"label_column": "txt"}, "no column 'txt' among text: did you mean 'text'?"),
        ("multilabel", {"text": "a", "labels": 3}, {}, "labels=3 is not a list of labels"),
        ("multilabel", {"text": "a", "labels": ["b", " "]}, {}, "labels=' ' is not a label"),
        *(
            (
                "regression",
                {"text": "a", "label": label},
                {},
                f"label={label!r} is not a number, which regression needs",
            )
            for label in ("good", "nan", "inf", "1,5")
        ),
    ],
)
def test_what_is_no_example_is_named_with_file_and_line(name, fields, options, message):
    said = refused(lambda: read(name, fields, **options))
    assert said.startswith("x.csv:7: ") and message in said


@pytest.mark.parametrize(
    ("name", "written", "options", "target"),
    [
        ("classification", " 3 ", {}, "3"),
        ("classification", 3, {}, "3"),
        ("intent", "oos", {}, "oos"),
        ("multilabel", "joy | anger|", {}, ("joy", "anger")),
        ("multilabel", "3,14", {"separator": ","}, ("3", "14")),
        ("multilabel", ["joy", " b|c "], {}, ("joy", "b|c")),
        ("multilabel", [27, 2], {}, ("27", "2")),
        ("multilabel", "", {}, ()),
        ("multilabel", [], {}, ()),
        ("regression", "1e2", {}, 100.0),
        ("regression", -3, {}, -3.0),
    ],
)
def test_targets_are_read_as_the_task_means_them(name, written, options, target):
    assert read(name, {"text": "a", "labels": written}, **options).target == target


def test_labels_are_named_in_the_order_of_numbers_or_letters():
    for written, names in (
        (["10", "9", "9", "-1"], ("-1", "9", "10")),
        (["pos", "neg", "2"], ("2", "neg", "pos")),
        (["1.0", "1", "01"], ("01", "1", "1.0")),
    ):
        assert label_names(written, "x.csv:2") == label_names(written[::-1], "x.csv:2") == names


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("classification", ["a", "a"], "x.csv: every label is 'a': two classes are needed"),
        ("intent", ["a", "oos"], "x.csv: every label is 'a': two classes are needed"),
        ("intent", ["oos", "oos"], "x.csv: no example has a label: two classes are needed"),
        ("multilabel", [(), ()], "x.csv: no example has a label: two classes are needed"),
    ],
)
def test_one_class_only_is_refused(name, targets, message):
    examples = [Example(("t",), target, "x.csv:2") for target in targets]
    assert refused(lambda: make_task(name).names(examples)) == message


def encode(name, examples, names, **options):
    return make_task(name, **options).encode(TOKENIZER, examples, small_config(id2label=names))


@pytest.mark.parametrize(
    ("name", "targets", "names", "labels"),
    [
        ("classification", ["b", "a", None], ("a", "b"), [1, 0, None]),
        ("intent", ["b", "oos", "a"], ("a", "b"), [1, None, 0]),
        ("multilabel", [("c", "a"), (), None], ("a", "b", "c"), [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], None]),
        ("regression", [0.5, None, -3.0], ("value",), [0.5, None, -3.0]),
    ],
)
def test_labels_become_what_the_head_learns_and_only_those_rows_are_learned(name, targets, names, labels):
    rows = encode(name, [Example(("the cat",), target, "x.csv:2") for target in targets], names)
    assert [row.label for row in rows] == labels and [row.example for row in rows] == [0, 1, 2]
    assert [row.example for row in learnable(rows, 1)] == [i for i, label in enumerate(labels) if label is not None]


@pytest.mark.parametrize(
    ("name", "target", "field"),
    [("classification", "bda", "label"), ("intent", "bda", "label"), ("multilabel", ("bda",), "labels")],
)
def test_a_label_that_training_never_saw_is_named(name, target, field):
    message = refused(lambda: encode(name, [Example(("the cat",), target, "x.csv:3")], ("bad", "good")))
    assert message == f"x.csv:3: {field}='bda' is not one of bad, good: did you mean 'bad'?"


def test_texts_become_ids_and_long_ones_are_named():
    whole = [
        Example(("the cat sat", "dogs"), "1", "x.csv:2"),
        Example(("the cat sat on the mat", "birds"), "0", "x.csv:3"),
    ]
    first, _ = encode("classification", whole, ("0", "1"), max_length=10)
    assert " ".join(TOKENIZER.convert_ids_to_tokens(first.ids)) == "[CLS] the cat sat [SEP] dogs [SEP]"
    assert first.types == [0, 0, 0, 0, 0, 1, 1]
    message = refused(lambda: encode("classification", whole, ("0", "1"), max_length=9))
    assert message == "x.csv:3: the text has 10 tokens, the model takes 9: use --truncate"
    rows = encode("classification", whole, ("0", "1"), max_length=9, truncate=True)
    assert [len(row.ids) for row in rows] == [7, 9] == [len(row.types) for row in rows]
    long = [Example(("cat " * 30,), "1", "x.csv:4")]
    assert "has 32 tokens, the model takes 19" in refused(
        lambda: encode("classification", long, ("0", "1"), max_length=99)
    )


def answers(name, logits, names, targets=None, **options):
    """(task, examples, predictions, config), as if a model had said these logits."""
    targets = [None] * len(logits) if targets is None else targets
    examples = [Example((f"text {i}", "pair"), target, f"x:{i}") for i, target in enumerate(targets)]
    task, config = make_task(name, **options), small_config(id2label=names)
    return task, examples, list(task.predict(examples, [None] * len(logits), list(logits), config)), config


def printed(prediction):
    return json.loads(json.dumps({k: v for k, v in prediction.items() if not isinstance(v, np.ndarray)}))


@pytest.mark.parametrize(
    ("name", "logits", "names", "options", "expected", "line"),
    [
        ("classification", [0, math.log(3)], ("a", "b"), {}, {"label": "b", "probability": 0.75}, "b 0.750"),
        ("intent", [0, math.log(3)], ("a", "b"), {"threshold": 0.7}, {"label": "b", "probability": 0.75}, "b 0.750"),
        ("intent", [0, math.log(3)], ("a", "b"), {"threshold": 0.8}, {"label": "oos", "probability": 0.75},
         "oos 0.750"),
        ("multilabel", [0, -math.log(3), 200], ("a", "b", "c"), {},
         {"labels": ["a", "c"], "probabilities": {"a": 0.5, "b": 0.25, "c": 1.0}}, "a 0.500, c 1.000"),
        ("multilabel", [-200, -1], ("a", "b"), {}, {"labels": [], "probabilities": {"a": 0.0, "b": 0.26894}}, "none"),
        ("regression", [2.5], ("value",), {}, {"value": 2.5}, "2.5000"),
    ],
)  # fmt: skip
def test_a_prediction_can_be_printed_as_json_and_as_a_line(name, logits, names, options, expected, line):
    with np.errstate(all="raise", under="ignore"):
        task, _, [said], _ = answers(name, np.array([logits], dtype=np.float32), names, **options)
    repeated = printed(said)
    assert (repeated.pop("text"), repeated.pop("text_pair")) == ("text 0", "pair")
    assert {k: pytest.approx(v, abs=1e-5) if k.startswith("prob") else v for k, v in expected.items()} == repeated
    assert task.line(said) == f"{line}\ttext 0 | pair"


def test_shares_of_large_logits_are_finite():
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4], [-1e4, 0]], dtype=np.float32)), [[0.5, 0.5], [0, 1]])


def joint_accuracy(task, examples, predictions, threshold, config):
    """The share that is right where `threshold` decides, counted one by one."""
    right = 0
    for example, said in zip(examples, predictions, strict=True):
        label = config.id2label[int(said["logits"].argmax())] if said["probability"] >= threshold else task.out_of_scope
        right += label == example.target
    return right


@pytest.mark.parametrize("seed", range(30))
def test_the_threshold_of_intents_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    count, names = int(rng.integers(1, 60)), ("a", "b", "c")
    logits = rng.integers(-2, 3, (count, 3)).astype(np.float32) * (0.3 if seed % 2 else 1)  # many are equal
    targets = [str(rng.choice([*names, "oos"], p=[0.2, 0.2, 0.2, 0.4])) for _ in range(count)]
    targets[0] = "oos"
    task, examples, predictions, config = answers("intent", logits, names, targets)
    fitted = task.fitted(examples, predictions, config)
    tried = [0.0, 1.1, *(p["probability"] for p in predictions)]
    best = max(joint_accuracy(task, examples, predictions, threshold, config) for threshold in tried)
    assert joint_accuracy(task, examples, predictions, fitted.threshold, config) == best
    again = fitted.predict(examples, [None] * count, list(logits), config)
    assert sum(p["label"] == example.target for p, example in zip(again, examples, strict=True)) == best


def test_without_examples_out_of_scope_no_threshold_is_fitted_or_measured():
    logits = np.eye(2, dtype=np.float32)
    task, examples, predictions, config = answers("intent", logits, ("a", "b"), ["a", "a"])
    assert task.fitted(examples, predictions, config) is task
    assert set(task.measure(examples, predictions, config)) == {
        "accuracy",
        "precision",
        "recall",
        "f1",
        "macro_f1",
        "mcc",
        "per_class",
    }


def test_intents_are_measured_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    for _ in range(100):
        measure_intents(rng, ("a", "b", "c"))


def measure_intents(rng, names):
    sklearn = pytest.importorskip("sklearn.metrics")
    logits = rng.normal(size=(47, 3)).round(1).astype(np.float32)
    targets = [str(rng.choice([*names, "oos"])) for _ in range(47)]
    task, examples, predictions, config = answers("intent", logits, names, targets, threshold=0.5)
    result = task.measure(examples, predictions, config)
    outside = np.array([target == "oos" for target in targets])
    sure = np.array([p["probability"] for p in predictions])
    closed = np.array(names)[logits.argmax(1)]
    assert result["accuracy"] == pytest.approx(sklearn.accuracy_score(np.array(targets)[~outside], closed[~outside]))
    assert result["out_of_scope_auroc"] == pytest.approx(sklearn.roc_auc_score(outside, -sure))
    assert result["out_of_scope_recall"] == pytest.approx(sklearn.recall_score(outside, sure < 0.5))
    assert result["in_scope_kept"] == pytest.approx(sklearn.recall_score(~outside, sure >= 0.5))


def test_labels_are_measured_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    for _ in range(100):
        measure_labels(rng, ("a", "b", "c", "d"))


def measure_labels(rng, names):
    sklearn = pytest.importorskip("sklearn.metrics")
    true = rng.random((37, 4)) < 0.4
    logits = (true * 2 - 1 + rng.normal(size=(37, 4)) * 2).astype(np.float32)
    targets = [tuple(np.array(names)[row]) for row in true]
    task, examples, predictions, config = answers("multilabel", logits, names, targets, threshold=0.4)
    result = task.measure(examples, predictions, config)
    said = 1 / (1 + np.exp(-logits.astype(np.float64))) >= 0.4
    for name, average in (("f1", "micro"), ("macro_f1", "macro")):
        assert result[name] == pytest.approx(sklearn.f1_score(true, said, average=average, zero_division=0))
    assert result["exact"] == pytest.approx(sklearn.accuracy_score(true, said))
    assert list(result["per_class"]) == list(names)


def test_numbers_are_measured_by_correlations():
    logits = np.array([[1.0], [2.0], [4.0]], dtype=np.float32)
    task, examples, predictions, config = answers("regression", logits, ("value",), [1.0, 2.0, 3.0])
    result = task.measure(examples, predictions, config)
    assert result["spearman"] == pytest.approx(1) and result["mse"] == pytest.approx(1 / 3)
    assert task.dtype == torch.float32 and task.metric in result
