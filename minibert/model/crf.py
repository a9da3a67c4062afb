"""Tags that know their neighbours: a linear-chain CRF (Lafferty et al., 2001) over words, by the package pytorch-crf.

The tags of a sequence have the score of its words' logits and of the steps from each tag to the next. All is computed
in float32. The rows that are read stand in the order of their sequences, as `collate` lays them.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import IGNORE, Batch
from ..config import BertConfig
from .losses import check_tags, token_classification_loss

UNSEEN = 0.1  # how often a step counts that no sentence takes: so, one that a scheme forbids is as good as ruled out


def crf_for(config: BertConfig) -> nn.Module | None:
    """The CRF that task_specific_params["crf"] asks for, with new scores.

    Raises:
        ValueError: its package is missing.
    """
    if not (config.task_specific_params or {}).get("crf"):
        return None
    try:
        from torchcrf import CRF
    except ImportError:
        raise ValueError("crf=True needs one more package: pip install 'minibert[tasks]'") from None
    return CRF(config.num_labels, batch_first=True)


@torch.no_grad()
def begin_chain(crf: nn.Module, sentences: Iterable[Sequence[int]]) -> None:
    """Score steps as the Markov chain of these tags does, which is best as long as no word is looked at.

    From scores near 0, at an encoder's rates, nothing would come of them in the few thousand steps of fine-tuning.
    """
    edge = crf.num_tags  # what stands before the first tag and behind the last
    counts = np.zeros((edge + 1, edge + 1), dtype=np.int64)
    for tags in sentences:
        steps = np.array([edge, *tags, edge])
        np.add.at(counts, (steps[:-1], steps[1:]), 1)
    shares = counts + UNSEEN
    shares[edge, edge] = 0
    scores = torch.from_numpy(shares / shares.sum(1, keepdims=True)).log()
    crf.transitions.copy_(scores[:edge, :edge])
    crf.start_transitions.copy_(scores[edge, :edge])
    crf.end_transitions.copy_(scores[:edge, edge])


def tag_loss(crf: nn.Module | None, logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
    """Minus the log likelihood of the tags, over their number; without a CRF, `token_classification_loss`.

    logits: [N, L]; labels: [N] int64. What has none is no link of its chain. Where none is left, the loss is 0.
    """
    if crf is None:
        return token_classification_loss(logits, labels)
    check_tags(logits, labels)
    kept = (labels != IGNORE).nonzero().squeeze(1)
    if not len(kept):
        return sum((x.sum() * 0 for x in crf.parameters()), logits.float().sum() * 0)
    return -log_likelihood(crf, logits.float()[kept], labels[kept], places(batch, kept)) / len(kept)


def best_tags(crf: nn.Module, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The likeliest tags of each sequence together (Viterbi) [N], and the marginal probability of each of them [N]."""
    if not len(logits):
        return logits.new_zeros(0, dtype=torch.int64), logits.new_zeros(0)
    with torch.inference_mode(False):  # there is a gradient below, which inference mode has none of
        logits = logits.detach().float().clone()
        at = places(batch, torch.arange(len(logits), device=logits.device))
        with torch.no_grad():
            paths = crf.decode(padded(logits, at), mask=at[2])
        tags = torch.tensor([tag for path in paths for tag in path], device=logits.device)
        with torch.enable_grad():
            logits.requires_grad_()
            # d log p(tags) / d logits is 1 at the tags, less the marginal probability everywhere
            (gradient,) = torch.autograd.grad(log_likelihood(crf, logits, tags, at), logits)
        return tags, (1 - gradient.gather(1, tags[:, None])).squeeze(1).clamp(0, 1)


def log_likelihood(crf: nn.Module, logits: Tensor, tags: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The sum over all chains; tags: [N]."""
    return crf(padded(logits, at), padded(tags, at), mask=at[2])


def places(batch: Batch, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chain and place there of each kept row that is read [K], and where chains have links [C, S].

    A sequence without any is no chain: C is at most B.
    """
    rows = kept if batch.token_rows is None else batch.token_rows[kept]
    sequences = torch.bucketize(rows, batch.cu_seqlens[1:], right=True)
    _, chain, counts = sequences.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[chain]
    return chain, place, torch.arange(int(counts.max()), device=rows.device) < counts[:, None]


def padded(x: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[K, ...] to [C, S, ...], 0 where a chain has no link."""
    chain, place, mask = at
    return x.new_zeros(*mask.shape, *x.shape[1:]).index_put((chain, place), x)
