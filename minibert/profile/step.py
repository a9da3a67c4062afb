"""What is profiled: a batch of uneven lengths, and one step on it."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from minibert_kernels.philox import fold

from ..batch import Batch, pack
from ..config import BertConfig
from ..model.losses import problem_type
from ..train import OPTIMIZERS

MASKED = 0.15  # share of the tokens that a masked language model predicts (Devlin et al., 2019)
LR, CLIP = 1e-4, 1.0


def lengths_of(batch_size: int, length: int, fill: float, seed: int = 0) -> list[int]:
    """`batch_size` lengths up to `length` in a shuffled order, whose mean is about `fill * length`.

    They are length * u^(1 / fill - 1) for u spread evenly over (0, 1): all equal at fill 1, many short and few long
    ones at a small fill, as text has them.
    """
    u = (torch.arange(batch_size, dtype=torch.float64) + 0.5) / batch_size
    lengths = (length * u ** (1 / fill - 1)).round().long().clamp(min=1)
    return lengths[torch.randperm(batch_size, generator=torch.Generator().manual_seed(seed))].tolist()


def synthetic_batch(
    config: BertConfig, objective: str, *, batch_size: int = 32, length: int = 128, fill: float = 1.0,
    labels: bool = True, seed: int = 0,
) -> Batch:  # fmt: skip
    """A packed batch of random ids on the host, with the targets that `objective` learns from where `labels` is true.

    Args:
        objective: a key of `minibert.model.MODELS`. length: the most tokens of a sequence. fill: mean length / length.
    Raises:
        ValueError: length exceeds max_position_embeddings, or labels are wanted of a model without a head.
    """
    if length > config.max_position_embeddings:
        raise ValueError(f"length={length} exceeds max_position_embeddings={config.max_position_embeddings}")
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    lengths, targets = lengths_of(batch_size, length, fill, seed), {}
    tokens = sum(lengths)
    if labels and objective in ("BertModel", "BertForSentenceEmbedding"):
        raise ValueError(f"{objective} has no head to train: use mode='infer'")
    if labels and objective in ("BertForPreTraining", "BertForMaskedLM"):
        rows = torch.randperm(tokens, generator=generator)[: max(1, round(MASKED * tokens))].sort().values
        targets = {"mlm_rows": rows, "mlm_labels": draw(config.vocab_size, len(rows))}
    if labels and objective == "BertForPreTraining":
        targets["nsp_labels"] = draw(2, batch_size)
    if objective == "BertForRelationExtraction":
        ends = torch.tensor(lengths).cumsum(0)
        targets["token_rows"] = torch.stack([ends - torch.tensor(lengths), ends - 1], 1).flatten()
    if labels and objective in ("BertForTokenClassification", "BertForJointClassification"):
        targets["token_labels"] = draw(config.num_labels, tokens)
    if labels and objective == "BertForJointClassification":
        targets["labels"] = draw(len(config.task_specific_params["intents"]), batch_size)
    if labels and objective == "BertForQuestionAnswering":
        targets["labels"] = draw(min(lengths), batch_size, 2)
    if labels and objective == "BertForMultipleChoice":
        targets["labels"] = draw(batch_size, 1)  # all choices of one question
    if labels and objective in ("BertForSequenceClassification", "BertForRelationExtraction"):
        kind = problem_type(config, draw(2, batch_size))
        shape = (batch_size, config.num_labels) if kind == "multi_label_classification" else (batch_size,)
        targets["labels"] = draw(2 if len(shape) == 2 else config.num_labels, *shape)
        targets["labels"] = targets["labels"] if kind == "single_label_classification" else targets["labels"].float()
    return pack([ids.tolist() for ids in draw(config.vocab_size, tokens).split(lengths)], **targets)


class Step:
    """A call is one step on `batch`: what the training loop does, without its one read of the loss, or inference.

    Every call copies the batch to the model's device, as the loop does; the optimizer is made anew, so weights and
    moments are the caller's model's and nobody else's.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, *, mode: str = "train", dtype: str = "float32", optimizer: str = "adamw",
        mark: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):  # fmt: skip
        self.model, self.batch, self.mark, self.number = model.train(mode == "train"), batch, mark, 0
        self.device = next(model.parameters()).device
        self.half = dtype == "bfloat16"
        self.optimizer = OPTIMIZERS[optimizer](model, LR) if mode == "train" else None

    def __call__(self) -> None:
        with self.mark("step"):
            self.infer() if self.optimizer is None else self.train()
        self.number += 1

    def autocast(self):
        if self.device.type == "meta":
            return contextlib.nullcontext()
        narrow = next(self.model.parameters()).dtype != torch.float32  # weights that need no cast at each call
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half and not narrow)

    def infer(self) -> None:
        with self.mark("forward"), torch.inference_mode(), self.autocast():
            self.model(self.batch.to(self.device))

    def train(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        seed = torch.tensor(fold(0, self.number))  # to torch.compile every new int is a new graph
        with self.mark("forward"), self.autocast():
            loss = self.model(self.batch.to(self.device), seed=seed).loss
        with self.mark("backward"):
            loss.backward()
        with self.mark("optimizer"):
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
