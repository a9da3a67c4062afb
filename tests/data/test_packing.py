import itertools

import numpy as np
import pytest
import torch

from minibert.data import PretrainingData, split_documents
from minibert.data.masking import Masker
from minibert.data.packing import permute

FIELDS = ("input_ids", "token_type_ids", "positions", "cu_seqlens", "seq_ids", "mlm_rows", "mlm_labels", "nsp_labels")


def same(a, b):
    return a.lengths == b.lengths and all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


@pytest.fixture(scope="module")
def data(store, tokenizer):
    return PretrainingData(store, tokenizer, seed=7, max_length=64, batch_tokens=1300)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 37, 64, 65, 1000])
def test_permute_visits_every_index_once(n):
    index = np.arange(n)
    for epoch in (0, 1, 1 << 33):
        assert sorted(permute(3, epoch, index, n).tolist()) == index.tolist()
    assert [permute(3, 1, i, n) for i in range(n)] == permute(3, 1, index, n).tolist()


def test_permutations_differ_between_epochs_and_seeds_and_look_random():
    index = np.arange(4096)
    a, b, c = permute(0, 0, index, 4096), permute(0, 1, index, 4096), permute(1, 0, index, 4096)
    for x, y in ((a, b), (a, c), (a, index)):
        assert (x == y).sum() < 15
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.08
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.08


def test_permute_takes_large_numbers():
    n = (1 << 31) - 1
    values = permute(0, 0, np.array([0, 1, n - 1]), n)
    assert len(set(values.tolist())) == 3 and values.min() >= 0 and values.max() < n


def test_every_sample_is_visited_once_an_epoch(data):
    cursor, seen, epochs = 0, [], 3
    while cursor < epochs * len(data):
        batch, after = data.next_batch(cursor)
        assert batch.seq_ids.tolist() == list(range(cursor, after))
        seen.extend(range(cursor, after))
        cursor = after
    cursors = np.array(seen[: epochs * len(data)])
    for epoch in range(epochs):
        part = cursors[cursors // len(data) == epoch] % len(data)
        assert sorted(permute(data.seed, epoch, part, len(data)).tolist()) == list(range(len(data)))


def test_a_batch_is_its_samples_masked_one_by_one(data, tokenizer):
    cursor = len(data) - 13  # the batch reaches into the next epoch
    batch, after = data.next_batch(cursor)
    borders = batch.cu_seqlens.tolist()
    special = {
        "mask_id": tokenizer.mask_token_id,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": tokenizer.special_ids,
    }
    masker, rows, labels = Masker(7, **special), [], []
    for i, position in enumerate(range(cursor, after)):
        epoch = position // len(data)
        index = permute(7, epoch, position % len(data), len(data))
        pair = data.sampler(epoch, index)
        own = np.array([[len(pair.ids)], [epoch], [index]])
        ids, chosen, originals = masker(np.asarray(pair.ids, dtype=np.int64), *own)
        here = slice(borders[i], borders[i + 1])
        assert batch.input_ids[here].tolist() == ids.tolist()
        assert batch.token_type_ids[here].tolist() == pair.types.tolist()
        assert batch.positions[here].tolist() == list(range(len(ids)))
        assert batch.nsp_labels[i] == pair.label
        rows.extend((borders[i] + chosen).tolist())
        labels.extend(originals.tolist())
    assert (batch.mlm_rows.tolist(), batch.mlm_labels.tolist()) == (rows, labels)
    assert after > len(data)


def test_batches_fill_their_budget_and_no_more(data):
    cursor = 0
    for _ in range(30):
        batch, cursor = data.next_batch(cursor)
        following = data.next_batch(cursor)[0].lengths[0]
        assert batch.num_tokens <= 1300 < batch.num_tokens + following
        assert batch.max_seqlen <= 64


def test_a_batch_is_skipped_without_reading_a_token(data, monkeypatch):
    ends = [0]
    for _ in range(3 + len(data) // 20):
        ends.append(data.next_batch(ends[-1])[1])
    assert ends[-1] > len(data)
    monkeypatch.setattr(data.sampler, "gather", None)
    assert [data.skip(cursor) for cursor in ends[:-1]] == ends[1:]


def test_a_batch_has_a_sample_even_where_the_budget_is_too_small(store, tokenizer):
    data = PretrainingData(store, tokenizer, max_length=64, batch_tokens=1)
    assert [data.next_batch(cursor)[1] for cursor in range(5)] == [1, 2, 3, 4, 5]


def test_short_samples_fill_a_large_budget(store, tokenizer):
    data = PretrainingData(store, tokenizer, max_length=7, batch_tokens=20_000)
    batch, cursor = data.next_batch(3)
    assert 20_000 - 7 <= batch.num_tokens <= 20_000 and cursor - 3 == batch.num_sequences


def test_a_run_continues_from_its_cursor_alone(data, store, tokenizer):
    batches = list(itertools.islice(data.batches(), 50))
    fresh = PretrainingData(store, tokenizer, seed=7, max_length=64, batch_tokens=1300)
    resumed = list(itertools.islice(fresh.batches(batches[19][1]), 30))
    for (a, cursor_a), (b, cursor_b) in zip(batches[20:], resumed, strict=True):
        assert cursor_a == cursor_b and same(a, b)


def test_evaluation_passes_once_over_the_held_out_documents(store, tokenizer):
    train, valid = split_documents(store.num_documents, 0.1, 0)
    data = PretrainingData(store, tokenizer, documents=valid, max_length=64, batch_tokens=700)
    batches = list(data.evaluation_batches())
    assert torch.cat([batch.seq_ids for batch in batches]).tolist() == list(range(len(data)))
    assert all(batch.num_tokens <= 700 for batch in batches)
    assert all(same(a, b) for a, b in zip(batches, data.evaluation_batches(), strict=True))
    limited = list(data.evaluation_batches(3))
    assert len(limited) == 3 and all(same(a, b) for a, b in zip(limited, batches, strict=False))
    other = PretrainingData(store, tokenizer, documents=train, max_length=64)
    spans = [set(np.unique(d.sampler.plan(*[np.arange(len(d))] * 2).start[:, 0]).tolist()) for d in (data, other)]
    assert not spans[0] & spans[1]


def test_rates_of_a_whole_epoch_are_those_of_the_paper(data, tokenizer):
    cursor, masked, tokens, random, samples = 0, 0, 0, 0, 0
    while cursor < len(data):
        batch, cursor = data.next_batch(cursor)
        masked += len(batch.mlm_rows)
        tokens += batch.num_tokens - 3 * batch.num_sequences
        random += int(batch.nsp_labels.sum())
        samples += batch.num_sequences
        assert not torch.isin(batch.mlm_labels, torch.tensor(tokenizer.special_ids)).any()
    assert abs(masked / tokens - 0.15) < 0.01
    assert abs(random / samples - 0.5) < 0.05


def test_without_pairs_there_are_no_pair_labels(store, tokenizer):
    batch, _ = PretrainingData(store, tokenizer, nsp=False, whole_word=True).next_batch(0)
    assert batch.nsp_labels is None
    assert batch.token_type_ids.sum() == 0 and len(batch.mlm_rows) > 0


def test_a_store_of_another_tokenizer_is_refused(store, toy_tokenizer):
    with pytest.raises(ValueError, match="another tokenizer"):
        PretrainingData(store, toy_tokenizer)
    with pytest.raises(ValueError, match="batch_tokens=0"):
        PretrainingData(store, store.tokenizer, batch_tokens=0)


def test_real_text_gives_the_rates_of_the_paper(wiki):
    data = PretrainingData(wiki, wiki.tokenizer)
    batches = [batch for batch, _ in itertools.islice(data.batches(), 60)]
    samples = sum(batch.num_sequences for batch in batches)
    assert abs(sum(int(batch.nsp_labels.sum()) for batch in batches) / samples - 0.5) < 0.04
    masked = sum(len(batch.mlm_rows) for batch in batches) / sum(batch.num_tokens for batch in batches)
    assert 0.14 < masked < 0.155
