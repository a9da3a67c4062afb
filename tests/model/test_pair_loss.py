"""The losses of pairs of vectors, and their gradients, beside plain formulas."""

import math

import pytest
import torch

from minibert.model.losses import pair_loss

LABELS = torch.tensor([0.9, 0.0, 0.4])


def vectors(pairs=3, dim=5, seed=0, **kwargs):
    return torch.randn(2 * pairs, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **kwargs)


def cosines(x):
    """Of every first with every second text, in plain Python."""
    rows = x.tolist()
    length = lambda a: math.sqrt(sum(v * v for v in a))  # noqa: E731
    dot = lambda a, b: sum(v * w for v, w in zip(a, b, strict=True)) / length(a) / length(b)  # noqa: E731
    return [[dot(a, b) for b in rows[1::2]] for a in rows[::2]]


def plain(x, labels, kind, temperature) -> float:
    table = cosines(x)
    if kind == "cosine":
        return sum((table[i][i] - float(label)) ** 2 for i, label in enumerate(labels)) / len(labels)
    shares = [
        math.exp(row[i] / temperature) / sum(math.exp(s / temperature) for s in row) for i, row in enumerate(table)
    ]
    return -sum(map(math.log, shares)) / len(shares)


@pytest.mark.parametrize(("kind", "temperature"), [("cosine", 1.0), ("contrastive", 0.05), ("contrastive", 0.7)])
def test_the_loss_of_pairs_and_its_gradient_are_those_of_the_formula(kind, temperature):
    x = vectors().float().requires_grad_()
    loss = pair_loss(x, LABELS, kind, temperature)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain(x, LABELS, kind, temperature), rel=1e-5)
    loss.backward()
    for row, column in ((0, 0), (1, 4), (4, 2), (5, 3)):
        step = torch.zeros_like(x, dtype=torch.float64)
        step[row, column] = 1e-5
        around = [plain(x.detach().double() + sign * step, LABELS, kind, temperature) for sign in (1, -1)]
        assert float(x.grad[row, column]) == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-3, abs=1e-5)


def test_the_contrastive_loss_reads_no_label_and_falls_as_pairs_part_from_others():
    near = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 2], [0.1, 1.9]])
    crossed = near[[0, 3, 2, 1]]
    a, b = (pair_loss(near, labels, "contrastive", 0.1) for labels in (torch.zeros(2), torch.ones(2)))
    assert a == b < 0.01 < 5 < pair_loss(crossed, torch.ones(2), "contrastive", 0.1)


def test_the_length_of_a_vector_is_no_part_of_it_and_half_precision_is_raised():
    x = vectors().float()
    scaled = x * torch.arange(1, 7)[:, None]
    for kind in ("cosine", "contrastive"):
        torch.testing.assert_close(pair_loss(scaled, LABELS, kind, 0.1), pair_loss(x, LABELS, kind, 0.1))
        assert pair_loss(x.bfloat16(), LABELS, kind, 0.1).dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [(5, 3, "5 vectors are not pairs"), (6, 2, r"labels has shape \[2\]: expected \[3\]")],
)
def test_what_is_no_pairs_is_refused(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        pair_loss(torch.ones(rows, 4), torch.ones(labels), "contrastive", 0.1)
