"""What one forward pass carries along, and what it gives back."""

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from minibert_kernels.philox import fold

from ..batch import Batch


@dataclass(frozen=True)
class Context:
    """The batch and the backend; where dropout acts, the seed of every site ([num_sites] int64) and `batch.rows`.

    schedule: the order in which attention's kernels take long sequences, one for all layers.
    forks: tensors that a product has read, each with the one that is to stand for it as a residual.
    """

    batch: Batch
    backend: str = "auto"
    seeds: Tensor | None = None
    rows: Tensor | None = None
    schedule: Tensor | None = None
    forks: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def residual(self, x: Tensor) -> Tensor:
        """x for the sum behind what has read it: from the product that read it, if there is one, see `Linear`."""
        if not self.forks:
            return x
        found = [residual for source, residual in self.forks if source is x]
        self.forks.clear()
        return found[-1] if found else x

    def drop(self, p: float, site: int) -> dict:
        """The dropout arguments of a kernel call at `site`."""
        return {} if self.seeds is None or p == 0 else {"dropout": p, "seed": self.seeds[site]}


def site_seeds(seed: int | Tensor | None, num_sites: int, device) -> Tensor:
    """One int64 seed a dropout site: [num_sites, 2], of which the second column only keeps the first at multiples of 16
    bytes, so that Triton compiles one kernel for all sites and not two.

    seed: an int, an int64 scalar, None to draw one from torch's generator; or what this returned, at an address that a
        CUDA graph reads.
    """
    if isinstance(seed, Tensor) and seed.ndim == 2:
        return seed
    if seed is None:
        seed = torch.randint(2**62, ())
    if isinstance(seed, int) and not torch.compiler.is_compiling():
        # a hundred small operations: on so few numbers NumPy makes them in a tenth of torch's time
        return torch.from_numpy(fold(seed, np.arange(num_sites)).repeat(2).reshape(-1, 2)).to(device, non_blocking=True)
    seed = torch.as_tensor(seed, dtype=torch.int64)
    return fold(seed, torch.arange(num_sites, device=seed.device))[:, None].repeat(1, 2).to(device, non_blocking=True)


@dataclass(kw_only=True)
class Output:
    """What a model returns; fields it does not produce are None.

    `output[0]`, `output[1]`, … count the fields that are there, in this order, as Hugging Face's outputs do. For a
    packed batch the token axis is [T]; for the Hugging Face call it is [B, S], zero at padding.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    sequence_logits: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    sentence_embedding: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    # sums for whoever averages over batches: of `count` labels, loss is a mean over those that are not ignored, and
    # correct is the number predicted
    mlm_loss: Tensor | None = None
    mlm_correct: Tensor | None = None
    mlm_count: int | None = None
    nsp_loss: Tensor | None = None
    nsp_correct: Tensor | None = None
    nsp_count: int | None = None
    sop_loss: Tensor | None = None
    sop_correct: Tensor | None = None
    sop_count: int | None = None
    clm_loss: Tensor | None = None
    clm_correct: Tensor | None = None
    clm_count: int | None = None
    # the two means whose sum is the loss of a head that reads sequences and tokens
    sequence_loss: Tensor | None = None
    token_loss: Tensor | None = None
    # of a packed batch without labels, by a CRF: [N] classes, and the probability of each
    tags: Tensor | None = None
    tag_probabilities: Tensor | None = None

    def to_tuple(self) -> tuple:
        names = [field.name for field in fields(self)]
        values = (getattr(self, name) for name in names[: names.index("mlm_loss")])
        return tuple(value for value in values if value is not None)

    def __getitem__(self, index):
        return getattr(self, index) if isinstance(index, str) else self.to_tuple()[index]

    def __iter__(self):
        return iter(self.to_tuple())
