"""Pretraining: what is measured on held-out documents; what a model says about a masked token, or after a text."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from minibert_kernels.philox import fold, philox

from ..batch import IGNORE, Batch, pack
from ..data import OBJECTIVES
from ..data.tokenizer import Tokenizer
from ..model import BertForMaskedLM, BertForPreTraining

GENERATE = 0x7E47  # the key of what is drawn to continue a text


@torch.no_grad()
def evaluate(
    model: BertForMaskedLM | BertForPreTraining,
    batches: Iterable[Batch],
    device="cpu",
    commonest: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Means over all labels of `batches`.

    Args:
        commonest: id of the training text's commonest token.
        weights: of the objectives, by name, in the sum of their losses; 1 where none is given.

    Returns:
        loss, that sum, and what each objective there are labels for reports: `mlm_loss`, `mlm_accuracy`, `nsp_loss`, …
        Where tokens are predicted, what a constant guess would reach: commonest_accuracy, of the training text's
        commonest token (where given), and best_constant_accuracy, of the token that turns out to be the commonest
        among these labels.
    """
    was_training = model.training
    model.eval()
    sums, tokens = {name: [0, 0.0, 0.0] for name in OBJECTIVES}, []  # labels, and sums of loss and of hits
    for batch in batches:
        out = model(batch.to(device))
        if batch.mlm_labels is not None:
            tokens.append(batch.mlm_labels[batch.mlm_labels != IGNORE])
        for name, total in sums.items():
            if getattr(out, f"{name}_loss") is not None:
                count = OBJECTIVES[name].count(batch)
                total[0] += count
                total[1] += count * float(getattr(out, f"{name}_loss"))
                total[2] += float(getattr(out, f"{name}_correct"))
    model.train(was_training)
    sums = {name: total for name, total in sums.items() if total[0]}
    result = {"loss": sum((weights or {}).get(name, 1.0) * loss / count for name, (count, loss, _) in sums.items())}
    for name, (count, loss, correct) in sums.items():
        result |= OBJECTIVES[name].numbers(loss / count, correct / count)
    return result | (_constant_guesses(torch.cat(tokens), commonest) if tokens else {})


def _constant_guesses(labels: Tensor, commonest: int | None) -> dict[str, float]:
    shares = labels.bincount() / len(labels)
    result = {"best_constant_accuracy": float(shares.max())}
    if commonest is not None:
        result["commonest_accuracy"] = float(shares[commonest]) if commonest < len(shares) else 0.0
    return result


@torch.no_grad()
def fill_mask(
    model: BertForMaskedLM | BertForPreTraining, tokenizer: Tokenizer, texts: Sequence[str], top: int = 5
) -> list[list[dict]]:
    """The likeliest tokens for every mask of every text, as {"token", "probability"}, likeliest first.

    Raises:
        ValueError: a text has no mask token, or is longer than the model's positions.
    """
    answers = []
    for text in texts:
        ids = tokenizer.encode(text)
        if tokenizer.mask_token_id not in ids:
            raise ValueError(f"text={text!r} has no {tokenizer.mask_token}")
        out = model(pack([ids]).to(next(model.parameters()).device), output_logits=True)
        logits = out.prediction_logits if out.logits is None else out.logits
        for row in (i for i, token in enumerate(ids) if token == tokenizer.mask_token_id):
            best = logits[row].float().softmax(-1).topk(min(top, logits.shape[-1]))
            answers.append(
                [
                    {"token": tokenizer.convert_ids_to_tokens(int(i)), "probability": float(p)}
                    for p, i in zip(best.values, best.indices, strict=True)
                ]
            )
    return answers


@torch.no_grad()
def generate(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Continue a text, token by token, up to the end of text; a pure function of its arguments.

    There is no cache of keys and values: every new token reads the whole text again.

    Args:
        model: a causal one.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw among the likeliest so many only, None for all.
    Returns:
        The text and its continuation, as the tokenizer writes them.
    Raises:
        ValueError: the model is not causal, text and new tokens exceed its positions, or an option out of range.
    """
    if not model.config.causal:
        raise ValueError("causal=False: the model fills masks; to continue a text, pretrain with the objective clm")
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not positive")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} is not a number from 0")
    ids = [tokenizer.cls_token_id, *tokenizer.encode_plain([text])[0]]
    limit = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after {len(ids)} tokens exceeds max_position_embeddings={limit}"
        )
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    for _ in range(max_new_tokens):
        ctx, encoded = model.encode(pack([ids]).to(device), None)
        logits = model.mlm(encoded.last_hidden_state[-1:], ctx)[0, : tokenizer.vocab_size].double().cpu()
        logits[[i for i in tokenizer.special_ids if i != tokenizer.sep_token_id]] = -math.inf
        ids.append(_draw(logits, temperature, top_k, philox(fold(seed, GENERATE), len(ids))[0]))
        if ids[-1] == tokenizer.sep_token_id:
            break
    model.train(was_training)
    return tokenizer.decode(ids, skip_special_tokens=True)


def _draw(logits: Tensor, temperature: float, top_k: int | None, word: int) -> int:
    """A token from logits [V], by 32 random bits."""
    best, ids = logits.sort(descending=True, stable=True)
    if temperature == 0:
        return int(ids[0])
    ends = (best[:top_k] / temperature).softmax(0).cumsum(0)
    return int(ids[min(int(torch.searchsorted(ends, word / 2**32 * ends[-1], right=True)), len(ends) - 1)])
