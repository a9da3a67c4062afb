import pytest

from minibert.train.schedule import SCHEDULES, warmup_constant, warmup_linear


def test_the_linear_schedule_has_the_values_worked_out_by_hand():
    assert [warmup_linear(step, 7, 3) for step in range(7)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    assert [warmup_linear(step, 4, 0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_the_constant_schedule_warms_up_and_stays():
    assert [warmup_constant(step, 5, 1) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 13, 1000])
def test_no_step_has_a_rate_of_zero_or_less_or_more_than_the_peak(name, total):
    for warmup in {0, 1, total // 10, total - 1} & set(range(total)):
        factors = [SCHEDULES[name](step, total, warmup) for step in range(total)]
        assert min(factors) > 0 and max(factors) == 1
        assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
        assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
