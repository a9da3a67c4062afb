"""The position slot. Encodings act in different places, so they share one base whose hooks do nothing."""

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config import BertConfig
from .linear import untouched


class Position(nn.Module):
    """Hooks: a table that the embeddings add, a rotation of queries and keys, a bias or slopes on the scores."""

    weight: Tensor | None  # [max_position_embeddings, D], added to the word embeddings

    def __init__(self, config: BertConfig):
        super().__init__()
        self.register_parameter("weight", None)

    def rotate(self, qkv: Tensor, batch: Batch) -> Tensor:
        """The fused projection [T, 3, H, d] with queries and keys rotated by their positions."""
        return qkv

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
    """Queries and keys rotated, pair by pair, by angles that grow with the position (Su et al., 2021): RoPE."""

    base = 10_000.0

    def __init__(self, config: BertConfig):
        super().__init__(config)
        if config.head_size % 2:
            raise ValueError(
                f"position='rotary' rotates pairs of a head's channels: head size {config.head_size} is odd"
            )

    def rotate(self, qkv: Tensor, batch: Batch) -> Tensor:
        # made here, not kept as a buffer, which a model in bfloat16 would round
        share = torch.arange(0, qkv.shape[-1], 2, device=qkv.device) / qkv.shape[-1]
        angles = (batch.positions[:, None] * self.base**-share)[:, None, None]  # [T, 1, 1, d / 2]
        return (_Rotate.apply if untouched(qkv) else rotated)(qkv, angles.cos(), angles.sin())


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys rotated in float32, by angles whose cosines and sines are [T, 1, 1, d / 2]."""
    left, right = qkv[:, :2].chunk(2, -1)
    qk = torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
    return torch.cat((qk.to(qkv.dtype), qkv[:, 2:]), 1)


class _Rotate(torch.autograd.Function):
    """`rotated` with a third of its memory traffic; backward rotates the gradient back in the same way."""

    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        (left, right), (out_left, out_right) = (x[:, :2].chunk(2, -1) for x in (qkv, out))
        # rounded as they are stored, each after one product in float32
        torch.addcmul(left * cos, right, sin, value=-1, out=out_left)
        torch.addcmul(right * cos, left, sin, out=out_right)
        out[:, 2] = qkv[:, 2]
        return out

    @staticmethod
    def backward(ctx, dout):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(dout, cos, -sin), None, None


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
