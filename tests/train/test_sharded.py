"""A model that several processes have a share of each, over gloo: `parallel="fsdp"`."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import (
    SIZES,
    Failed,
    assert_logs_are_close,
    assert_weights_are_close,
    together,
    torchrun,
    train_tiny,
)
from test_loop import assert_runs_are_equal, crash_at, log_of
from tiny_run import KINDS, Stream, make_config, make_model

from minibert.train import NonFiniteError, World, checkpoint, latest, train

LAYERS = {"num_hidden_layers": 2}


def whole(model):
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in model.named_parameters()}


def train_sharded(run_dir, model=None, evaluate=None, data=None, resume=False, weights=None, **changes):
    """A run of two layers; returns the model, and the ids of each micro-batch's sequences."""
    seen = []
    model = model or make_model("pretraining", **LAYERS)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].seq_ids.tolist()))
    config = make_config(**{"accumulate": 4, "parallel": "fsdp"} | changes)
    data, parts = data or Stream("pretraining", SIZES), KINDS["pretraining"][1]
    train(model, data, evaluate, config, run_dir, resume=resume, parts=parts, weights=weights)
    return model, seen


def evaluate(model, limit):
    assert not model.training
    return {"loss": model(Stream("pretraining").make(range(1000, 1013))).loss.item()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    model, seen = train_sharded(folder, evaluate=evaluate, eval_every=4)
    return folder, seen, whole(model)


@pytest.mark.parametrize("size", [2, 4])
def test_a_divided_model_learns_as_a_whole_one(alone, tmp_path, size):
    one, order, weights = alone

    def work(world):
        model, seen = train_sharded(tmp_path / "run", evaluate=evaluate, eval_every=4)
        word, decoder = model.bert.embeddings.word.weight, model.mlm.decoder.weight
        held = sum(p.to_local().numel() for p in model.parameters())
        return [ids for ids in seen if ids[0] != 1000], whole(model), word is decoder, held, model.num_parameters()

    results = together(size, work, tmp_path)
    woven = [ids for turn in zip(*(seen for seen, *_ in results), strict=True) for ids in turn]
    assert woven == order[:-3] if False else woven == [ids for ids in order if ids[0] != 1000]
    assert_logs_are_close(one, tmp_path / "run")
    assert "eval_loss" in log_of(tmp_path / "run")[3]
    stored = [load_file(latest(path) / "model.safetensors") for path in (one, tmp_path / "run")]
    for _, trained, tied, held, total in results:
        assert tied and held < 1.1 * total / size
        assert_weights_are_close(weights, trained)
    assert sum(held for *_, held, _ in results) == results[0][-1]
    assert_weights_are_close(*stored)
