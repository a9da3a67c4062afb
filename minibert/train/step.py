"""What the device does in an optimizer step: the gradients of its micro-batches, and the update of the weights.

`EagerStep` launches each op as it comes, for every model, optimizer and number of processes; `graph.GraphedStep` has
the same methods, and replays CUDA graphs. Between the two the loop reads losses and norm, and may leave out the update.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minibert_kernels.philox import fold

from ..batch import Batch
from .config import TrainConfig
from .distributed import Losses, World
from .optim import drop_frozen

DROPOUT = 0xD809  # the key of dropout: the data draws under the same seed with keys of its own
logger = logging.getLogger(__name__)


def autocast(dtype: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16 where dtype says so, "float32" or "bfloat16"."""
    if device.type == "meta":  # which has none; a step runs there to be looked at
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


class EagerStep:
    """One op after the other.

    Args:
        parts: see `train`. weights: of the losses, 1 where a name is not in it.
        progress: the share of the run that is done, asked for where layers thaw.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, weights: dict[str, float],
        *, parts: Callable[[Batch], dict[str, int]], progress: Callable[[], float], world: World,
    ):  # fmt: skip
        self.model, self.optimizer, self.config, self.weights = model, optimizer, config, weights
        self.parts, self.progress, self.world = parts, progress, world
        self.losses = Losses(model)
        self.device = next(model.parameters()).device
        self.pieces = 1  # of a micro-batch: more where memory ran out

    def begin(self, batch: Batch, share: dict[str, float]) -> None:
        """Let gradients be means over the ranks; a batch of the first step shows which parameters have one."""
        with autocast(self.config.dtype, self.device):
            self.losses = self.world.prepare_losses(self.losses, batch.to(self.device), self.config.seed, list(share))

    def gradients(self, step: int, batches: list[Batch], shares: list[dict[str, float]]) -> Tensor:
        """Leave the clipped gradient of a step in the parameters, from smaller pieces where memory runs out.

        Args:
            step: its number, from 0.
            batches: this rank's micro-batches. shares: of each loss of each of them in the step's.
        Returns:
            [1 + micro-batches * parts] on the device: the norm of the gradient before it was clipped, and the losses.
            The norm is that of the reduced gradient and the losses are those of all ranks: each decides the same.
        """
        while True:
            try:
                return self._gradients(step, batches, shares)
            except torch.OutOfMemoryError:
                if not self.config.split_on_oom or self.pieces >= max(batch.num_sequences for batch in batches):
                    raise
            # out here, where the error no longer holds on to what the try had made
            self.pieces *= 2
            logger.warning("step %d: out of memory: micro-batches are cut into %d from here", step + 1, self.pieces)

    def _gradients(self, step: int, batches: list[Batch], shares: list[dict[str, float]]) -> Tensor:
        # not keyed on the micro-batch: dropout is keyed on sequences, so it is the same however the step is cut
        seed = fold(self.config.seed, DROPOUT, step)
        self.optimizer.zero_grad(set_to_none=True)
        world, losses = self.world, []
        for batch, share in zip(batches, shares, strict=True):
            # times the ranks, over which the gradients will be averaged
            factors = {name: part * self.weights.get(name, 1.0) * world.size for name, part in share.items()}
            total = torch.zeros(len(share), device=self.device)
            for piece, own in self._cut(batch):
                with world.gradient_sync(self.losses, last=batch is batches[-1]):
                    with autocast(self.config.dtype, self.device):
                        means = self.losses(piece.to(self.device), seed, list(share))
                    sum(means[name] * (own[name] * factor) for name, factor in factors.items()).backward()
                total += torch.stack([own[name] * mean.detach().float() for name, mean in means.items()])
            losses.append(total)
        if self.config.unfreeze:
            drop_frozen(self.optimizer, self.progress())
        norm = world.clip(self.model, self.config.clip or math.inf)
        return torch.cat([norm.float()[None], world.all_gather(torch.stack(losses)).flatten()])

    def _cut(self, batch: Batch) -> Iterator[tuple[Batch, dict[str, float]]]:
        """The pieces of a micro-batch, and the share that each has in its losses."""
        counts = self.parts(batch)
        for piece in batch.split(self.pieces):
            own = counts if piece is batch else self.parts(piece)
            yield piece, {name: own[name] / count if count else 1.0 for name, count in counts.items()}

    def update(self, lr: float) -> None:
        """The optimizer's step, each group at its share of this rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
