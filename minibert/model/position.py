"""The position slot. Encodings act in different places, so they share one base whose hooks do nothing."""

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config import BertConfig


class Position(nn.Module):
    """Hooks: a table that the embeddings add, a rotation of queries and keys, a bias on the scores."""

    weight: Tensor | None  # [max_position_embeddings, D], added to the word embeddings

    def __init__(self, config: BertConfig):
        super().__init__()
        self.register_parameter("weight", None)

    def rotate(self, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """q, k: [T, H, d]."""
        return q, k

    def score_bias(self, batch: Batch) -> Tensor | None:
        """[B or 1, H or 1, S, S], added to the scaled scores."""
        return None


class Learned(Position):
    """One learned vector a position (Devlin et al., 2019)."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        nn.init.trunc_normal_(self.weight, std=config.initializer_range)


POSITIONS = {"learned": Learned}
