import dataclasses
import json
import os
import random
import signal

import pytest
import safetensors.torch
import torch
from tiny_run import KINDS, Fork, Stream, evaluate_loss, make_config, make_model, run

from minibert.train import (
    TIMING_FIELDS,
    Interrupted,
    NonFiniteError,
    TrainConfig,
    checkpoint,
    claim,
    read_metrics,
    train,
)
from minibert.train.checkpoint import Run
from minibert.train.loop import TrainingLoop
from minibert.train.step import DROPOUT
from minibert_kernels.philox import fold


class Crash(Exception):
    pass


def log_of(run_dir):
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMING_FIELDS} for record in records]


def assert_runs_are_equal(one, two, step):
    """The same log but for the clock, and the same bytes of weights, optimizer and state."""
    assert log_of(one) == log_of(two)
    names = {path.name for path in (one / f"step-{step}").iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", "manifest.json"} <= names
    for name in names:
        assert (one / f"step-{step}" / name).read_bytes() == (two / f"step-{step}" / name).read_bytes(), name


def crash_at(cursor):
    def before(now):
        if now == cursor:
            raise Crash

    return before


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("classification", {}),
        ("pretraining", {}),
        ("pretraining", {"accumulate": 2}),
        ("classification", {"dtype": "bfloat16"}),
        ("pretraining", {"optimizer": "lamb"}),
        ("classification", {"optimizer": "bertadam", "beta2": 0.98, "schedule": "cosine", "final_lr": 0.1}),
        ("pretraining", {"optimizer": "sgd"}),
        ("classification", {"layer_decay": 0.7, "unfreeze": 0.8}),
        ("pretraining", {"optimizer": "lamb", "layer_decay": 0.7, "unfreeze": 0.5}),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, kind, changes):
    config = make_config(**changes)
    model, _ = run(tmp_path / "whole", kind, config=config)
    with pytest.raises(Crash):
        run(tmp_path / "cut", kind, config=config, data=Stream(kind, before=crash_at(40 * config.accumulate)))
    assert log_of(tmp_path / "cut")[-1]["step"] == 7 and checkpoint.latest(tmp_path / "cut").name == "step-6"
    resumed, result = run(tmp_path / "cut", kind, config=config, model=make_model(kind, seed=1), resume=True)
    assert result.step == 10 and result.checkpoint == tmp_path / "cut" / "step-10"
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_dropout_is_at_work_in_these_runs(tmp_path):
    run(tmp_path / "a", config=make_config(steps=2, seed=1))
    run(tmp_path / "b", config=make_config(steps=2, seed=2))
    assert log_of(tmp_path / "a")[0]["loss"] != log_of(tmp_path / "b")[0]["loss"]


def test_every_step_has_its_own_dropout_and_micro_batches_share_it(tmp_path):
    model, seeds = make_model(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seeds.append(kwargs["seed"]), with_kwargs=True)
    run(tmp_path, model=model, config=make_config(steps=3, accumulate=2))
    assert seeds[::2] == seeds[1::2] and len(set(seeds)) == 3


def test_evaluating_changes_nothing_about_the_training(tmp_path):
    run(tmp_path / "a", evaluate=evaluate_loss, config=make_config(eval_every=2))
    run(tmp_path / "b", config=make_config(eval_every=2))
    plain = [{k: v for k, v in record.items() if not k.startswith("eval_")} for record in log_of(tmp_path / "a")]
    assert plain == log_of(tmp_path / "b")


def test_runs_killed_at_random_moments_end_as_the_one_that_was_not(tmp_path):
    config = make_config(steps=30, save_every=4, eval_every=6, best_metric="loss")
    run(tmp_path / "whole", config=config, evaluate=evaluate_loss)
    rng, killed = random.Random(3), 0
    child = Fork(lambda: run(tmp_path / "cut", config=config, evaluate=evaluate_loss))
    for _ in range(6):
        child.kill_after(rng.uniform(0.02, 0.15))
        killed += not (tmp_path / "cut" / "step-30").exists()
        child = Fork(lambda: run(tmp_path / "cut", config=config, evaluate=evaluate_loss, resume=True))
    os.waitpid(child.pid, 0)
    assert killed >= 2
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 30)


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("lamb", 0.1)])
def test_training_lowers_the_loss_and_leaves_torchs_generator_alone(tmp_path, optimizer, lr):
    model = make_model(hidden_dropout_prob=0.0)
    state = torch.get_rng_state()
    run(
        tmp_path,
        model=model,
        config=make_config(steps=40, lr=lr, optimizer=optimizer),
        data=Stream(sizes=(32,)),
    )
    assert torch.equal(state, torch.get_rng_state())
    losses = [record["loss"] for record in log_of(tmp_path)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def gradients(tmp_path, sizes, clip=None, weights=None):
    """One step over the samples 0 to 11, cut into micro-batches of these sizes."""
    config = make_config(accumulate=len(sizes), clip=clip)
    data, model = Stream("pretraining", sizes), make_model("pretraining")
    trainer = TrainingLoop(model, data, None, config, Run(tmp_path, False), None, KINDS["pretraining"][1], {}, weights)
    model.train()
    batches, shares, cursor = trainer._draw(0)
    assert cursor == 12
    record = trainer._update(batches, shares, trainer._backward(batches, shares))
    return record, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 11), (7, 2, 3)])
def test_the_gradient_is_the_same_however_a_step_is_cut(tmp_path, sizes):
    record, grads = gradients(tmp_path, (12,))
    cut_record, cut_grads = gradients(tmp_path, sizes)
    for name in ("loss", "mlm_loss", "nsp_loss", "grad_norm"):
        assert cut_record[name] == pytest.approx(record[name], rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(cut_grads[name], grad, rtol=1e-4, atol=1e-7, msg=name)
    assert record["loss"] == pytest.approx(record["mlm_loss"] + record["nsp_loss"])


def test_the_step_of_weighted_losses_is_that_of_their_weighted_sum(tmp_path):
    weights, losses, sums = {"mlm_loss": 2.0, "nsp_loss": 0.25}, {}, {}
    for name, weight in weights.items():
        model = make_model("pretraining").train()
        batch = Stream("pretraining", (12,)).next_batch(0)[0]
        losses[name] = getattr(model(batch, seed=fold(11, DROPOUT, 0)), name)
        losses[name].backward()
        for parameter, p in model.named_parameters():
            if p.grad is not None:
                sums[parameter] = sums.get(parameter, 0) + weight * p.grad
    for sizes in ((12,), (1, 11)):
        record, grads = gradients(tmp_path, sizes, weights=weights)
        assert record["loss"] == pytest.approx(2 * record["mlm_loss"] + 0.25 * record["nsp_loss"])
        for name, loss in losses.items():
            assert record[name] == pytest.approx(loss.item(), rel=1e-5), "a loss is logged as it is"
        for name, grad in sums.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_run_with_other_weights_is_not_resumed(tmp_path):
    run(tmp_path, config=make_config(steps=3), weights={"loss": 0.5})
    with pytest.raises(ValueError, match="was started with weights.loss=0.5, now it is 0.75"):
        run(tmp_path, config=make_config(steps=3), weights={"loss": 0.75}, resume=True)


def test_a_large_gradient_is_clipped_and_its_own_norm_is_logged(tmp_path):
    record, whole = gradients(tmp_path, (12,))
    clipped_record, clipped = gradients(tmp_path, (12,), clip=0.01)
    assert record["grad_norm"] == clipped_record["grad_norm"] > 0.1
    norm = torch.stack([grad.norm() for grad in clipped.values()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
    scale = 0.01 / record["grad_norm"]
    for name, grad in whole.items():
        torch.testing.assert_close(clipped[name], grad * scale, rtol=1e-3, atol=1e-9, msg=name)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_it(tmp_path):
    model = make_model()

    def spoil(module, args, output):
        if 23 in args[0].seq_ids:
            output.loss = output.loss * float("nan")

    model.register_forward_hook(spoil)
    config = make_config(accumulate=2, save_every=1)
    with pytest.raises(NonFiniteError, match=r"step 3: loss is nan on samples 20 to 24; no optimizer step") as caught:
        run(tmp_path, model=model, config=config)
    assert "\n" not in str(caught.value)
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2]
    saved = make_model(seed=1)
    with claim(tmp_path, resume=True) as held:
        TrainingLoop(saved, Stream(), None, config, held, None, KINDS["classification"][1], {})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    model.classifier.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"step 1: the norm of the gradient is (inf|nan) on samples 0 to 4"):
        run(tmp_path, model=model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_can_be_continued(tmp_path, signum, code):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def before(cursor):
        if cursor == 20:
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=r"after step 4, saved in .*step-4: continue with --resume") as caught:
        run(tmp_path / "cut", data=Stream(before=before))
    assert caught.value.exit_code == code
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run(tmp_path / "cut", resume=True)
    run(tmp_path / "whole")
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"lr": 1e-4}}, r"lr=0\.003, now it is 0\.0001"),
        ({"config": {"steps": 20}}, "steps=10, now it is 20"),
        ({"config": {"clip": None}}, r"clip=1\.0, now it is None"),
        ({"model": {"hidden_dropout_prob": 0.2}}, r"model\.hidden_dropout_prob=0\.1, now it is 0\.2"),
        ({"settings": {"data": {"path": "b", "rate": 0.15}}}, r"data\.path='a', now it is 'b'"),
        ({"settings": {"data": {"path": "a"}}}, r"data\.rate=0\.15, now it is None"),
        ({"settings": {"data": {"path": "a", "rate": 0.15}, "new": 1}}, "new=None, now it is 1"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(tmp_path, changes, message):
    settings = {"data": {"path": "a", "rate": 0.15}}
    run(tmp_path, settings=settings, config=make_config())
    log = (tmp_path / "metrics.jsonl").read_bytes()
    model = make_model(**changes.get("model", {}))
    config = make_config(**changes.get("config", {}))
    with pytest.raises(ValueError, match=f"was started with {message}"):
        run(tmp_path, model=model, config=config, settings=changes.get("settings", settings), resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_what_changes_no_result_may_change_on_resume(tmp_path):
    with pytest.raises(Crash):
        run(tmp_path / "cut", data=Stream(before=crash_at(40)))
    run(tmp_path / "cut", config=make_config(save_every=None, keep_last=1), resume=True)
    run(tmp_path / "whole")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert checkpoint.steps(tmp_path / "cut") == [10]


def test_resuming_before_the_first_checkpoint_starts_at_the_beginning(tmp_path):
    with pytest.raises(Crash):
        run(tmp_path / "cut", data=Stream(before=crash_at(10)))
    assert checkpoint.latest(tmp_path / "cut") is None and log_of(tmp_path / "cut")
    run(tmp_path / "cut", resume=True)
    run(tmp_path / "whole", resume=True)
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    _, first = run(tmp_path, evaluate=evaluate_loss)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    model, again = run(tmp_path, evaluate=evaluate_loss, model=make_model(seed=1), resume=True)
    assert again == first and again.metrics
    assert before == {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    }
    stored = safetensors.torch.load_file(first.checkpoint / "model.safetensors")
    assert torch.equal(model.classifier.weight, stored["classifier.weight"])


def test_a_damaged_newest_checkpoint_costs_steps_but_not_the_result(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(Crash):
        run(tmp_path / "cut", data=Stream(before=crash_at(45)))
    (tmp_path / "cut" / "step-6" / "optimizer.safetensors").write_bytes(b"")
    run(tmp_path / "cut", resume=True)
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)
    assert checkpoint.steps(tmp_path / "cut") == checkpoint.steps(tmp_path / "whole") == [9, 10]


def test_a_directory_that_holds_a_run_is_not_trained_into(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} already holds a run: continue it with --resume"):
        run(tmp_path)


def test_a_caller_that_holds_the_directory_trains_into_it(tmp_path):
    with claim(tmp_path) as held:
        (tmp_path / "config.yaml").write_text("steps: 10\n")
        _, result = run(held)
    assert result.checkpoint == tmp_path / "step-10"


def test_the_best_checkpoint_is_kept_and_named(tmp_path):
    values = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.8, 10: 0.6}
    seen = iter(values.values())
    config = make_config(
        eval_every=2, eval_batches=3, best_metric="f1", best_mode="higher", keep_last=1, save_every=None
    )
    _, result = run(tmp_path, config=config, evaluate=lambda model, eval_batches: {"f1": next(seen), "n": eval_batches})
    assert result.best == {"metric": "f1", "value": 0.9, "step": 4} and result.metrics == {"f1": 0.6, "n": 3.0}
    assert checkpoint.steps(tmp_path) == [4, 10]
    assert checkpoint.best(tmp_path) == tmp_path / "step-4"
    assert {r["step"]: r["eval_f1"] for r in log_of(tmp_path) if "eval_f1" in r} == values


def test_an_unknown_best_metric_is_named_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"best_metric='lost' is not one of loss, batches: did you mean 'loss'"):
        run(tmp_path, config=make_config(best_metric="lost"), evaluate=evaluate_loss)


def test_the_log_has_the_fields_and_steps_that_were_asked_for(tmp_path):
    config = make_config(steps=11, log_every=4, eval_every=5, warmup=2)
    run(tmp_path, "pretraining", config=config, evaluate=lambda model, eval_batches: {"nsp_accuracy": 0.5})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [4, 5, 8, 10, 11]
    assert ["eval_nsp_accuracy" in record for record in records] == [False, True, False, True, True]
    names = {"step", "loss", "mlm_loss", "nsp_loss", "learning_rate", "grad_norm", *TIMING_FIELDS}
    assert all(names <= record.keys() and record["tokens_per_second"] > 0 for record in records)
    assert [record["learning_rate"] for record in records] == pytest.approx([3e-3 * f / 9 for f in (8, 7, 4, 2, 1)])


def test_bfloat16_computes_otherwise_but_keeps_float32_weights(tmp_path):
    model, _ = run(tmp_path / "b", config=make_config(steps=2, dtype="bfloat16"))
    run(tmp_path / "f", config=make_config(steps=2))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours, theirs = log_of(tmp_path / "b")[0]["loss"], log_of(tmp_path / "f")[0]["loss"]
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)


def test_the_checkpoint_names_what_made_it(tmp_path):
    run(tmp_path, settings={"data": "here"})
    state = json.loads((tmp_path / "step-10" / "trainer.json").read_text())
    assert state["step"] == 10 and state["cursor"] == 50 and state["settings"]["data"] == "here"
    assert state["config"] == dataclasses.asdict(make_config()) and state["settings"]["model"]["vocab_size"] == 37
    assert state["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 is not a positive whole number"),
        ({"steps": 2.5}, r"steps=2\.5 is not a positive whole number"),
        ({"accumulate": True}, "accumulate=True"),
        ({"eval_every": 0}, "eval_every=0 is not a positive whole number or null"),
        ({"keep_last": None}, "keep_last=None"),
        ({"lr": 0}, "lr=0 is not a positive number"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"clip": -1.0}, r"clip=-1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"warmup": 1.0}, r"warmup=1\.0 is neither a fraction in \[0, 1\) nor fewer than steps=10"),
        ({"warmup": 10}, "warmup=10 is neither"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"optimizer": "lam"}, "optimizer='lam' is not one of adamw, bertadam, lamb, sgd: did you mean 'lamb'"),
        ({"schedule": "linea"}, "schedule='linea' is not one of linear, constant, .*: did you mean 'linear'"),
        ({"steps": None}, "steps=None and minutes=None: give one of the two"),
        ({"minutes": 3}, "steps=10 and minutes=3: give one of the two"),
        ({"steps": None, "minutes": 0}, "minutes=0 is not a positive number"),
        ({"steps": None, "minutes": 1, "warmup": 1}, "warmup=1 is neither"),
        ({"final_lr": 2}, "final_lr=2 is not a share of the peak"),
        ({"decay": 0.0}, r"decay=0\.0 is not a positive number"),
        ({"beta2": 1.0}, r"beta2=1\.0 is not in \[0, 1\)"),
        ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
        ({"best_mode": "most"}, "best_mode='most'"),
        ({"device": "gpu"}, "device='gpu' is not the name of a device"),
        ({"device": "cuda:99"}, r"device='cuda:99': this machine has \d+ CUDA devices"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig(**{"steps": 10} | changes)
    assert "\n" not in str(caught.value)


def test_warmup_is_a_number_of_steps_or_a_fraction():
    assert TrainConfig(steps=30, warmup=0.1).warmup_steps == 3
    assert TrainConfig(steps=30, warmup=7).warmup_steps == 7
    assert TrainConfig(steps=1).warmup_steps == 0


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_resumed_run_equals_one_that_never_stopped_on_a_gpu(tmp_path, optimizer):
    config = make_config(device="cuda", optimizer=optimizer)
    run(tmp_path / "whole", "pretraining", config=config)
    with pytest.raises(Crash):
        run(tmp_path / "cut", "pretraining", config=config, data=Stream("pretraining", before=crash_at(40)))
    run(tmp_path / "cut", "pretraining", config=config, resume=True)
    assert_runs_are_equal(tmp_path / "whole", tmp_path / "cut", 10)


def test_a_full_disk_while_logging_stops_with_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        claim(tmp_path, resume=True) as held,
        pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left"),
    ):
        train(make_model(), Stream(), None, make_config(save_every=1), Run(held.path, False))
    assert checkpoint.steps(tmp_path) == []
