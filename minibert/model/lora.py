"""Low-rank adaptation (Hu et al., 2021): a frozen W is used as W + s·BA, and only the thin A and B learn."""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Linear):
    """x (W + s·BA)ᵀ + bias, with weight W [out, in] and bias of `linear`, a [rank, in] and b [out, rank].

    b starts at zero, so at first it is `linear`; a starts as a linear layer's weight does. s = alpha / rank.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.a = nn.Parameter(nn.Linear(linear.in_features, rank, bias=False).weight)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.addition(x)

    def addition(self, x: Tensor) -> Tensor:
        """x (s·BA)ᵀ, as two thin products."""
        return F.linear(self.scale * F.linear(x, self.a), self.b)


def adapt(model: nn.Module, rank: int, alpha: float) -> None:
    """Let a model with a head learn in these alone: its head, what is new in it, and A and B in the encoder's layers.

    Raises:
        ValueError: rank is not a whole number from 1 to the hidden size, or alpha is not positive.
    """
    widest = model.config.hidden_size
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= widest:
        raise ValueError(f"lora={rank!r} is not a rank: expected a whole number from 1 to {widest}, the hidden size")
    if not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha={alpha!r} is not a positive number")
    body = getattr(model, "bert", model)  # a model of embeddings is an encoder itself
    frozen = set(body.parameters())
    for name, p in model.named_parameters():
        p.requires_grad_(p not in frozen or name in model.new_parameters)
    for parent in list(body.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LowRank(child, rank, alpha))


def low_rank(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """The layers that `adapt` put in, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRank))


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not frozen."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merged(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of an adapted model as those of one that never was: W + s·BA for W, and neither A nor B."""
    plain = dict(parameters)
    for name, layer in low_rank(model):
        a, b = plain.pop(f"{name}.a"), plain.pop(f"{name}.b")
        plain[f"{name}.weight"] = plain[f"{name}.weight"] + layer.scale * (b @ a)
    return plain
