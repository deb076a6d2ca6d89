"""α schedules against their closed forms."""

import math

import pytest
from pydantic import ValidationError

from raysae.training.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Dynamic,
    LinearDecay,
    LinearWarmup,
    trajectory,
)

TOTAL = 101
MIDDLE, END = 50, 100
PLANNED = sorted(set(SCHEDULES) - {"dynamic"})
"""Schedules that depend on the step alone."""


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


@pytest.mark.parametrize("end_factor", [0.0, 0.25, 1.0])
def test_linear_decay_falls_from_one_to_its_end_factor(end_factor: float):
    schedule = LinearDecay(end_factor=end_factor)
    for step in range(TOTAL):
        wanted = 1 - (1 - end_factor) * step / END
        assert schedule.factor(step, TOTAL) == pytest.approx(wanted)
    assert schedule.factor(END, TOTAL) == pytest.approx(end_factor, abs=1e-15)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("total_steps", [1, 2, 3, 100])
def test_factors_stay_between_zero_and_one(name: str, total_steps: int):
    schedule = SCHEDULES[name]()
    factors = [schedule.factor(step, total_steps) for step in range(total_steps)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)


@pytest.mark.parametrize("name", PLANNED)
def test_a_schedule_is_monotone(name: str):
    schedule = SCHEDULES[name]()
    factors = [schedule.factor(step, TOTAL) for step in range(TOTAL)]
    assert factors in (sorted(factors), sorted(factors, reverse=True))


@pytest.mark.parametrize("name", PLANNED)
def test_a_planned_schedule_looks_at_nothing_but_the_step(name: str):
    schedule = SCHEDULES[name]()
    for step in range(TOTAL):
        assert not schedule.measures(step)
        seen = schedule.factor(step, TOTAL, previous=7.0, overlap=0.9)
        assert seen == schedule.factor(step, TOTAL)


# --- dynamic --------------------------------------------------------------------------------------


def test_dynamic_measures_every_few_steps_but_not_at_the_first():
    schedule = Dynamic(every=4)
    assert [step for step in range(13) if schedule.measures(step)] == [4, 8, 12]


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.3, 0.7, 1.0])
def test_dynamic_multiplies_the_factor_by_the_feedback(overlap: float):
    schedule = Dynamic(target=0.3, gain=0.5, every=10)
    wanted = 1.5 * math.exp(0.5 * (overlap - 0.3) / 0.3)
    factor = schedule.factor(20, TOTAL, previous=1.5, overlap=overlap)
    assert factor == pytest.approx(wanted)
    assert (factor > 1.5) == (overlap > 0.3)
    assert (factor < 1.5) == (overlap < 0.3)


def test_dynamic_keeps_its_factor_between_two_measurements():
    schedule = Dynamic(every=10)
    for step in (0, 1, 9, 11, 99):
        assert schedule.factor(step, TOTAL, previous=2.5, overlap=1.0) == 2.5


@pytest.mark.parametrize(("overlap", "clamp"), [(1.0, 4.0), (0.0, 0.5)])
def test_dynamic_is_clamped_and_comes_back_at_once(overlap: float, clamp: float):
    schedule = Dynamic(target=0.5, gain=0.4, every=2, min_factor=0.5, max_factor=4.0)
    factor = 1.0
    for step in range(40):
        factor = schedule.factor(step, TOTAL, factor, overlap)
        assert 0.5 <= factor <= 4.0
    assert factor == clamp
    back = schedule.factor(40, TOTAL, factor, 1.0 - overlap)
    assert back == pytest.approx(clamp * math.exp(0.4 * (1 - 2 * overlap)))


def test_dynamic_settles_where_the_overlap_meets_its_target():
    """A tame world, in which the overlap falls as the penalty grows."""
    schedule = Dynamic(target=0.3, gain=0.2, every=1)
    factor = 1.0
    for step in range(200):
        factor = schedule.factor(step, 200, factor, overlap=min(1.0, 0.6 / factor))
    assert 0.6 / factor == pytest.approx(0.3, rel=1e-3)


def test_dynamic_starts_at_one_within_its_clamps():
    assert Dynamic().factor(0, TOTAL) == 1.0
    assert Dynamic(min_factor=2.0, max_factor=3.0).factor(0, TOTAL) == 2.0


def test_dynamic_with_clamps_in_the_wrong_order_is_refused():
    with pytest.raises(ValidationError, match="min_factor 2 is above max_factor 1"):
        Dynamic(min_factor=2.0, max_factor=1.0)


@pytest.mark.parametrize(
    ("schedule", "field", "value"),
    [
        (LinearWarmup, "warmup_fraction", 0.0),
        (LinearWarmup, "warmup_fraction", 1.1),
        (Cosine, "end_factor", -0.1),
        (Cosine, "end_factor", 1.1),
        (LinearDecay, "end_factor", 1.1),
        (Dynamic, "target", 0.0),
        (Dynamic, "target", 1.1),
        (Dynamic, "gain", 0.0),
        (Dynamic, "every", 0),
        (Dynamic, "min_factor", 0.0),
        (Constant, "end_factor", 0.5),
    ],
)
def test_parameters_out_of_bounds_are_refused(schedule: type, field: str, value: float):
    with pytest.raises(ValidationError, match=field):
        schedule(**{field: value})


def test_the_trajectory_of_a_planned_schedule_is_its_factor_at_each_step():
    for name in PLANNED:
        schedule = SCHEDULES[name]()
        assert trajectory(schedule, [0.5] * TOTAL) == [
            schedule.factor(step, TOTAL) for step in range(TOTAL)
        ]


def test_the_trajectory_of_feedback_carries_the_factor_from_step_to_step():
    schedule = Dynamic(target=0.25, gain=0.5, every=2, min_factor=0.01)
    overlaps = [0.0, 0.0, 0.5, 0.0, 0.25, 0.0, 0.0]
    up, down = math.exp(0.5), math.exp(-0.5)
    assert trajectory(schedule, overlaps) == pytest.approx([1, 1, up, up, up, up, up * down])
