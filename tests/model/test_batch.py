"""Packing and unpacking lose nothing, and name what does not fit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import packed, padded

from minibert.batch import ROW_SHIFT, Batch, pack, pack_padded, unpack


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=13), seed=st.integers(0, 99))
def test_unpacking_what_was_packed_gives_the_rows_back(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor(lengths, dtype=torch.long)[:, None]
    # shuffled columns: tokens may lie anywhere in a row
    mask = mask[:, torch.randperm(9, generator=generator)] if lengths else mask.new_zeros(0, 9)
    ids = torch.randint(1, 99, mask.shape, generator=generator)
    batch, where = pack_padded(ids, mask.long())
    assert torch.equal(where, mask)
    assert torch.equal(unpack(batch.input_ids, where), ids * mask)
    assert batch.lengths == tuple(lengths) and batch.num_tokens == sum(lengths)
    assert batch.num_sequences == len(lengths) and batch.max_seqlen == max(lengths, default=0)
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()


def test_unpacking_keeps_the_axes_behind_the_tokens():
    batch, mask = pack_padded(**padded((7, 1, 5)))
    x = torch.randn(batch.num_tokens, 3, 2)
    y = unpack(x, mask)
    assert y.shape == (3, 7, 3, 2)
    assert torch.equal(y[2, :5], x[8:13]) and y[1, 1:].abs().sum() == 0


def test_lists_and_padded_rows_make_the_same_batch():
    inputs = padded((4, 1, 3))
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    types = [t[m.bool()].numpy() for t, m in zip(inputs["token_type_ids"], inputs["attention_mask"], strict=True)]
    a, b = pack(rows, types), packed(inputs)
    assert a.lengths == b.lengths
    for name in ("input_ids", "token_type_ids", "positions", "cu_seqlens", "seq_ids", "rows", "first_rows"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name


def test_packing_sets_types_positions_and_borders():
    batch = pack([[5, 6, 7], [], [8]], seq_ids=[10, 3, 2**40])
    assert batch.input_ids.tolist() == [5, 6, 7, 8] and batch.token_type_ids.tolist() == [0] * 4
    assert batch.positions.tolist() == [0, 1, 2, 0] and batch.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.input_ids.dtype == torch.int64
    assert batch.lengths == (3, 0, 1) and batch.max_seqlen == 3
    assert batch.first_rows.tolist() == [0, 3, 3]
    assert batch.rows.tolist() == [10 << ROW_SHIFT, (10 << ROW_SHIFT) + 1, (10 << ROW_SHIFT) + 2, 2**60]


def test_a_token_has_the_same_counter_in_any_batch():
    rows = {7: [5, 6, 7], 8: [9], 9: [4, 4]}
    alone = {seq: pack([ids], seq_ids=[seq]).rows.tolist() for seq, ids in rows.items()}
    for order in ([7, 8, 9], [9, 7], [8, 9, 7]):
        together = pack([rows[seq] for seq in order], seq_ids=order).rows.tolist()
        assert together == sum((alone[seq] for seq in order), [])
    assert len(set(sum(alone.values(), []))) == 6


def test_left_padded_tokens_keep_their_columns_as_positions():
    batch = packed(padded((2, 4), left=True))
    assert batch.positions.tolist() == [2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (4,)])
def test_given_positions_are_kept(shape):
    inputs = padded((2, 4))
    positions = torch.arange(4).flip(0).expand(shape) + 3
    batch, _ = pack_padded(**inputs, position_ids=positions)
    assert batch.positions.tolist() == [6, 5, 6, 5, 4, 3]


def test_no_mask_means_that_every_token_is_there():
    batch, mask = pack_padded(torch.tensor([[5, 0, 7], [0, 0, 1]]))
    assert mask.all() and batch.lengths == (3, 3) and batch.input_ids.tolist() == [5, 0, 7, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_may_have_any_dtype(dtype):
    inputs = padded((3, 1))
    batch, mask = pack_padded(inputs["input_ids"], inputs["attention_mask"].to(dtype))
    assert batch.lengths == (3, 1) and mask.dtype == torch.bool


def test_no_sequences_are_a_batch_too():
    batch = pack([])
    assert (batch.num_tokens, batch.num_sequences, batch.max_seqlen) == (0, 0, 0)
    assert batch.rows.shape == (0,) and batch.cu_seqlens.tolist() == [0]


def test_targets_pass_through_and_move_along():
    targets = {"mlm_rows": torch.tensor([1]), "mlm_labels": torch.tensor([9]), "nsp_labels": torch.tensor([0, 1])}
    batch = pack([[5, 6], [7]], **targets)
    rows = batch.rows  # fills a cache, which must not break the move
    moved = batch.to("meta")
    assert moved.lengths == (2, 1) and moved.labels is None
    for name in ("input_ids", "token_type_ids", "positions", "cu_seqlens", "seq_ids", *targets):
        assert getattr(moved, name).device.type == "meta" and getattr(batch, name).device.type == "cpu", name
    again = batch.to("cpu")
    assert isinstance(again, Batch) and torch.equal(again.rows, rows) and again.mlm_labels.tolist() == [9]


def test_what_does_not_fit_is_named():
    ids = torch.zeros(2, 3, dtype=torch.long)
    cases = [
        (lambda: pack([[1], [2]], seq_ids=[1]), "seq_ids names 1 sequences, got 2"),
        (lambda: pack([[1], [2, 3]], [[0], [0]]), "token_type_ids do not have the lengths of the sequences"),
        (lambda: pack([[1], [2]], [[0]]), "token_type_ids do not have the lengths of the sequences"),
        (lambda: pack_padded(ids[0]), "input_ids has shape [3]: expected [batch, length]"),
        (lambda: pack_padded(ids, ids[:, :2]), "attention_mask has shape [2, 2]: expected [2, 3], as input_ids"),
        (lambda: pack_padded(ids, None, ids[:1]), "token_type_ids has shape [1, 3]: expected [2, 3], as input_ids"),
        (lambda: pack_padded(ids, ids + 2), "attention_mask holds other values than 0 and 1"),
        (lambda: pack_padded(ids, torch.full((2, 3), 0.5)), "attention_mask holds other values than 0 and 1"),
        (lambda: pack_padded(ids, position_ids=ids[:, :2]), "position_ids has shape [2, 2]: expected [2, 3]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


TARGETS = {
    "mlm_rows": [0, 0, 1, 4, 5, 9],
    "mlm_labels": [-100, -100, 7, 8, 9, 6],
    "nsp_labels": [0, 1, 0, 1, 1],
    "sop_labels": [1, 0, -100, 0, 1],
    "labels": [[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]],
}
WHOLE = pack(
    [[5, 6, 7], [], [8, 9], [4, 4, 4, 4], [3]],
    [[0, 0, 1], [], [0, 1], [0, 1, 1, 1], [0]],
    seq_ids=[10, 3, 2**40, 7, 8],
    **{name: torch.tensor(values) for name, values in TARGETS.items()},
)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_a_batch_is_split_by_sequences_that_keep_all_that_is_theirs(count):
    pieces = WHOLE.split(count)
    assert len(pieces) == min(count, 5) and sum((piece.lengths for piece in pieces), ()) == WHOLE.lengths
    assert max(piece.num_sequences for piece in pieces) == -(-5 // len(pieces))
    for name in ("input_ids", "token_type_ids", "positions", "rows", "seq_ids", "mlm_labels", *TARGETS):
        begins = np.cumsum([0, *(piece.num_tokens for piece in pieces)])
        shifts = begins if name == "mlm_rows" else [0] * len(begins)
        joined = torch.cat([getattr(piece, name) + shift for piece, shift in zip(pieces, shifts, strict=False)])
        assert torch.equal(joined, getattr(WHOLE, name)), name
    for piece in pieces:
        assert (
            piece.cu_seqlens.dtype == torch.int32
            and piece.cu_seqlens.tolist() == np.cumsum([0, *piece.lengths]).tolist()
        )
        assert piece.max_seqlen == max(piece.lengths)


def test_a_batch_without_targets_or_sequences_is_split_too():
    assert [piece.input_ids.tolist() for piece in pack([[5, 6], [7]]).split(2)] == [[5, 6], [7]]
    assert [piece.num_tokens for piece in pack([]).split(4)] == [0]


def test_a_batch_whose_labels_are_of_groups_is_not_split():
    batch = pack([[1], [2], [3], [4]], labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="the labels are of groups of sequences"):
        batch.split(2)
    assert batch.split(1) == [batch]
