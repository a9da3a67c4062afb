import numpy as np
import pytest
import torch

from minibert.data.masking import UNITS, Masker
from minibert_kernels import mlm_mask
from minibert_kernels.philox import fold, philox

OPTIONS = {"mask_id": 4, "vocab_size": 37, "special_ids": (0, 1, 2, 3, 4)}


def mask(ids, seed=0, epoch=0, sample=0, **options):
    """One sample: ids with masks [n], the chosen positions [m], what stood there [m]."""
    masker = Masker(seed, **OPTIONS | options)
    return masker(ids, np.array([len(ids)]), np.array([epoch]), np.array([sample]))


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
            masked, rows, labels = mask(ids, 5, epoch, sample)
            expected = oracle(ids.tolist(), 5, epoch, sample)
            assert (masked.tolist(), rows.tolist(), labels.tolist()) == expected


def test_a_batch_is_masked_as_its_samples_alone():
    samples = [sentence(length, seed=length) for length in (7, 1, 37, 13)]
    epoch, number = np.array([0, 0, 1, 1]), np.array([5, 9, 0, 2])
    masker = Masker(3, **OPTIONS)
    masked, rows, labels = masker(np.concatenate(samples), np.array([len(s) for s in samples]), epoch, number)
    alone = [mask(s, 3, e, n) for s, e, n in zip(samples, epoch, number, strict=True)]
    begins = np.cumsum([0, *(len(s) for s in samples)])
    assert np.array_equal(masked, np.concatenate([a[0] for a in alone]))
    assert np.array_equal(rows, np.concatenate([begin + a[1] for begin, a in zip(begins, alone, strict=False)]))
    assert np.array_equal(labels, np.concatenate([a[2] for a in alone]))


def test_special_tokens_are_never_chosen_and_never_drawn():
    ids = np.tile(sentence(11), 300)
    masked, rows, labels = mask(ids, rate=1.0)
    assert (labels >= 5).all() and len(rows) == 300 * 11
    assert np.array_equal(masked[ids < 5], ids[ids < 5])
    assert set(masked[ids >= 5].tolist()) == {4, *range(5, 37)}


def test_special_tokens_alone_are_returned_as_they_are():
    masked, rows, labels = mask(np.array([2, 3]))
    assert masked.tolist() == [2, 3] and len(rows) == len(labels) == 0
    assert [len(part) for part in mask(np.zeros(0, int))] == [0, 0, 0]


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.3, 0.4])
def test_the_number_of_masks_is_exact_and_their_kinds_are_80_10_10(rate):
    ids, kinds = np.arange(1000, 1100), []
    for sample in range(600):
        masked, rows, labels = mask(ids, 1, 0, sample, rate=rate, vocab_size=30_000)
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
        counts[mask(sentence(38), sample=sample)[1]] += 1
    assert counts[0] == counts[-1] == 0
    assert np.abs(counts[1:-1] / 2000 - 6 / 38).max() < 0.04


def test_masks_change_with_seed_epoch_and_sample():
    ids = sentence(100)
    drawn = [mask(ids, *key)[1].tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(rows) for rows in drawn}) == 4
    assert mask(ids, 0, 1, 0)[1].tolist() == drawn[2]


def test_whole_words_are_chosen_together():
    continues = np.zeros(37, dtype=bool)
    continues[20:] = True
    #               [CLS] a  ##  ##  b  c  ##  [SEP] ##  d  ##  [SEP]
    ids = np.array([2, 5, 20, 21, 6, 7, 22, 3, 23, 8, 24, 3])
    words = [{1, 2, 3}, {4}, {5, 6}, {8}, {9, 10}]
    seen = set()
    for sample in range(200):
        _, rows, labels = mask(ids, sample=sample, rate=0.3, is_continuation=continues)
        chosen = set(rows.tolist())
        inside = [word for word in words if word & chosen]
        assert set().union(*inside) == chosen, "no word is chosen in part"
        assert min(len(chosen) - len(word) for word in inside) < 3 <= len(chosen), "the last word may exceed 0.3 * 9"
        assert np.array_equal(labels, ids[rows])
        seen.update(map(frozenset, inside))
    assert seen == set(map(frozenset, words))


def test_a_piece_that_begins_a_sample_begins_a_word_whatever_lies_before_it():
    ids, lengths = np.array([5, 20, 21, 6]), np.array([1, 3])
    masker = Masker(0, **OPTIONS, rate=0.3, is_continuation=np.arange(37) >= 20)
    seen = {tuple(masker(ids, lengths, np.full(2, epoch), np.arange(2))[1].tolist()) for epoch in range(40)}
    assert seen == {(0, 1, 2), (0, 3)}


def span_oracle(ids, seed, rate, max_span):
    """Which tokens are chosen in spans, span by span, with Python integers."""
    shares = [0.2 * 0.8**n for n in range(max_span)]
    spans = []
    for i, token in enumerate(ids):
        words = philox(fold(seed, 0x3A5C), i)
        length = 1 + sum(words[3] / 2**32 >= sum(shares[:n]) / sum(shares) for n in range(1, max_span))
        span = []
        for at in range(i, min(i + length, len(ids))):
            if ids[at] < 5:
                break
            span.append(at)
        if token >= 5:
            spans.append((words[0], i, span))
    chosen = set()
    for at in (at for _, _, span in sorted(spans) for at in span):
        if len(chosen) == max(round(rate * len(spans)), 1):
            break
        chosen.add(at)
    return sorted(chosen)


@pytest.mark.parametrize("max_span", [1, 2, 10])
def test_spans_are_those_of_a_span_by_span_oracle(max_span):
    for seed in range(20):
        ids = np.concatenate([sentence(length, seed) for length in (1, 2, 37, 13)])
        for rate in (0.01, 0.15, 0.5, 1.0):
            masked, rows, labels = mask(ids, seed, rate=rate, unit="span", max_span=max_span)
            assert rows.tolist() == span_oracle(ids.tolist(), seed, rate, max_span)
            assert np.array_equal(labels, ids[rows])
    assert max_span > 1 or np.array_equal(rows, mask(ids, seed, rate=rate)[1]), "spans of one are tokens"


def exact_oracle(samples, seed, count):
    """The rows of a batch that are chosen in turn: one of every sample, then by rank over length."""
    turns, begin = [], 0
    for number, ids in enumerate(samples):
        words = {i: philox(fold(seed, 0x3A5C), i, number)[0] for i, token in enumerate(ids.tolist()) if token >= 5}
        for rank, i in enumerate(sorted(words, key=words.get)):
            turns.append((rank / len(words) if rank else -1, begin + i))
        begin += len(ids)
    return sorted(row for _, row in sorted(turns)[:count])


@pytest.mark.parametrize("count", [1, 3, 4, 11, 49])
def test_an_exact_number_is_taken_in_turn_from_all_samples(count):
    samples = [sentence(length, seed=length) for length in (7, 1, 37, 13)]
    ids, lengths = np.concatenate(samples), np.array([len(s) for s in samples])
    masked, rows, labels = Masker(3, **OPTIONS, count=count)(ids, lengths, np.zeros(4, int), np.arange(4))
    assert rows.tolist() == exact_oracle(samples, 3, count) and len(rows) == count
    assert np.array_equal(labels, ids[rows])
    assert np.array_equal(np.delete(masked, rows), np.delete(ids, rows))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("count", [5, 23, 80])
def test_an_exact_number_is_what_the_op_on_the_device_chooses(unit, count):
    samples = [sentence(length, seed=length) for length in (7, 1, 37, 13)]
    ids, lengths = np.concatenate(samples), np.array([len(s) for s in samples])
    epoch, number = np.array([2, 0, 1, 1]), np.array([5, 9, 0, 1 << 33])
    masker = Masker(3, **OPTIONS, unit=unit, count=count, is_continuation=np.arange(37) >= 20)
    every = torch.arange(37)
    expected = mlm_mask(
        torch.from_numpy(ids), torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), 39, mask_id=4,
        special=every < 5, ordinary=every[5:], unit=unit, continues=every >= 20, seed=3, num_labels=count,
        seq_ids=torch.from_numpy(number), epochs=torch.from_numpy(epoch), backend="reference",
    )  # fmt: skip
    for ours, theirs in zip(masker(ids, lengths, epoch, number), expected, strict=True):
        assert ours.tolist() == theirs.tolist()


def test_a_surplus_of_labels_is_ignored():
    ids = sentence(4)
    masked, rows, labels = mask(ids, count=7)
    assert rows.tolist() == [0, 0, 0, 1, 2, 3, 4] and labels.tolist() == [-100] * 3 + ids[1:5].tolist()
    assert masked[0] == ids[0]


def test_every_chosen_token_may_become_mask():
    ids = sentence(400)
    plain, masked = mask(ids, rate=0.3), mask(ids, rate=0.3, all_mask=True)
    assert (masked[0][masked[1]] == 4).all() and not (plain[0][plain[1]] == 4).all()
    assert all(np.array_equal(a, b) for a, b in zip(plain[1:], masked[1:], strict=True))


def test_spans_are_as_long_as_they_were_in_the_paper():
    ids, lengths, sizes = np.full(2000 * 100, 7), np.full(2000, 100), np.zeros(2000, int)
    for share in range(1, 12):
        masker = Masker(0, **OPTIONS, rate=share / 100, unit="span")
        rows = masker(ids, lengths, np.zeros(2000, int), np.arange(2000))[1].reshape(2000, share)
        # all from the first on: one span, or what there is of it
        sizes += (sizes == share - 1) & (rows[:, -1] - rows[:, 0] == share - 1)
    # two spans lie beside each other now and then
    assert sizes.min() == 1 and (sizes > 10).mean() < 0.01
    assert sizes.mean() == pytest.approx(3.8, abs=0.2)


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_spans_end_where_the_share_is_reached(rate):
    for length in (1, 10, 37, 126):
        for sample in range(50):
            assert len(mask(sentence(length), 0, 0, sample, rate=rate, unit="span")[1]) == max(round(rate * length), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0}, r"mask_rate=0 is not in \(0, 1\]"),
        ({"rate": -0.1}, r"mask_rate=-0.1"),
        ({"rate": 1.5}, r"mask_rate=1.5"),
        ({"count": 0}, "mask_count=0 is not positive"),
        ({"unit": "spam"}, "mask_unit='spam' is not one of token, word, span: did you mean 'span'"),
        ({"unit": "word"}, "unit='word' needs is_continuation"),
        ({"unit": "span", "max_span": 0}, "max_span=0 is not positive"),
        ({"vocab_size": 5}, "vocab_size=5 leaves no token"),
    ],
)
def test_an_option_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Masker(0, **OPTIONS | change)
