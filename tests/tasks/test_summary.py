"""Which sentences are kept: the search for labels, what is passed over, what is read, and ROUGE."""

import itertools
import json
import random
import sys
from collections import Counter

import numpy as np
import pytest
from toy_start import toy_start, toy_tokenizer, write_jsonl

from minibert import BertConfig
from minibert.cli import main
from minibert.data.records import as_records
from minibert.tasks import make_task, read_examples
from minibert.tasks.summary import choose, oracle, rouge

WORDS = "the cat dog bird likes sees moon tree sea news : a one two three ."
TOKENIZER = toy_tokenizer(WORDS)
TASK = make_task("summary")
CONFIG = BertConfig(max_position_embeddings=32)


def sentence(draw, length=None):
    words = ["cat", "dog", "bird", "likes", "sees", "moon", "tree"]
    return " ".join(draw.choices(words, k=length or draw.randint(1, 6))) + " ."


def counted(texts, n) -> Counter:
    """Runs of n words; none reaches over the border of two texts."""
    texts = [text.split()[:-1] for text in texts]
    return Counter(tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1))


def value(sentences, chosen, summary) -> float:
    """The sum of F1 of words and of pairs of words."""
    total = 0.0
    for n in (1, 2):
        ours, theirs = counted([sentences[i] for i in chosen], n), counted([summary], n)
        size = sum(ours.values()) + sum(theirs.values())
        total += 2 * sum((ours & theirs).values()) / size if size else 0.0
    return total


@pytest.mark.parametrize("seed", range(20))
def test_the_search_adds_the_best_sentence_until_none_helps(seed):
    draw = random.Random(seed)
    sentences, summary = [sentence(draw) for _ in range(6)], sentence(draw, 12)
    kept, best = [], 0.0
    while len(kept) < 3:
        tried = {i: value(sentences, [*kept, i], summary) for i in range(6) if i not in kept}
        top = max(tried, key=lambda i: (round(tried[i], 9), -i))
        if tried[top] <= best:
            break
        kept, best = [*kept, top], tried[top]
    assert oracle(sentences, summary, 3) == tuple(sorted(kept))


def test_the_search_is_rarely_far_from_the_best_of_all_choices():
    draw, shares = random.Random(5), []
    for _ in range(30):
        sentences, summary = [sentence(draw) for _ in range(7)], sentence(draw, 10)
        everything = [c for n in range(4) for c in itertools.combinations(range(7), n)]
        most = max(value(sentences, chosen, summary) for chosen in everything)
        shares.append(value(sentences, oracle(sentences, summary, 3), summary) / most)
        assert value(sentences, oracle(sentences, summary, 1), summary) == pytest.approx(
            max(value(sentences, [i], summary) for i in range(7))
        )
    assert max(shares) <= 1 + 1e-9 and np.mean(shares) > 0.95


def test_nothing_is_kept_where_nothing_is_shared():
    assert oracle(["the cat .", "a dog ."], "three birds", 2) == ()
    assert oracle(["the cat .", "the cat ."], "the cat", 2) == (0,), "of equal ones the first"


def test_a_sentence_that_repeats_three_words_is_passed_over():
    sentences = ["the cat sees the moon .", "now the cat sees a tree .", "the cat sees it", "cat the sees .", "no ."]
    assert choose(sentences, [1, 2, 0, 3, 4], 3, block=True) == [1, 3, 4]
    assert choose(sentences, [1, 2, 0, 3, 4], 3, block=False) == [0, 1, 2]
    assert choose(sentences[:3], [2, 1, 0], 3, block=True) == [2], "fewer than asked for"
    assert choose(["The CAT, sees!", "the cat sees"], [0, 1], 2, block=True) == [0], "as ROUGE reads words"


@pytest.mark.parametrize("seed", range(20))
def test_no_two_kept_sentences_share_three_words(seed):
    draw = random.Random(seed)
    sentences, order = [sentence(draw, 5) for _ in range(12)], draw.sample(range(12), 12)
    kept = choose(sentences, order, 5, block=True)
    triples = [{tuple(words[i : i + 3]) for i in range(3)} for words in (s.split()[:-1] for s in sentences)]
    assert all(not triples[a] & triples[b] for a, b in itertools.combinations(kept, 2))
    chosen, plain = [], iter(order)
    while len(chosen) < 5 and (i := next(plain, None)) is not None:
        chosen += [i] if all(not triples[i] & triples[j] for j in chosen) else []
    assert kept == sorted(chosen)


def examples_of(*rows):
    return list(read_examples(TASK, as_records(rows, "docs.jsonl")))


@pytest.mark.parametrize(
    "row",
    [
        {"document": "The cat sees. A dog!\nThe sea", "summary": "A dog"},
        {"article": "The cat sees. A dog!\n\nThe sea\n", "highlights": "A dog"},
        {"text": "The cat sees. A dog! The sea", "summary": "A dog"},
        {"sentences": ["The cat sees.", "A dog!", "The sea"], "summary": "A dog"},
    ],
)
def test_a_document_is_read_by_its_usual_names(row):
    [example] = examples_of(row | {"id": 7})
    if "text" in row:
        assert example.texts == ("The cat sees.", "A dog!", "The sea")
    assert len(example.texts) == 3 and example.target == "A dog" and example.extra == {"id": 7}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "a"}, "no column 'text' among body"),
        ({"document": " ", "summary": "a"}, "document=' ' is not a text"),
        ({"sentences": [], "summary": "a"}, "sentences=[] is not a list of 1 or more texts"),
        ({"sentences": ["a", ""]}, "sentences[1]='' is not a text"),
        ({"document": "a", "summary": 3}, "summary=3 is not a text"),
    ],
)
def test_a_record_that_is_no_document_is_refused(row, message):
    with pytest.raises(ValueError) as error:
        examples_of(row)
    assert str(error.value) == f"docs.jsonl:1: {message}"


def test_each_sentence_has_a_cls_that_is_read_and_every_other_one_another_type():
    [row] = TASK.encode(
        TOKENIZER, examples_of({"sentences": ["the cat .", "a dog .", "the sea ."], "summary": "a dog"}), CONFIG
    )
    ids, cls = np.array(row.ids), TOKENIZER.cls_token_id
    assert row.at == tuple(np.flatnonzero(ids == cls).tolist()) == (0, 5, 10)
    assert row.types == [0] * 5 + [1] * 5 + [0] * 5 and row.tags == (0, 1, 0)
    [one_type] = TASK.encode(
        TOKENIZER, examples_of({"sentences": ["the cat .", "a dog ."]}), CONFIG.replace(type_vocab_size=1)
    )
    assert set(one_type.types) == {0} and one_type.tags == ()


def test_of_a_document_longer_than_the_model_the_first_whole_sentences_are_read():
    # of 32 tokens each of the first three takes 10; the fourth would fit where the third does not
    long, short = "the cat likes the dog the moon .", "a ."
    [example] = examples_of({"sentences": [long, long, long, short, long], "summary": "a"})
    [row] = TASK.encode(TOKENIZER, [example], CONFIG.replace(max_position_embeddings=28))
    assert len(row.at) == 2 and len(row.ids) == 20 and len(row.tags) == 2
    [found] = TASK.predict([example], [row], [np.array([[0.0, 1], [0, 2]])], CONFIG)
    assert found["kept"] == [1] and len(found["probabilities"]) == 2
    assert found["summary"] == long and TASK.line(found) == long


def test_a_first_sentence_that_is_too_long_is_refused_or_cut():
    examples = examples_of({"sentences": ["the " * 40, "a ."]})
    with pytest.raises(ValueError, match="docs.jsonl:1: the first sentence has 42 tokens, the model takes 32: use"):
        TASK.encode(TOKENIZER, examples, CONFIG)
    [row] = make_task("summary", truncate=True).encode(TOKENIZER, examples, CONFIG)
    assert len(row.ids) == 32 and row.at == (0,)


def test_rouge_is_that_of_its_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(
        ["rouge1", "rouge2", "rougeL"], use_stemmer=True
    )
    draw = random.Random(2)
    for _ in range(1000):
        target, text = (" ".join(sentence(draw) for _ in range(draw.randint(1, 4))) for _ in range(2))
        theirs = scorer.score(target, text)
        assert rouge([target], [text]) == pytest.approx({name: score.fmeasure for name, score in theirs.items()})
    assert rouge(["the cats"], ["a cat"])["rouge1"] == 0.5, "with stemming"


def test_a_missing_package_is_named_before_anything_is_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    data = write_jsonl(tmp_path / "docs.jsonl", documents(4))
    start = toy_start(tmp_path / "start", WORDS)
    assert main(f"finetune --task summary --data {data} --init {start} --out {tmp_path / 'run'}".split()) == 2
    assert capsys.readouterr().err.endswith("error: ROUGE needs one more package: pip install 'minibert[tasks]'\n")


def documents(count, seed=0):
    """What is worth keeping is called news."""
    draw = random.Random(seed)
    for number in range(count):
        lines = [f"the {a} likes the {b} ." for a, b in itertools.product(("cat", "dog"), ("moon", "tree"))]
        draw.shuffle(lines)
        place = draw.randrange(3)
        lines[place] = f"news : the {draw.choice(['bird', 'cat'])} sees {draw.choice(['one', 'two', 'three'])} ."
        yield {"id": number, "sentences": lines[:3], "summary": lines[place]}


def test_a_document_learned_evaluated_and_summarised(tmp_path, capsys):
    pytest.importorskip("rouge_score")
    start, out = toy_start(tmp_path / "start", WORDS), tmp_path / "run"
    data = write_jsonl(tmp_path / "docs.jsonl", documents(60))
    unseen = write_jsonl(tmp_path / "unseen.jsonl", documents(12, seed=1))
    command = f"finetune --task summary --data {data} --init {start} --out {out} --epochs 5 --lr 2e-3 --batch-size 8"
    assert main(f"{command} --option.sentences 1 --device cpu".split()) == 0
    capsys.readouterr()
    assert main(f"evaluate --model {out} --data {unseen} --json".split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rouge1"] == result["oracle_rouge1"] == 1 > result["lead_rouge1"] > 0
    assert set(result) == {f"{k}rouge{n}" for k in ("", "lead_", "oracle_") for n in "12L"}
    assert main(["predict", "--model", str(out), "--data", str(unseen), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["predictions"]
    assert [a["summary"] for a in answers] == [row["summary"] for row in documents(12, seed=1)]
    assert [a["id"] for a in answers] == list(range(12))
    assert all(a["kept"] == [int(np.argmax(a["probabilities"]))] for a in answers)
