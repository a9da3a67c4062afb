"""The relation of two marked entities: where the head reads, and the official score of SemEval-2010 task 8."""

import random
import re
from pathlib import Path

import pytest
from toy import finetune, save_weights, say, words_tokenizer

from minibert.config import BertConfig
from minibert.data.records import Record
from minibert.data.sources import Source
from minibert.tasks.base import read_examples
from minibert.tasks.relation import Relation, directed_f1

RELATIONS = (
    "Cause-Effect", "Instrument-Agency", "Product-Producer", "Content-Container", "Entity-Origin", "Entity-Destination",
    "Component-Whole", "Member-Collection", "Message-Topic",
)  # fmt: skip
LABELS = [*(f"{name}({order})" for name in RELATIONS for order in ("e1,e2", "e2,e1")), "Other"]
SEMEVAL = Path(__file__).resolve().parents[3] / "shared/data/labelled/semeval2010_task8"
CONFIG = BertConfig(vocab_size=300, id2label=("Other", "made(e1,e2)", "made(e2,e1)"))


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer("the", "cat", "made", "noise")


def example(text, **fields):
    return Relation().example(Record("a.jsonl:3", {"text": text} | fields))


def encode(tokenizer, text, config=CONFIG, **options):
    row = Relation(**options).encode(tokenizer, [example(text)], config)[0]
    return tokenizer.convert_ids_to_tokens(row.ids), list(row.at)


def test_both_entities_stand_between_signs_and_the_first_signs_are_read(tokenizer):
    tokens, at = encode(tokenizer, "The <e1>cat</e1> made a <e2>noise</e2>.")
    assert tokens == ["[CLS]", "the", "$", "cat", "$", "made", "a", "#", "noise", "#", ".", "[SEP]"]
    assert at == [2, 7]


def test_an_entity_keeps_its_sign_and_its_place_for_the_head_where_e2_comes_first(tokenizer):
    tokens, at = encode(tokenizer, "The <e2>cat</e2> made a <e1>noise</e1>.")
    assert tokens == ["[CLS]", "the", "#", "cat", "#", "made", "a", "$", "noise", "$", ".", "[SEP]"]
    assert at == [7, 2]


def test_the_head_reads_the_signs_before_the_entities_of_odd_texts(tokenizer):
    draw = random.Random(2)
    for _ in range(200):
        parts = ["".join(draw.choices(["cat", "$", "#", " ", "x ", "\u200b", "\u4e2d"], k=9)) for _ in range(3)]
        entities = {1: draw.choice(["cat", "$5", "a # b", "\u200b", "[SEP]"]), 2: draw.choice(["noise", "#", "$ $"])}
        order = draw.choice([(1, 2), (2, 1)])
        marked = [f"<e{n}>{entities[n]}</e{n}>" for n in order]
        text = parts[0] + marked[0] + parts[1] + marked[1] + parts[2]
        tokens, at = encode(tokenizer, text, CONFIG.replace(max_position_embeddings=128))
        for n in (1, 2):
            sign = "$#"[n - 1]
            inner = tokenizer.convert_ids_to_tokens(tokenizer.encode_plain([entities[n]])[0])
            assert tokens[at[n - 1] :][: len(inner) + 2] == [sign, *inner, sign], text
        assert (at[0] < at[1]) == (order == (1, 2))
        assert tokens.count("[SEP]") == 1


@pytest.mark.parametrize(
    "text",
    [
        "no marks",
        "<e1>one</e1> only",
        "<e1>a</e1> <e1>b</e1>",
        "<e1>a <e2>b</e2></e1>",
        "<e1> </e1> and <e2>b</e2>",
        "<e1>a</e1> <e2>b</e2> </e2>",
        "</e1>a<e1> <e2>b</e2>",
    ],
)
def test_a_text_that_does_not_mark_two_entities_is_refused_by_name(text):
    with pytest.raises(ValueError, match="^a.jsonl:3: text=.* does not mark <e1>one entity</e1> and <e2>another</e2>$"):
        example(text)


def test_a_long_text_is_refused_or_loses_its_end_and_then_its_beginning(tokenizer):
    text = "x x x x x <e1>cat</e1> made <e2>noise</e2> y y y y"
    small = CONFIG.replace(max_position_embeddings=17)
    with pytest.raises(ValueError, match=r"a.jsonl:3: the text has 18 tokens, the model takes 17: use --truncate"):
        encode(tokenizer, text, small)
    for length, before, after in ((17, 5, 3), (14, 5, 0), (12, 3, 0), (9, 0, 0)):
        tokens, at = encode(tokenizer, text, small, truncate=True, max_length=length)
        wanted = ["[CLS]", *"x" * before, *["$", "cat", "$", "made", "#", "noise", "#"], *"y" * after, "[SEP]"]
        assert tokens == wanted and [tokens[i] for i in at] == ["$", "#"]
    with pytest.raises(ValueError, match="a.jsonl:3: the entities and what is between them have 7 tokens, .* takes 6"):
        encode(tokenizer, text, small, truncate=True, max_length=8)


def test_an_unknown_relation_names_its_line(tokenizer):
    unknown = example("<e1>a</e1> <e2>b</e2>", label="mode(e1,e2)")
    with pytest.raises(ValueError, match=r"a.jsonl:3: label='mode\(e1,e2\)' is not one of"):
        Relation().encode(tokenizer, [unknown], CONFIG)


def official(targets, given) -> float:
    """By the definition in the task's README: for each relation, an F-score of sentences; a wrong direction is a false
    positive of what was said and a false negative of what is true; then the mean over relations in the key."""
    scores = []
    for relation in sorted({re.sub(r"\(.*", "", target) for target in targets} - {"Other"}):
        tp = fp = fn = 0
        for target, said in zip(targets, given, strict=True):
            is_it, says_it = target.startswith(relation + "("), said.startswith(relation + "(")
            tp += is_it and said == target
            fp += says_it and said != target
            fn += is_it and said != target
        precision, recall = tp / max(1, tp + fp), tp / (tp + fn)
        scores.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    return sum(scores) / len(scores) if scores else 0.0


def test_the_score_is_the_official_one():
    draw = random.Random(8)
    for case in range(1000):
        labels = LABELS if case % 2 else draw.sample(LABELS, 5)
        targets = draw.choices(labels, k=draw.randrange(1, 60))
        turned = [re.sub(r"e(\d),e(\d)", r"e\2,e\1", target) for target in targets]
        right = draw.random()
        given = [
            target if draw.random() < right else draw.choice([other, draw.choice(labels)])
            for target, other in zip(targets, turned, strict=True)
        ]
        assert directed_f1(targets, given, "Other")["f1"] == pytest.approx(official(targets, given), abs=1e-12)


def test_the_score_worked_by_hand():
    targets = ["a(e1,e2)", "a(e1,e2)", "a(e2,e1)", "b(e1,e2)", "Other", "Other"]
    given = ["a(e1,e2)", "a(e2,e1)", "a(e2,e1)", "Other", "Other", "a(e1,e2)"]
    scores = directed_f1(targets, given, "Other")
    assert scores["per_class"]["a"] == {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "support": 3}
    assert scores["per_class"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert scores["f1"] == pytest.approx(2 / 7) and set(scores["per_class"]) == {"a", "b"}


def test_all_sentences_of_semeval_are_read():
    if not SEMEVAL.is_dir():
        pytest.skip("needs SemEval-2010 task 8 in ../shared")
    files = "SemEval2010_task8_training/TRAIN_FILE.TXT", "SemEval2010_task8_testing_keys/TEST_FILE_FULL.TXT"
    counts = []
    for file in files:
        examples = list(read_examples(Relation(), Source((SEMEVAL / file,)).records()))
        assert set(Relation().names(examples)) <= set(LABELS)
        assert directed_f1([e.target for e in examples], [e.target for e in examples], "Other")["f1"] == 1
        counts.append(len(examples))
    assert counts == [8000, 2717]


def test_a_small_model_learns_relations_and_their_directions(tmp_path, tokenizer, capsys):
    draw = random.Random(1)
    kinds = {"made": "Cause-Effect(e1,e2)", "after": "Cause-Effect(e2,e1)", "saw": "Other"}
    lines = []
    for number in range(1, 241):
        verb, (one, other) = draw.choice(list(kinds)), draw.sample("abcdefgh", 2)
        order = draw.choice([(1, 2), (2, 1)])  # the relation is between the entities, wherever they stand
        label = kinds[verb] if order == (1, 2) else re.sub(r"e(\d),e(\d)", r"e\2,e\1", kinds[verb])
        first, second = (f"<e{n}>{x}</e{n}>" for n, x in zip(order, (one, other), strict=True))
        lines.append(f'{number}\t"The {first} {verb} a {second}."\n{label}\nComment:\n\n')
    (tmp_path / "train.txt").write_text("".join(lines))
    init = save_weights(tmp_path / "init", words_tokenizer("made", "after", "saw"))
    results = finetune("relation", tmp_path / "train.txt", init, tmp_path / "run", epochs=30)
    assert results["valid"]["f1"] > 0.9 and results["valid"]["accuracy"] > 0.9
    measured = say(capsys, "evaluate", "--model", tmp_path / "run", "--data", tmp_path / "train.txt")
    assert measured["f1"] > 0.9 and set(measured["per_class"]) == {"Cause-Effect"}
    text = "The <e2>b</e2> made a <e1>c</e1>."
    answer = say(capsys, "predict", "--model", tmp_path / "run", text)["predictions"][0]
    assert answer["label"] == "Cause-Effect(e2,e1)"
    assert (answer["e1"], answer["e2"], answer["text"]) == ("c", "b", text)
