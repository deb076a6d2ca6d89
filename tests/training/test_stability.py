"""Group stability and what is measured on the way: the same rows whoever trains, none twice."""

from __future__ import annotations

import io
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from training_bench import every_method, small

from raysae.regularizers import REGISTRY
from raysae.training.loop import QUARTERS, train, train_one
from raysae.training.run import Progress, Rung, SAERun
from raysae.training.stability import GroupStability

PERIOD, STEPS = 5, 24
GROUPING = {"grouped", "hierarchical", "subspace_clustered", "task_masked"}


def rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted for chance, by counting pairs of features."""
    together = [(a[i] == a[j], b[i] == b[j]) for i, j in combinations(range(len(a)), 2)]
    both = sum(x and y for x, y in together)
    in_a, in_b = sum(x for x, _ in together), sum(y for _, y in together)
    chance = in_a * in_b / len(together)
    return (both - chance) / ((in_a + in_b) / 2 - chance)


def measure(run: SAERun) -> list[dict[str, Any]]:
    rate = float(run.firing.rates()[0].sum())
    weight = float(run.sae.W_dec.detach()[3, 5])
    return [{"step": run.step, "seed": run.spec.seed, "weight": weight, "rate": rate}]


def events_of(run: SAERun, fake_result: Any, on_event: Any = None) -> list[Progress | Rung]:
    events: list[Progress | Rung] = []

    def listen(found: list[Any]) -> list[bool]:
        events.extend(found)
        if on_event is not None:
            on_event(found[0])
        return [True]

    train([run], lambda *_: [fake_result()], listen, measure=measure)
    return events


@every_method
def test_groups_before_and_after_every_update_are_compared(regularizer, make_spec, make_store):
    """Old against new labels by a count of pairs; nothing at step 0 and between updates."""
    spec = make_spec("topk", regularizer, small(regularizer) | {"group_update_period": PERIOD}
                     if "group_update_period" in REGISTRY[regularizer].model_fields else {},
                     steps=STEPS)  # fmt: skip
    run = SAERun(spec, make_store())
    found, expected = [], []
    for step in range(STEPS):
        before = run.regularizer_state.get("groups", torch.zeros(1)).clone().numpy()
        run.advance()
        found.append(run.stability.take())
        after = run.regularizer_state.get("groups", torch.zeros(1)).numpy()
        regroups = regularizer in GROUPING and step > 0 and step % PERIOD == 0
        expected.append(pytest.approx(rand_index(before, after)) if regroups else None)
    assert found == expected
    assert regularizer not in GROUPING or sum(value is not None for value in found) == 4


def test_several_updates_between_two_rows_are_averaged(make_spec):
    spec = make_spec("topk", "grouped", {"group_update_period": 1, "n_groups": 2})
    labels = iter(([0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]))

    class Scripted(type(spec.regularizer)):
        def update(self, state, statistics, W_dec, step):
            state["groups"] = torch.tensor(next(labels))

    method, state = Scripted(group_update_period=1), {"groups": torch.zeros(4, dtype=torch.long)}
    stability = GroupStability()
    for step in range(3):
        stability.update(method, state, {}, torch.zeros(4, 2), step)
    # The same groups under other names; then two pairs that share nothing: −0.5 by its formula.
    assert stability.take() == pytest.approx((1.0 - 0.5) / 2)
    assert stability.take() is None


def test_the_curve_has_the_stability_of_its_updates(make_spec, make_store, fake_result):
    spec = make_spec("topk", "grouped", small("grouped"), steps=STEPS)
    rows = [e for e in events_of(SAERun(spec, make_store()), fake_result)
            if isinstance(e, Progress)]  # fmt: skip
    # A row a step; the update of step 5 is in the row after it.
    assert [row.step for row in rows if "group_stability" in row.metrics] == [6, 11, 16, 21]


def test_quarters_without_a_rung_are_measured_once_and_come_with_the_next_rung(
    make_spec, make_store, fake_result
):
    spec = make_spec("topk", steps=STEPS, rungs=(6 * 64, 16 * 64, STEPS * 64))
    rungs = [e for e in events_of(SAERun(spec, make_store()), fake_result) if isinstance(e, Rung)]
    assert [[row["step"] for row in rung.measured] for rung in rungs] == [[], [12], [18]]
    assert all(row["rate"] > 0 for rung in rungs for row in rung.measured)


def test_rates_are_looked_at_before_they_are_counted_anew(make_spec, make_store, fake_result):
    """With one rung at the end the half of the training is both a quarter and a new beginning."""
    spec = make_spec("topk", steps=STEPS, rungs=(STEPS * 64,))
    (rung,) = [e for e in events_of(SAERun(spec, make_store()), fake_result) if isinstance(e, Rung)]
    assert [row["step"] for row in rung.measured] == [STEPS * share for share in QUARTERS]
    assert all(row["rate"] > 0 for row in rung.measured)


@pytest.mark.parametrize("at", [5, 6, 7, 13, 18, STEPS])
def test_a_trial_taken_up_measures_nothing_twice(at: int, make_spec, make_store, fake_result):
    spec = make_spec("topk", "grouped", small("grouped"), steps=STEPS, rungs=(16 * 64, STEPS * 64))
    store, saved = make_store(), io.BytesIO()
    run = SAERun(spec, store)

    def save(event: Progress | Rung) -> None:
        if event.step == at and isinstance(event, Progress):
            torch.save(run.state_dict(), saved)

    expected = events_of(run, fake_result, save)
    saved.seek(0)
    resumed = SAERun(spec, store)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    found = events_of(resumed, fake_result)
    rungs = [e.measured for e in expected if isinstance(e, Rung)]
    again = [e.measured for e in found if isinstance(e, Rung)]
    assert again == rungs[-len(again) :]
    assert resumed.curve == run.curve


def test_in_a_pack_the_rows_are_those_of_each_alone(make_spec, make_store, fake_result):
    spec = make_spec("topk", "grouped", small("grouped"), steps=STEPS)
    members = spec.model_copy(update={"seeds": 3}).members()
    packed = [SAERun(member, make_store()) for member in members]
    told: list[Any] = []
    train(
        packed,
        lambda saes, _: [fake_result() for _ in saes],
        lambda events: told.append(events) or [True] * 3,
        measure=measure,
    )
    for i, member in enumerate(members):
        run = SAERun(member.model_copy(), make_store())
        alone = events_of(run, fake_result)
        found = [events[i] for events in told]
        for ours, wanted in zip(found, alone, strict=True):
            if isinstance(wanted, Rung):
                assert [row["step"] for row in ours.measured] == [6, 12, 18]
                for row, other in zip(ours.measured, wanted.measured, strict=True):
                    assert row == pytest.approx(other, rel=1e-3)
            else:
                assert ours.metrics.keys() == wanted.metrics.keys()
                stability = ours.metrics.get("group_stability")
                assert stability == pytest.approx(wanted.metrics.get("group_stability"), abs=0.05)


def test_without_somebody_who_measures_nothing_is(make_spec, make_store, fake_result):
    run = SAERun(make_spec("topk", steps=STEPS), make_store())
    rungs: list[Any] = []
    train_one(run, lambda *_: fake_result(), lambda e: rungs.append(e) or True)
    assert rungs[-1].measured == []
