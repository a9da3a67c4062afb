"""Integrated gradients (Sundararajan et al., 2017): what each token adds to one number that a model gives."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..batch import Batch, pack
from ..model.heads import Headed

Score = Callable[[Headed, Batch], Tensor]  # a model and a packed batch of B sequences to [B], a number for each
TOKENS = 4096  # so many at a time: the steps of the integral are sequences of one packed batch


def class_score(label: int) -> Score:
    """The logit of a class."""
    return lambda model, batch: model(batch).logits[:, label]


def token_score(position: int, token: int) -> Score:
    """The logit of a token of the vocabulary, at one position of each sequence."""

    def score(model: Headed, batch: Batch) -> Tensor:
        ctx, encoded = model.encode(batch, None)
        return model.mlm(encoded.last_hidden_state[batch.first_rows + position], ctx)[:, token]

    return score


def integrated_gradients(
    model: Headed, score: Score, ids: Sequence[int], types: Sequence[int], baseline: Sequence[int], *, steps: int = 50
) -> tuple[Tensor, float, float]:
    """What each token adds to `score`, on the straight line from the embeddings of `baseline` to those of `ids`.

    The embeddings are what the first layer reads, word, position and segment normalised; a token that is the same in
    both has no part.

    Args:
        model: in eval mode. score: what is explained.
        ids, types, baseline: S integers each. steps: at so many points of the line gradients are taken.
    Returns:
        attributions [S] float32 on the host, the score of `ids`, and that of `baseline`; but for the error of the
        integral, the attributions add up to their difference.
    Raises:
        ValueError: captum is not installed, or steps is not positive.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise ValueError("explaining needs one more package: pip install 'minibert[explain]'") from None
    if steps < 1:
        raise ValueError(f"steps={steps} is not positive")
    batch = pack([ids, baseline], [types, types]).to(next(model.parameters()).device)
    embeddings = model.bert.embeddings
    with torch.no_grad():
        present, absent = embeddings(model.context(batch, None)).unflatten(0, (2, 1, -1))

    def forward(points: Tensor) -> Tensor:
        """Embeddings [N, S, D] to [N]: N sequences in one packed batch, whose ids are then read by nobody."""
        copies = pack([ids] * len(points), [types] * len(points)).to(points.device)
        with embeddings.register_forward_hook(lambda *_: points.flatten(0, 1)):
            return score(model, copies)

    at_once = max(1, TOKENS // len(ids))
    method = IntegratedGradients(forward)
    parts = method.attribute(present, absent, n_steps=steps, internal_batch_size=at_once)
    with torch.no_grad():
        ends = forward(torch.cat([present, absent])).tolist()
    return parts[0].sum(-1).float().cpu(), *ends
