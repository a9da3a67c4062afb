"""A moving average of the weights, which is often better than the last of them (Izmailov et al., 2018)."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Average:
    """Of every parameter that learns, mean += (1 - d) · (parameter - mean) after step t.

    With d = min(decay, (1 + t) / (10 + t)) the weights a run starts with are soon forgotten, whatever the decay.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.names, self.params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        self.decay, self.means = decay, [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, from 0."""
        torch._foreach_lerp_(self.means, list(self.params), 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the means for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, mean in zip(self.params, self.means, strict=True):
            kept = p.clone()  # values, not storages: a share of a parameter is seen through other tensors, too
            p.copy_(mean)
            mean.copy_(kept)

    def trained(self) -> dict[str, Tensor]:
        """The weights themselves, while the means are in place."""
        return dict(zip(self.names, self.means, strict=True))

    @torch.no_grad()
    def load(self, trained: Mapping[str, Tensor]) -> None:
        """What the model holds are the means; the weights are `trained`.

        Raises:
            ValueError: a parameter is missing, or has another shape.
        """
        for p, mean in zip(self.params, self.means, strict=True):
            mean.copy_(p)
        put_back(dict(zip(self.names, self.params, strict=True)), trained)


@torch.no_grad()
def put_back(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy what is stored into these parameters.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    for name, p in parameters.items():
        if name not in stored or stored[name].shape != p.shape:
            raise ValueError(f"there is no {name} of shape {list(p.shape)}")
        p.copy_(stored[name])
