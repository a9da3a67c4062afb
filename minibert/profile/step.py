"""What is profiled: a batch of uneven lengths, and one step on it."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from minibert_kernels.philox import fold

from ..batch import Batch, pack
from ..config import BertConfig
from ..model import MODELS
from ..train import OPTIMIZERS
from ..train.step import autocast

LR, CLIP = 1e-4, 1.0


def lengths_of(batch_size: int, length: int, fill: float, seed: int = 0) -> torch.Tensor:
    """`batch_size` lengths up to `length` in a shuffled order, whose mean is about `fill * length`.

    They are length * u^(1 / fill - 1) for u spread evenly over (0, 1): all equal at fill 1, many short and few long
    ones at a small fill, as text has them.
    """
    u = (torch.arange(batch_size, dtype=torch.float64) + 0.5) / batch_size
    lengths = (length * u ** (1 / fill - 1)).round().long().clamp(min=1)
    return lengths[torch.randperm(batch_size, generator=torch.Generator().manual_seed(seed))]


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
    head, lengths = MODELS[objective], lengths_of(batch_size, length, fill, seed)
    targets = head.example_targets(config, lengths, draw) if labels else {}
    targets |= head.example_inputs(lengths)
    return pack(
        [ids.tolist() for ids in draw(config.vocab_size, int(lengths.sum())).split(lengths.tolist())], **targets
    )


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
        self.dtype = dtype
        self.optimizer = OPTIMIZERS[optimizer](model, LR) if mode == "train" else None

    def __call__(self) -> None:
        with self.mark("step"):
            self.infer() if self.optimizer is None else self.train()
        self.number += 1

    def autocast(self):
        whole = next(self.model.parameters()).dtype == torch.float32  # else they need no cast at each call
        return autocast(self.dtype if whole else "float32", self.device)

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
