import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minibert.data import build_store
from minibert.data.pairs import PairSampler, _truncate

ROOT = Path(__file__).resolve().parents[2]
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def toy_store(toy_tokenizer, tmp_path_factory):
    """Three documents of sentences with 2, 3, 1; 9; and 1, 1 tokens."""
    folder = tmp_path_factory.mktemp("toy")
    sentences = ["the cat\nsat on a\nmat", "dogs bark at night and birds sing ! why", "play\n?"]
    (folder / "toy.txt").write_text("\n\n".join(sentences))
    return build_store(folder / "toy.txt", folder / "store", toy_tokenizer)


def decode(store, ids):
    return store.tokenizer.decode(ids)


def sections(pair):
    """A and B without special tokens."""
    first, last = np.flatnonzero(pair.ids == SEP)
    return pair.ids[1:first].tolist(), pair.ids[first + 1 : last].tolist()


def test_chunks_of_a_toy_corpus_are_as_worked_out_by_hand(toy_store):
    sampler = PairSampler(toy_store, seed=0, max_length=8, short_prob=0)  # room for 5 tokens
    pieces = [(int(a), int(b)) for a, b in zip(sampler._pieces[:-1], sampler._pieces[1:], strict=True)]
    assert pieces == [(0, 2), (2, 5), (5, 6), (6, 10), (10, 15), (15, 16), (16, 17)]  # 9 tokens became 4 and 5
    chunks = list(zip(sampler._start.tolist(), sampler._end.tolist(), strict=True))
    assert chunks == [(0, 2), (2, 3), (3, 5), (5, 7)]


def test_true_pairs_continue_and_random_ones_come_from_another_document(toy_store):
    sampler = PairSampler(toy_store, seed=0, max_length=8, short_prob=0)
    documents = [[5, 6, 7, 8, 9, 10], [12, 13, 14, 15, 16, 17, 18, 19, 20], [24, 21]]
    seen = set()
    for epoch in range(40):
        for index in range(len(sampler)):
            pair = sampler(epoch, index)
            a, b = sections(pair)
            own = next(document for document in documents if a[0] in document)
            assert pair.ids[0] == CLS and len(a) + len(b) <= 5 and a and b
            assert pair.types.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
            if pair.label:
                assert b[0] not in own
            else:
                assert b[0] in own and own.index(b[0]) > own.index(a[-1])
            seen.add((index, pair.label))
    assert seen == {(0, 0), (0, 1), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)}, "one sentence alone needs a random partner"


def test_without_pairs_a_sample_is_whole_sentences_of_one_document(toy_store):
    sampler = PairSampler(toy_store, seed=0, max_length=7, pairs=None, short_prob=0)
    texts = [decode(toy_store, sampler(0, i).ids) for i in range(len(sampler))]
    assert texts == [
        "[CLS] the cat sat on a [SEP]",
        "[CLS] mat [SEP]",
        "[CLS] dogs bark at night [SEP]",
        "[CLS] and birds sing! why [SEP]",
        "[CLS] play? [SEP]",
    ]
    assert sampler(0, 1).types.tolist() == [0, 0, 0]


def test_without_pairs_every_token_is_in_exactly_one_sample(store):
    sampler = PairSampler(store, seed=3, max_length=37, pairs=None)
    index = np.arange(len(sampler))
    plan = sampler.plan(np.zeros_like(index), index)
    assert plan.start[0, 0] == 0 and plan.sizes.max() <= 37
    assert np.array_equal(plan.start[1:, 0], (plan.start + plan.length)[:-1, 0])
    assert plan.length.sum() == store.num_tokens


@pytest.mark.parametrize("max_length", [5, 7, 37, 128, 512])
def test_no_sample_is_longer_than_allowed_and_every_part_has_a_token(store, max_length):
    sampler = PairSampler(store, seed=1, max_length=max_length)
    index = np.arange(len(sampler))
    plan = sampler.plan(np.full_like(index, 7), index)
    assert plan.sizes.max() == max_length
    assert plan.length.min() >= 1
    assert (plan.start >= 0).all() and (plan.start + plan.length <= store.num_tokens).all()


def test_half_of_the_partners_are_random_and_all_of_those_from_other_documents(store):
    sampler = PairSampler(store, seed=5, max_length=128)
    index = np.tile(np.arange(len(sampler)), 20)
    plan = sampler.plan(np.repeat(np.arange(20), len(sampler)), index)
    document = np.searchsorted(store.sentences[store.documents], plan.start, side="right") - 1
    is_random = plan.label.astype(bool)
    assert abs(is_random.mean() - 0.5) < 0.02
    assert (document[is_random, 0] != document[is_random, 1]).all()
    assert (document[~is_random, 0] == document[~is_random, 1]).all()
    assert (plan.start[~is_random, 1] >= (plan.start + plan.length)[~is_random, 0]).all()
    partners = np.bincount(document[is_random, 1], minlength=store.num_documents)
    assert (partners > 0).all(), "every document is a partner"


def test_about_a_tenth_of_the_chunks_is_short(store):
    sampler = PairSampler(store, seed=5, max_length=64)
    short = sampler._target < 61
    assert 0.05 < short.mean() < 0.2
    assert sampler._target.min() >= 2
    assert not (PairSampler(store, seed=5, max_length=64, short_prob=0)._target < 61).any()


def test_a_sample_depends_on_seed_epoch_and_index_alone(store):
    sampler = PairSampler(store, seed=5)
    alone = PairSampler(store, seed=5)(2, 13)
    for i in range(20):
        sampler(0, i)
    index = np.arange(len(sampler))
    plan = sampler.plan(np.full_like(index, 2), index)
    ids, _ = sampler.gather(plan)
    begin = int(plan.sizes[:13].sum())
    assert np.array_equal(sampler(2, 13).ids, alone.ids)
    assert np.array_equal(ids[begin : begin + len(alone.ids)], alone.ids)
    different = [PairSampler(store, seed=6)(2, 13), sampler(3, 13), sampler(2, 14)]
    assert not any(np.array_equal(other.ids, alone.ids) for other in different)


def test_another_process_draws_the_same_sample(store):
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from minibert.data import TokenStore
from minibert.data.pairs import PairSampler
pair = PairSampler(TokenStore({str(store.path)!r}), seed=5)(2, 13)
print(pair.ids.tolist(), pair.types.tolist(), pair.label)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    pair = PairSampler(store, seed=5)(2, 13)
    assert done.stdout.strip() == f"{pair.ids.tolist()} {pair.types.tolist()} {pair.label}", done.stderr


def test_samples_come_only_from_the_documents_that_were_named(store):
    documents = [1, 7, 13]
    sampler = PairSampler(store, seed=5, documents=documents)
    index = np.arange(len(sampler))
    plan = sampler.plan(np.zeros_like(index), index)
    found = np.searchsorted(store.sentences[store.documents], plan.start, side="right") - 1
    assert set(found.ravel().tolist()) == set(documents)


def test_truncation_takes_tokens_one_by_one_from_the_longer_part():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, size=(300, 2))
    for room in (2, 7, 20, 37):
        expected = []
        for a, b in lengths.tolist():
            while a + b > room:
                a, b = (a - 1, b) if a > b else (a, b - 1)
            expected.append([a, b])
        assert _truncate(lengths, room).tolist() == expected


def test_truncation_cuts_the_front_and_the_back(toy_store):
    sampler = PairSampler(toy_store, seed=0, max_length=5, short_prob=0)
    partners = {tuple(sections(sampler(epoch, 0))[1]) for epoch in range(60)}
    assert len(partners) > 5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_length": 4}, "max_length=4"),
        ({"max_length": 2, "pairs": None}, "max_length=2"),
        ({"pairs": "nps"}, "pairs='nps' is not one of nsp, sop: did you mean 'nsp'"),
        ({"short_prob": 1.5}, "short_prob=1.5"),
        ({"documents": []}, "documents"),
        ({"documents": [0, 3]}, "documents"),
        ({"documents": [1]}, "two documents"),
    ],
)
def test_samplers_that_cannot_work_are_refused(toy_store, options, words):
    with pytest.raises(ValueError, match=words):
        PairSampler(toy_store, seed=0, **options)
    assert len(PairSampler(toy_store, seed=0, documents=[1], pairs=None)) == 1
