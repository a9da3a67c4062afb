"""Mixtures of stores: each sample is one of a store's own, and which one follows from the cursor alone."""

import itertools

import numpy as np
import pytest
import torch

from minibert.data import Mixture, PretrainingData, build_store

WORDS = ("the", "cat", "sat", "on", "a", "mat", "dogs", "bark", "at", "night", "and", "birds", "sing", "play")


@pytest.fixture(scope="module")
def parts(toy_tokenizer, tmp_path_factory):
    """Two stores of 11 and 40 documents, the second without the words of the first."""
    made = []
    for name, count, words in (("small", 11, WORDS[:7]), ("large", 40, WORDS[7:])):
        folder = tmp_path_factory.mktemp(name)
        documents = [
            "\n".join(" ".join(words[(d * i + k) % 7] for k in range(3 + (d + i) % 5)) for i in range(5 + d % 7))
            for d in range(count)
        ]
        (folder / "a.txt").write_text("\n\n".join(documents))
        store = build_store(folder / "a.txt", folder / "store", toy_tokenizer)
        made.append(PretrainingData(store, toy_tokenizer, seed=5, max_length=23, batch_tokens=190))
    return made


def owners(mixture, cursors):
    epoch, index = mixture._order(cursors)
    return np.searchsorted(mixture.sampler.last, index, side="right"), epoch, index


def test_every_block_has_the_shares_exactly_and_every_epoch_each_sample_once(parts):
    mixture = Mixture(parts, [0.7, 0.3])
    owner, epoch, index = owners(mixture, np.arange(5000))
    assert owner.reshape(5, 1000).sum(1).tolist() == [300] * 5
    for number, part in enumerate(parts):
        mine = np.stack([epoch, index])[:, owner == number]
        for e in range(int(mine[0].max())):
            assert sorted(mine[1][mine[0] == e] - mixture.sampler.first[number]) == list(range(len(part)))
    runs = np.flatnonzero(np.diff(owner[:1000]))
    assert 300 < len(runs) < 540  # in no pattern: 420 changes are expected


def test_samples_are_those_of_the_stores_and_masked_alike_from_any_cursor(parts, toy_tokenizer):
    mixture = Mixture(parts, [1, 3])
    batches = list(itertools.islice(mixture.batches(), 30))
    again = Mixture(parts, [0.25, 0.75])
    _, start = batches[11]
    for (a, cursor_a), (b, cursor_b) in zip(batches[12:], again.batches(start), strict=False):
        assert (
            cursor_a == cursor_b and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.mlm_labels, b.mlm_labels)
        )
    cursor = 0
    for batch, after in batches:
        owner, epoch, index = owners(mixture, np.arange(cursor, after))
        borders = batch.cu_seqlens.tolist()
        ids = batch.input_ids.clone()
        ids[batch.mlm_rows] = batch.mlm_labels
        for i in range(after - cursor):
            own = int(index[i] - mixture.sampler.first[owner[i]])
            pair = parts[owner[i]].sampler(int(epoch[i]), own)
            assert ids[borders[i] : borders[i + 1]].tolist() == pair.ids.tolist()
            assert batch.token_type_ids[borders[i] : borders[i + 1]].tolist() == pair.types.tolist()
            assert batch.nsp_labels[i] == pair.label
        cursor = after


def test_an_evaluation_goes_through_without_repeats(parts):
    for weights in ([1, 1], [0.01, 0.99]):
        mixture = Mixture(parts, weights)
        seen = torch.cat([batch.seq_ids for batch in mixture.evaluation_batches()]).tolist()
        assert len(seen) == len(set(seen)) > len(parts[0]) // 20
        assert {int(i >= len(parts[0])) for i in seen} == {0, 1}


def test_weights_that_make_no_mixture_are_refused(parts):
    for weights, message in (
        ([1], "2 stores and 1 weights"),
        ([1, 0], "not all positive"),
        ([1, float("nan")], "not all positive"),
        ([1, 1e-5], "less than a thousandth"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(parts, weights)


def test_quotas_add_up(parts):
    assert Mixture(parts, [1, 2]).quota.tolist() == [333, 667]
    assert Mixture([*parts, parts[0]], [1, 1, 1]).quota.tolist() == [334, 333, 333]
