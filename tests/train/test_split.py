"""Micro-batches that are too large for the memory, which is a hook here: it knows how many tokens it has room for."""

import json

import pytest
import torch
from test_distributed import Failed, together, train_tiny
from test_loop import Crash, assert_runs_are_equal, crash_at, log_of
from tiny_run import KINDS, Stream, make_config, make_model, run

from minibert.train import World
from minibert.train.checkpoint import Run
from minibert.train.loop import TrainingLoop


def small_memory(model, tokens, where="forward"):
    """The model, out of memory at batches of more tokens than that, and a list of the sizes it was called with."""
    seen = []

    def before(module, args):
        seen.append(args[0].num_tokens)
        if where == "forward" and seen[-1] > tokens:
            raise torch.OutOfMemoryError("no room")

    def halfway(grad):
        if seen[-1] > tokens:  # the heads have their gradients by now, the embeddings do not
            raise torch.OutOfMemoryError("no room")

    model.register_forward_pre_hook(before)
    if where == "backward":
        model.bert.encoder.layers[0].register_forward_hook(
            lambda module, args, out: out.register_hook(halfway) and None
        )
    return model, seen


def step(tmp_path, tokens, where="forward", **changes):
    """One step over the samples 0 to 11, in micro-batches of 7 and 5."""
    config = make_config(accumulate=2, split_on_oom=True, **changes)
    model, seen = small_memory(make_model("pretraining"), tokens, where)
    run = Run(tmp_path, False)
    trainer = TrainingLoop(model, Stream("pretraining", (7, 5)), None, config, run, None, KINDS["pretraining"][1], {})
    model.train()
    batches, shares, _ = trainer._draw(0)
    record = trainer._update(batches, shares, trainer._backward(batches, shares))
    return record, {name: p.grad for name, p in model.named_parameters()}, seen


@pytest.mark.parametrize(("tokens", "pieces"), [(40, 2), (20, 4), (11, 8)])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_gradient_of_a_step_that_was_split_is_that_of_the_whole(tmp_path, where, tokens, pieces):
    expected, whole, seen = step(tmp_path, 1000)
    assert len(seen) == 2 and min(seen) > 20 and "pieces" not in expected
    record, split, seen = step(tmp_path, tokens, where)
    assert record.pop("pieces") == pieces and max(seen[-pieces:]) <= tokens
    assert record == pytest.approx(expected, rel=1e-5)
    for name, grad in whole.items():
        torch.testing.assert_close(split[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_mean_over_unequal_labels_stays_one_where_a_piece_has_none(tmp_path):
    model, _ = small_memory(make_model("pretraining"), 11)
    batch, _ = Stream("pretraining", (5,)).next_batch(0)
    batch.mlm_labels[batch.mlm_rows < batch.lengths[0]] = -100
    losses = {}
    for tokens in (1000, 11):
        model, _ = small_memory(make_model("pretraining", hidden_dropout_prob=0.0), tokens)
        config, parts = make_config(split_on_oom=True), KINDS["pretraining"][1]
        trainer = TrainingLoop(model, None, None, config, Run(tmp_path, False), None, parts, {})
        losses[tokens] = trainer._backward([batch], [{"mlm_loss": 1.0, "nsp_loss": 1.0}])
    torch.testing.assert_close(losses[11], losses[1000], rtol=1e-5, atol=1e-7)


def test_a_later_step_begins_with_the_pieces_that_were_found(tmp_path, caplog):
    model, seen = small_memory(make_model("pretraining"), 30)
    run(tmp_path, "pretraining", model=model, config=make_config(split_on_oom=True, steps=4))
    assert [size > 30 for size in seen] == [True] + [False] * 8
    assert [record["pieces"] for record in log_of(tmp_path)] == [2] * 4
    assert json.loads((tmp_path / "step-4/trainer.json").read_text())["pieces"] == 2
    assert caplog.messages == ["step 1: out of memory: micro-batches are cut into 2 from here"]


def test_a_resumed_run_goes_on_in_pieces_and_equals_one_that_never_stopped(tmp_path):
    config = make_config(split_on_oom=True)
    run(tmp_path / "whole", "pretraining", model=small_memory(make_model("pretraining"), 20)[0], config=config)
    data = Stream("pretraining", before=crash_at(40))
    with pytest.raises(Crash):
        run(
            tmp_path / "cut",
            "pretraining",
            model=small_memory(make_model("pretraining"), 20)[0],
            config=config,
            data=data,
        )
    model, seen = small_memory(make_model("pretraining", seed=1), 1000)
    run(tmp_path / "cut", "pretraining", model=model, config=config, resume=True)
    assert max(seen) <= 20, "also where there is more memory"
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)


def test_memory_that_has_no_room_for_one_sequence_or_is_not_to_be_split_for_ends_the_run(tmp_path):
    for name, split, calls in (("one", True, 4), ("off", False, 1)):
        model, seen = small_memory(make_model(), 3)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            run(tmp_path / name, model=model, config=make_config(split_on_oom=split))
        assert len(seen) == calls
        assert all(p.grad is None for p in model.parameters()) and log_of(tmp_path / name) == []


def test_several_processes_refuse_to_split(tmp_path):
    config = make_config(accumulate=2, split_on_oom=True)
    ends = together(2, lambda world: train_tiny(tmp_path / "run", config=config), tmp_path / "work")
    line = "split_on_oom=True is for one process, not for 2: leave it out"
    assert ends == [Failed("ValueError", line), Failed("PeerFailed", "rank 0 failed, and says why")]
    World().check(3, split_on_oom=True)
