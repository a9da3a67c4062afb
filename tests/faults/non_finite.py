"""A loss or a gradient that is not finite: no step is made of it, whether or not that step is logged."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from minibert.train import NonFiniteError, TrainConfig, read_metrics
from minibert.train.checkpoint import Run
from minibert.train.loop import TrainingLoop
from minibert.train.optim import optimizer_state

from .common import STEPS, Tally, corpus, new_config, new_model, refusal, samples

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
    """The first `count` of the cases, each in a step that is logged and in one that is not: the run ends."""
    for case, spoilt in spoilt_runs(tally, count, directory):
        with tally.trial(case):
            error = refusal(spoilt.trainer.run, NonFiniteError, names=f"step {STEP}: ")
            assert "samples" in str(error), "the batch is not named"
            assert_equal(spoilt.before, spoilt.state())
            assert all(record["step"] < STEP for record in spoilt.records())
            saved = sorted(path.name for path in spoilt.trainer.path.glob("step-*"))
            assert saved == [f"step-{STEP - 2}", f"step-{STEP - 1}"]


def passed_over(tally: Tally, count: int, directory: Path) -> None:
    """The same, where one bad step may be passed over: the next one begins with what this one began with."""
    for case, spoilt in spoilt_runs(tally, count, directory, skip=1, save_every=None):
        with tally.trial(case):
            result = spoilt.trainer.run()
            assert result.step == STEPS
            assert_equal(spoilt.before, spoilt.after)
            assert [record["step"] for record in spoilt.records() if "skipped" in record] == [STEP]
            changed = [name for name, value in spoilt.state().items() if not torch.equal(value, spoilt.after[name])]
            assert changed and all(value.isfinite().all() for value in spoilt.state().values())


def spoilt_runs(tally: Tally, count: int, directory: Path, **changes) -> Iterator[tuple[str, "Spoilt"]]:
    for number, (case, spoil) in enumerate(list(CASES.items())[:count]):
        for log_every in (1, 1000):
            usual = {"log_every": log_every, "save_every": 1, "eval_every": None, "best_metric": None}
            config = new_config(**usual | changes)
            run_dir = directory / f"{number}-{log_every}"
            run_dir.mkdir()
            yield f"{case}, log_every={log_every}", Spoilt(run_dir, spoil, config)


class Spoilt:
    """A run whose third step is spoilt; `before` and `after`: weights and moments as that step and the next begin."""

    def __init__(self, run_dir: Path, spoil: Callable, config: TrainConfig):
        data, tokenizer, self.model = samples(), corpus()[0].tokenizer, new_model()
        self.trainer = TrainingLoop(self.model, data, None, config, Run(run_dir, False), tokenizer, data.parts, {})
        self.micro, self.before, self.after = -1, {}, {}
        self.model.register_forward_pre_hook(self.count)
        spoil(self.model, lambda which: self.micro == 2 * (STEP - 1) + which)

    def count(self, *_) -> None:
        self.micro += 1
        if self.micro == 2 * (STEP - 1):
            self.before = self.state()
        elif self.micro == 2 * STEP:
            self.after = self.state()

    def state(self) -> dict[str, torch.Tensor]:
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        tensors = weights | optimizer_state(self.model, self.trainer.optimizer)
        return {name: value.clone() for name, value in tensors.items()}

    def records(self) -> list[dict]:
        return read_metrics(self.trainer.path / "metrics.jsonl")


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one and one.keys() == two.keys(), "other tensors"
    assert all(torch.equal(one[name], two[name]) for name in one), "a step was made"
