"""Which kernels a step launches, as which variants, found out without a GPU."""

import random
import warnings
from contextlib import contextmanager

import torch

from minibert_kernels.launches import Launches, recorded

from ..config import BertConfig
from ..model import MODELS
from .step import Step, synthetic_batch

LENGTHS = (128, 512)  # of BERT's two phases
OBJECTIVES = {"train": "BertForPreTraining", "infer": "BertModel"}
GPU = {80: 108, 90: 132, 100: 148, 120: 170}  # multiprocessors of a typical GPU: what a persistent grid fills


def _model(mode, config):
    """With weights in bfloat16 for inference; training casts them under autocast."""
    model = MODELS[OBJECTIVES[mode]](config)
    return model.to(torch.bfloat16) if mode == "infer" else model


def step_launches(
    config: BertConfig, *, mode: str, length: int, capability: int = 90, batch_size: int = 2, fill: float = 1.0
) -> Launches:
    """The launches of one step in bfloat16, of pretraining or of inference, on synthetic sequences.

    Args:
        mode: "train" (masked tokens and next sentence) or "infer" (states alone).
        length, batch_size, fill: as `synthetic_batch` takes them.
    Raises:
        ValueError: there is no compiler of Triton here, or the sizes do not fit the config.
    """
    objective = OBJECTIVES[mode]
    batch = synthetic_batch(config, objective, batch_size=batch_size, length=length, fill=fill, labels=mode == "train")
    step = Step(_model(mode, config), batch, mode=mode, dtype="bfloat16")
    with recorded(capability, GPU[capability]) as found, _no_products():
        step()
    return found


def bert_base(capability: int) -> dict[str, Launches]:
    """By name, the launches of BERT-base's steps on full sequences of either length."""
    config = BertConfig.preset("bert-base", num_hidden_layers=2)  # further layers launch what the second does
    return {
        f"{mode} {length}": step_launches(config, mode=mode, length=length, capability=capability)
        for mode in OBJECTIVES for length in LENGTHS
    }  # fmt: skip


@contextmanager
def _no_products():
    """Products of matrices on the CPU have the right shape and any values: nothing means anything while recording."""

    def empty(a, b):
        return a.new_empty(a.shape[0], b.shape[1])

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*overriding a previously registered kernel")
        library.impl("mm", empty, "CPU")
        library.impl("mm.out", lambda a, b, *, out: out, "CPU")
        library.impl("addmm", lambda x, a, b, **_: empty(a, b), "CPU")
        library.impl("addmm_", lambda x, a, b, **_: x, "CPU")
        library.impl("addmm.out", lambda x, a, b, *, out, **_: out, "CPU")
    try:
        yield
    finally:
        library._destroy()


def variants_of_batches(mode: str, batches: int, *, capability: int = 90, seed: int = 0) -> Launches:
    """The launches of steps of one small model on batches of random sizes: up to 4,096 tokens in sequences of up to 33
    to 512.

    A kernel that Triton specialises on a size has many variants here, and in a run each is compiled when it first
    occurs, for seconds.

    Args:
        mode: "train" or "infer".
    """
    draw, objective = random.Random(seed), OBJECTIVES[mode]
    config = BertConfig.preset(
        "bert-base", num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=256, vocab_size=500
    )
    model = _model(mode, config)
    steps = []
    for _ in range(batches):
        length = draw.randint(33, 512)
        sizes = {"batch_size": draw.randint(1, 4096 // length), "length": length, "fill": draw.uniform(0.3, 1)}
        batch = synthetic_batch(config, objective, labels=mode == "train", seed=draw.randrange(1 << 30), **sizes)
        steps.append(Step(model, batch, mode=mode, dtype="bfloat16"))
    with recorded(capability, GPU[capability]) as found, _no_products():
        for step in steps:
            step()
    return found
