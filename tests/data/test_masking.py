import numpy as np
import pytest

from minibert.data.masking import Masker, mask_tokens
from minibert_kernels.philox import fold, philox

OPTIONS = {"mask_id": 4, "vocab_size": 37, "special_ids": (0, 1, 2, 3, 4)}


def sentence(length, seed=0):
    ids = np.random.default_rng(seed).integers(5, 37, length)
    return np.concatenate([[2], ids, [3]])


def oracle(ids, seed, epoch, sample, rate=0.15):
    """Token by token, with Python integers."""
    key = fold(seed, 0x3A5C)
    words = {i: philox(key, i, sample, sample >> 32, epoch) for i, token in enumerate(ids) if token >= 5}
    count = max(round(rate * len(words)), 1)
    chosen = sorted(sorted(words, key=lambda i: words[i][0])[:count])
    masked = list(ids)
    for i in chosen:
        share = words[i][1] / 2**32
        if share < 0.9:
            masked[i] = 4 if share < 0.8 else range(5, 37)[words[i][2] * 32 >> 32]
    return masked, chosen, [ids[i] for i in chosen]


@pytest.mark.parametrize("length", [1, 7, 37, 126])
def test_masks_are_those_of_a_token_by_token_oracle(length):
    ids = sentence(length)
    for sample in (0, 13, 1 << 40):
        for epoch in (0, 7):
            masked, rows, labels = mask_tokens(ids, 5, epoch, sample, **OPTIONS)
            expected = oracle(ids.tolist(), 5, epoch, sample)
            assert (masked.tolist(), rows.tolist(), labels.tolist()) == expected


def test_a_batch_is_masked_as_its_samples_alone():
    samples = [sentence(length, seed=length) for length in (7, 1, 37, 13)]
    epoch, number = np.array([0, 0, 1, 1]), np.array([5, 9, 0, 2])
    masker = Masker(3, **OPTIONS)
    masked, rows, labels = masker(np.concatenate(samples), np.array([len(s) for s in samples]), epoch, number)
    alone = [mask_tokens(s, 3, e, n, **OPTIONS) for s, e, n in zip(samples, epoch, number, strict=True)]
    begins = np.cumsum([0, *(len(s) for s in samples)])
    assert np.array_equal(masked, np.concatenate([a[0] for a in alone]))
    assert np.array_equal(rows, np.concatenate([begin + a[1] for begin, a in zip(begins, alone, strict=False)]))
    assert np.array_equal(labels, np.concatenate([a[2] for a in alone]))


def test_special_tokens_are_never_chosen_and_never_drawn():
    ids = np.tile(sentence(11), 300)
    masked, rows, labels = mask_tokens(ids, 0, 0, 0, rate=1.0, **OPTIONS)
    assert (labels >= 5).all() and len(rows) == 300 * 11
    assert np.array_equal(masked[ids < 5], ids[ids < 5])
    assert set(masked[ids >= 5].tolist()) == {4, *range(5, 37)}


def test_special_tokens_alone_are_returned_as_they_are():
    masked, rows, labels = mask_tokens(np.array([2, 3]), 0, 0, 0, **OPTIONS)
    assert masked.tolist() == [2, 3] and len(rows) == len(labels) == 0
    assert [len(part) for part in mask_tokens(np.zeros(0, int), 0, 0, 0, **OPTIONS)] == [0, 0, 0]


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.3, 0.4])
def test_the_number_of_masks_is_exact_and_their_kinds_are_80_10_10(rate):
    options = OPTIONS | {"vocab_size": 30_000}
    ids, kinds = np.arange(1000, 1100), []
    for sample in range(600):
        masked, rows, labels = mask_tokens(ids, 1, 0, sample, rate=rate, **options)
        assert len(rows) == max(round(rate * 100), 1)
        assert np.array_equal(labels, ids[rows]) and len(set(rows.tolist())) == len(rows)
        untouched = np.setdiff1d(np.arange(100), rows)
        assert np.array_equal(masked[untouched], ids[untouched])
        kinds.append(np.where(masked[rows] == 4, 0, np.where(masked[rows] == labels, 2, 1)))
    share = np.bincount(np.concatenate(kinds), minlength=3) / np.concatenate(kinds).size
    bound = 4 * (0.25 / np.concatenate(kinds).size) ** 0.5
    assert np.abs(share - [0.8, 0.1, 0.1]).max() < bound


def test_every_position_is_chosen_equally_often():
    counts = np.zeros(40)
    for sample in range(2000):
        counts[mask_tokens(sentence(38), 0, 0, sample, **OPTIONS)[1]] += 1
    assert counts[0] == counts[-1] == 0
    assert np.abs(counts[1:-1] / 2000 - 6 / 38).max() < 0.04


def test_masks_change_with_seed_epoch_and_sample():
    ids = sentence(100)
    drawn = [mask_tokens(ids, *key, **OPTIONS)[1].tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(rows) for rows in drawn}) == 4
    assert mask_tokens(ids, 0, 1, 0, **OPTIONS)[1].tolist() == drawn[2]


def test_whole_words_are_chosen_together():
    continues = np.zeros(37, dtype=bool)
    continues[20:] = True
    #               [CLS] a  ##  ##  b  c  ##  [SEP] ##  d  ##  [SEP]
    ids = np.array([2, 5, 20, 21, 6, 7, 22, 3, 23, 8, 24, 3])
    words = [{1, 2, 3}, {4}, {5, 6}, {8}, {9, 10}]
    seen = set()
    for sample in range(200):
        _, rows, labels = mask_tokens(ids, 0, 0, sample, rate=0.3, whole_word=continues, **OPTIONS)
        chosen = set(rows.tolist())
        inside = [word for word in words if word & chosen]
        assert set().union(*inside) == chosen, "no word is chosen in part"
        assert min(len(chosen) - len(word) for word in inside) < 3 <= len(chosen), "the last word may exceed 0.3 * 9"
        assert np.array_equal(labels, ids[rows])
        seen.update(map(frozenset, inside))
    assert seen == set(map(frozenset, words))


@pytest.mark.parametrize("rate", [0, -0.1, 1.5])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="mask_rate="):
        mask_tokens(sentence(7), 0, 0, 0, rate=rate, **OPTIONS)
    with pytest.raises(ValueError, match="vocab_size=5"):
        Masker(0, mask_id=4, vocab_size=5, special_ids=range(5))
