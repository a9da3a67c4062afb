"""What is learned from unlabelled text: each objective sets the targets of a batch, and has numbers of its own.

    mlm  the tokens that were masked                                        loss, accuracy
    nsp  whether B follows A, or comes from another document                loss, accuracy
    sop  whether B follows A, or A follows B                                loss, accuracy
    clm  every next token, with causal attention                            loss, accuracy, perplexity

Some go together, and then their losses are added, each with a weight; `check_objectives` says which. Everything drawn
is a function of (seed, epoch, sample), see `PairSampler` and `Masker`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..batch import IGNORE, Batch
from ..config import one_of
from .masking import Masker
from .pairs import Plan
from .tokenizer import Tokenizer


class Objective:
    """Called on every batch: token ids [T] of the samples of a plan to the ids the model reads, and fields of `Batch`.

    name: the key in `OBJECTIVES`, and the first part of the names of its numbers. labels: the field it learns from.
    pairs: its samples are those of `PairSampler(pairs=…)`. causal: whether attention has to be.
    """

    name: str
    labels: str
    pairs: str | None = None
    causal = False

    def __init__(self, seed: int, tokenizer: Tokenizer, masking: Mapping[str, Any]):
        """`masking` holds the options of `Masker`."""

    def __call__(self, ids: np.ndarray, plan: Plan, epoch, index) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        raise NotImplementedError

    @classmethod
    def count(cls, batch: Batch) -> int:
        """Over how many labels of a batch the loss is a mean."""
        return int((getattr(batch, cls.labels) != IGNORE).sum())

    @classmethod
    def numbers(cls, loss: float, accuracy: float) -> dict[str, float]:
        """What an evaluation reports."""
        return {f"{cls.name}_loss": loss, f"{cls.name}_accuracy": accuracy}


class MaskedLM(Objective):
    """Predict the tokens that were masked (Devlin et al., 2019, section 3.1)."""

    name, labels = "mlm", "mlm_labels"

    def __init__(self, seed, tokenizer, masking):
        self.mask = Masker(
            seed,
            mask_id=tokenizer.mask_token_id,
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special_ids,
            is_continuation=tokenizer.is_continuation,
            **masking,
        )

    def __call__(self, ids, plan, epoch, index):
        ids, rows, labels = self.mask(ids, plan.sizes, epoch, index)
        return ids, {"mlm_rows": rows, "mlm_labels": labels}


class NextSentence(Objective):
    """Tell the text that follows from text of another document (Devlin et al., 2019, section 3.1)."""

    name, labels, pairs = "nsp", "nsp_labels", "nsp"

    def __call__(self, ids, plan, epoch, index):
        return ids, {self.labels: plan.label}


class SentenceOrder(NextSentence):
    """Tell two neighbouring segments from the same two swapped (Lan et al., 2020, section 3.1)."""

    name, labels, pairs = "sop", "sop_labels", "sop"


class CausalLM(Objective):
    """Predict every token after [CLS] from those before it; [SEP] is the end of the text."""

    name, labels, causal = "clm", "mlm_labels", True

    def __call__(self, ids, plan, epoch, index):
        rows = np.delete(np.arange(len(ids)), np.cumsum(plan.sizes) - 1)
        return ids, {"mlm_rows": rows, "mlm_labels": ids[rows + 1]}

    @classmethod
    def numbers(cls, loss, accuracy):
        return super().numbers(loss, accuracy) | {"clm_perplexity": math.exp(min(loss, 700.0))}


OBJECTIVES = {kind.name: kind for kind in (MaskedLM, NextSentence, SentenceOrder, CausalLM)}


def check_objectives(names: Sequence[str], weights: Mapping[str, float] | None = None) -> list[type[Objective]]:
    """The classes of these names.

    Raises:
        ValueError: none, an unknown one, one twice, two that do not go together, or a weight that fits none of them.
    """
    if not names:
        raise ValueError(f"objectives names none: expected some of {', '.join(OBJECTIVES)}")
    for name in names:
        one_of("objectives", name, OBJECTIVES)
        if list(names).count(name) > 1:
            raise ValueError(f"objectives names {name} twice")
    kinds = [OBJECTIVES[name] for name in names]
    causal = [kind.name for kind in kinds if kind.causal]
    if causal and len(kinds) > 1:
        other = next(kind.name for kind in kinds if not kind.causal)
        raise ValueError(f"objectives {causal[0]} and {other} do not go together: {other} reads what is yet to come")
    if {"nsp", "sop"} <= {kind.pairs for kind in kinds}:
        raise ValueError("objectives nsp and sop do not go together: each makes the pairs: choose one")
    for name, weight in (weights or {}).items():
        one_of("weights", name, names)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"weights.{name}={weight!r} is not a positive number")
    return kinds
