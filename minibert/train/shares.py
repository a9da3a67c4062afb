"""Files of tensors that several processes wrote together, each its own rows."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader


def read_shares(path: Path, parameters: Mapping[str, Tensor], alone: bool) -> dict[str, Tensor]:
    """What any number of ranks wrote for `path`, divided as the parameters are in this process: see `World.read`.

    Args:
        alone: whether no other process reads.
    Raises:
        ValueError: there is none, or a tensor has another shape than its parameter. OSError: it cannot be read.
    """
    shares = [str(share) for share in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))]
    if not shares:
        raise ValueError("no such file")
    reader = HuggingFaceStorageReader(path.parent)
    reader.fs.ls = lambda folder: shares  # of a checkpoint's other files, some have tensors of the same names
    tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        parameter = parameters.get(owner(name, parameters))
        if parameter is None:
            continue
        if len(stored.size) and stored.size != parameter.shape:
            raise ValueError(f"{name} has shape {list(stored.size)}: expected {list(parameter.shape)}")
        tensors[name] = torch.zeros_like(parameter.detach()) if len(stored.size) else torch.zeros(())
    try:
        checkpoint.load(tensors, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    return tensors


def name_shares(path: Path) -> None:
    """From the names that torch gives, shard-00001-model-00001-of-00001.safetensors."""
    for share in path.parent.glob("shard-*.safetensors"):
        os.replace(share, path.with_stem(f"{path.stem}-{share.name.split('-')[1]}"))


def owner(name: str, parameters: Mapping[str, Tensor]) -> str:
    """The parameter that a tensor belongs to: itself, or one of its moments."""
    return name if name in parameters else name.rpartition(".")[0]
