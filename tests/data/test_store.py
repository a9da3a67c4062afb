import json
import pickle
import shutil

import numpy as np
import pytest

from minibert.data import Tokenizer, TokenStore, build_store, split_documents

TOY = "The cat sat. Dogs bark!\nWhy?\n\nBirds sing.\n\n\x01\n\nA cat on a mat. . zebra\n"


@pytest.fixture
def toy_text(tmp_path):
    path = tmp_path / "toy.txt"
    path.write_text(TOY)
    return path


def test_a_toy_corpus_is_stored_as_worked_out_by_hand(toy_text, toy_tokenizer, tmp_path):
    store = build_store(toy_text, tmp_path / "store", toy_tokenizer)
    #        the cat sat .   dogs bark !   why ?   birds sing .   a cat on a mat .   . zebra
    sentences = [[5, 6, 7, 11], [12, 13, 19], [20, 21], [17, 18, 11], [9, 6, 8, 9, 10, 11, 11, 1]]
    assert [store.sentence(i).tolist() for i in range(store.num_sentences)] == sentences
    assert [store.document(i) for i in range(store.num_documents)] == [(0, 3), (3, 4), (4, 5)]
    assert (store.num_documents, store.num_sentences, store.num_tokens) == (3, 5, 20)
    assert store.meta["counts"]["unknown"] == 1 and store.meta["tokenizer_hash"] == toy_tokenizer.hash
    assert store.meta["sources"][0]["file"] == "toy.txt" and store.meta["sources"][0]["bytes"] == len(TOY)
    assert (tmp_path / "store" / "tokens.bin").stat().st_size == 2 * 20
    assert store.tokenizer.hash == toy_tokenizer.hash
    assert not (tmp_path / "store.tmp").exists()


def test_a_store_travels_to_another_process_by_its_path(toy_text, toy_tokenizer, tmp_path):
    store = build_store(toy_text, tmp_path / "store", toy_tokenizer)
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).tokens, store.tokens)


def test_batches_of_text_do_not_change_the_store(sample_corpus, tokenizer, store, tmp_path, monkeypatch):
    monkeypatch.setattr("minibert.data.parts.BATCH_CHARACTERS", 1000)
    monkeypatch.setattr("minibert.data.parts.CHUNK", 7)
    small = build_store(sample_corpus, tmp_path / "small", tokenizer)
    for name in ("tokens.bin", "sentences.bin", "documents.bin", "meta.json"):
        assert (small.path / name).read_bytes() == (store.path / name).read_bytes(), name
    part = build_store(sample_corpus, tmp_path / "part", tokenizer, max_documents=13)
    assert part.num_documents == 13
    assert np.array_equal(part.tokens, store.tokens[: part.num_tokens])


def test_a_large_vocabulary_is_stored_in_32_bits(toy_text, toy_tokenizer, tmp_path):
    pieces = toy_tokenizer.get_vocab()
    pieces |= {f"unused{i}": len(pieces) + i for i in range(1 << 16)}
    large = Tokenizer.from_vocab(pieces | {"zebra": 70_000})
    store = build_store(toy_text, tmp_path / "store", large)
    assert store.tokens.dtype == np.uint32 and store.tokens[-1] == 70_000


def test_the_same_store_is_used_again_and_another_is_never_overwritten(toy_text, toy_tokenizer, tmp_path):
    out = tmp_path / "store"
    build_store(toy_text, out, toy_tokenizer)
    (out / "mark").touch()
    build_store([toy_text], out, toy_tokenizer)
    assert (out / "mark").exists()
    cased = Tokenizer.from_vocab(toy_tokenizer.get_vocab(), lowercase=False)
    for tokenizer, options, name in ((cased, {}, "tokenizer_hash"), (toy_tokenizer, {"max_documents": 1}, "max_doc")):
        with pytest.raises(ValueError, match=name):
            build_store(toy_text, out, tokenizer, **options)
    toy_text.write_text(TOY.replace("zebra", "horse"))
    with pytest.raises(ValueError, match="sources"):
        build_store(toy_text, out, toy_tokenizer)
    assert (out / "mark").exists()


def test_a_folder_or_file_that_is_no_store_is_left_alone(toy_text, toy_tokenizer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("mine")
    for out in (tmp_path / "thesis", toy_text):
        with pytest.raises(ValueError, match="no token store"):
            build_store(toy_text, out, toy_tokenizer)
    assert (tmp_path / "thesis" / "chapter1").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert build_store(toy_text, tmp_path / "empty", toy_tokenizer).num_documents == 3


def test_a_build_that_fails_leaves_nothing(tmp_path, toy_tokenizer):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"the cat\n\n\xff\n")
    with pytest.raises(ValueError, match="bad.txt:3"):
        build_store(path, tmp_path / "store", toy_tokenizer)
    path.write_text("\x01\n")
    with pytest.raises(ValueError, match="no document"):
        build_store(path, tmp_path / "store", toy_tokenizer)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.txt"]


def test_a_folder_with_the_name_of_a_temporary_one_is_left_alone(toy_text, toy_tokenizer, tmp_path):
    (tmp_path / "store.tmp").mkdir()
    (tmp_path / "store.tmp" / "tokens.bin").write_bytes(b"mine")
    before = set(tmp_path.iterdir())
    assert build_store(toy_text, tmp_path / "store", toy_tokenizer).num_tokens == 20
    assert (tmp_path / "store.tmp" / "tokens.bin").read_bytes() == b"mine"
    assert set(tmp_path.iterdir()) == before | {tmp_path / "store"}


@pytest.mark.parametrize("name", ["tokens.bin", "sentences.bin", "documents.bin"])
def test_a_store_that_is_cut_off_is_refused_with_the_file(store, tmp_path, name):
    shutil.copytree(store.path, tmp_path / "store")
    file = tmp_path / "store" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=name):
        TokenStore(tmp_path / "store")
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        TokenStore(tmp_path / "store")


@pytest.mark.parametrize(
    "meta",
    ["{", "[]", "{}", '{"version": 7}', '{"version": 1, "dtype": "float8"}', '{"version": 1, "dtype": "uint16"}'],
)
def test_a_broken_meta_file_is_refused(store, tmp_path, meta):
    shutil.copytree(store.path, tmp_path / "store")
    (tmp_path / "store" / "meta.json").write_text(meta)
    with pytest.raises(ValueError, match="meta.json"):
        TokenStore(tmp_path / "store")


def test_counts_that_do_not_fit_the_files_are_refused(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    meta = json.loads((store.path / "meta.json").read_text())
    offsets = np.fromfile(store.path / "documents.bin", dtype=np.int64)
    offsets[-1] += 1
    offsets.tofile(tmp_path / "store" / "documents.bin")
    with pytest.raises(ValueError, match="documents.bin"):
        TokenStore(tmp_path / "store")
    meta["counts"]["tokens"] = 0
    (tmp_path / "store" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="tokens"):
        TokenStore(tmp_path / "store")
    with pytest.raises(ValueError, match="no token store"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(
    "count, fraction, held_out", [(100, 0.1, 10), (2, 0.01, 1), (3, 0.9, 2), (1, 0, 0), (13, 0, 0)]
)
def test_documents_are_split_into_two_disjoint_parts(count, fraction, held_out):
    train, valid = split_documents(count, fraction, 7)
    assert len(valid) == held_out
    assert sorted([*train, *valid]) == list(range(count))
    assert all(np.array_equal(a, b) for a, b in zip((train, valid), split_documents(count, fraction, 7), strict=True))


def test_each_side_of_a_split_gets_what_pairs_need():
    train, valid = split_documents(20, 0.05, 7, at_least=2)
    assert (len(train), len(valid)) == (18, 2)
    with pytest.raises(ValueError, match="there are 3 documents: training and held-out text need 2 each"):
        split_documents(3, 0.05, 7, at_least=2)


def test_the_split_depends_on_the_seed_and_refuses_a_bad_fraction():
    assert not np.array_equal(split_documents(1000, 0.1, 1)[1], split_documents(1000, 0.1, 2)[1])
    assert abs(split_documents(1000, 0.1, 1)[1].mean() - 500) < 100
    with pytest.raises(ValueError, match="valid_fraction=1.5"):
        split_documents(10, 1.5, 0)


def test_wikipedia_becomes_a_store(shared, tmp_path):
    tokenizer = Tokenizer.from_pretrained(shared / "vocab" / "bert-base-uncased-tokenizer.json")
    store = build_store(shared / "data/corpora/enwiki-2015/wiki_03", tmp_path / "store", tokenizer)
    assert store.num_documents > 10 and store.num_tokens > 100_000
    assert store.meta["counts"]["unknown"] < 0.01 * store.num_tokens
    assert tokenizer.decode(store.sentence(0)).startswith("attila")
