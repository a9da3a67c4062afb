"""Small stores that the data tests share."""

from pathlib import Path

import pytest

from minibert.data import Tokenizer, build_store, read_documents
from minibert.data.sample import write_sample_corpus

SHARED = Path(__file__).resolve().parents[2].parent / "shared"

TOY_WORDS = "the cat sat on a mat . dogs bark at night and birds sing ! why ? ##s ##ing play"


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("needs real text in ../shared")
    return SHARED


@pytest.fixture(scope="session")
def toy_tokenizer():
    """Five special tokens (0 to 4), then TOY_WORDS from 5 on."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOY_WORDS.split()]
    return Tokenizer.from_vocab({piece: i for i, piece in enumerate(pieces)})


@pytest.fixture(scope="session")
def sample_corpus(tmp_path_factory):
    return write_sample_corpus(tmp_path_factory.mktemp("sample") / "topics.jsonl")


@pytest.fixture(scope="session")
def tokenizer(sample_corpus):
    texts = (paragraph for document in read_documents(sample_corpus) for paragraph in document)
    return Tokenizer.train(texts, 1500)


@pytest.fixture(scope="session")
def store(sample_corpus, tokenizer, tmp_path_factory):
    return build_store(sample_corpus, tmp_path_factory.mktemp("stores") / "topics", tokenizer)


@pytest.fixture(scope="session")
def wiki(shared, tmp_path_factory):
    """Two files of Wikipedia, under BERT's own vocabulary."""
    tokenizer = Tokenizer.from_pretrained(shared / "vocab" / "bert-base-uncased-tokenizer.json")
    files = [shared / "data/corpora/enwiki-2015" / f"wiki_{i:02}" for i in (5, 17)]
    return build_store(files, tmp_path_factory.mktemp("stores") / "wiki", tokenizer)
