"""Weights and smoothing of classes in the loss of a classifier, beside torch's."""

import pytest
import torch
import torch.nn.functional as F
from small import small_config

from minibert.batch import IGNORE
from minibert.model.losses import classification_loss

WEIGHTS = {"b": 3.5, "a": 0.25}
ORDERED = torch.tensor([0.25, 3.5, 1.0])


def config(**params):
    return small_config(id2label=("a", "b", "c"), task_specific_params=params)


def draw(rows=13):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(rows, 3, generator=generator).requires_grad_()
    return logits, torch.randint(0, 3, (rows,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_but_for_the_divisor(smoothing):
    logits, labels = draw()
    loss = classification_loss(config(class_weights=WEIGHTS, label_smoothing=smoothing), logits, labels)
    theirs = F.cross_entropy(logits, labels, ORDERED, label_smoothing=smoothing) * ORDERED[labels].sum() / 13
    torch.testing.assert_close(loss, theirs)
    pairs = [torch.autograd.grad(value, logits)[0] for value in (loss, theirs)]
    torch.testing.assert_close(*pairs)
    assert not torch.allclose(loss, F.cross_entropy(logits, labels))


def test_smoothing_spreads_a_share_of_the_label_over_all_classes():
    logits, labels = draw()
    targets = F.one_hot(labels, 3) * 0.7 + 0.1
    loss = classification_loss(config(label_smoothing=0.3), logits, labels)
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(-1)).sum(-1).mean())


def test_the_losses_of_parts_add_up_to_that_of_the_whole():
    logits, labels = draw()
    labels = labels.where(labels != 2, IGNORE)
    kept, setting = labels != IGNORE, config(class_weights=WEIGHTS, label_smoothing=0.1)
    parts = [(part, kept[part].sum()) for part in (slice(0, 4), slice(4, 13))]
    total = sum(classification_loss(setting, logits[part], labels[part]) * count for part, count in parts)
    torch.testing.assert_close(total / kept.sum(), classification_loss(setting, logits, labels))


def test_of_several_labels_the_weight_is_of_those_that_are_there():
    logits, _ = draw(5)
    labels = torch.tensor([[0.0, 1.0, 1.0]] * 5)
    setting = config(class_weights=WEIGHTS, label_smoothing=0.2)
    targets = labels * 0.8 + 0.1
    sure = logits.sigmoid()
    each = -(targets * ORDERED * sure.log() + (1 - targets) * (1 - sure).log())
    torch.testing.assert_close(classification_loss(setting, logits, labels), each.mean())


def test_weights_that_are_not_by_name_are_refused():
    logits, labels = draw()
    with pytest.raises(ValueError, match="'balanced' is not a number for each label"):
        classification_loss(config(class_weights="balanced"), logits, labels)
