import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.data import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAD, UNK, CLS, SEP, MASK = range(5)


def run_python(code, **environment):
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_one_text_gives_flat_lists(toy_tokenizer):
    encoding = toy_tokenizer("The CAT, played")
    pieces = toy_tokenizer.convert_ids_to_tokens(encoding.input_ids)
    assert pieces == ["[CLS]", "the", "cat", "[UNK]", "[UNK]", "[SEP]"]
    assert encoding.token_type_ids == [0] * 6 and encoding["attention_mask"] == [1] * 6
    assert list(encoding) == ["input_ids", "token_type_ids", "attention_mask"]
    assert toy_tokenizer.tokenize("cats playing!") == ["cat", "##s", "play", "##ing", "!"]


def test_pairs_carry_types_and_batches_are_lists_of_rows(toy_tokenizer):
    encoding = toy_tokenizer(["the cat", "dogs"], ["birds sing.", "why?"])
    assert encoding.token_type_ids == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert encoding.input_ids[1] == [CLS, 12, SEP, 20, 21, SEP]


def test_padding_and_tensors(toy_tokenizer):
    encoding = toy_tokenizer(["the cat sat", "dogs"], padding=True, return_tensors="pt")
    assert encoding.input_ids.tolist() == [[CLS, 5, 6, 7, SEP], [CLS, 12, SEP, PAD, PAD]]
    assert encoding.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert encoding.to("meta").input_ids.device.type == "meta"
    assert toy_tokenizer("dogs", return_tensors="np").input_ids.shape == (1, 3)
    assert len(toy_tokenizer("dogs", padding="max_length", max_length=7).input_ids) == 7
    assert len(toy_tokenizer("dogs", padding="max_length").input_ids) == 512
    assert toy_tokenizer("dogs").input_ids == [CLS, 12, SEP], "a call must not change the next one"


@pytest.mark.parametrize(
    "truncation, kept",
    [
        (True, "the cat [SEP] dogs bark [SEP]"),
        ("only_first", "the [SEP] dogs bark at [SEP]"),
        ("only_second", "the cat sat [SEP] dogs [SEP]"),
    ],
)
def test_truncation_cuts_the_text_it_names(toy_tokenizer, truncation, kept):
    encoding = toy_tokenizer("the cat sat", "dogs bark at", truncation=truncation, max_length=7)
    assert len(encoding.input_ids) == 7
    assert toy_tokenizer.decode(encoding.input_ids) == f"[CLS] {kept}"


def test_truncation_without_a_length_uses_the_models(toy_tokenizer):
    assert len(toy_tokenizer("cat " * 1000, truncation=True).input_ids) == 512
    assert len(toy_tokenizer("cat " * 1000).input_ids) == 1002


def test_offsets_and_special_token_masks(toy_tokenizer):
    encoding = toy_tokenizer("The cats", return_offsets_mapping=True, return_special_tokens_mask=True)
    assert encoding.offset_mapping == [(0, 0), (0, 3), (4, 7), (7, 8), (0, 0)]
    assert encoding.special_tokens_mask == [1, 0, 0, 0, 1]


def test_an_empty_list_and_an_empty_text(toy_tokenizer):
    assert toy_tokenizer([]).input_ids == []
    assert toy_tokenizer("").input_ids == [CLS, SEP]
    assert toy_tokenizer("", add_special_tokens=False).input_ids == []


@pytest.mark.parametrize(
    "arguments, options, words",
    [
        (([3],), {}, ["text[0]", "int"]),
        ((["a"], "b"), {}, ["text_pair"]),
        ((["a", "b"], ["c"]), {}, ["2 rows", "1"]),
        (("a",), {"truncation": "longest"}, ["truncation='longest'"]),
        (("a",), {"truncation": "only_second"}, ["text_pair"]),
        (("a",), {"padding": "maximum"}, ["padding='maximum'"]),
        (("a",), {"return_tensors": "tf"}, ["return_tensors='tf'"]),
        (("a",), {"truncation": True, "max_length": 0}, ["max_length=0"]),
        (("a", "b"), {"truncation": True, "max_length": 2}, ["max_length=2"]),
        ((["a", "a cat"],), {"return_tensors": "pt"}, ["padding=True"]),
    ],
)
def test_bad_calls_are_refused_and_leave_no_trace(toy_tokenizer, arguments, options, words):
    with pytest.raises(ValueError) as caught:
        toy_tokenizer(*arguments, **options)
    for word in words:
        assert word in str(caught.value)
    assert toy_tokenizer("dogs").input_ids == [CLS, 12, SEP]


def test_ids_and_pieces_convert_both_ways(toy_tokenizer):
    assert toy_tokenizer.convert_tokens_to_ids(["cat", "zebra"]) == [6, UNK]
    assert toy_tokenizer.convert_ids_to_tokens(6) == "cat"
    assert toy_tokenizer.decode(torch.tensor([CLS, 6, 22, SEP]), skip_special_tokens=True) == "cats"
    assert toy_tokenizer.decode(np.array([CLS, 12, SEP]), skip_special_tokens=True) == "dogs"
    for bad in (-1, 10_000):
        with pytest.raises(ValueError, match=str(bad)):
            toy_tokenizer.convert_ids_to_tokens([bad])


def test_saving_and_loading_keeps_everything(toy_tokenizer, tmp_path):
    toy_tokenizer.save_pretrained(tmp_path / "new" / "folder")
    loaded = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.hash == toy_tokenizer.hash and loaded.get_vocab() == toy_tokenizer.get_vocab()
    assert pickle.loads(pickle.dumps(loaded)).hash == loaded.hash
    assert (tmp_path / "new/folder/vocab.txt").read_text().split("\n")[:2] == ["[PAD]", "[UNK]"]
    from_vocab = Tokenizer.from_pretrained(tmp_path / "new" / "folder" / "vocab.txt")
    assert from_vocab("the cats, why?").input_ids == loaded("the cats, why?").input_ids


def test_the_hash_tells_tokenizers_apart(toy_tokenizer):
    vocab = toy_tokenizer.get_vocab()
    same, cased = Tokenizer.from_vocab(vocab), Tokenizer.from_vocab(vocab, lowercase=False)
    other = Tokenizer.from_vocab(vocab | {"zebra": len(vocab)})
    assert same.hash == toy_tokenizer.hash
    assert len({same.hash, cased.hash, other.hash}) == 3
    assert cased("The the").input_ids == [CLS, UNK, 5, SEP] and not cased.lowercase


def test_special_tokens_may_stand_anywhere_in_a_vocabulary(tmp_path):
    pieces = ["the", "[SEP]", "cat", "[MASK]", "[CLS]", "\u2028", "[UNK]", "[PAD]"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 6}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.vocab_size, tokenizer.model_max_length) == (7, 8, 6)
    assert tokenizer.special_ids == (1, 3, 4, 6, 7)
    encoding = tokenizer(["the cat", "The"], padding=True)
    assert encoding.input_ids == [[4, 0, 2, 1], [4, 6, 1, 7]]


def test_truncation_and_padding_stored_in_a_file_do_not_leak(toy_tokenizer, tmp_path):
    toy_tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert len(loaded("the cat sat on a mat").input_ids) == 8
    assert loaded.hash == toy_tokenizer.hash


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.json", "{", ["tokenizer.json", "JSON"]),
        ("tokenizer.json", "[]", ["object"]),
        ("tokenizer.json", '{"hidden_size": 37}', ["no model"]),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', ["BPE", "WordPiece"]),
        ("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": 7}}', ["tokenizer.json"]),
        ("vocab.txt", "the\ncat\n", ["vocab.txt", "[PAD]"]),
        ("vocab.txt", b"\xff\n", ["vocab.txt", "UTF-8"]),
        ("config.json", "{}", ["tokenizer.json or vocab.txt"]),
        ("tokenizer_config.json", "{", ["tokenizer.json or vocab.txt"]),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


TRAIN = """
from pydoc_data.topics import topics
from minibert.data import Tokenizer
tokenizer = Tokenizer.train(topics.values(), 1200)
print(tokenizer.vocab_size, tokenizer.hash)
"""


def test_training_gives_the_same_vocabulary_in_every_process():
    results = {run_python(TRAIN, PYTHONHASHSEED=str(seed)).stdout for seed in range(2)}
    assert len(results) == 1 and results.pop().startswith("1200 ")


def test_training_learns_frequent_words_whole():
    texts = ["Banana bread, banana split!"] * 30 + ["zyx"]
    tokenizer = Tokenizer.train(iter(texts), 60)
    assert tokenizer.tokenize("BANANA bread") == ["banana", "bread"]
    assert tokenizer.tokenize("zyx") == ["z", "##y", "##x"], "seen once, below min_frequency"
    assert tokenizer.special_ids == (0, 1, 2, 3, 4) and tokenizer.vocab_size <= 60
    cased = Tokenizer.train(texts, 60, lowercase=False)
    assert "B" in cased.get_vocab() and "B" not in tokenizer.get_vocab()


def test_training_on_nothing_or_into_too_little_is_refused():
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train([" ", ""], 100)
    with pytest.raises(ValueError, match="vocab_size=9"):
        Tokenizer.train(["some characters"], 9)


def test_text_that_spells_a_special_token_is_text_in_a_store(toy_tokenizer):
    assert toy_tokenizer("[MASK] cat").input_ids == [CLS, MASK, 6, SEP]
    assert toy_tokenizer.encode_plain(["[MASK] cat", ""]) == [[UNK, UNK, UNK, 6], []]
    assert toy_tokenizer("[MASK]").input_ids == [CLS, MASK, SEP]


def test_offsets_are_characters_of_the_text_as_it_was_given(toy_tokenizer):
    text = "Thé  [MASK]\u200b CAT"
    [(ids, offsets), empty] = toy_tokenizer.encode_with_offsets([text, ""])
    assert ids == toy_tokenizer.encode_plain([text])[0] and empty == ([], [])
    assert [text[a:b] for a, b in offsets] == ["Thé", "[", "MASK", "]", "CAT"]


def test_a_process_may_fork_after_encoding_without_a_warning():
    code = """
import os, warnings
warnings.simplefilter("error")
from minibert.data import Tokenizer
t = Tokenizer.train(["some text here"] * 9, 60)
t(["some text"] * 50)
child = os.fork()
if child == 0:
    t(["some text"] * 50)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.environ.get("TOKENIZERS_PARALLELISM"))
"""
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("7 None\n", "")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(), max_size=200), st.text(max_size=20))
def test_any_unicode_text_gets_ids_within_the_vocabulary(toy_tokenizer, text, pair):
    encoding = toy_tokenizer(text, pair, return_offsets_mapping=True)
    assert all(0 <= i < toy_tokenizer.vocab_size for i in encoding.input_ids)
    assert all(0 <= a <= b <= len(text + pair) for a, b in encoding.offset_mapping)
    assert isinstance(toy_tokenizer.decode(encoding.input_ids), str)
    assert len(toy_tokenizer(text, pair, truncation=True, max_length=13).input_ids) <= 13


def test_half_a_surrogate_pair_is_cleaned_away(toy_tokenizer):
    assert toy_tokenizer("\ud800 cat \udfff").input_ids == [CLS, 6, SEP]
    assert toy_tokenizer.encode_plain(["\ud800 cat"]) == [[6]]


def test_a_line_of_ten_megabytes_is_encoded_in_seconds(toy_tokenizer):
    start = time.perf_counter()
    assert toy_tokenizer.encode_plain(["x" * 10_000_000]) == [[UNK]]
    assert len(toy_tokenizer("cat " * 250_000, truncation=True, max_length=37).input_ids) == 37
    assert time.perf_counter() - start < 60
