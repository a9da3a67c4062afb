"""The same ids as transformers, from the same files, and from those that we write."""

from pathlib import Path

import pytest

from minibert.data import Tokenizer

transformers = pytest.importorskip("transformers")
SHARED = Path(__file__).resolve().parents[2].parent / "shared"
CORPUS = [
    "Banana bread, naïve CAFÉ! 3.14 – 中文 ﬁne",
    "don't stop; e-mail [MASK] me\tnow\n",
    "x" * 137,
    "",
    "##ing \u200b🙂",
] * 5


def assert_same(ours, theirs, texts, pairs=None):
    for options in ({}, {"truncation": True, "max_length": 13}, {"padding": True, "return_tensors": "pt"}):
        a, b = ours(texts, pairs, **options), theirs(texts, pairs, **options)
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            x, y = (e[name].tolist() if "return_tensors" in options else e[name] for e in (a, b))
            assert x == y, (name, options)
    padded = {"padding": "max_length", "truncation": "longest_first", "max_length": 37}
    assert ours(texts, pairs, **padded)["input_ids"] == theirs(texts, pairs, **padded)["input_ids"]
    for row in a.input_ids.tolist():
        assert ours.decode(row) == theirs.decode(row, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_reads_what_we_save_and_gives_the_same_ids(tmp_path, lowercase):
    ours = Tokenizer.train(CORPUS, 150, lowercase=lowercase)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == ours.model_max_length and theirs.mask_token_id == ours.mask_token_id
    assert len(theirs) == ours.vocab_size
    assert_same(ours, theirs, CORPUS[:5])
    assert_same(ours, theirs, CORPUS[:5], CORPUS[5:0:-1])


def test_a_pretrained_tokenizer_gives_the_ids_of_transformers(tmp_path):
    folder = SHARED / "weights" / "bert-tiny-splade-mlm"
    if not folder.is_dir():
        pytest.skip("needs ../shared/weights")
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    lines = (SHARED / "data/corpora/enwiki-2015/wiki_00").read_text().split("\n")[1:400]
    assert_same(ours, theirs, lines, lines[::-1])
    ours.save_pretrained(tmp_path)
    assert_same(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), lines)


def test_options_and_results_have_the_form_of_transformers(tmp_path):
    Tokenizer.train(CORPUS, 150).save_pretrained(tmp_path)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    assert dict(ours("e-mail me", **options)) == dict(theirs("e-mail me", **options))
    assert ours("e-mail", return_tensors="pt").input_ids.shape == theirs("e-mail", return_tensors="pt").input_ids.shape
    assert ours.encode("a b", "c") == theirs.encode("a b", "c")
    assert ours.tokenize("bread now") == theirs.tokenize("bread now")
