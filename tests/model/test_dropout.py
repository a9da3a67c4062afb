"""Dropout is keyed on seed and sequence, so training mode is as comparable as evaluation mode."""

import dataclasses

import pytest
import torch
from small import build, gradients, mlm_labels, packed, padded

from minibert.batch import IGNORE, Batch, pack
from minibert.model import BertForPreTraining, BertForSequenceClassification, BertModel
from minibert.model.context import site_seeds
from minibert_kernels.philox import fold

HEAVY = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.4}
KIND = BertForPreTraining


def labelled(inputs, seq_ids=None) -> Batch:
    batch = packed(inputs)
    labels = mlm_labels(inputs)[inputs["attention_mask"].bool()]
    rows = (labels != IGNORE).nonzero().squeeze(1)
    seq_ids = batch.seq_ids if seq_ids is None else torch.tensor(seq_ids)
    nsp = torch.arange(len(batch.lengths)) % 2
    return dataclasses.replace(batch, mlm_rows=rows, mlm_labels=labels[rows], nsp_labels=nsp, seq_ids=seq_ids)


def step(model, batch, seed, **options):
    model.zero_grad()
    output = model(batch, seed=seed, **options) if isinstance(batch, Batch) else model(**batch, seed=seed, **options)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def test_the_same_seed_gives_the_same_loss_and_gradients():
    model, batch = build(KIND, train=True, **HEAVY), labelled(padded())
    (a, grads_a), (b, grads_b) = step(model, batch, 7), step(model, batch, 7)
    assert torch.equal(a, b) and all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


def test_another_seed_gives_another_loss():
    model, batch = build(KIND, train=True, **HEAVY), labelled(padded())
    losses = {step(model, batch, seed)[0].item() for seed in range(6)}
    assert len(losses) == 6


def test_a_seed_may_be_a_tensor():
    model, batch = build(KIND, train=True, **HEAVY), labelled(padded())
    assert torch.equal(model(batch, seed=torch.tensor(7)).loss, model(batch, seed=7).loss)


def test_no_seed_draws_one_from_the_generator_of_torch():
    model, batch = build(KIND, train=True, **HEAVY), labelled(padded())
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append((model(batch).loss.item(), model(batch).loss.item()))
    assert losses[0] == losses[1] != losses[2] and losses[0][0] != losses[0][1]


def test_evaluation_drops_nothing():
    model, batch = build(KIND, **HEAVY), labelled(padded())
    plain = build(KIND, train=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert torch.equal(model(batch, seed=1).loss, model(batch, seed=2).loss)
    assert torch.equal(model(batch).loss, plain(batch, seed=1).loss)


def test_padding_changes_neither_loss_nor_gradients_in_training():
    model, tight, wide = build(KIND, train=True, **HEAVY), padded(), padded(width=12)
    nsp = {"next_sentence_label": torch.arange(5) % 2}
    loss, grads = step(model, labelled(tight), 7)
    for inputs in (tight, wide):
        other, other_grads = step(model, inputs | nsp | {"labels": mlm_labels(inputs)}, 7)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
        for name in grads:
            torch.testing.assert_close(other_grads[name], grads[name], rtol=1e-4, atol=2e-5)


def test_left_padding_draws_the_same_bits_where_positions_are_the_same():
    model, right, left = build(BertModel, train=True, **HEAVY), padded(), padded(left=True)
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    a = model(**right, seed=7).last_hidden_state[right["attention_mask"].bool()]
    b = model(**left, position_ids=positions, seed=7).last_hidden_state[left["attention_mask"].bool()]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_sequence_drops_the_same_in_any_batch():
    rows = {11: [5, 6, 7, 8], 2**33: [9, 10], 3: [30, 31, 32]}
    model = build(BertModel, train=True, **HEAVY)
    alone = {seq: model(pack([ids], seq_ids=[seq]), seed=7).last_hidden_state for seq, ids in rows.items()}
    for order in ([3, 11, 2**33], [2**33, 3]):
        together = model(pack([rows[seq] for seq in order], seq_ids=order), seed=7).last_hidden_state
        torch.testing.assert_close(together, torch.cat([alone[seq] for seq in order]), rtol=1e-5, atol=1e-5)
    renamed = model(pack([rows[3]], seq_ids=[4]), seed=7).last_hidden_state
    assert (renamed - alone[3]).abs().max() > 1e-2


def test_the_gradient_of_a_batch_is_that_of_its_halves():
    model, inputs = build(KIND, train=True, **HEAVY), padded()
    labels, nsp = mlm_labels(inputs), torch.arange(5) % 2
    sums = {}
    for batch in (slice(0, 2), slice(2, 5)):
        part = {name: value[batch] for name, value in inputs.items()}
        packed_part = dataclasses.replace(labelled(part, range(5)[batch]), nsp_labels=nsp[batch])
        output = model(packed_part, seed=7)
        weighted = output.mlm_loss * output.mlm_count / (labels != IGNORE).sum()
        model.zero_grad()
        (weighted + output.nsp_loss * output.nsp_count / 5).backward()
        sums = {name: grad + sums.get(name, 0) for name, grad in gradients(model).items()}
    _, whole = step(model, labelled(inputs), 7)
    for name in whole:
        torch.testing.assert_close(sums[name], whole[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_acts_alone(field):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, batch = build(KIND, train=True, **off | {field: 0.4}), labelled(padded())
    assert not torch.equal(model(batch, seed=1).loss, model(batch, seed=2).loss)


def test_sites_and_layers_draw_apart():
    model = build(BertModel, train=True, **HEAVY)
    seeds = model.context(packed(padded()), 7).seeds
    assert len(seeds) == 2 + 3 * 2 and len(set(seeds.tolist())) == len(seeds)
    sites = [(layer.attention.site, layer.attention_norm.site, layer.ffn_norm.site) for layer in model.encoder.layers]
    assert sites == [(1, 2, 3), (4, 5, 6)]


def test_the_embeddings_drop_the_share_that_was_asked_for_and_scale_the_rest():
    model = build(BertModel, hidden_dropout_prob=0.25)
    batch = pack([list(range(1, 20))] * 13)
    kept = model(batch, output_hidden_states=True).hidden_states[0]
    dropped = model.train()(batch, seed=1, output_hidden_states=True).hidden_states[0]
    zero = dropped == 0
    assert abs(zero.float().mean() - 0.25) < 0.02
    torch.testing.assert_close(dropped[~zero], kept[~zero] / 0.75)


def test_the_classifier_dropout_is_its_own():
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build(BertForSequenceClassification, train=True, classifier_dropout=0.5, **off)
    batch, plain = packed(padded()), build(BertForSequenceClassification, **off)
    assert not torch.equal(model(batch, seed=1).logits, model(batch, seed=2).logits)
    mean = torch.stack([model(batch, seed=seed).logits.detach() for seed in range(400)]).mean(0)
    torch.testing.assert_close(mean, plain(batch).logits, rtol=0.1, atol=0.15)
    model = build(BertForSequenceClassification, train=True, classifier_dropout=0.0, **off)
    assert torch.equal(model(batch, seed=1).logits, plain(batch).logits)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, 2**63 - 1])
def test_the_seeds_of_the_sites_are_the_same_from_an_int_a_tensor_and_themselves(seed):
    sites = site_seeds(seed, 38, "cpu")
    assert sites.dtype == torch.int64 and sites[:, 0].tolist() == [fold(seed, site) for site in range(38)]
    assert len(set(sites[:, 0].tolist())) == 38 and sites.stride() == (2, 1)  # each at a multiple of 16 bytes
    assert torch.equal(sites, site_seeds(torch.tensor(seed), 38, "cpu"))
    assert site_seeds(sites, 38, "cpu") is sites
