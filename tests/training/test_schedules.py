"""α schedules against their closed forms."""

import math

import pytest
from pydantic import ValidationError

from raysae.training.schedules import SCHEDULES, Constant, Cosine, LinearWarmup

TOTAL = 101
MIDDLE, END = 50, 100


def test_constant_is_one():
    assert [Constant().factor(step, TOTAL) for step in (0, MIDDLE, END)] == [1.0, 1.0, 1.0]


def test_linear_warmup_rises_from_zero_to_one_over_its_share_of_the_run():
    schedule = LinearWarmup(warmup_fraction=0.5)
    assert schedule.factor(0, TOTAL) == 0.0
    assert schedule.factor(25, TOTAL) == pytest.approx(25 / (0.5 * TOTAL))
    assert schedule.factor(MIDDLE, TOTAL) == pytest.approx(50 / 50.5)
    assert [schedule.factor(step, TOTAL) for step in (51, 75, END)] == [1.0, 1.0, 1.0]


def test_linear_warmup_over_the_whole_run_is_the_share_of_steps_done():
    schedule = LinearWarmup(warmup_fraction=1.0)
    for step in range(TOTAL):
        assert schedule.factor(step, TOTAL) == pytest.approx(step / TOTAL)


@pytest.mark.parametrize("end_factor", [0.0, 0.1, 1.0])
def test_cosine_falls_from_one_to_its_end_factor(end_factor: float):
    schedule = Cosine(end_factor=end_factor)
    assert schedule.factor(0, TOTAL) == pytest.approx(1.0)
    assert schedule.factor(MIDDLE, TOTAL) == pytest.approx((1 + end_factor) / 2)
    assert schedule.factor(END, TOTAL) == pytest.approx(end_factor, abs=1e-15)
    quarter = end_factor + (1 - end_factor) * 0.5 * (1 + math.sqrt(0.5))
    assert schedule.factor(25, TOTAL) == pytest.approx(quarter)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("total_steps", [1, 2, 3, 100])
def test_factors_stay_between_zero_and_one(name: str, total_steps: int):
    schedule = SCHEDULES[name]()
    factors = [schedule.factor(step, total_steps) for step in range(total_steps)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_is_monotone(name: str):
    schedule = SCHEDULES[name]()
    factors = [schedule.factor(step, TOTAL) for step in range(TOTAL)]
    assert factors in (sorted(factors), sorted(factors, reverse=True))


@pytest.mark.parametrize(
    ("schedule", "field", "value"),
    [
        (LinearWarmup, "warmup_fraction", 0.0),
        (LinearWarmup, "warmup_fraction", 1.1),
        (Cosine, "end_factor", -0.1),
        (Cosine, "end_factor", 1.1),
        (Constant, "end_factor", 0.5),
    ],
)
def test_parameters_out_of_bounds_are_refused(schedule: type, field: str, value: float):
    with pytest.raises(ValidationError, match=field):
        schedule(**{field: value})
