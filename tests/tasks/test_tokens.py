"""Tags of words, alone and with the intent of the sentence: what is read, what is said, and what is measured."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import finetune, save_weights, say, words_tokenizer

from minibert.config import BertConfig
from minibert.data.records import Record
from minibert.data.rows import collate
from minibert.data.sources import Source, find_splits
from minibert.data.tokenizer import Tokenizer
from minibert.hub import load_config
from minibert.tasks.base import predict, printable, read_examples
from minibert.tasks.tokens import Joint, Tagging

SNIPS = Path(__file__).resolve().parents[3] / "shared/data/labelled/snips"
CONFIG = BertConfig(vocab_size=300, id2label=("B-city", "I-city", "O"), max_position_embeddings=20)


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer("new", "york", "fly", "to", "##s")


def tagged(words, tags=None, **fields):
    fields |= {"tokens": words.split(" ")} | ({} if tags is None else {"tags": tags.split(" ")})
    return Record("a.txt:4", fields)


def encode(tokenizer, record, **options):
    task = Tagging(**options)
    return task.encode(tokenizer, [task.example(record)], CONFIG)[0]


def said(words, tags, task=None):
    """The prediction of a model that is sure of these tags."""
    task = task or Tagging()
    example = task.example(words if isinstance(words, Record) else Record("text 1", {"text": words}))
    names = tuple(sorted({"O", "I-city", *tags}))
    logits = np.array([[8.0 * (name == tag) for name in names] for tag in tags])
    return next(task.predict([example], [None], [logits], CONFIG.replace(id2label=names)))


def test_a_tag_is_read_at_the_first_piece_of_its_word(tokenizer):
    row = encode(tokenizer, tagged("fly to News York zz", "O O B-city I-city O"))
    tokens = tokenizer.convert_ids_to_tokens(row.ids)
    assert tokens == ["[CLS]", "fly", "to", "new", "##s", "york", "z", "##z", "[SEP]"]
    assert [tokens[i] for i in row.at] == ["fly", "to", "new", "york", "z"]
    assert list(row.tags) == [2, 2, 0, 1, 2]


def test_words_without_pieces_and_unknown_ones_keep_their_tags(tokenizer):
    row = encode(tokenizer, tagged("\u200b to \u4e2d\u4e2d [SEP] \u200b", "B-city O I-city O B-city"))
    tokens = tokenizer.convert_ids_to_tokens(row.ids)
    assert [tokens[i] for i in row.at] == ["[UNK]", "to", "[UNK]", "[", "[UNK]"]
    assert list(row.tags) == [0, 2, 1, 2, 0] and tokens.count("[SEP]") == 1


def test_a_long_sentence_is_refused_by_name_or_cut(tokenizer):
    record = tagged("to " * 17 + "zzzzz fly", "O " * 17 + "B-city I-city")
    with pytest.raises(ValueError, match=r"^a.txt:4: the text has 25 tokens, the model takes 20: use --truncate$"):
        encode(tokenizer, record)
    row = encode(tokenizer, record, truncate=True)
    assert len(row.ids) == 20 and list(row.at) == list(range(1, 19)) and list(row.tags) == [2] * 17 + [0]
    row = encode(tokenizer, tagged("zzzzzz to", "B-city O"), truncate=True, max_length=3)
    assert len(row.ids) == 3 and list(row.at) == [1] and list(row.tags) == [0]


def test_words_that_were_cut_off_are_outside(tokenizer):
    answer = said(tagged("new york new york"), ["B-city", "I-city"])
    assert answer["tags"] == ["B-city", "I-city", "O", "O"]
    assert [one["text"] for one in answer["entities"]] == ["new york"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Fly to New-York, (now)!", "Fly to New-York , ( now ) !"),
        ("  O'Brien’s  \t3.5$", "O'Brien’s 3 . 5 $"),
        ("caf\u00e9 cafe\u0301s", "caf\u00e9 cafe\u0301s"),
        ("हिन्दी भाषा।", "हिन्दी भाषा ।"),
        ("去纽约 now", "去 纽 约 now"),
        ("snake_case 😀", "snake_case 😀"),
    ],
)
def test_a_text_is_cut_at_blanks_and_punctuation(text, words):
    example = Tagging().example(Record("text 1", {"text": text}))
    assert list(example.texts) == words.split(" ")
    assert [text[a:b] for a, b in example.extra["at"]] == words.split(" ")


def test_entities_are_pieces_of_the_text_as_it_was_written():
    text = " Fly to NEW\t York, Zürich!"
    answer = said(text, ["O", "O", "B-city", "I-city", "O", "B-city", "O"])
    assert [(one["text"], one["label"]) for one in answer["entities"]] == [("NEW\t York", "city"), ("Zürich", "city")]
    assert all(text[one["start"] : one["end"]] == one["text"] for one in answer["entities"])
    assert answer["text"] == text and json.dumps(printable(answer))
    joined = said(tagged("fly to new york"), ["O", "O", "B-city", "I-city"])
    assert joined["text"][7:15] == joined["entities"][0]["text"] == "new york"


def test_an_entity_is_as_sure_as_its_least_sure_word():
    task = Tagging(scheme="iob2")
    logits = np.log(np.array([[0.9, 0.05, 0.05], [0.2, 0.7, 0.1]]))
    answer = next(task.predict([task.example(tagged("new york"))], [None], [logits], CONFIG))
    assert answer["entities"][0]["probability"] == pytest.approx(0.7)


def test_the_scheme_is_the_one_of_the_tags_or_of_their_names():
    assert [one["text"] for one in said("new york", ["I-city", "I-city"])["entities"]] == ["new york"]
    assert said("new york", ["I-city", "I-city"], Tagging(scheme="iob2"))["entities"] == []
    examples = [Tagging().example(tagged("a b c", "O I-x I-x")), Tagging().example(tagged("a b", "I-x B-x"))]
    assert Tagging().config(examples)["task_specific_params"]["scheme"] == "iob1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"tokens": ["a"], "tags": ["NN"]}, "tag 'NN' is not one of O, B-…, I-…, E-…, S-…"),
        ({"tokens": []}, r"tokens=\[\] is not a list of words"),
        ({"tokens": ["a", " "]}, r"tokens=\['a', ' '\] is not a list of words"),
        ({"tokens": ["a", 3]}, r"tokens=\['a', 3\] is not a list of words"),
        ({"tokens": ["a"], "tags": "O"}, "tags='O' is not a list of words"),
        ({"text": " "}, "text=' ' is not a text"),
    ],
)
def test_what_is_not_tagged_words_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"^a.txt:4: {message}$"):
        Tagging().example(Record("a.txt:4", fields))


def test_a_tag_outside_of_the_scheme_or_never_learned_names_its_line(tokenizer):
    with pytest.raises(ValueError, match="^a.txt:4: tag 'S-city' is not one of O, B-…, I-…$"):
        Tagging(scheme="iob2").example(tagged("york", "S-city"))
    with pytest.raises(ValueError, match="a.txt:4: tags='B-citi' is not one of"):
        encode(tokenizer, tagged("york", "B-citi"))


@pytest.mark.parametrize(
    ("scheme", "tags", "found"),
    [("iob2", "I-city I-city O", "iob1"), ("iobes", "B-city I-city O", "iob2"), ("iob1", "B-city I-city O", "iob2")],
)
def test_tags_of_another_scheme_than_the_models_are_refused(scheme, tags, found):
    """In which all of their spans would be lost, and F1 be 0."""
    task = Tagging(scheme=scheme)
    read = lambda *rows: [task.example(tagged("new york fly", row)) for row in rows]  # noqa: E731
    message = f"^a.txt:4: tags from here on are in {found}, the model's in {scheme}: convert them$"
    examples = read("O O O", tags, tags, tags)
    with pytest.raises(ValueError, match=message):
        task.check_part(examples, CONFIG)
    with pytest.raises(ValueError, match=message):
        task.measure(examples, [{"tags": ["O"] * 3}] * 4, CONFIG)
    task.check_part(read("O O O"), CONFIG)


def test_a_few_tags_that_make_no_span_are_left_as_they_are():
    """As published sets have some, and as a scorer leaves them out."""
    task = Tagging(scheme="iob2")
    examples = [task.example(tagged("new york fly", row)) for row in (None, *["I-city I-city O"] * 3)]
    sound = [task.example(tagged("new york fly", "B-city I-city O"))] * 4
    for few in (examples[:2], examples[:3], examples + sound):
        task.check_part(few, CONFIG)
    with pytest.raises(ValueError, match="are in iob1, the model's in iob2"):
        task.check_part(examples, CONFIG)


def test_files_of_columns_are_read(tmp_path, tokenizer):
    (tmp_path / "a.conll").write_text("-DOCSTART- -X- O\n\nnew NNP B-city\nyork NNP I-city\n\nto TO O\nfly VB O\n")
    examples = list(read_examples(Tagging(), Source((tmp_path / "a.conll",)).records()))
    assert [(e.texts, e.target) for e in examples] == [
        (("new", "york"), ("B-city", "I-city")), (("to", "fly"), ("O", "O")),
    ]  # fmt: skip
    assert [e.where.rpartition(":")[2] for e in examples] == ["3", "6"]


def test_measures_are_of_spans_and_of_words():
    task = Tagging(scheme="iob2")
    examples = [task.example(tagged("new york to york", "B-city I-city O B-city"))]
    scores = task.measure(examples, [{"tags": ["B-city", "I-city", "O", "O"]}], CONFIG)
    assert (scores["precision"], scores["recall"], scores["token_accuracy"]) == (1.0, 0.5, 0.75)
    assert scores["f1"] == pytest.approx(2 / 3)


def test_joint_losses_are_means_over_their_own_counts(tokenizer):
    task = Joint(intents=["fly", "stay"])
    records = [tagged("to new york", "O B-city I-city", label="fly"), tagged("york", "B-city", label="stay")]
    rows = task.encode(tokenizer, [task.example(one) for one in records], CONFIG)
    batch = collate(rows, range(2))
    assert task.parts(batch) == {"sequence_loss": 2, "token_loss": 4}
    config = CONFIG.replace(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **task.kept())
    torch.manual_seed(0)
    model = task.head(config).eval()
    alone = [model(collate([row], [0])) for row in rows]
    both = model(batch)
    assert both.sequence_loss.item() == pytest.approx(sum(one.sequence_loss.item() for one in alone) / 2, rel=1e-5)
    counted = 3 * alone[0].token_loss.item() + alone[1].token_loss.item()
    assert both.token_loss.item() == pytest.approx(counted / 4, rel=1e-5)


@pytest.mark.parametrize("missing", ["tags", "label"])
def test_joint_needs_both_a_label_and_tags(missing):
    record = tagged("york", "B-city", label="fly")
    del record.fields[missing]
    with pytest.raises(ValueError, match=f"^a.txt:4: it has no {missing}: joint learns a label and tags of each"):
        Joint().example(record)


def test_a_sentence_is_exact_where_intent_and_all_tags_are():
    task = Joint(scheme="iob2", intents=["fly", "stay"])
    examples = [task.example(tagged("to york", "O B-city", label="fly"))] * 3
    right = {"label": "fly", "tags": ["O", "B-city"]}
    scores = task.measure(examples, [right, right | {"label": "stay"}, right | {"tags": ["O", "O"]}], CONFIG)
    assert (scores["intent_accuracy"], scores["exact"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    with pytest.raises(ValueError, match="a.txt:4: label='go' is not one of"):
        task.label(dataclasses.replace(examples[0], target=("go", ())))


def test_all_sentences_of_snips_are_read():
    if not SNIPS.is_dir():
        pytest.skip("needs SNIPS in ../shared")
    counts = {}
    for split, source in find_splits(SNIPS).items():
        examples = list(read_examples(Joint(), source.records()))
        found = Joint().found(examples)
        assert found["scheme"] == "iob2" and len(found["intents"]) == 7
        counts[split] = len(examples)
    assert counts == {"train": 13084, "valid": 700, "test": 700}


def sentences(count: int, seed: int) -> list[tuple[list[str], list[str], str]]:
    """Fly to a city, or call a person; names of one and two words."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        intent, kind, words = draw.choice([("fly", "city", ["fly", "to"]), ("call", "person", ["please", "call"])])
        name = draw.choice([["york"], ["new", "york"], ["sydney"], ["saint", "sydney"]])
        words, tags = words + name, ["O", "O", f"B-{kind}", *[f"I-{kind}"] * (len(name) - 1)]
        if draw.random() < 0.5:
            words, tags = [*words, "now"], [*tags, "O"]
        made.append((words, tags, intent))
    return made


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    words = ["fly", "to", "please", "call", "york", "new", "sydney", "saint", "now"]
    return save_weights(tmp_path_factory.mktemp("weights"), words_tokenizer(*words))


def test_a_small_model_learns_entities(tmp_path, init, capsys):
    for name, seed in (("train", 1), ("test", 2)):
        lines = ["\n".join(map(" ".join, zip(words, tags, strict=True))) for words, tags, _ in sentences(160, seed)]
        (tmp_path / f"{name}.conll").write_text("\n\n".join(lines) + "\n")
    results = finetune("ner", tmp_path, init, tmp_path / "run", epochs=12)
    assert results["valid"]["f1"] > 0.95 and results["test"]["f1"] > 0.95
    measured = say(capsys, "evaluate", "--model", tmp_path / "run", "--data", tmp_path / "test.conll")
    assert measured["f1"] == pytest.approx(results["test"]["f1"]) and set(measured["per_class"]) == {"city", "person"}
    answer = say(capsys, "predict", "--model", tmp_path / "run", "Please call Saint Sydney now!")["predictions"][0]
    found = [(one["text"], one["label"], one["start"], one["end"]) for one in answer["entities"]]
    assert found == [("Saint Sydney", "person", 12, 24)]


def test_a_small_model_learns_intents_and_slots_and_says_the_same_when_reloaded(tmp_path, init, capsys):
    for name, seed in (("train", 1), ("test", 2)):
        rows = sentences(160, seed)
        (tmp_path / name).mkdir()
        for file, lines in zip(("seq.in", "seq.out", "label"), zip(*rows, strict=True), strict=True):
            text = [line if isinstance(line, str) else " ".join(line) for line in lines]
            (tmp_path / name / file).write_text("\n".join(text) + "\n")
    results = finetune("joint", tmp_path, init, tmp_path / "run", epochs=12)
    assert min(results["test"][name] for name in ("intent_accuracy", "f1", "exact")) > 0.95
    best = next((tmp_path / "run").glob("step-*"))
    assert load_config(best).task_specific_params["intents"] == ["call", "fly"]
    task = Joint(**load_config(best).task_specific_params)
    model = task.head.from_pretrained(best)
    examples = [Joint().example(Record("t:1", {"text": text})) for text in ("fly to new york", "please call york")]
    tokenizer = Tokenizer.from_pretrained(best)
    before = list(map(printable, predict(task, model, tokenizer, examples)))
    model.save_pretrained(tmp_path / "copy")
    again = predict(task, task.head.from_pretrained(tmp_path / "copy"), tokenizer, examples)
    assert list(map(printable, again)) == before and [one["label"] for one in before] == ["fly", "call"]
    answer = say(capsys, "predict", "--model", tmp_path / "run", "fly to new york")["predictions"][0]
    assert answer["tags"] == before[0]["tags"] == ["O", "O", "B-city", "I-city"]
