"""Losses of the task heads; the language-model loss is `minibert_kernels.linear_cross_entropy`."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import IGNORE
from ..config import BertConfig


def problem_type(config: BertConfig, labels: Tensor) -> str:
    """Hugging Face's rule where the config is silent: one output is regression, integer labels are classes."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(config: BertConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss over the sequences, in float32; classes have `class_weights` and `label_smoothing` of the config's
    task_specific_params, see there.

    Args:
        logits: [B, num_labels].
        labels: [B] int64 classes, [B] float for regression, [B, num_labels] float 0/1 for multi-label.
    Raises:
        ValueError: labels have another shape, or a class is out of range (checked on CPU).
    """
    kind, logits = problem_type(config, labels), logits.float()
    if labels.ndim == 2 and labels.shape[1] == 1 and kind != "multi_label_classification":
        labels = labels.squeeze(1)  # a column, as Hugging Face takes it
    if kind == "regression":
        expected = logits.squeeze(-1) if config.num_labels == 1 else logits
        check_shape("labels", labels, expected)
        return F.mse_loss(expected, labels.float())
    if kind == "multi_label_classification":
        check_shape("labels", labels, logits)
        smoothing, weights = label_smoothing(config), class_weights(config, logits)
        targets = labels.float() * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    check_shape("labels", labels, logits[:, 0])
    check_classes("labels", labels, config.num_labels)
    return cross_entropy(logits, labels, class_weights(config, logits), label_smoothing(config))


def token_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss over the tokens, in float32; logits: [N, L], labels: [N] int64.

    Raises:
        ValueError: labels have another shape, or a class is out of range (checked on CPU).
    """
    check_tags(logits, labels)
    return cross_entropy(logits.float(), labels)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """The mean over rows whose label is not ignored; 0 with zero gradients, not nan, where all are.

    weights: [num_labels], how much a row counts by its label. Unlike torch's, the mean is over the rows, not over their
    weights, so that the losses of parts of a batch add up to that of the whole.
    """
    options = {"weight": weights, "label_smoothing": smoothing, "ignore_index": IGNORE}
    return F.cross_entropy(logits, labels, reduction="sum", **options) / (labels != IGNORE).sum().clamp(min=1)


def class_weights(config: BertConfig, logits: Tensor) -> Tensor | None:
    """[num_labels] from task_specific_params["class_weights"], a number for each name of id2label, 1 where it has none.

    Of several labels at once, the number is how much a text that has the label counts over one that has not.
    """
    given = (config.task_specific_params or {}).get("class_weights")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"task_specific_params['class_weights']={given!r} is not a number for each label")
    weights = tuple(given.get(name, 1.0) for name in config.id2label)
    if type(logits) is Tensor and logits.is_cuda and not torch.compiler.is_compiling():
        return _constant(weights, logits.dtype, logits.device)
    return logits.new_tensor(weights)


@cache
def _constant(values, dtype, device):
    """On the device once and for all: to copy it waits for the device, which a CUDA graph cannot."""
    return torch.tensor(values, dtype=dtype, device=device)


def label_smoothing(config: BertConfig) -> float:
    """The share of a target that is spread evenly over the classes (Szegedy et al., 2016)."""
    return (config.task_specific_params or {}).get("label_smoothing", 0.0)


def check_tags(logits: Tensor, labels: Tensor) -> None:
    check_shape("token_labels", labels, logits[:, 0])
    check_classes("token_labels", labels, logits.shape[1])


def check_shape(name: str, labels: Tensor, like: Tensor) -> None:
    if labels.shape != like.shape:
        raise ValueError(f"{name} has shape {list(labels.shape)}: expected {list(like.shape)}")


def check_classes(name: str, labels: Tensor, classes: int) -> None:
    """Refuse labels outside the classes; looks at them on the CPU only, and not in a compiled graph."""
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            raise ValueError(f"{name} holds {int(wrong[0])}: expected 0 to {classes - 1}, or {IGNORE}")


def pair_loss(vectors: Tensor, labels: Tensor, kind: str, temperature: float) -> Tensor:
    """The mean loss over P pairs of vectors, in float32.

    Args:
        vectors: [2·P, D], the two of a pair side by side.
        labels: [P] float, the similarity that a pair should have, from 0 to 1; `contrastive` does not look at it.
        kind: "cosine", the squared difference of cosine and label; or "contrastive", the cross entropy of finding the
            second text of each pair among all second texts by cosine over `temperature` (Henderson et al., 2017).
    Raises:
        ValueError: an odd number of vectors, or labels of another shape.
    """
    if len(vectors) % 2:
        raise ValueError(f"{len(vectors)} vectors are not pairs")
    check_shape("labels", labels, vectors[::2, 0])
    first, second = F.normalize(vectors.float(), dim=-1).unflatten(0, (-1, 2)).unbind(1)
    if kind == "cosine":
        return F.mse_loss((first * second).sum(-1), labels.float())
    scores = first @ second.T / temperature
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
