"""What a run may have beside its steps: a budget of time, an average, a guard, an early stop, a growing batch."""

import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_loop import Crash, assert_runs_are_equal, crash_at, log_of
from tiny_run import Stream, evaluate_loss, make_config, make_model, run

from minibert.model import BertForSequenceClassification
from minibert.train import Interrupted, NonFiniteError, checkpoint, claim
from minibert.train.average import Average
from minibert.train.loop import TrainingLoop
from minibert.train.optim import depths


def clocked(monkeypatch, model, seconds=6.0):
    """A clock that only this model moves: by so many seconds in each forward pass."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("minibert.train.loop.time", SimpleNamespace(monotonic=lambda: clock.now))

    def tick(*_):
        clock.now += seconds * model.training

    model.register_forward_pre_hook(tick)
    return model


def budget(**changes):
    return make_config(**{"steps": None, "minutes": 1, "warmup": 0.5} | changes)


def test_a_budget_is_spent_and_its_schedule_runs_by_the_clock(tmp_path, monkeypatch):
    _, result = run(tmp_path, model=clocked(monkeypatch, make_model()), config=budget(), evaluate=evaluate_loss)
    assert result.step == 10 and result.checkpoint.name == "step-10" and "loss" in result.metrics
    rates = [record["learning_rate"] / 3e-3 for record in log_of(tmp_path)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_a_resumed_budget_goes_on_at_the_elapsed_share_of_its_checkpoint(tmp_path, monkeypatch):
    run(tmp_path / "whole", model=clocked(monkeypatch, make_model()), config=budget())
    with pytest.raises(Crash):
        data = Stream(before=crash_at(40))
        run(tmp_path / "cut", model=clocked(monkeypatch, make_model()), config=budget(), data=data)
    assert json.loads((tmp_path / "cut/step-6/trainer.json").read_text())["seconds"] == 36
    model = clocked(monkeypatch, make_model(seed=1))
    _, result = run(tmp_path / "cut", model=model, config=budget(), resume=True)
    # the same clock, so the same bits: what differs between real runs is the clock alone
    assert result.step == 10
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)
    _, again = run(tmp_path / "cut", model=make_model(), config=budget(), resume=True)
    assert again == result


@pytest.mark.parametrize(("minutes", "said"), [(0.5, 1), (2, 0)])
def test_a_step_that_takes_a_tenth_of_the_budget_is_mentioned(minutes, said, tmp_path, monkeypatch, caplog):
    run(tmp_path, model=clocked(monkeypatch, make_model()), config=budget(minutes=minutes))
    assert caplog.text.count(f"a step takes a tenth of minutes={minutes}: take a smaller model or batch") == said


def test_a_real_clock_ends_a_run_soon_after_its_time(tmp_path):
    config = budget(minutes=5 / 60)  # the start of a run takes a second on a busy machine
    _, result = run(tmp_path, config=config)
    seconds = json.loads((result.checkpoint / "trainer.json").read_text())["seconds"]
    assert 5 <= seconds < 60 and result.step > 2
    rates = [record["learning_rate"] for record in log_of(tmp_path)]
    assert max(rates) > 2e-3 and rates[-1] < 1e-3


def test_the_average_is_that_of_a_few_lines_of_numpy():
    model = torch.nn.Linear(3, 2)
    average = Average(model, 0.3)
    mean = model.weight.detach().numpy().copy()
    for step in range(5):
        torch.nn.init.normal_(model.weight)
        average.update(step)
        d = min(0.3, (1 + step) / (10 + step))
        mean = d * mean + (1 - d) * model.weight.detach().numpy()
    trained = model.weight.detach().clone()
    with average.in_place():
        np.testing.assert_allclose(model.weight.detach().numpy(), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(average.trained()["weight"], trained)
    assert torch.equal(model.weight, trained)


def test_a_resumed_run_with_an_average_equals_one_that_never_stopped(tmp_path):
    config = make_config(ema=0.8, eval_every=2, best_metric="loss")
    whole, _ = run(tmp_path / "whole", "pretraining", config=config)
    with pytest.raises(Crash):
        run(tmp_path / "cut", "pretraining", config=config, data=Stream("pretraining", before=crash_at(40)))
    cut, _ = run(tmp_path / "cut", "pretraining", config=config, model=make_model("pretraining", seed=1), resume=True)
    assert (tmp_path / "cut/step-10/trained.safetensors").is_file()
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_the_average_is_what_is_evaluated_and_saved_and_leaves_the_training_alone(tmp_path):
    plain, _ = run(tmp_path / "plain", evaluate=evaluate_loss)
    model, result = run(tmp_path / "ema", evaluate=evaluate_loss, config=make_config(ema=0.8))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    saved = BertForSequenceClassification.from_pretrained(result.checkpoint, backend="reference").eval()
    with torch.no_grad():
        assert evaluate_loss(saved, None)["loss"] == result.metrics["loss"]
    assert not torch.equal(saved.classifier.weight, model.classifier.weight)


def test_an_average_without_the_trained_weights_is_refused():
    with pytest.raises(ValueError, match="there is no bert.embeddings.word.weight of shape"):
        Average(make_model(), 0.8).load({})


def test_training_stops_where_evaluations_no_longer_improve(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 2.1, 2.0, 1.0])
    config = make_config(steps=12, eval_every=2, best_metric="loss", patience=3, save_every=100)
    arguments = {"config": config, "evaluate": lambda model, limit: {"loss": next(losses)}}
    _, result = run(tmp_path, **arguments)
    assert result.step == 10 and result.best["step"] == 4 and result.metrics == {"loss": 2.0}
    assert checkpoint.steps(tmp_path) == [4, 10]
    _, again = run(tmp_path, **arguments, resume=True)
    assert again == result, "it stays stopped"


def test_an_evaluation_that_improves_at_the_last_moment_goes_on(tmp_path):
    losses = iter([3.0, 4.0, 2.0, 4.0, 4.0])
    config = make_config(steps=8, eval_every=2, best_metric="loss", patience=2)
    _, result = run(tmp_path, config=config, evaluate=lambda model, limit: {"loss": next(losses)})
    assert result.step == 8


def test_a_layer_moves_by_its_share_of_the_rate(tmp_path):
    before, changes = make_model(), {"steps": 1, "warmup": 0, "optimizer": "sgd", "clip": None}
    plain, _ = run(tmp_path / "plain", config=make_config(**changes))
    decayed, _ = run(tmp_path / "decayed", config=make_config(layer_decay=0.25, **changes))
    depth = depths(before)
    for (name, p), whole, part in zip(before.named_parameters(), plain.parameters(), decayed.parameters(), strict=True):
        torch.testing.assert_close(part - p, (whole - p) * 0.25 ** (2 - depth[name]), atol=1e-7, rtol=1e-3, msg=name)


def test_layers_thaw_from_the_last_to_the_first(tmp_path):
    before = make_model()
    config = make_config(steps=9, unfreeze=0.8, save_every=None, keep_last=9, eval_every=1)
    moved = []

    def watch(model, limit):
        pairs = zip(before.named_parameters(), model.parameters(), strict=True)
        moved.append({depths(model)[name] for (name, p), now in pairs if not torch.equal(p, now)})
        return {"loss": 0.0}

    run(tmp_path, config=config, evaluate=watch)
    assert moved == [{2}] * 3 + [{1, 2}] * 4 + [{0, 1, 2}] * 2


@pytest.mark.parametrize(
    "changes", [{"layer_decay": 0.0}, {"layer_decay": 1.1}, {"layer_decay": True}, {"unfreeze": 1.0}]
)
def test_a_share_that_makes_no_sense_is_refused(changes):
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value} is not in"):
        make_config(**changes)


def spoiled(samples, factor):
    """A model whose loss is multiplied where a batch has one of these samples."""
    model = make_model()

    def spoil(module, args, output):
        if set(samples) & set(args[0].seq_ids.tolist()):
            output.loss = output.loss * factor

    model.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("factor", [math.nan, math.inf, 100.0])
def test_a_bad_step_is_left_out_and_the_weights_do_not_notice(tmp_path, factor):
    config = make_config(skip=2, spike=5.0, save_every=1, keep_last=20, log_every=5, schedule="constant", warmup=0)
    run(tmp_path / "spoiled", model=spoiled([12, 17, 33], factor), config=config)
    records = log_of(tmp_path / "spoiled")
    assert [record["step"] for record in records if "skipped" in record] == [3, 4, 7]
    assert all("learning_rate" not in record for record in records if "skipped" in record)
    for step in (3, 4, 7):
        before, after = (tmp_path / "spoiled" / f"step-{n}" for n in (step - 1, step))
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (before / name).read_bytes() == (after / name).read_bytes()
    weights = [(tmp_path / f"spoiled/step-{n}/model.safetensors").read_bytes() for n in (7, 8)]
    assert weights[0] != weights[1], "and then it goes on"


def test_more_bad_steps_in_a_row_than_asked_stop_the_run(tmp_path):
    config = make_config(skip=2, spike=5.0)
    with pytest.raises(NonFiniteError, match=r"step 5: loss is .*, above 5 times its mean of .* on samples 20 to 24"):
        run(tmp_path, model=spoiled([12, 17, 22], 100.0), config=config)
    with pytest.raises(NonFiniteError, match="step 3: loss is"):
        run(tmp_path / "none", model=spoiled([12], 100.0), config=make_config(spike=5.0))


def test_the_guard_goes_on_where_it_was_when_the_run_resumes(tmp_path):
    config = make_config(skip=1, spike=5.0, save_every=1)
    run(tmp_path / "whole", model=spoiled([12, 22], 100.0), config=config)
    with pytest.raises(Crash):  # right after the step that was left out
        run(tmp_path / "cut", model=spoiled([12, 22], 100.0), config=config, data=Stream(before=crash_at(20)))
    run(tmp_path / "cut", model=spoiled([12, 22], 100.0), config=config, resume=True)
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)


def test_a_growing_batch_resumes_bit_for_bit(tmp_path):
    config = make_config(accumulate=4, ramp=0.5)
    _, result = run(tmp_path / "whole", config=config)
    sizes = [max(1, round(4 * min(1, (step + 1) / 11 / 0.5))) for step in range(10)]
    assert sizes[0] == 1 and sizes[-1] == 4
    with claim(tmp_path / "whole", resume=True) as held:
        trainer = TrainingLoop(make_model(), Stream(), None, config, held, None, lambda batch: {"loss": 5}, {})
    assert trainer.cursor == 5 * sum(sizes)
    with pytest.raises(Crash):
        run(tmp_path / "cut", config=config, data=Stream(before=crash_at(5 * sum(sizes[:7]))))
    run(tmp_path / "cut", config=config, resume=True)
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)


def test_a_signal_ends_a_budget_where_it_can_be_continued(tmp_path, monkeypatch):
    def before(cursor):
        if cursor == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path, model=clocked(monkeypatch, make_model()), config=budget(), data=Stream(before=before))
    _, result = run(tmp_path, model=clocked(monkeypatch, make_model()), config=budget(), resume=True)
    assert result.step == 10


def kept_for_backward(model, batch):
    """Bytes of what a forward pass keeps beside the parameters."""
    own, kept = {p.data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch, seed=3).loss.backward()
    return sum(kept.values())


def test_blocks_computed_again_give_the_same_bits_and_keep_less(tmp_path):
    weights, memory = [], []
    for again in (False, True):
        model = make_model(num_hidden_layers=3)
        config = make_config(checkpoint_activations=again, steps=4)
        run(tmp_path / str(again), model=model, config=config)
        weights.append([p.detach().clone() for p in model.parameters()])
        memory.append(kept_for_backward(model.train(), Stream().next_batch(0)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert log_of(tmp_path / "False") == log_of(tmp_path / "True")
    assert memory[1] < 0.5 * memory[0]


def test_a_resumed_run_may_begin_to_compute_blocks_again(tmp_path):
    run(tmp_path / "whole", config=make_config(steps=6))
    with pytest.raises(Crash):
        run(tmp_path / "cut", data=Stream(before=crash_at(25)), config=make_config(steps=6))
    assert checkpoint.latest(tmp_path / "cut").name == "step-3"
    run(tmp_path / "cut", config=make_config(steps=6, checkpoint_activations=True), resume=True)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "whole/step-6" / name).read_bytes() == (tmp_path / "cut/step-6" / name).read_bytes()


def test_a_run_that_died_of_memory_may_go_on_in_pieces(tmp_path):
    with pytest.raises(Crash):
        run(tmp_path, data=Stream(before=crash_at(25)), config=make_config(steps=6))
    assert run(tmp_path, config=make_config(steps=6, split_on_oom=True), resume=True)[1].step == 6
