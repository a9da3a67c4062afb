"""A model divided among processes: of every parameter, its gradient and its moments, each keeps some rows (FSDP2).

Between steps a parameter is a DTensor, cut along its first axis. For the forward and the backward pass of a block its
weights are gathered, and there they are plain tensors: no op of the model sees a DTensor. Embeddings, heads and
whatever else is in no block are one more group, in which a decoder and the word embedding that it is tied to meet.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model.encoder import Encoder
from .distributed import PeerFailed, World
from .shares import name_shares, owner

T = TypeVar("T")


class Sharded(World):
    """A World of several processes none of which has the whole model."""

    def prepare_model(self, model: nn.Module, device: torch.device) -> nn.Module:
        mesh = init_device_mesh(device.type, (self.size,))
        encoders = [module for module in model.modules() if isinstance(module, Encoder)]
        for block in (block for encoder in encoders for block in encoder.layers):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def prepare_losses(self, losses: nn.Module, *example) -> nn.Module:
        return losses

    def gradient_sync(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        module.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        return super().clip(model, limit).full_tensor()

    def measure(self, model: nn.Module, work: Callable[[], T]) -> T:
        """Every rank works, because a forward pass needs the weights of all; what rank 0 gets is what counts."""
        result = work()
        model.reshard()  # embeddings and heads are whole after a forward pass, and would outlive a step
        return self.on_main(lambda: result)

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor()
            if self.is_main:
                result[name] = full.cpu()
        return result

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Each rank its own share, into `<stem>-00001.safetensors` and so on beside `path`."""
        if not tensors:  # of none there would be no share, and a resume would look for one
            return super().write(path, tensors)
        try:
            checkpoint.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(path.parent, save_distributed=True))
        except CheckpointException as error:
            if not self.is_main:
                raise PeerFailed("a share of the checkpoint was not written: rank 0 says why") from None
            raise next(iter(error.failures.values()))[0] from None
        self.on_main(lambda: name_shares(path))

    def read(self, path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = super().read(path, parameters)
        return {name: _share(value, parameters.get(owner(name, parameters))) for name, value in tensors.items()}


def _share(value: Tensor, parameter: Tensor | None) -> Tensor:
    """This rank's rows of what every rank has read; scalars, and what is divided already, as they are."""
    if parameter is None or value.ndim == 0 or isinstance(value, DTensor):
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
