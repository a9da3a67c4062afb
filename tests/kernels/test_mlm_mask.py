import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from harness import SEED, repeat_with

from minibert.data.masking import Masker
from minibert_kernels import masking
from minibert_kernels.masking import mlm_mask
from minibert_kernels.philox import fold, philox
from minibert_kernels.reference import UNITS, span_reach

VOCAB, SPECIAL, MASK = 37, 5, 4


def tables(device):
    """Ids 0 to 4 are special, 20 and up continue a word."""
    ids = torch.arange(VOCAB, device=device)
    return {"mask_id": MASK, "special": ids < SPECIAL, "ordinary": ids[SPECIAL:], "continues": ids >= 20}


def offsets(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def twin(ids, lengths, seed, seq_ids, epochs, rate, unit, max_span):
    """(masked, labels) by the NumPy Masker."""
    continues = np.arange(VOCAB) >= 20 if unit == "word" else None
    masker = Masker(
        seed, mask_id=MASK, vocab_size=VOCAB, special_ids=range(SPECIAL), rate=rate, unit=unit, max_span=max_span,
        is_continuation=continues,
    )  # fmt: skip
    masked, rows, labels = masker(ids.numpy(), np.array(lengths, dtype=np.int64), epochs.numpy(), seq_ids.numpy())
    return torch.from_numpy(masked), torch.full_like(ids, -100).index_copy(
        0, torch.from_numpy(rows), torch.from_numpy(labels)
    )


@dataclass(frozen=True)
class Case:
    seed: int
    lengths: tuple
    unit: str = "token"
    rate: float = 0.15
    max_span: int = 10
    num_labels: int | None = None
    first_id: int = 0
    slack: int = 0
    strided: bool = False

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        lengths = tuple(rng.choice([0, 1, 2, 7, 13, rng.randint(1, 70)]) for _ in range(rng.randint(0, 3)))
        return cls(
            seed=seed,
            lengths=lengths,
            unit=rng.choice(UNITS),
            rate=rng.choice([0.001, 0.15, 0.15, 0.3, 0.5, 1.0]),
            max_span=rng.choice([1, 2, 3, 5]),
            num_labels=rng.choice([None, None, 0, len(lengths), 5, sum(lengths), 100]),
            first_id=rng.choice([0, 3, 4, SPECIAL]),
            slack=rng.choice([0, 0, 3]),
            strided=rng.random() < 0.3,
        )

    def run(self, device):
        rng = np.random.default_rng(self.seed)
        ids = torch.from_numpy(rng.integers(self.first_id, VOCAB, sum(self.lengths)))
        seq_ids, epochs = (torch.from_numpy(rng.integers(-(2**62), 2**62, len(self.lengths))) for _ in range(2))
        options = {"unit": self.unit, "rate": self.rate, "max_span": self.max_span, "seed": self.seed - 50}
        with repeat_with(self, device):
            expected = twin(ids, self.lengths, seq_ids=seq_ids, epochs=epochs, **options)
            mine = torch.stack([ids, ids - 1], 1).to(device)[:, 0] if self.strided else ids.to(device)
            options |= tables(device) | {"seq_ids": seq_ids.to(device), "epochs": epochs.to(device)}
            call = mine, offsets(self.lengths).to(device), max(self.lengths, default=0) + self.slack
            if self.num_labels is None:
                for backend in ("triton", "reference"):
                    for ours, theirs in zip(mlm_mask(*call, backend=backend, **options), expected, strict=True):
                        assert torch.equal(ours.cpu(), theirs), backend
            else:
                options["num_labels"] = self.num_labels
                pair = (mlm_mask(*call, backend=backend, **options) for backend in ("triton", "reference"))
                for ours, theirs in zip(*pair, strict=True):
                    assert torch.equal(ours, theirs)


def test_any_call_gives_the_bits_of_the_numpy_twin(fuzz_seed, device, poisoned):
    Case.draw(fuzz_seed).run(device)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("length", [512, 4096])
def test_long_sequences_give_the_bits_of_the_numpy_twin(length, unit, device, poisoned):
    Case(seed=length, lengths=(length - 1, 3), unit=unit, max_span=3).run(device)


def test_shares_are_rounded_as_numpy_rounds_them(device):
    # 0.15 times an odd multiple of 10 lies between two integers, where the last bit of the product decides
    Case(seed=1, lengths=(10, 30, 50, 70, 90), first_id=SPECIAL).run(device)
    Case(seed=1, lengths=(1, 5, 15, 35), first_id=SPECIAL, rate=0.1).run(device)


def test_spans_that_are_too_short_fail_and_print_the_line_that_repeats_it(device, monkeypatch):
    monkeypatch.setattr(masking, "span_reach", lambda unit, max_span: span_reach(unit, max_span - 1))
    with pytest.raises(AssertionError, match="triton") as failure:
        Case(seed=3, lengths=(40, 60), unit="span", rate=0.3, max_span=3).run(device)
    (line,) = failure.value.__notes__
    with pytest.raises(AssertionError, match="triton"):
        eval(line.removeprefix("repeat with: "))


def batch(lengths, device="cpu", first_id=SPECIAL, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first_id, VOCAB, (sum(lengths),), generator=generator)
    return ids.to(device), offsets(lengths).to(device), max(lengths, default=0)


def pieces(values, lengths):
    return [piece.tolist() for piece in values.split(lengths)]


@pytest.mark.parametrize("unit", UNITS)
def test_a_sequence_gets_the_same_masks_in_any_batch(unit, device):
    lengths = [13, 1, 40, 7]
    ids, cuts, longest = batch(lengths, device)
    names, epochs = torch.tensor([2**40, 5, 0, 9], device=device), torch.tensor([0, 1, 0, 3], device=device)
    options = tables(device) | {"unit": unit, "rate": 0.3, "seed": SEED, "backend": "triton"}
    together = mlm_mask(ids, cuts, longest, seq_ids=names, epochs=epochs, **options)
    for i, own in enumerate(ids.split(lengths)):
        alone = mlm_mask(
            own, offsets([len(own)]).to(device), 128, seq_ids=names[i : i + 1], epochs=epochs[i : i + 1], **options
        )
        for ours, all_ in zip(alone, together, strict=True):
            assert ours.tolist() == pieces(all_, lengths)[i]


def test_masks_change_with_seed_epoch_and_sequence(device):
    ids, cuts, longest = batch([60], device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    drawn = [
        mlm_mask(ids, cuts, longest, backend="triton", **tables(device), **options)[1].tolist()
        for options in ({}, {"seed": 1}, {"seed": 1 << 32}, {"epochs": one}, {"seq_ids": one}, {"seq_ids": one << 32})
    ]
    assert len({tuple(labels) for labels in drawn}) == 6


def test_the_seed_may_be_an_int_of_any_size_or_a_tensor(device):
    ids, cuts, longest = batch([60], device)
    options = tables(device) | {"rate": 0.5}
    for seed in (7, -7, 2**63 + 11):
        ours, reference = (
            mlm_mask(ids, cuts, longest, seed=seed, backend=backend, **options)[1]
            for backend in ("triton", "reference")
        )
        assert torch.equal(ours, reference)
    for backend in ("triton", "reference"):
        by_tensor = mlm_mask(ids, cuts, longest, seed=torch.tensor(7, device=device), backend=backend, **options)
        assert torch.equal(by_tensor[1], mlm_mask(ids, cuts, longest, seed=7, **options)[1])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_tokens_no_sequences_and_special_tokens_alone_are_returned_as_they_are(backend, unit, device):
    options = tables(device) | {"unit": unit, "backend": backend}
    for lengths, first_id in (([], 0), ([0], 0), ([0, 0], 0)):
        ids, cuts, longest = batch(lengths, device, first_id)
        assert [len(out) for out in mlm_mask(ids, cuts, longest, **options)] == [0, 0]
        masked, rows, labels = mlm_mask(ids, cuts, longest, num_labels=2, **options)
        assert (masked.tolist(), rows.tolist(), labels.tolist()) == ([], [0, 0], [-100, -100])
    ids, cuts = torch.tensor([2, 3, 2], device=device), offsets([2, 0, 1]).to(device)
    masked, labels = mlm_mask(ids, cuts, 2, **options)
    assert masked.tolist() == [2, 3, 2] and labels.tolist() == [-100] * 3
    masked, rows, labels = mlm_mask(ids, cuts, 2, num_labels=2, **options)
    assert (masked.tolist(), rows.tolist(), labels.tolist()) == ([2, 3, 2], [0, 0], [-100, -100])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("lengths", "before", "after"), [([7, 0, 13], 0, 40), ([3, 1], 0, 2), ([7, 3], 5, 37), ([], 0, 3)]
)
def test_tokens_outside_of_the_sequences_stay_and_get_no_label(lengths, before, after, backend, unit, device, poisoned):
    ids, cuts, longest = batch(lengths, device)
    options = tables(device) | {"unit": unit, "rate": 0.5, "backend": backend}
    around = [torch.arange(SPECIAL, SPECIAL + n, device=device) % VOCAB for n in (before, after)]
    wide = torch.cat([around[0], ids, around[1]])
    inner = slice(before, before + len(ids))
    masked, labels = mlm_mask(ids, cuts, longest, **options)
    ours, rows = mlm_mask(wide, cuts + before, longest, **options)
    expected, marks = wide.clone(), torch.full_like(wide, -100)
    expected[inner], marks[inner] = masked, labels
    assert torch.equal(ours, expected) and torch.equal(rows, marks)
    for count in (3, 60):
        plain = mlm_mask(ids, cuts, longest, num_labels=count, **options)
        ours, rows, labels = mlm_mask(wide, cuts + before, longest, num_labels=count, **options)
        expected = wide.clone()
        expected[inner] = plain[0]
        assert torch.equal(ours, expected) and torch.equal(labels, plain[2])
        assert torch.equal(rows, torch.where(labels == -100, 0, plain[1] + before))


@pytest.mark.parametrize("unit", UNITS)
def test_the_share_the_kinds_and_the_labels_are_right(unit, device):
    lengths = [200] * 400
    ids, cuts, longest = batch(lengths, device)
    masked, labels = mlm_mask(ids, cuts, longest, unit=unit, seed=SEED, **tables(device))
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    counts = chosen.view(400, 200).sum(1)
    assert counts.min() >= 30, "no sequence has fewer than its share"
    # words overshoot by less than the last one's length
    assert counts.double().mean() < 33 if unit == "word" else counts.max() == 30
    was, became = ids[chosen], masked[chosen]
    kinds = torch.stack([became == MASK, (became != MASK) & (became != was), became == was]).double().mean(1)
    # a random token is the old one in 1 of 32 cases
    expected = torch.tensor([0.8, 0.1 * 31 / 32, 0.1 + 0.1 / 32], device=device)
    assert (kinds - expected).abs().max() < 4 * (0.25 / len(was)) ** 0.5
    drawn = torch.bincount(became[(became != MASK) & (became != was)], minlength=VOCAB)
    assert drawn[:SPECIAL].sum() == 0 and (drawn[SPECIAL:] > 0).all()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("num_labels", [None, 300])
def test_no_sequence_with_text_is_left_without_a_label(num_labels, unit, device):
    lengths = [int(n) for n in np.random.default_rng(0).integers(0, 12, 300)]
    ids, cuts, longest = batch(lengths, device, first_id=0)
    outs = mlm_mask(ids, cuts, longest, unit=unit, rate=0.001, num_labels=num_labels, **tables(device))
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    if num_labels is None:
        chosen = outs[1] != -100
    else:
        chosen[outs[1][outs[2] != -100]] = True
    with_text = [any(token >= SPECIAL for token in piece) for piece in pieces(ids, lengths)]
    assert [any(piece) for piece in pieces(chosen, lengths)] == with_text


def test_spans_have_the_lengths_that_were_asked_for(device):
    ids, cuts, longest = batch([100] * 2000, device)
    lengths = torch.zeros(2000, dtype=torch.int64, device=device)
    for share in range(1, 12):
        _, labels = mlm_mask(ids, cuts, longest, unit="span", rate=share / 100, **tables(device))
        rows = (labels != -100).nonzero().view(2000, share)
        # all from the first on: one span, or what there is of it
        lengths += (lengths == share - 1) & (rows[:, -1] - rows[:, 0] == share - 1)
    shares = torch.bincount(lengths, minlength=12)[1:] / 2000
    expected = torch.tensor([0.2 * 0.8**n / (1 - 0.8**10) for n in range(10)] + [0.0], device=device)
    assert (shares - expected).abs().max() < 0.04, "two spans lie beside each other now and then"
    assert lengths.double().mean().item() == pytest.approx(3.8, abs=0.25)


def test_spans_stop_at_special_tokens_and_at_the_end(device):
    ids = torch.tensor([2, 7, 3, 8, 8, 3, 9, 9], device=device).repeat(200)
    cuts = offsets([6, 2] * 200).to(device)
    _, labels = mlm_mask(ids, cuts, 6, unit="span", rate=0.6, **tables(device))
    chosen = (labels != -100).view(200, 8)
    assert not chosen[:, [0, 2, 5]].any(), "special tokens"
    assert {tuple(row) for row in chosen[:, [1, 3, 4]].tolist()} == {
        (True, True, False),
        (True, False, True),
        (False, True, True),
    }
    assert {tuple(row) for row in chosen[:, 6:].tolist()} == {(True, False), (False, True)}


def test_a_piece_that_begins_a_sequence_or_follows_a_special_token_begins_a_word(device):
    # "a" alone, then three sequences that begin with pieces
    ids = torch.tensor([5, 20, 21, 2, 22, 23, 6], device=device)
    cuts = offsets([1, 2, 4]).to(device)
    seen = set()
    for epoch in range(40):
        epochs = torch.full((3,), epoch, device=device)
        _, labels = mlm_mask(ids, cuts, 4, unit="word", rate=0.3, epochs=epochs, **tables(device))
        seen.add(tuple((labels != -100).int().tolist()))
    assert seen == {(1, 1, 1, 0, 1, 1, 0), (1, 1, 1, 0, 0, 0, 1)}


def exact_by_hand(ids, lengths, seed, count):
    """Rows by the rule, token by token: the first of each sequence, then by rank relative to the number."""
    scored, row = [], 0
    for seq, length in enumerate(lengths):
        words = [(philox(fold(seed, 0x3A5C), i, seq)[0], row + i) for i in range(length) if ids[row + i] >= SPECIAL]
        scored += [(rank / len(words) if rank else -1, at) for rank, (_, at) in enumerate(sorted(words))]
        row += length
    return sorted(at for _, at in sorted(scored)[:count])


@pytest.mark.parametrize("count", [0, 1, 4, 5, 17, 60, 90, 400])
def test_an_exact_number_is_taken_by_rank_in_the_sequences(count, device):
    lengths = [13, 0, 1, 40, 7, 30]
    ids, cuts, longest = batch(lengths, device, first_id=3)
    options = tables(device) | {"seed": 3, "backend": "triton"}
    masked, rows, labels = mlm_mask(ids, cuts, longest, num_labels=count, **options)
    expected = exact_by_hand(ids.tolist(), lengths, 3, count)
    surplus = count - len(expected)
    assert rows.tolist() == [0] * surplus + expected
    assert labels.tolist() == [-100] * surplus + ids[expected].tolist()
    everything, _ = mlm_mask(ids, cuts, longest, rate=1.0, **options)
    by_hand = ids.clone()
    by_hand[expected] = everything[expected]
    assert torch.equal(masked, by_hand), "what a token becomes does not depend on the others"


CORRECT = {"ids": torch.tensor([5, 6, 7]), "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32), "max_seqlen": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3)}, r"ids is torch.float32 \[3\]: expected int64 \[T\]"),
        ({"ids": torch.zeros(1, 3, dtype=torch.int64)}, r"ids is torch.int64 \[1, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens is torch.int64 \[2\]: expected int32 \[B \+ 1\]"),
        ({"unit": "wrod"}, "unit='wrod' is not one of token, word, span"),
        ({"rate": 0.0}, r"rate=0.0 is not in \(0, 1\]"),
        ({"rate": float("nan")}, r"rate=nan is not in \(0, 1\]"),
        ({"unit": "word", "continues": None}, "unit='word' needs continues"),
        ({"max_span": 0}, "max_span=0 is not positive"),
        ({"num_labels": -1}, "num_labels=-1 is negative"),
        ({"special": torch.zeros(VOCAB)}, r"special is torch.float32 \[37\]: expected bool \[V\]"),
        ({"continues": torch.zeros(3, dtype=torch.bool)}, r"continues is torch.bool \[3\]: expected bool \[37\]"),
        ({"ordinary": torch.zeros(0, dtype=torch.int64)}, r"ordinary is torch.int64 \[0\]: expected int64 \[n\]"),
        ({"seq_ids": torch.zeros(2, dtype=torch.int64)}, r"seq_ids is torch.int64 \[2\]: expected int64 \[1\]"),
        ({"epochs": torch.zeros(1)}, r"epochs is torch.float32 \[1\]: expected int64 \[1\]"),
        ({"ordinary": torch.zeros(2, dtype=torch.int64, device="meta")}, "ordinary is on meta, ids is on cpu"),
        ({"seed": torch.zeros(2)}, r"seed is torch.float32 \[2\]"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, reference"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        mlm_mask(**CORRECT | tables("cpu") | change)


def test_what_the_kernel_cannot_hold_runs_the_reference(device):
    ids, cuts, _ = batch([40], device)
    for longest, options, message in (
        (4097, {}, "takes sequences of up to 4096 tokens, got 4097"),
        (40, {"unit": "span", "max_span": 33}, "takes spans of up to 32 tokens, got 33"),
    ):
        with pytest.raises(ValueError, match=f"mlm_mask: backend='triton' {message}"):
            mlm_mask(ids, cuts, longest, backend="triton", **tables(device), **options)
        assert (mlm_mask(ids, cuts, longest, **tables(device), **options)[1] != -100).sum() >= 6
