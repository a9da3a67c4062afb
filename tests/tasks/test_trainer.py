"""Rows of one's own: what `Trainer` learns, measures and says is what the functions below it do; what it refuses."""

import dataclasses
import inspect

import pytest
from small import refused

import minibert
from minibert import Trainer, pipeline
from minibert.data.records import as_records
from minibert.hub import load_config
from minibert.tasks import evaluate, make_task, read_examples, split_examples
from minibert.tasks.finetune import finetune
from minibert.tasks.trainer import OPTIONS as KNOWN
from minibert.train import TrainConfig, best, latest

OPTIONS = {"batch_size": 5, "epochs": 4, "lr": 1e-2, "log_every": 1, "device": "cpu", "keep_last": 9, "seed": 3}
KINDS = (("dogs bark", "dog"), ("the cat sat", "cat"), ("birds sing", "bird"))


def made(count, first=0):
    """Rows of three labels, of several lengths; every seventh has another's label."""
    return [
        {"text": f"{KINDS[i % 3][0]} {'at night ' * (i % 4)}!", "label": KINDS[(i + (i % 7 == 0)) % 3][1]}
        for i in range(first, first + count)
    ]


ROWS, TEST = made(23), made(11, 23)
TEXTS = ["dogs bark", "why the cat sat", "birds sing at night"]


@pytest.fixture(scope="module")
def fitted(weights, tmp_path_factory):
    """A trainer that learned from a stream of rows, a fifth of which it held out, and what it reported."""
    trainer = Trainer(
        "classification", weights, tmp_path_factory.mktemp("fitted") / "run", valid_fraction=0.2, **OPTIONS
    )
    return trainer, trainer.fit(iter(ROWS))


def stored(run):
    return {path.parent.name: path.read_bytes() for path in sorted(run.glob("step-*/model.safetensors"))}


def by_hand(weights, run, train, valid, **options):
    return finetune(make_task("classification"), {"train": train, "valid": valid}, weights, run, **OPTIONS | options)


def examples(rows):
    return list(read_examples(make_task("classification"), as_records(rows)))


def measured(run, rows):
    said = pipeline(run, device="cpu")
    return evaluate(said.task, said.model, said.tokenizer, examples(rows))


def test_it_learns_measures_and_says_what_the_functions_below_it_do(fitted, weights, tmp_path):
    trainer, result = fitted
    expected = by_hand(weights, tmp_path / "run", *split_examples(examples(ROWS), 0.2, seed=3))
    assert (result.step, result.metrics, result.best) == (expected.step, expected.metrics, expected.best)
    assert stored(trainer.run_dir) == stored(tmp_path / "run") and len(stored(trainer.run_dir)) > 1
    found = trainer.evaluate(row for row in TEST)
    assert found == measured(tmp_path / "run", TEST) and 0 < found["accuracy"] < 1
    said = pipeline(tmp_path / "run", device="cpu")
    assert trainer.predict(TEXTS) == said(TEXTS) and trainer.predict(TEXTS[0]) == said(TEXTS[0])
    assert [one["text"] for one in trainer.predict(iter(TEXTS), chunk=2)] == TEXTS


def test_rows_that_are_given_to_measure_by_leave_all_others_to_learn_from(weights, tmp_path):
    trainer = Trainer("classification", weights, str(tmp_path / "run"), **OPTIONS, steps=2)
    result = trainer.fit(iter(ROWS), valid=iter(TEST))
    expected = by_hand(weights, tmp_path / "hand", examples(ROWS), examples(TEST), steps=2)
    assert result.metrics == expected.metrics and stored(tmp_path / "run") == stored(tmp_path / "hand")
    assert trainer.evaluate(TEST)["accuracy"] == result.best["value"]


def test_it_is_the_best_checkpoint_that_speaks_and_not_the_newest(weights, tmp_path):
    trainer = Trainer("classification", weights, tmp_path / "run", **OPTIONS | {"lr": 1e-6}, steps=2, eval_every=1)
    trainer.fit(ROWS, valid=TEST)  # so slow that the first evaluation is as good as the second
    first, last = best(tmp_path / "run"), latest(tmp_path / "run")
    assert trainer.predict(TEXTS) == pipeline(first, device="cpu")(TEXTS) != pipeline(last, device="cpu")(TEXTS)


def test_an_earlier_run_is_used_without_a_fit_and_for_its_own_task_alone(fitted):
    run = fitted[0].run_dir
    again = Trainer("classification", "nowhere", run, device="cpu")
    assert again.evaluate(TEST) == fitted[0].evaluate(TEST) and again.predict(TEXTS) == fitted[0].predict(TEXTS)
    assert refused(lambda: Trainer("ner", "nowhere", run).predict("dogs")).endswith("for classification, not for ner")


def test_a_run_goes_on_only_where_that_is_asked_for(fitted, weights):
    run, before = fitted[0].run_dir, stored(fitted[0].run_dir)
    options = {"valid_fraction": 0.2, **OPTIONS}
    assert "already holds a run" in refused(lambda: Trainer("classification", weights, run, **options).fit(ROWS))
    assert Trainer("classification", weights, run, resume=True, **options).fit(ROWS).step == fitted[1].step
    assert stored(run) == before


def test_a_second_fit_is_what_is_asked_afterwards(weights, tmp_path):
    trainer = Trainer("classification", weights, tmp_path / "run", **OPTIONS, steps=1, resume=True)
    trainer.fit(ROWS, valid=TEST)
    model = trainer._load().model
    assert trainer._load().model is model
    trainer.fit(ROWS, valid=TEST)
    assert trainer._load().model is not model


def test_a_task_with_options_and_a_backend_are_taken_as_they_are(weights, tmp_path):
    rows = [{"body": row["text"], "tag": row["label"]} for row in ROWS]
    task = make_task("classification", text_column="body", label_column="tag", label_smoothing=0.1)
    trainer = Trainer(task, weights, tmp_path / "run", backend="reference", **OPTIONS, steps=1)
    trainer.fit(rows)
    kept = load_config(latest(tmp_path / "run")).task_specific_params
    assert (kept["text_column"], kept["label_column"], kept["label_smoothing"]) == ("body", "tag", 0.1)
    assert set(trainer.evaluate(rows[:5])) >= {"accuracy"} and trainer._load().model.backend == "reference"
    assert trainer.predict({"body": "dogs"})["label"] in ("dog", "cat", "bird")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 2}, "option='epoch' is not one of .*: did you mean 'epochs'?"),
        ({"wheels": 2}, "option='wheels' is not one of batch_size, epochs, "),
        ({"best_metric": "f1"}, "option='best_metric' is not one of "),
        ({"task": "clasification"}, "task='clasification' is not one of .*: did you mean 'classification'?"),
        ({"valid_fraction": 0}, "valid_fraction=0 is not between 0 and 1"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0 is not between 0 and 1"),
    ],
)
def test_what_there_is_not_is_refused_before_a_row_is_read(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        Trainer(**{"task": "classification", "init": "nowhere", "run_dir": tmp_path / "run"} | options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_every_option_of_finetuning_is_one_of_its_own_and_none_twice():
    given = {name for name, one in inspect.signature(finetune).parameters.items() if one.kind is one.KEYWORD_ONLY}
    given |= {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(KNOWN) == given - {"best_metric", "best_mode"} and len(KNOWN) == len(set(KNOWN))


def test_nothing_is_measured_or_said_before_there_is_a_checkpoint(weights, tmp_path):
    trainer = Trainer("classification", weights, tmp_path / "run")
    for call in (lambda: trainer.evaluate(TEST), lambda: trainer.predict("dogs")):
        assert refused(call) == f"run_dir={tmp_path / 'run'} holds no checkpoint: fit first"
    (tmp_path / "run").mkdir()
    assert refused(lambda: trainer.predict("dogs")) == f"run_dir={tmp_path / 'run'} holds no checkpoint: fit first"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": " ", "label": "dog"}, "3: text=' ' is not a text"),
        ({"text": "dogs", "label": None}, "3: label=None is not a label"),
        ({"text": "dogs"}, "3: it has no label"),
        ({"txt": "dogs", "label": "dog"}, "3: its columns are txt, label"),
        ("dogs bark", "3: expected a dictionary, got str"),
        (("dogs", "dog"), "3: expected a dictionary, got tuple"),
    ],
)
def test_a_bad_row_is_named_by_its_argument_and_number(bad, message, fitted, weights, tmp_path):
    rows, trainer = [*ROWS[:2], bad, *ROWS[2:]], Trainer("classification", weights, tmp_path / "run", **OPTIONS)
    assert refused(lambda: trainer.fit(rows)).startswith(f"rows:{message}")
    assert refused(lambda: trainer.fit(ROWS, valid=iter(rows))).startswith(f"valid:{message}")
    assert refused(lambda: fitted[0].evaluate(rows)).startswith(f"rows:{message}")
    assert not (tmp_path / "run").exists()


def test_a_label_that_was_not_learned_is_named_with_its_row(fitted):
    line = refused(lambda: fitted[0].evaluate([*TEST, {"text": "dogs", "label": "fish"}]))
    assert line.startswith("rows:12: ") and "fish" in line


def test_too_few_rows_are_refused_in_one_line(weights, tmp_path):
    trainer = Trainer("classification", weights, tmp_path / "run", **OPTIONS)
    assert refused(lambda: trainer.fit([])) == "rows is empty: expected dictionaries"
    assert refused(lambda: trainer.fit(ROWS, valid=[])) == "valid is empty: expected dictionaries"
    assert refused(lambda: trainer.fit(ROWS[1:2])) == "rows=1 are too few to hold any out: give more, or valid"
    assert not (tmp_path / "run").exists()


def test_the_package_knows_it_by_name():
    assert "Trainer" in minibert.__all__ and minibert.Trainer is Trainer
