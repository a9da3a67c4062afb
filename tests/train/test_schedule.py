import pytest

from minibert.train import TrainConfig
from minibert.train.schedule import SCHEDULES, factor, micro_batches

# at progress 0, 1/8, …, 1 of a run that warms up for a quarter, worked out by hand
BY_HAND = {
    "linear": [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0],
    "constant": [0, 0.5, 1, 1, 1, 1, 1, 1, 1],
    "cosine": [0, 0.5, 1, (2 + 3**0.5) / 4, 0.75, 0.5, 0.25, (2 - 3**0.5) / 4, 0],
    "polynomial": [0, 0.5, 1, 25 / 36, 16 / 36, 9 / 36, 4 / 36, 1 / 36, 0],
    "trapezoid": [0, 0.5, 1, 1, 1, 1, 1, 1 - 0.5**0.5, 0],
}


def rates(**changes):
    """The learning rate at every step."""
    config = TrainConfig(**{"steps": 7, "lr": 1.0} | changes)
    return [config.learning_rate(config.progress(step, 0.0)) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_has_the_values_worked_out_by_hand(schedule):
    values = [factor(schedule, i / 8, 0.25, decay=0.25, power=2) for i in range(9)]
    assert values == pytest.approx(BY_HAND[schedule], abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("final", [0.0, 0.02, 1.0])
def test_a_schedule_rises_to_its_peak_and_falls_to_its_end(schedule, warmup, final):
    def at(progress):
        return factor(schedule, progress, warmup, final=final, decay=0.1, power=0.5)

    up, down = ([at(a + (b - a) * i / 500) for i in range(501)] for a, b in ((0.0, warmup), (warmup, 1.0)))
    assert at(warmup) == 1 and at(0.0) == (0 if warmup else 1)
    assert at(1.0) == pytest.approx(1 if schedule == "constant" else final)
    assert up == sorted(up) and down == sorted(down, reverse=True)
    assert min(up + down) >= 0 and max(up + down) == 1
    assert all(value >= final for value in down)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 13, 1000])
def test_no_step_has_a_rate_of_zero_or_less_or_more_than_the_peak(schedule, steps):
    for warmup in {0, 1, steps // 10, steps - 1} & set(range(steps)):
        values = rates(steps=steps, warmup=warmup, schedule=schedule, power=2.0)
        assert min(values) > 0 and max(values) == 1
        assert values[: warmup + 1] == sorted(values[: warmup + 1])
        assert values[warmup:] == sorted(values[warmup:], reverse=True)


def test_by_steps_the_tent_stands_on_the_steps_before_the_first_and_after_the_last():
    assert rates(warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    assert rates(steps=4, warmup=0) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(steps=5, warmup=1, schedule="constant") == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_by_the_clock_the_steps_do_not_matter():
    config = TrainConfig(minutes=2, lr=1.0, warmup=0.25, schedule="linear")
    assert {config.progress(step, 30.0) for step in (0, 7, 10**6)} == {0.25}
    values = [config.learning_rate(config.progress(3, seconds)) for seconds in (0, 15, 30, 75, 120, 500)]
    assert values == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_the_batch_grows_from_one_micro_batch_to_all():
    assert [micro_batches(8, 0.5, i / 16) for i in range(17)] == [1, 1, 2, 3, 4, 5, 6, 7, *[8] * 9]
    assert {micro_batches(8, 0.0, p) for p in (0.0, 0.3, 1.0)} == {8}
