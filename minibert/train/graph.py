"""A training step as CUDA graphs: what a host launches op by op in milliseconds, it replays in microseconds.

A graph is bound to shapes and addresses. So batches are padded to a few shapes (`Batch.padded`); each shape has its
inputs in one block of memory, which one copy fills: the batch, the dropout seeds of the step and what each loss counts.
Gradients, weights, moments and learning rates stay where they are. There is a graph for each shape (forward, backward),
one that clips the gradient, and one of the optimizer: between these the loop reads losses and norm, and may leave the
optimizer out.

On a device that has no graphs the same step runs op by op.
"""

import math

import torch
from torch import Tensor, nn

from minibert_kernels.philox import fold

from ..batch import Batch
from ..model.context import site_seeds
from ..model.graphs import Graphs, StaticInputs, check_paddable, key_of
from .config import TrainConfig
from .distributed import Losses
from .step import DROPOUT, autocast


class GraphedStep:
    """An `EagerStep` of one process whose optimizer is one of `CAPTURABLE`."""

    pieces = 1

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, weights: dict[str, float]
    ):
        check_paddable(model)
        self.model, self.optimizer, self.config, self.weights = model, optimizer, config, weights
        self.losses, self.device = Losses(model), next(model.parameters()).device
        self.graphs = Graphs(self.device)
        self.slots: dict[tuple, Slot] = {}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.norm = torch.zeros((), device=self.device)
        self.rates = torch.zeros(len(optimizer.param_groups), device=self.device)
        for group, rate in zip(optimizer.param_groups, self.rates.unbind(), strict=True):
            group["lr"] = rate
        self.clip, self.optimize = self.graphs.call(self._clip), self.graphs.call(self._optimize)

    def begin(self, batch: Batch, share: dict[str, float]) -> None:
        """Give memory to the gradients that there are; a batch of the first step shows which."""
        try:
            slot = self._load(0, batch, share)
        except ValueError as error:
            raise ValueError(f"cuda_graph=True: {error}") from None
        with autocast(self.config.dtype, self.device):
            means = self.losses(slot.inputs.batch, slot.inputs.beside["seeds"], slot.names)
        found = torch.autograd.grad(sum(means.values()), self.parameters, allow_unused=True)
        for p, gradient in zip(self.parameters, found, strict=True):
            p.grad = None if gradient is None else torch.zeros_like(p)

    def gradients(self, step: int, batches: list[Batch], shares: list[dict[str, float]]) -> Tensor:
        """See `EagerStep.gradients`."""
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
        found = []
        for batch, share in zip(batches, shares, strict=True):
            slot = self._load(step, batch, share)
            slot.backward()
            found.append(slot.means.clone())  # the next micro-batch may have the same shape
        self.clip()
        return torch.cat([self.norm[None], *found])

    def _load(self, step: int, batch: Batch, share: dict[str, float]) -> "Slot":
        """The slot of a micro-batch's shape, with its inputs."""
        padded = batch.padded(batch.shape.rounded(self.model.config.max_position_embeddings))
        factors = [part * self.weights.get(name, 1.0) for name, part in share.items()]
        seed = fold(self.config.seed, DROPOUT, step)
        beside = {"seeds": site_seeds(seed, self.model.dropout_sites, "cpu"), "factors": torch.tensor(factors)}
        slot = self.slots.get(key := (*share, *key_of(padded)))
        if slot is None:
            slot = self.slots[key] = Slot(self, list(share), StaticInputs(padded, self.device, **beside))
        slot.inputs.load(padded, **beside)
        return slot

    def update(self, lr: float) -> None:
        """See `EagerStep.update`."""
        rates = torch.tensor([lr * group["scale"] for group in self.optimizer.param_groups])
        self.rates.copy_(rates.pin_memory() if self.device.type == "cuda" else rates, non_blocking=True)
        self.optimize()

    def _clip(self) -> None:
        self.norm.copy_(nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf))

    def _optimize(self) -> None:
        for group in self.optimizer.param_groups:
            group["capturable"] = self.graphs.capturing  # torch's optimizers want to be told, and warn without a reason
        self.optimizer.step()


class Slot:
    """The inputs of micro-batches of one shape, and their forward and backward, which adds to the gradients."""

    def __init__(self, step: GraphedStep, names: list[str], inputs: StaticInputs):
        self.step, self.names, self.inputs = step, names, inputs
        self.means = torch.zeros(len(names), device=step.device)
        self.backward = step.graphs.call(self._backward)

    def _backward(self) -> None:
        step, beside = self.step, self.inputs.beside
        with autocast(step.config.dtype, step.device):
            means = step.losses(self.inputs.batch, beside["seeds"], self.names)
        sum(
            means[name] * factor for name, factor in zip(self.names, beside["factors"].unbind(), strict=True)
        ).backward()
        self.means.copy_(torch.stack([means[name].detach().float() for name in self.names]))
