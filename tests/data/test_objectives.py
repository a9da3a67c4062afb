"""The targets of each objective, worked out by hand on a toy corpus and counted on a real one."""

import itertools

import numpy as np
import pytest
import torch

from minibert.batch import IGNORE
from minibert.data import OBJECTIVES, PretrainingData, build_store
from minibert.data.objectives import CausalLM, MaskedLM, NextSentence, SentenceOrder, check_objectives
from minibert.data.pairs import PairSampler

CLS, SEP, MASK = 2, 3, 4
# three documents; the words of the toy tokenizer are numbered from 5 on
DOCUMENTS = ["the cat\nsat on a\nmat", "dogs bark at night and birds sing ! why", "play\n?"]
IDS = [[5, 6, 7, 8, 9, 10], [12, 13, 14, 15, 16, 17, 18, 19, 20], [24, 21]]


def store_of(documents, tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.txt").write_text("\n\n".join(documents))
    return build_store(folder / "toy.txt", folder / "store", tokenizer)


@pytest.fixture(scope="module")
def toy_store(toy_tokenizer, tmp_path_factory):
    return store_of(DOCUMENTS, toy_tokenizer, tmp_path_factory.mktemp("toy"))


def data_of(store, *objectives, **options):
    options = {"max_length": 8, "batch_tokens": 1000, "short_prob": 0} | options
    return PretrainingData(store, store.tokenizer, objectives=objectives, **options)


def only_batch(data):
    [batch] = data.evaluation_batches()
    return batch


def rows_of(batch, values):
    return [part.tolist() for part in values.split(list(batch.lengths))]


def test_a_causal_model_learns_every_next_token(toy_store):
    batch = only_batch(data_of(toy_store, "clm", max_length=7))
    samples = [
        [CLS, 5, 6, 7, 8, 9, SEP],
        [CLS, 10, SEP],
        [CLS, 12, 13, 14, 15, SEP],
        [CLS, 16, 17, 18, 19, 20, SEP],
        [CLS, 24, 21, SEP],
    ]
    assert rows_of(batch, batch.input_ids) == samples
    # 0 to 5, then 7 and 8, … : every row but those of the last [SEP] of each sample
    assert batch.mlm_rows.tolist() == [*range(6), 7, 8, *range(10, 15), *range(16, 22), 23, 24, 25]
    assert batch.mlm_labels.tolist() == [token for sample in samples for token in sample[1:]]
    assert batch.nsp_labels is None and batch.sop_labels is None
    assert CausalLM.count(batch) == 22


def test_swapped_pairs_are_those_worked_out_by_hand(toy_store):
    sampler = PairSampler(toy_store, seed=0, max_length=8, pairs="sop", short_prob=0)  # room for 5 tokens
    # the second chunk is one token; the third, of 4 and 5 tokens, is cut to 3 and 2, at the front or the back
    first, second = ([12, 13, 14], [13, 14, 15]), ([16, 17], [19, 20])
    swapped = [([16, 17, 18], [18, 19, 20]), ([12, 13], [14, 15])]
    expected = {
        0: {((5, 6), (7, 8, 9), 0), ((7, 8, 9), (5, 6), 1)},
        1: {((10,), (), IGNORE), ((), (10,), IGNORE)},
        2: {(tuple(a), tuple(b), 0) for a in first for b in second}
        | {(tuple(a), tuple(b), 1) for a, b in itertools.product(*swapped)},
        3: {((24,), (21,), 0), ((21,), (24,), 1)},
    }
    seen = {index: set() for index in expected}
    for epoch in range(80):
        for index in range(len(sampler)):
            pair = sampler(epoch, index)
            a_end, b_end = np.flatnonzero(pair.ids == SEP)
            assert pair.ids[0] == CLS and b_end == len(pair.ids) - 1
            assert pair.types.tolist() == [0] * (a_end + 1) + [1] * (b_end - a_end)
            seen[index].add((tuple(pair.ids[1:a_end].tolist()), tuple(pair.ids[a_end + 1 : -1].tolist()), pair.label))
    assert seen == expected


def test_one_sentence_alone_is_split_in_its_middle(toy_tokenizer, tmp_path):
    store = store_of(["the cat sat on a"], toy_tokenizer, tmp_path)
    sampler = PairSampler(store, seed=0, max_length=8, pairs="sop")
    drawn = {tuple(sampler(epoch, 0).ids.tolist()) + (sampler(epoch, 0).label,) for epoch in range(20)}
    assert drawn == {(CLS, 5, 6, 7, SEP, 8, 9, SEP, 0), (CLS, 8, 9, SEP, 5, 6, 7, SEP, 1)}


def test_pairs_of_a_batch_are_labelled_by_where_b_comes_from(toy_store):
    data = data_of(toy_store, "nsp")
    seen = set()
    for batch, _ in itertools.islice(data.batches(), 12):
        for ids, types, label in zip(
            rows_of(batch, batch.input_ids), rows_of(batch, batch.token_type_ids), batch.nsp_labels, strict=True
        ):
            a = [token for token, kind in zip(ids, types, strict=True) if kind == 0][1:-1]
            b = [token for token, kind in zip(ids, types, strict=True) if kind == 1][:-1]
            own = next(document for document in IDS if a[0] in document)
            assert (b[0] in own) == (label == 0)
            seen.add(int(label))
        assert batch.mlm_rows is None and batch.sop_labels is None
    assert seen == {0, 1}


def test_objectives_together_make_the_targets_that_each_makes_alone(store):
    together, order, masks = (data_of(store, *names, max_length=64) for names in (("mlm", "sop"), ("sop",), ("mlm",)))
    batch, _ = together.next_batch(5)
    alone, _ = order.next_batch(5)
    assert torch.equal(batch.sop_labels, alone.sop_labels)
    whole = batch.input_ids.clone()
    whole[batch.mlm_rows] = batch.mlm_labels
    assert torch.equal(whole, alone.input_ids), "the labels are what stood there"
    assert together.parts(batch) == {"mlm_loss": len(batch.mlm_rows), "sop_loss": batch.num_sequences}
    assert masks.next_batch(5)[0].sop_labels is None


def test_ignored_labels_do_not_count(toy_store):
    batch = only_batch(data_of(toy_store, "mlm", "sop", mask_count=50))
    assert batch.sop_labels[1] == IGNORE and SentenceOrder.count(batch) == 3
    assert len(batch.mlm_labels) == 50 and MaskedLM.count(batch) == 13, "there are 13 tokens of text"


def test_a_masked_batch_may_have_a_fixed_number_of_labels(store):
    data = data_of(store, "mlm", "nsp", max_length=64, mask_count=77)
    for batch, _ in itertools.islice(data.batches(), 5):
        assert len(batch.mlm_rows) == MaskedLM.count(batch) == 77
        borders = torch.searchsorted(batch.cu_seqlens[1:].contiguous(), batch.mlm_rows, right=True)
        assert borders.unique().tolist() == list(range(batch.num_sequences)), "every sample has one"


def test_everything_that_is_masked_may_become_mask(store):
    mask = store.tokenizer.mask_token_id
    batch, _ = data_of(store, "mlm", all_mask=True, max_length=64).next_batch(0)
    plain, _ = data_of(store, "mlm", max_length=64).next_batch(0)
    assert (batch.input_ids[batch.mlm_rows] == mask).all() and (batch.input_ids == mask).sum() == len(batch.mlm_rows)
    assert torch.equal(batch.mlm_rows, plain.mlm_rows) and torch.equal(batch.mlm_labels, plain.mlm_labels)


@pytest.mark.parametrize("names", [("mlm", "sop"), ("clm",)])
def test_targets_depend_on_seed_epoch_and_index_alone(store, names):
    data, again, other = (data_of(store, *names, max_length=64, seed=seed) for seed in (3, 3, 4))
    batch, cursor = data.next_batch(17)
    data.next_batch(cursor)
    fields = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(getattr(again.next_batch(17)[0], name), getattr(batch, name)) for name in fields)
    assert not torch.equal(other.next_batch(17)[0].input_ids, batch.input_ids)


def test_the_keys_of_the_table_are_the_names_of_the_classes():
    assert list(OBJECTIVES.values()) == [MaskedLM, NextSentence, SentenceOrder, CausalLM]
    assert all(name == kind.name for name, kind in OBJECTIVES.items())


def test_numbers_are_named_after_the_objective():
    assert SentenceOrder.numbers(0.5, 0.75) == {"sop_loss": 0.5, "sop_accuracy": 0.75}
    numbers = CausalLM.numbers(2.0, 0.25)
    assert numbers == {"clm_loss": 2.0, "clm_accuracy": 0.25, "clm_perplexity": pytest.approx(7.389056)}


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], {}, "objectives names none: expected some of mlm, nsp, sop, clm"),
        (["mml"], {}, "objectives='mml' is not one of mlm, nsp, sop, clm: did you mean 'mlm'?"),
        (["mlm", "mlm"], {}, "objectives names mlm twice"),
        (["mlm", "nsp", "sop"], {}, "objectives nsp and sop do not go together: each makes the pairs: choose one"),
        (["mlm", "clm"], {}, "objectives clm and mlm do not go together: mlm reads what is yet to come"),
        (["clm", "sop"], {}, "objectives clm and sop do not go together: sop reads what is yet to come"),
        (["mlm", "nsp"], {"sop": 1.0}, "weights='sop' is not one of mlm, nsp: did you mean 'nsp'?"),
        (["mlm", "nsp"], {"nsp": 0.0}, "weights.nsp=0.0 is not a positive number"),
        (["mlm"], {"mlm": float("inf")}, "weights.mlm=inf is not a positive number"),
        (["mlm"], {"mlm": "2"}, "weights.mlm='2' is not a positive number"),
    ],
)
def test_objectives_that_do_not_go_together_are_refused(names, weights, message):
    with pytest.raises(ValueError) as error:
        check_objectives(names, weights)
    assert str(error.value) == message


def document_of(store, batch_plan):
    """[k, 2]: the document that each segment of a plan comes from."""
    return np.searchsorted(store.sentences[store.documents], batch_plan.start, side="right") - 1


def plan_of(data, epochs=1):
    index = np.tile(np.arange(len(data)), epochs)
    return data.sampler.plan(np.repeat(np.arange(epochs), len(data)), index)


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_real_text_is_masked_at_the_rate_and_in_the_shares_of_the_paper(wiki, rate):
    tokenizer, special = wiki.tokenizer, torch.tensor(wiki.tokenizer.special_ids)
    chosen = candidates = 0
    kinds = torch.zeros(3)
    for batch, _ in itertools.islice(data_of(wiki, "mlm", mask_rate=rate, max_length=128).batches(), 200):
        original, now = batch.mlm_labels, batch.input_ids[batch.mlm_rows]
        whole = batch.input_ids.index_copy(0, batch.mlm_rows, original)
        candidates += int((~torch.isin(whole, special)).sum())
        chosen += len(original)
        masked, kept = now == tokenizer.mask_token_id, now == original
        kinds += torch.tensor([masked.sum(), (~masked & ~kept).sum(), kept.sum()])
    assert chosen / candidates == pytest.approx(rate, abs=0.005)
    assert (kinds / chosen - torch.tensor([0.8, 0.1, 0.1])).abs().max() < 0.01


@pytest.mark.parametrize(("unit", "most"), [("word", 0.165), ("span", 0.19)])
def test_real_text_is_masked_in_whole_units_of_which_the_last_may_exceed_the_rate(wiki, unit, most):
    continues = torch.from_numpy(wiki.tokenizer.is_continuation)
    special = torch.tensor(wiki.tokenizer.special_ids)
    chosen = candidates = neighbours = 0
    for batch, _ in itertools.islice(data_of(wiki, "mlm", mask_unit=unit, max_length=128).batches(), 200):
        whole = batch.input_ids.index_copy(0, batch.mlm_rows, batch.mlm_labels)
        is_chosen = torch.zeros(batch.num_tokens, dtype=torch.bool).index_fill(0, batch.mlm_rows, True)
        if unit == "word":
            inside = continues[whole[1:]] & (batch.positions[1:] > 1)  # this piece and the one before are one word
            assert torch.equal(is_chosen[1:][inside], is_chosen[:-1][inside])
        neighbours += int((is_chosen[1:] & is_chosen[:-1]).sum())
        candidates += int((~torch.isin(whole, special)).sum())
        chosen += len(batch.mlm_rows)
    assert 0.149 < chosen / candidates < most
    assert unit == "word" or neighbours / chosen > 0.6, "a span is 3.8 tokens long on the mean"


def test_half_of_the_pairs_of_real_text_are_random_and_from_another_document(wiki):
    plan = plan_of(data_of(wiki, "mlm", "nsp", max_length=128, short_prob=0.1))
    document, is_random = document_of(wiki, plan), plan.label == 1
    assert is_random.mean() == pytest.approx(0.5, abs=0.02)
    assert (document[is_random, 0] != document[is_random, 1]).all()
    assert (document[~is_random, 0] == document[~is_random, 1]).all()
    assert (plan.start[~is_random, 1] >= (plan.start + plan.length)[~is_random, 0]).all()


def test_half_of_the_pairs_of_real_text_are_swapped_and_all_are_neighbours(wiki):
    plan = plan_of(data_of(wiki, "mlm", "sop", max_length=128, short_prob=0.1))
    document, labelled = document_of(wiki, plan), plan.label != IGNORE
    assert labelled.mean() > 0.999
    assert plan.label[labelled].mean() == pytest.approx(0.5, abs=0.02)
    assert (document[:, 0] == document[:, 1]).all()
    swapped = plan.label == 1
    first, second = np.where(swapped, plan.start[:, 1], plan.start[:, 0]), plan.start.max(1)
    assert (first[labelled] < second[labelled]).all()
    assert (first == plan.start.min(1))[labelled].all(), "B lies before A where they are swapped"
    uncut = plan.length.sum(1) < 128 - 3
    gap = second - first - np.where(swapped, plan.length[:, 1], plan.length[:, 0])
    assert uncut.sum() > 100 and (gap[uncut & labelled] == 0).all()


def test_a_causal_model_learns_every_token_of_real_text_once(wiki):
    data = data_of(wiki, "clm", max_length=128, batch_tokens=100_000)
    batches = list(data.evaluation_batches())
    text = torch.cat([batch.mlm_labels for batch in batches])
    ends = sum(batch.num_sequences for batch in batches)
    assert len(text) == wiki.num_tokens + ends
    assert torch.equal(text[text != wiki.tokenizer.sep_token_id], torch.from_numpy(wiki.tokens.astype(np.int64)))
