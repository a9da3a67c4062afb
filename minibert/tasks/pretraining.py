"""Pretraining: what is measured on held-out documents, and what the model says about a masked token."""

from collections.abc import Iterable, Sequence

import torch

from ..batch import Batch, pack
from ..data.tokenizer import Tokenizer
from ..model import BertForMaskedLM, BertForPreTraining


@torch.no_grad()
def evaluate(
    model: BertForPreTraining, batches: Iterable[Batch], device="cpu", commonest: int | None = None
) -> dict[str, float]:
    """Means over all masked tokens and all pairs of `batches`.

    Args:
        commonest: id of the training text's commonest token.

    Returns:
        loss (the sum of the two), mlm_loss, mlm_accuracy, nsp_loss, nsp_accuracy (the last two where there are pairs).
        What a constant guess would reach: commonest_accuracy, of the training text's commonest token (where given), and
        best_constant_accuracy, of the token that turns out to be the commonest among these masked ones.
    """
    was_training = model.training
    model.eval()
    sums, labels = (
        dict.fromkeys(("mlm_loss", "mlm_correct", "mlm_count", "nsp_loss", "nsp_correct", "nsp_count"), 0.0),
        [],
    )
    for batch in batches:
        out = model(batch.to(device))
        labels.append(batch.mlm_labels)
        for head in ("mlm", "nsp"):
            count = getattr(out, f"{head}_count")
            if count:
                sums[f"{head}_count"] += count
                sums[f"{head}_loss"] += count * float(getattr(out, f"{head}_loss"))
                sums[f"{head}_correct"] += float(getattr(out, f"{head}_correct"))
    model.train(was_training)
    result = {}
    for head in ("mlm", "nsp"):
        if count := sums[f"{head}_count"]:
            result |= {
                f"{head}_loss": sums[f"{head}_loss"] / count,
                f"{head}_accuracy": sums[f"{head}_correct"] / count,
            }
    counts = torch.cat(labels).bincount() / sum(map(len, labels))
    constants = {"best_constant_accuracy": float(counts.max())}
    if commonest is not None:
        constants["commonest_accuracy"] = float(counts[commonest]) if commonest < len(counts) else 0.0
    loss = sum(value for key, value in result.items() if key.endswith("_loss"))
    return {"loss": loss} | result | constants


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
