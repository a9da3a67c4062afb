"""Questions with choices: what is refused, what stays together, and that the right choice is learned."""

import json
import random

import numpy as np
import pytest
import torch
from toy_start import toy_start, toy_tokenizer, write_jsonl

from minibert import BertConfig
from minibert.cli import main
from minibert.data.records import as_records
from minibert.data.rows import RowData, in_order
from minibert.tasks import make_task, read_examples, split_examples

WORDS = "pick the right one yes no maybe never . ?"
TOKENIZER = toy_tokenizer(WORDS)
TASK = make_task("choice")


def questions(count, seed=0, choices=3):
    """The right choice is the one that says yes."""
    draw = random.Random(seed)
    for _ in range(count):
        label = draw.randrange(choices)
        said = [f"{draw.choice(['the', 'right'])} {draw.choice(['no', 'never'])}" for _ in range(choices)]
        said[label] = "the yes"
        yield {"question": "pick the right one ?", "choices": said, "label": label}


def examples_of(rows, task=TASK):
    return list(read_examples(task, as_records(rows, "q.jsonl")))


def refused(call):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


QUESTION = {"question": "which ?", "choices": ["yes", "no"], "label": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": 2}, "label=2 is not the number of a choice, 0 to 1"),
        ({"label": -1}, "label=-1 is not the number of a choice, 0 to 1"),
        ({"label": True}, "label=True is not the number of a choice, 0 to 1"),
        ({"label": "1"}, "label='1' is not the number of a choice, 0 to 1"),
        ({"choices": ["yes"]}, "choices=['yes'] is not a list of 2 or more texts"),
        ({"choices": "yes"}, "choices='yes' is not a list of 2 or more texts"),
        ({"choices": ["yes", " "]}, "choices[1]=' ' is not a text"),
        ({"choices": ["yes", 3]}, "choices[1]=3 is not a text"),
        ({"question": ""}, "question='' is not a text"),
        ({"context": None}, "context=None is not a text"),
    ],
)
def test_a_record_that_is_no_question_is_refused(changed, message):
    assert refused(lambda: examples_of([QUESTION | changed])) == f"q.jsonl:1: {message}"


def test_choices_of_different_counts_are_refused_in_training_and_afterwards():
    rows = [QUESTION, QUESTION | {"choices": ["yes", "no", "maybe"]}]
    message = refused(lambda: TASK.config(examples_of(rows)))
    assert message == "q.jsonl:2: choices has 3 texts, the first question 2"
    learned = make_task("choice", **TASK.config(examples_of(rows[:1]))["task_specific_params"])
    assert refused(lambda: examples_of(rows, learned)) == "q.jsonl:2: choices has 3 texts, expected 2"


def test_each_choice_is_read_behind_the_context_and_the_question():
    [example] = examples_of([QUESTION | {"context": "the right one ."}])
    rows = TASK.encode(TOKENIZER, [example], BertConfig(max_position_embeddings=32))
    first, second = (TOKENIZER.decode(row.ids, skip_special_tokens=False) for row in rows)
    assert first.split("[SEP]")[0] == second.split("[SEP]")[0]
    assert "the right one. [UNK]? [SEP] yes" in first
    assert [row.types.count(1) for row in rows] == [2, 2], "a choice and its [SEP]"
    assert [row.label for row in rows] == [1, None] and [row.example for row in rows] == [0, 0]


def test_questions_of_one_context_are_on_one_side_of_a_split():
    rows = [row | {"context": f"story {number % 6}"} for number, row in enumerate(questions(24))]
    train, held = split_examples(examples_of(rows), 0.25, seed=2)
    stories = [{example.group for example in part} for part in (train, held)]
    assert (len(train), len(held)) == (16, 8) and not stories[0] & stories[1]
    assert examples_of([QUESTION])[0].group is None, "without a context, each stands for itself"


def test_the_choices_of_a_question_stay_together_in_training():
    examples = examples_of(questions(7))
    task = make_task("choice", **TASK.config(examples)["task_specific_params"])
    data, cursor, seen = RowData(units(task, examples), batch_size=2, seed=3, together=task.together), 0, []
    assert task.parts(data.next_batch(0)[0]) == {"loss": 2}
    yes = TOKENIZER.convert_tokens_to_ids("yes")
    for _ in range(4):
        batch, cursor = data.next_batch(cursor)
        sequences = torch.tensor_split(batch.input_ids, batch.cu_seqlens[1:-1].long())
        right = np.array([yes in ids.tolist() for ids in sequences]).reshape(-1, 3)
        assert right.argmax(1).tolist() == batch.labels.tolist() and right.sum() == len(batch.labels)
        seen += (batch.seq_ids[::3] // 3).tolist()
    assert len(seen) == 7 and cursor == len(data)


def units(task, examples):
    return task.encode(TOKENIZER, examples, BertConfig(max_position_embeddings=32))


def test_predictions_belong_to_their_questions_whatever_order_rows_are_read_in():
    examples = examples_of([QUESTION, QUESTION | {"choices": ["the right one", "no no no no no"]}, QUESTION])
    rows = units(TASK, examples)
    scores = [0.0] * len(rows)
    for numbers, _ in in_order(rows, 20):
        for number in numbers:
            scores[number] = np.float32(number == 2 or number % 3 == 1)  # rows 1, 2 and 4
    found = list(TASK.predict(examples, rows, scores, BertConfig()))
    assert [p["label"] for p in found] == [1, 0, 0]
    assert found[1]["choice"] == "the right one" and found[1]["question"] == "which ?"
    assert found[0]["probability"] == pytest.approx(np.e / (1 + np.e), abs=1e-6)
    assert TASK.measure(examples, found, BertConfig()) == {"accuracy": pytest.approx(1 / 3)}
    assert TASK.line(found[1]) == "the right one 0.731\twhich ?"


def test_a_question_that_is_too_long_is_refused_or_cut():
    [example] = examples_of([QUESTION | {"question": "the " * 40}])
    config = BertConfig(max_position_embeddings=32)
    message = refused(lambda: TASK.encode(TOKENIZER, [example], config))
    assert message == "q.jsonl:1: the text has 44 tokens, the model takes 32: use --truncate"
    assert [len(row.ids) for row in make_task("choice", truncate=True).encode(TOKENIZER, [example], config)] == [32, 32]


def test_a_question_learned_evaluated_and_answered(tmp_path, capsys):
    start, out = toy_start(tmp_path / "start", WORDS), tmp_path / "run"
    data = write_jsonl(tmp_path / "q.jsonl", questions(80))
    unseen = write_jsonl(tmp_path / "unseen.jsonl", questions(20, seed=1))
    command = f"finetune --task choice --data {data} --init {start} --out {out} --epochs 6 --lr 2e-3 --batch-size 8"
    assert main(f"{command} --device cpu".split()) == 0
    capsys.readouterr()
    assert main(f"evaluate --model {out} --data {unseen} --json".split()) == 0
    assert json.loads(capsys.readouterr().out) == {"accuracy": 1.0}
    asked = "pick the right one ? ||| the no ||| right never ||| the yes"
    assert main(["predict", "--model", str(out), asked, "--json"]) == 0
    [answer] = json.loads(capsys.readouterr().out)["predictions"]
    assert (answer["label"], answer["choice"]) == (2, "the yes") and 1 / 3 < answer["probability"] < 1
    assert main(["predict", "--model", str(out), "pick the right one ?"]) == 2
    assert "text 1: choices=() is not a list of 2 or more texts" in capsys.readouterr().err
