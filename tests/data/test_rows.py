"""Rows are packed with what their heads read and learn, and drawn by counters."""

import numpy as np
import pytest
import torch

from minibert.data.rows import Row, RowData, collate, in_order


def lengths_1_to_13(batch_size=4, seed=5):
    rows = [Row(list(range(i + 1)), [0] * (i + 1), label=10 * i) for i in range(13)]
    return RowData(rows, batch_size=batch_size, seed=seed)


@pytest.fixture
def data():
    return lengths_1_to_13()


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
    assert drawn(lengths_1_to_13(seed=6), 0, 4) != drawn(data, 0, 4)


def test_in_order_covers_every_row_once_shortest_first_and_names_it(data):
    seen = []
    for numbers, batch in in_order(data.rows[::-1], batch_tokens=20):
        assert batch.lengths == tuple(13 - number for number in numbers) and batch.labels is None
        assert batch.seq_ids.tolist() == numbers and (batch.num_tokens <= 20 or len(numbers) == 1)
        seen += numbers
    assert seen == list(range(12, -1, -1))


def test_a_row_longer_than_the_budget_has_a_batch_of_its_own(data):
    sizes = [batch.lengths for _, batch in in_order(data.rows[:7], batch_tokens=5)]
    assert sizes == [(1, 2), (3,), (4,), (5,), (6,), (7,)]


def units():
    """Five questions of three choices; the first choice carries the answer."""
    return [
        Row([10 * q + c] * (1 + (q + c) % 4), [0] * (1 + (q + c) % 4), label=q % 3 if c == 0 else None)
        for q in range(5)
        for c in range(3)
    ]


def test_rows_that_belong_together_stay_together():
    data, cursor, seen = RowData(units(), batch_size=2, seed=1, together=3), 0, []
    for _ in range(3):
        batch, cursor = data.next_batch(cursor)
        firsts = batch.input_ids[batch.cu_seqlens[:-1].long()].tolist()
        assert [first % 10 for first in firsts] == [0, 1, 2] * (len(firsts) // 3)
        questions = [first // 10 for first in firsts[::3]]
        assert batch.labels.tolist() == [q % 3 for q in questions]
        seen += questions
    assert sorted(seen) == list(range(5)) and cursor == 5 == len(data)


def test_grouping_by_length_gives_even_batches_in_a_shuffled_order_and_every_row_once_an_epoch():
    lengths = np.random.default_rng(0).integers(1, 40, 1000)
    rows = [Row([number] * size, [0] * size) for number, size in enumerate(lengths)]
    data = RowData(rows, batch_size=4, seed=2, group_by_length=True)
    again = RowData(rows, batch_size=4, seed=2, group_by_length=True)
    epochs, cursor = [], 0
    for _ in range(2):
        batches = []
        for _ in range(250):
            batch, end = data.next_batch(cursor)
            batches.append(batch)
            if cursor % 7 == 0:  # from anywhere, whatever was drawn before
                assert torch.equal(again.next_batch(cursor)[0].input_ids, batch.input_ids)
            cursor = end
        epochs.append(torch.cat([batch.input_ids[batch.cu_seqlens[:-1].long()] for batch in batches]))
        longest = np.array([batch.max_seqlen for batch in batches])
        assert sum(4 * batch.max_seqlen - batch.num_tokens for batch in batches) < 0.05 * lengths.sum()
        assert (np.diff(longest[:64]) < 0).sum() > 20  # not from short to long
    assert cursor == 2000 and not torch.equal(*epochs)
    assert all(torch.equal(epoch.sort().values, torch.arange(1000)) for epoch in epochs)


def test_grouping_by_length_keeps_what_belongs_together_and_the_smaller_batch_last():
    data = RowData(units(), batch_size=2, seed=1, together=3, group_by_length=True)
    batches = [data.next_batch(cursor)[0] for cursor in (0, 2, 4)]
    assert [batch.num_sequences for batch in batches] == [6, 6, 3]
    questions = [first // 10 for batch in batches for first in batch.input_ids[batch.cu_seqlens[:-1].long()].tolist()]
    assert questions[::3] == questions[1::3] == questions[2::3] and sorted(questions[::3]) == list(range(5))


def test_what_a_head_reads_is_shifted_to_where_the_row_lies():
    rows = [
        Row([1, 2, 3], [0, 0, 0], at=(1,), tags=(7,)),
        Row([4, 5], [0, 0]),
        Row([6, 7, 8, 9], [0, 0, 1, 1], at=(0, 3), tags=(8, 9)),
    ]
    batch = collate(rows, [4, 9, 2])
    assert batch.token_rows.tolist() == [1, 5, 8] and batch.token_labels.tolist() == [7, 8, 9]
    assert batch.labels is None and batch.seq_ids.tolist() == [4, 9, 2]
    assert batch.input_ids[batch.token_rows].tolist() == [2, 6, 9]
    bare = collate(rows, [0, 1, 2], labelled=False)
    assert bare.token_rows.tolist() == [1, 5, 8] and bare.token_labels is None


@pytest.mark.parametrize(
    ("labels", "dtype", "shape"),
    [([2, 0], torch.int64, (2,)), ([0.5, 1], torch.float32, (2,)), ([[0.0, 1, 1], [1, 0, 0]], torch.float32, (2, 3))],
)
def test_labels_have_the_type_of_their_head(labels, dtype, shape):
    batch = collate([Row([1], [0], label=label) for label in labels], [0, 1], dtype)
    assert batch.labels.dtype == dtype and batch.labels.shape == shape


def test_no_batch_is_empty():
    with pytest.raises(ValueError, match="batch_size=0 is not positive"):
        lengths_1_to_13(batch_size=0)
