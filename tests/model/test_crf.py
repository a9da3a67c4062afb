"""The likelihood, the path and the marginals of the CRF, beside the sums over all paths there are."""

import dataclasses
import itertools
import sys

import pytest
import torch
from small import build, packed, padded

from minibert.batch import IGNORE, pack
from minibert.model import BertForJointClassification, BertForTokenClassification
from minibert.model.crf import begin_chain, best_tags, tag_loss

CRF = pytest.importorskip("torchcrf").CRF
LABELS = 3
# three words of the first sequence are read, none of the second, one of the third, and all four of the last
BATCH = pack([[1] * 5, [1] * 2, [1] * 3, [1] * 4], token_rows=torch.tensor([1, 2, 4, 8, 10, 11, 12, 13]))
CHAINS = ([0, 1, 2], [3], [4, 5, 6, 7])


@pytest.fixture
def crf():
    torch.manual_seed(0)
    made = CRF(LABELS, batch_first=True)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def logits(count=8):
    return torch.randn(count, LABELS, generator=torch.Generator().manual_seed(1)) * 2


def scores(crf, rows) -> dict[tuple[int, ...], torch.Tensor]:
    """The score of every path through rows [S, L]."""
    return {
        path: crf.start_transitions[path[0]]
        + sum(rows[i, tag] for i, tag in enumerate(path))
        + sum(crf.transitions[a, b] for a, b in itertools.pairwise(path))
        + crf.end_transitions[path[-1]]
        for path in itertools.product(range(LABELS), repeat=len(rows))
    }


def expected_loss(crf, x, tags, chains):
    total = 0
    for chain in chains:
        found = scores(crf, x[chain])
        total = total + torch.logsumexp(torch.stack(list(found.values())), 0) - found[tuple(tags[chain].tolist())]
    return total / sum(map(len, chains))


@pytest.mark.parametrize("ignored", [(), (1,), (3,), (3, 4, 7)])
def test_the_loss_and_its_gradients_are_those_of_all_paths(crf, ignored):
    tags = torch.tensor([0, 2, 1, 1, 0, 0, 2, 1])
    tags[list(ignored)] = IGNORE
    chains = [kept for chain in CHAINS if (kept := [i for i in chain if i not in ignored])]
    results = []
    for loss in (lambda x: tag_loss(crf, x, tags, BATCH), lambda x: expected_loss(crf, x, tags, chains)):
        x = logits().requires_grad_()
        value = loss(x)
        results.append((value, *torch.autograd.grad(value, [x, *crf.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_labels_left_the_loss_is_zero_and_so_are_its_gradients(crf):
    x = logits().requires_grad_()
    loss = tag_loss(crf, x, torch.full((8,), IGNORE), BATCH)
    loss.backward()
    assert loss == 0 and all(not y.grad.any() for y in (x, *crf.parameters()))


def test_the_best_path_and_its_marginals_are_those_of_all_paths(crf):
    tags, sure = best_tags(crf, logits(), BATCH)
    for chain in CHAINS:
        found = scores(crf, logits()[chain])
        shares = dict(zip(found, torch.stack(list(found.values())).softmax(0).tolist(), strict=True))
        best = max(shares, key=shares.get)
        assert tuple(tags[chain].tolist()) == best
        marginals = [sum(share for path, share in shares.items() if path[i] == tag) for i, tag in enumerate(best)]
        assert sure[chain].tolist() == pytest.approx(marginals, abs=1e-5)
    alone = logits().argmax(-1)
    assert not torch.equal(tags, alone), "the steps between tags decide something"


def test_a_batch_of_no_words_has_no_tags(crf):
    tags, sure = best_tags(crf, logits(0), pack([[1, 2]], token_rows=torch.zeros(0, dtype=torch.int64)))
    assert tags.shape == sure.shape == (0,)


def test_tags_are_found_in_inference_mode_too():
    model = build(BertForTokenClassification, id2label=("a", "b"), task_specific_params={"crf": True}).eval()
    batch = packed(padded())
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = model(dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens.clone()))
        found.append((output.tags, output.tag_probabilities))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True)) and len(found[0][0]) == batch.num_tokens


def test_new_scores_are_the_chain_that_the_tags_themselves_are(crf):
    begin_chain(crf, [[0, 1, 1], [0, 1], [2], []] * 40)
    # the shares of all paths of all lengths are 1 in sum: the score is the log of one
    share = lambda *path: scores(crf, torch.zeros(len(path), LABELS))[path].exp().item()  # noqa: E731
    # two of three begin with 0, behind which there is always 1; of three 1, one goes on
    assert share(0, 1) == pytest.approx(2 / 3 * 2 / 3, abs=0.01)
    assert share(0, 1, 1) == pytest.approx(2 / 3 * 1 / 3 * 2 / 3, abs=0.01)
    assert share(2) == pytest.approx(1 / 3, abs=0.01)
    assert 0 < max(share(0), share(1), share(0, 0, 1), share(0, 2)) < 0.01, "what was never seen is next to nothing"


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForJointClassification])
def test_under_autocast_the_loss_is_float32_and_the_whole_batch_is_the_sum_of_its_parts(kind):
    params = {"crf": True, "intents": ["ask", "tell"]}
    model = build(kind, id2label=("a", "b", "c"), task_specific_params=params)
    batch = packed(padded())
    rows = torch.arange(1, batch.num_tokens)
    labels = batch.input_ids[rows] % 3
    labels[::4] = IGNORE
    batch = dataclasses.replace(batch, token_rows=rows, token_labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(batch)
    whole, low = (one.loss if kind is BertForTokenClassification else one.token_loss for one in (model(batch), low))
    assert low.dtype == torch.float32 and low.item() == pytest.approx(whole.item(), rel=0.05)
    parts = batch.split(3)
    counts = [int((part.token_labels != IGNORE).sum()) for part in parts]
    losses = [model(part).loss.item() for part in parts]
    total = sum(n * x for n, x in zip(counts, losses, strict=True))
    assert total / sum(counts) == pytest.approx(whole.item(), rel=1e-5)


def test_a_missing_package_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcrf", None)
    build(BertForTokenClassification)
    with pytest.raises(ValueError, match=r"^crf=True needs one more package: pip install 'minibert\[tasks\]'$"):
        build(BertForTokenClassification, task_specific_params={"crf": True})
