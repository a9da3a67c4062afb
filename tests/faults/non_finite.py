"""A loss or a gradient that is not finite: no step is made of it, whether or not that step is logged."""

from collections.abc import Callable
from pathlib import Path

import torch

from minibert.train import NonFiniteError, TrainConfig, read_metrics
from minibert.train.checkpoint import Run
from minibert.train.loop import Trainer
from minibert.train.optim import optimizer_state

from .common import Tally, corpus, new_config, new_model, refusal, samples

STEP = 3  # the step that is spoilt, counted from 1


def spoil_loss(value: float, name: str = "mlm_loss", micro: int = 0) -> Callable:
    def apply(model, is_now):
        def spoil(module, arguments, output):
            if is_now(micro):
                setattr(output, name, getattr(output, name) * value)

        model.register_forward_hook(spoil)

    return apply


def spoil_gradient(value: float) -> Callable:
    def apply(model, is_now):
        model.mlm.dense.weight.register_hook(lambda grad: torch.full_like(grad, value) if is_now(0) else grad)

    return apply


CASES = {
    "the loss is nan": spoil_loss(float("nan")),
    "the loss is infinite": spoil_loss(float("inf")),
    "one of two losses is nan": spoil_loss(float("nan"), "nsp_loss"),
    "the last micro-batch alone is nan": spoil_loss(float("nan"), micro=1),
    "a gradient is nan": spoil_gradient(float("nan")),
    "gradients whose norm overflows": spoil_gradient(1e30),
}


def not_finite(tally: Tally, count: int, directory: Path) -> None:
    """The first `count` of the cases, each in a step that is logged and in one that is not."""
    for number, (case, spoil) in enumerate(list(CASES.items())[:count]):
        for log_every in (1, 1000):
            with tally.trial(f"{case}, log_every={log_every}"):
                run_dir = directory / f"{number}-{log_every}"
                run_dir.mkdir()
                check(run_dir, spoil, new_config(log_every=log_every, eval_every=None, save_every=1, best_metric=None))


def check(run_dir: Path, spoil: Callable, config: TrainConfig) -> None:
    data, model, tokenizer = samples(), new_model(), corpus()[0].tokenizer
    trainer = Trainer(model, data, None, config, Run(run_dir, False), tokenizer, data.parts, {})
    micro, before = -1, {}

    def count(*_):
        nonlocal micro
        micro += 1
        if micro == 2 * (STEP - 1):
            before.update(state())

    def state():
        weights = {name: p.detach() for name, p in model.named_parameters()}
        return {name: value.clone() for name, value in (weights | optimizer_state(model, trainer.optimizer)).items()}

    model.register_forward_pre_hook(count)
    spoil(model, lambda which: micro == 2 * (STEP - 1) + which)
    error = refusal(trainer.run, NonFiniteError, names=f"step {STEP}: ")
    assert "samples" in str(error), "the batch is not named"
    now = state()
    assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in now), "a step was made"
    assert all(record["step"] < STEP for record in read_metrics(run_dir / "metrics.jsonl"))
    assert sorted(path.name for path in run_dir.glob("step-*")) == [f"step-{STEP - 2}", f"step-{STEP - 1}"]
