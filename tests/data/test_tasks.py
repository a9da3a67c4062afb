"""Labelled files are read strictly, split fairly and drawn by counters."""

import json
from collections import Counter

import numpy as np
import pytest

from minibert.data.tasks import (
    Columns,
    Example,
    LabelledData,
    encode_labels,
    encode_texts,
    find_columns,
    find_splits,
    label_names,
    read_examples,
    split_examples,
)


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(call):
    """The message of the ValueError that `call` raises, which is one line."""
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def rows(examples):
    return [(*example.texts, example.label) for example in examples]


EXPECTED = [("good, really", "1"), ('she said "no"', "0"), ("naïve café", "1")]
CSV = 'text,label\n"good, really",1\n"she said ""no""",0\nnaïve café,1\n'
TSV = 'text\tlabel\ngood, really\t1\nshe said "no"\t0\nnaïve café\t1\n'
JSONL = "".join(json.dumps({"text": text, "label": int(label), "extra": [1]}) + "\n" for text, label in EXPECTED)


@pytest.mark.parametrize(("name", "content"), [("x.csv", CSV), ("x.tsv", TSV), ("x.jsonl", JSONL), ("x.json", JSONL)])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_format_gives_the_same_rows(tmp_path, name, content, start, end):
    path = put(tmp_path / name, start + content.replace("\n", end))
    examples = read_examples(path, Columns())
    assert rows(examples) == EXPECTED
    assert [example.where for example in examples] == [
        f"{path}:{line}" for line in ((1, 2, 3) if "json" in name else (2, 3, 4))
    ]


def test_a_missing_last_newline_and_blank_lines_do_no_harm(tmp_path):
    assert rows(read_examples(put(tmp_path / "x.csv", "\n".join(CSV.split("\n")[:3])), Columns())) == EXPECTED[:2]
    assert rows(read_examples(put(tmp_path / "x.jsonl", JSONL.replace("\n", "\n\n")), Columns())) == EXPECTED
    assert len(read_examples(put(tmp_path / "y.csv", CSV + "\n\n"), Columns())) == 3


def test_a_quoted_field_may_hold_lines_and_a_later_error_still_has_its_line(tmp_path):
    path = put(tmp_path / "x.csv", 'text,label\n"two\nlines",1\nfine,0\n')
    assert rows(read_examples(path, Columns())) == [("two\nlines", "1"), ("fine", "0")]
    path = put(tmp_path / "x.csv", 'text,label\n"two\nlines",1\nfine,0,9\n')
    assert refused(lambda: read_examples(path, Columns())) == f"{path}:4: 3 fields, the header has 2"


def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path):
    path = put(tmp_path / "x.tsv", 'label\ttext\n1\t"half a quote\n0\t"whole"\n')
    assert rows(read_examples(path, Columns())) == [('"half a quote', "1"), ('"whole"', "0")]


def test_pairs_and_other_columns_and_no_labels(tmp_path):
    path = put(tmp_path / "x.csv", "id,b,a,score\n1,second,first,0.5\n")
    assert rows(read_examples(path, Columns(text="a", pair="b", label="score"))) == [("first", "second", "0.5")]
    assert rows(read_examples(path, Columns(text="a", label=None))) == [("first", None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", ": it holds no rows"),
        ("x.csv", "text,label\n", ": it holds no rows"),
        ("x.jsonl", "\n \n", ": it holds no rows"),
        ("x.txt", "text,label\na,1\n", ": file type='.txt' is not one of .csv, .tsv, .jsonl, .json"),
        ("x.csv", "text,label\na,1\nb\n", ":3: 1 fields, the header has 2"),
        ("x.csv", "text,text\na,1\n", ":1: two columns have one name: text, text"),
        ("x.csv", 'label,text\n1,"a\n0,b\n', ":3: unexpected end of data"),
        ("x.csv", 'label,text\n1,"a"b\n', ":2: ',' expected after '\"'"),
        ("x.csv", "txt,label\na,1\n", ":2: column='text' is not one of txt, label: did you mean 'txt'?"),
        ("x.csv", "text,labels\na,1\n", ":2: column='label' is not one of text, labels: did you mean 'labels'?"),
        ("x.csv", "text,label\na,1\n  ,0\n", ":3: text='  ' is not a text"),
        ("x.csv", "text,label\na,1\nb,\n", ":3: label='' is not a label"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": ', ":2: broken JSON"),
        ("x.jsonl", '{"text": "a", "label": 1}\n[1]\n', ":2: expected a JSON object, got list"),
        ("x.jsonl", "[" * 100_000, ":1: broken JSON"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', ":2: column='label' is not one of text"),
        ("x.jsonl", '{"text": 3, "label": 1}\n', ":1: text=3 is not a text"),
        ("x.jsonl", '{"text": null, "label": 1}\n', ":1: text=None is not a text"),
        ("x.jsonl", '{"text": "a", "label": null}\n', ":1: label=None is not a label"),
        ("x.jsonl", '{"text": "a", "label": [1]}\n', ":1: label=[1] is not a label"),
        ("x.csv", b"text,label\na,1\n\xff\xfe,0\n", ":3: not UTF-8 (invalid start byte)"),
        ("x.tsv", "text\tlabel\na\t1\n".encode("utf-16"), ":1: not UTF-8 (invalid start byte)"),
    ],
)
def test_what_cannot_be_read_names_file_line_and_field(tmp_path, name, content, message):
    path = put(tmp_path / name, content)
    assert refused(lambda: read_examples(path, Columns())).startswith(f"{path}{message}")


def test_a_bad_byte_far_into_a_large_file_has_its_line(tmp_path):
    content = b"text,label\n" + b"some words that fill a line,1\n" * 5000 + b"caf\xe9,0\n"
    path = put(tmp_path / "x.csv", content)
    assert refused(lambda: read_examples(path, Columns())).startswith(f"{path}:5002: not UTF-8")


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.csv"
    assert refused(lambda: read_examples(path, Columns())) == f"{path}: no such file"
    assert refused(lambda: read_examples(tmp_path, Columns())) == f"{tmp_path}: no such file"
    assert refused(lambda: find_columns(path)) == f"{path}: no such file"


@pytest.mark.parametrize(
    ("header", "given", "expected"),
    [
        ("text,label", {}, ("text", None, "label")),
        ("label,sentence", {}, ("sentence", None, "label")),
        ("idx,sentence1,sentence2,score", {}, ("sentence1", "sentence2", "score")),
        ("idx,question,sentence,label", {}, ("question", "sentence", "label")),
        ("premise,hypothesis,gold_label", {}, ("premise", "hypothesis", "gold_label")),
        ("text,category", {}, ("text", None, "category")),
        ("text,other", {}, ("text", None, None)),
        ("a,b,c", {"text": "b", "pair": "a", "label": "c"}, ("b", "a", "c")),
    ],
)
def test_usual_column_names_are_found(tmp_path, header, given, expected):
    path = put(tmp_path / "x.csv", f"{header}\n" + ",".join("x" for _ in header.split(",")) + "\n")
    columns = find_columns(path, **given)
    assert (columns.text, columns.pair, columns.label) == expected


def test_unusual_column_names_have_to_be_given(tmp_path):
    path = put(tmp_path / "x.csv", "a,b\n1,2\n")
    assert refused(lambda: find_columns(path)) == f"{path}: its columns are a, b: name the text with --text-column"
    path = put(tmp_path / "x.csv", "a,b\n")
    assert refused(lambda: find_columns(path)) == f"{path}: it holds no rows"


def test_the_files_of_a_folder_are_found_by_their_names(tmp_path):
    for name in ("train.tsv", "dev.tsv", "test.csv", "notes.md"):
        put(tmp_path / name, "x")
    assert {k: path.name for k, path in find_splits(tmp_path).items()} == {
        "train": "train.tsv", "valid": "dev.tsv", "test": "test.csv"
    }  # fmt: skip
    assert find_splits(tmp_path / "notes.md") == {"train": tmp_path / "notes.md"}
    (tmp_path / "train.tsv").unlink()
    assert refused(lambda: find_splits(tmp_path)).startswith(f"{tmp_path}: it has no train file (train.csv")


def examples(counts):
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Example((f"text {i}",), label, f"x.csv:{i + 2}") for i, label in enumerate(labels)]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_disjoint_complete_in_order_and_stratified(seed):
    whole = examples({"a": 61, "b": 37, "c": 5, "d": 1})
    first, second = split_examples(whole, 0.2, seed)
    assert sorted(first + second, key=whole.index) == whole and not set(first) & set(second)
    assert first == sorted(first, key=whole.index) and second == sorted(second, key=whole.index)
    assert Counter(example.label for example in second) == {"a": 12, "b": 7, "c": 1}
    assert any(example.label == "d" for example in first), "a single row stays where it can be learnt"


def test_a_split_is_a_pure_function_of_the_seed():
    whole = examples({"a": 30, "b": 30})
    splits = [split_examples(whole, 0.25, seed)[1] for seed in (3, 3, 4, -1, 2**40)]
    assert splits[0] == splits[1] and len({tuple(split) for split in splits}) == 4


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_neither_part_of_a_split_loses_a_label(fraction):
    for part in split_examples(examples({"a": 40, "b": 2}), fraction, 0):
        assert {example.label for example in part} == {"a", "b"}


def test_numbers_are_split_without_regard_to_their_values():
    whole = [Example(("t",), str(i / 7), f"x:{i}") for i in range(40)]
    first, second = split_examples(whole, 0.25, 0)
    assert (len(first), len(second)) == (30, 10)


def test_labels_are_named_in_the_order_of_numbers_or_letters():
    assert label_names(examples({"10": 2, "9": 1, "-1": 1})) == ("-1", "9", "10")
    assert label_names(examples({"pos": 2, "neg": 1, "2": 1})) == ("2", "neg", "pos")
    assert label_names(examples({"1.0": 2, "1": 1, "01": 1})) == ("01", "1", "1.0")


def test_one_class_only_is_refused():
    assert refused(lambda: label_names(examples({"a": 3}))) == "x.csv: every label is 'a': two classes are needed"


def test_labels_become_classes_or_numbers():
    whole = examples({"b": 1, "a": 2})
    classes = encode_labels(whole, "classification", ("a", "b"))
    assert classes.tolist() == [1, 0, 0] and classes.dtype == np.int64
    numbers = encode_labels(examples({"0.5": 1, "-3": 1, "1e2": 1}), "regression", ())
    assert numbers.tolist() == [0.5, -3, 100] and numbers.dtype == np.float32


@pytest.mark.parametrize("label", ["good", "nan", "inf", "1,5"])
def test_a_label_that_is_no_number_is_named(label):
    message = refused(lambda: encode_labels(examples({"1": 1, label: 1}), "regression", ()))
    assert message == f"x.csv:3: label={label!r} is not a number, which regression needs"


def test_a_label_that_training_never_saw_is_named():
    message = refused(lambda: encode_labels(examples({"good": 1, "bda": 1}), "classification", ("bad", "good")))
    assert message == "x.csv:3: label='bda' is not one of bad, good: did you mean 'bad'?"


def test_texts_become_ids_and_long_ones_are_named(toy_tokenizer):
    whole = [
        Example(("the cat sat", "dogs"), "1", "x.csv:2"),
        Example(("the cat sat on the mat", "birds"), "1", "x.csv:3"),
    ]
    ids, types = encode_texts(toy_tokenizer, whole, 10, truncate=False)
    assert " ".join(toy_tokenizer.convert_ids_to_tokens(ids[0])) == "[CLS] the cat sat [SEP] dogs [SEP]"
    assert types[0] == [0, 0, 0, 0, 0, 1, 1]
    message = refused(lambda: encode_texts(toy_tokenizer, whole, 9, truncate=False))
    assert message == "x.csv:3: the text has 10 tokens, the model takes 9: use --truncate"
    ids, types = encode_texts(toy_tokenizer, whole, 9, truncate=True)
    assert [len(row) for row in ids] == [7, 9] == [len(row) for row in types]


@pytest.fixture
def data():
    ids = [list(range(i + 1)) for i in range(13)]
    types = [[0] * len(row) for row in ids]
    return LabelledData(ids, types, np.arange(13) * 10, batch_size=4, seed=5)


def drawn(data, cursor, batches):
    result = []
    for _ in range(batches):
        batch, cursor = data.next_batch(cursor)
        result.append((batch.lengths, batch.labels.tolist(), batch.seq_ids.tolist(), cursor))
    return result


def test_an_epoch_draws_every_example_once_in_an_order_of_its_own(data):
    epochs = [[label for _, labels, _, _ in drawn(data, start, 4) for label in labels] for start in (0, 13, 26)]
    assert all(sorted(epoch) == list(range(0, 130, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != sorted(epochs[0])
    assert [len(lengths) for lengths, *_ in drawn(data, 0, 5)] == [4, 4, 4, 1, 4]


def test_a_batch_is_skipped_by_its_cursor(data):
    assert [data.skip(cursor) for cursor in (0, 4, 12, 13, 20)] == [4, 8, 13, 17, 24]


def test_texts_and_labels_stay_together(data):
    for lengths, labels, _, _ in drawn(data, 0, 9):
        assert labels == [10 * (length - 1) for length in lengths]


def test_the_stream_resumes_from_its_cursor(data):
    stream = drawn(data, 0, 9)
    for i, (*_, cursor) in enumerate(stream[:-1]):
        assert drawn(data, cursor, 1)[0] == stream[i + 1]
    assert stream[-1][-1] == 4 + 4 + 4 + 1 + 4 + 4 + 4 + 1 + 4


def test_dropout_is_keyed_on_the_place_in_the_stream(data):
    seen = [seq for _, _, seqs, _ in drawn(data, 0, 8) for seq in seqs]
    assert seen == list(range(26))


def test_another_seed_draws_another_order(data):
    other = LabelledData(data.ids, data.types, data.labels, batch_size=4, seed=6)
    assert drawn(other, 0, 4) != drawn(data, 0, 4)


def test_in_order_covers_every_example_once_and_names_its_row(data):
    backwards = LabelledData(data.ids[::-1], data.types[::-1], None, batch_size=5, seed=0)
    seen = []
    for numbers, batch in backwards.in_order():
        assert batch.lengths == tuple(13 - number for number in numbers) and batch.labels is None
        seen += numbers
    assert sorted(seen) == list(range(13)) and seen == list(range(12, -1, -1))
