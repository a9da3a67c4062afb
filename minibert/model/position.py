"""The position slot. Encodings act in different places, so they share one base whose hooks do nothing."""

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config import BertConfig


class Position(nn.Module):
    """Hooks: a table that the embeddings add, a rotation of queries and keys, a bias or slopes on the scores."""

    weight: Tensor | None  # [max_position_embeddings, D], added to the word embeddings
    rotates = False

    def __init__(self, config: BertConfig):
        super().__init__()
        self.register_parameter("weight", None)

    def rotate(self, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """q, k: [T, H, d]."""
        return q, k

    def score_bias(self, batch: Batch) -> Tensor | None:
        """[B or 1, H or 1, S, S], added to the scaled scores."""
        return None

    def slopes(self, batch: Batch) -> Tensor | None:
        """[H] float32, by how much a head's scores fall with each token of distance."""
        return None


class Learned(Position):
    """One learned vector a position (Devlin et al., 2019)."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        nn.init.trunc_normal_(self.weight, std=config.initializer_range)


class Rotary(Position):
    """Queries and keys turned, pair by pair, by angles that grow with the position (Su et al., 2021): RoPE."""

    rotates, base = True, 10_000.0

    def __init__(self, config: BertConfig):
        super().__init__(config)
        if config.head_size % 2:
            raise ValueError(f"position='rotary' turns pairs of a head's channels: head size {config.head_size} is odd")

    def rotate(self, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        # made here, not kept as a buffer, which a model in bfloat16 would round
        share = torch.arange(0, q.shape[-1], 2, device=q.device) / q.shape[-1]
        angles = (batch.positions[:, None] * self.base**-share)[:, None]  # [T, 1, d / 2]
        cos, sin = angles.cos(), angles.sin()

        def turn(x: Tensor) -> Tensor:
            left, right = x.float().chunk(2, -1)
            return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)

        return turn(q), turn(k)


class Alibi(Position):
    """Scores fall with the distance, in each head by a slope of its own (Press et al., 2022), in both directions.

    The slopes of H heads are 2^(-8/H), 2^(-16/H) … 2^-8, as in their paper where H is a power of two. Distances are
    counted in tokens of the packed sequence: `position_ids` change nothing.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_heads = config.num_attention_heads

    def slopes(self, batch: Batch) -> Tensor:
        return 2.0 ** (-8 * torch.arange(1, self.num_heads + 1, device=batch.input_ids.device) / self.num_heads)


POSITIONS = {"learned": Learned, "rotary": Rotary, "alibi": Alibi}
