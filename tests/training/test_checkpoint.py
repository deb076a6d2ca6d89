"""A trial's checkpoint: taken up bit for bit, replaced as a whole, left aside if no good."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from training_bench import assert_same_state, small, train

from raysae.training.checkpoint import CHECKPOINT_FILE, SHARE, Checkpoints, Pace
from raysae.training.loop import Between
from raysae.training.loop import train as train_together
from raysae.training.run import Progress, Rung, SAERun, TrainingDivergedError


@pytest.mark.parametrize("stop_at", [3, 8, 13, 24])
@pytest.mark.parametrize("regularizer", ["none", "grouped"])
def test_a_trial_taken_up_ends_as_if_it_had_never_stopped(
    stop_at: int, regularizer: str, tmp_path: Path, make_spec, make_store, fake_result
):
    parameters = {"group_update_period": 4, "n_groups": 4} if regularizer == "grouped" else {}
    spec = make_spec("topk", regularizer, parameters, rungs=(512, 1536))
    store = make_store()
    whole = SAERun(spec, store)
    expected = train(whole, fake_result)

    checkpoints = Checkpoints(tmp_path)
    killed = SAERun(spec, store)

    def save_and_die(event: Progress | Rung) -> bool:
        if isinstance(event, Progress):
            checkpoints.save([killed])
        return not (isinstance(event, Progress) and event.step == stop_at)

    train(killed, fake_result, save_and_die)
    resumed = SAERun(spec, store)
    assert Checkpoints(tmp_path).restore([resumed])
    assert resumed.step == stop_at
    found = train(resumed, fake_result)
    last, wanted = found[-1], expected[-1]
    assert isinstance(last, Rung) and isinstance(wanted, Rung)
    assert resumed.curve == whole.curve
    assert (last.metrics, last.step, last.last) == (wanted.metrics, wanted.step, wanted.last)
    assert torch.equal(last.forget_rate, wanted.forget_rate)
    for name, tensor in wanted.sae.state_dict().items():
        assert torch.equal(last.sae.state_dict()[name], tensor), name


def test_a_rung_that_was_trained_to_and_not_scored_is_scored(
    tmp_path: Path, make_spec, make_store, fake_result
):
    spec, store = make_spec(rungs=(512, 1536)), make_store()
    checkpoints, run = Checkpoints(tmp_path), SAERun(spec, store)

    def die_before_scoring(event: Progress | Rung) -> bool:
        if event.step == 8:
            checkpoints.save([run])
        return event.step < 8

    train(run, fake_result, die_before_scoring)
    resumed = SAERun(spec, store)
    checkpoints.restore([resumed])
    rungs = [e.step for e in train(resumed, fake_result) if isinstance(e, Rung)]
    assert rungs == [8, 24]


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "another spec", "none there"])
def test_a_checkpoint_that_is_no_good_is_left_aside(
    damage: str, tmp_path: Path, make_spec, make_store, fake_result, caplog
):
    spec, store = make_spec(), make_store()
    checkpoints, run = Checkpoints(tmp_path), SAERun(spec, store)
    train(run, fake_result, lambda _: checkpoints.save([run]) or True)
    path = tmp_path / CHECKPOINT_FILE
    data = path.read_bytes()
    if damage == "none there":
        checkpoints.remove()
    elif damage == "another spec":
        spec = make_spec(alpha=2.0)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": b"x" * 99}[damage])
    fresh = SAERun(spec, store)
    assert not checkpoints.restore([fresh])
    assert fresh.step == 0
    assert bool(caplog.records) == (damage != "none there")


def test_a_save_that_fails_leaves_the_checkpoint_before(
    tmp_path: Path, make_spec, make_store, fake_result, monkeypatch
):
    run = SAERun(make_spec(), make_store())
    checkpoints = Checkpoints(tmp_path)
    train(run, fake_result, lambda event: checkpoints.save([run]) or event.step < 5)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save([run])
    again = SAERun(run.spec, make_store())
    assert checkpoints.restore([again]) and again.step == 5


def test_checkpoints_take_a_small_share_of_the_time(monkeypatch):
    """Saves of 3 s may be followed by the next after 3 s / SHARE, however short the interval."""
    now = [0.0]
    monkeypatch.setattr("raysae.training.checkpoint.time.monotonic", lambda: now[0])
    pace, saves = Pace(seconds_between=1), []
    while now[0] < 1000:
        if pace.is_due():
            saves.append(now[0])
            with pace.saving():
                now[0] += 3
        now[0] += 1
    assert saves[0] == pytest.approx(1)
    assert all(b - a >= 3 / SHARE for a, b in pairwise(saves))


def test_the_seeds_of_a_trial_are_taken_up_together(make_spec, make_store, fake_result, tmp_path):
    """Bit for bit, from one file, though a pack's weights are views of one tensor."""
    spec = make_spec("topk", "grouped", small("grouped")).model_copy(update={"seeds": 3})
    store = make_store()

    def runs() -> list[SAERun]:
        return [SAERun(member, store) for member in spec.members()]

    def go(these: list[SAERun], on_events) -> None:
        train_together(these, lambda saes, _: [fake_result() for _ in saes], on_events)

    whole, killed, resumed = runs(), runs(), runs()
    go(whole, lambda _: [True] * 3)
    checkpoints = Checkpoints(tmp_path)

    def until_nine(events: list[Progress | Rung]) -> list[bool]:
        if events[0].step == 9:
            checkpoints.save(killed)
        return [events[0].step < 9] * 3

    go(killed, until_nine)
    assert checkpoints.restore(resumed)
    assert [run.step for run in resumed] == [9] * 3
    go(resumed, lambda _: [True] * 3)
    for expected, found in zip(whole, resumed, strict=True):
        for name, tensor in expected.sae.state_dict().items():
            assert torch.equal(found.sae.state_dict()[name], tensor), name
        assert [row.metrics for row in found.curve] == [row.metrics for row in expected.curve]


# --- Between two rows of the curve ----------------------------------------------------------------


def trained(
    runs: list[SAERun], fake_result: Any, save: Callable[[], object] = lambda: None, at: int = 0
) -> tuple[list[list[Progress]], list[list[Rung]]]:
    """Curves and rungs of runs that are trained together, and end after step `at` with `save`."""
    rungs: list[list[Rung]] = [[] for _ in runs]

    def listen(events: Any) -> list[bool]:
        for found, event in zip(rungs, events, strict=True):
            if isinstance(event, Rung):
                found.append(event)
        return [True] * len(events)

    def leave() -> list[bool]:
        save()
        return [False] * len(runs)

    train_together(
        runs,
        lambda saes, _: [fake_result() for _ in saes],
        listen,
        between=Between(lambda: runs[0].step == at, leave),
    )
    return [run.curve for run in runs], rungs


def assert_same_end(found: list[SAERun], rungs: list[Rung], whole: list[SAERun], wanted: Any):
    """Bit for bit: curves, weights, moments, states, and what the last rung says."""
    for run, rung, other, expected in zip(found, rungs, whole, wanted, strict=True):
        assert run.curve == other.curve
        assert (rung.metrics, rung.step, rung.last) == (expected.metrics, expected.step, True)
        assert torch.equal(rung.forget_rate, expected.forget_rate)
        assert torch.equal(rung.retain_rate, expected.retain_rate)
        assert_same_state(run, other)


@pytest.mark.parametrize("at", [41, 98, 101])
@pytest.mark.parametrize("step", ["packed", "saelens"])
@pytest.mark.parametrize("regularizer", ["none", "task_masked"])
def test_an_sae_saved_in_the_middle_of_a_row_ends_as_if_never_stopped(
    at: int, step: str, regularizer: str, tmp_path: Path, make_spec, make_store, fake_result
):
    """A row is six steps here, and a regrouping, of which the row tells, falls into those saved."""
    spec = make_spec(
        "topk", regularizer, small(regularizer), steps=400, batch_size=16, step=step, lr=5e-3,
        rungs=(16 * 99, 16 * 400), dead_after=5,
    )  # fmt: skip
    store = make_store()
    whole = [SAERun(spec, store)]
    _, wanted = trained(whole, fake_result)
    assert [row.step for row in whole[0].curve[5:8]] == [36, 42, 48]
    checkpoints, killed = Checkpoints(tmp_path), [SAERun(spec, store)]
    trained(killed, fake_result, lambda: checkpoints.save(killed), at)
    assert killed[0].step == at and killed[0].curve[-1].step < at
    resumed = [SAERun(spec, store)]
    assert checkpoints.restore(resumed) and resumed[0].step == at
    _, rungs = trained(resumed, fake_result)
    assert_same_end(resumed, [rungs[0][-1]], whole, [wanted[0][-1]])


@pytest.mark.parametrize("company", ["the same", "alone"])
def test_a_pack_saved_in_the_middle_of_a_row_is_taken_up_together_or_one_by_one(
    company: str, tmp_path: Path, make_spec, make_store, fake_result
):
    """One of them has no penalty of its own, but beside the others a sum of zeros."""
    store = make_store()
    specs = [
        make_spec("topk", name, small(name), steps=400, batch_size=16, number=i, seed=i, alpha=3.0)
        for i, name in enumerate(("none", "grouped", "fixed_orthogonal"))
    ]

    def begin() -> list[SAERun]:
        return [SAERun(spec, store) for spec in specs]

    whole, killed, resumed = begin(), begin(), begin()
    _, wanted = trained(whole, fake_result)
    kept = [Checkpoints(tmp_path / str(spec.number)) for spec in specs]

    def save() -> None:
        for checkpoints, run in zip(kept, killed, strict=True):
            checkpoints.save([run])

    trained(killed, fake_result, save, at=100)
    for checkpoints, run in zip(kept, resumed, strict=True):
        assert checkpoints.restore([run]) and run.step == 100
    if company == "the same":
        _, rungs = trained(resumed, fake_result)
    else:
        rungs = [trained([run], fake_result)[1][0] for run in resumed]
    assert_same_end(resumed, [r[-1] for r in rungs], whole, [r[-1] for r in wanted])


def test_a_run_that_leaves_in_the_middle_of_a_row_takes_nothing_of_the_others(
    make_spec, make_store, fake_result
):
    store = make_store()
    names = ("fixed_orthogonal", "none", "none")
    specs = [
        make_spec("topk", name, steps=400, batch_size=16, number=i, seed=i)
        for i, name in enumerate(names)
    ]
    runs = [SAERun(spec, store) for spec in specs]
    asked = iter(range(1000))
    train_together(
        runs,
        lambda saes, _: [fake_result() for _ in saes],
        lambda events: [True] * len(events),
        between=Between(lambda: runs[1].step == 100, lambda: [next(asked) > 0, True, True]),
    )
    assert [run.step for run in runs] == [100, 400, 400]
    for run, spec in zip(runs[1:], specs[1:], strict=True):
        alone = SAERun(spec, store)
        trained([alone], fake_result)
        assert run.curve == alone.curve
        assert_same_state(run, alone)


def test_a_trial_that_diverges_after_it_was_taken_up_leaves_the_same_last_good_sae(
    tmp_path: Path, make_spec, make_store, fake_result
):
    spec, store = make_spec("topk", steps=400, batch_size=16, step="saelens"), make_store()

    def diverge(run: SAERun, **how: Any) -> TrainingDivergedError:
        """From step 100 on its loss is not finite."""
        ends = iter(range(run.step, 400))
        run.sae.W_dec.register_hook(lambda grad: grad * (math.nan if next(ends) >= 100 else 1))
        found: list[Any] = []

        def listen(events: Any) -> list[bool]:
            found.extend(event for event in events if isinstance(event, TrainingDivergedError))
            return [True]

        train_together([run], lambda *_: [fake_result()], listen, **how)
        return found[0] if found else None

    wanted = diverge(SAERun(spec, store))
    killed, checkpoints = SAERun(spec, store), Checkpoints(tmp_path)

    def leave() -> list[bool]:
        checkpoints.save([killed])
        return [False]

    diverge(killed, between=Between(lambda: killed.step == 98, leave))
    resumed = SAERun(spec, store)
    assert checkpoints.restore([resumed]) and resumed.step == 98
    found = diverge(resumed)
    assert (str(found), found.last_good_step) == (str(wanted), wanted.last_good_step)
    assert found.last_good_step == 96
    kept, expected = found.last_good.state_dict(), wanted.last_good.state_dict()
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_a_checkpoint_of_another_layout_is_left_aside(
    tmp_path: Path, make_spec, make_store, monkeypatch, caplog
):
    monkeypatch.setattr("raysae.training.checkpoint.LAYOUT", 1)
    run, checkpoints = SAERun(make_spec(), make_store()), Checkpoints(tmp_path)
    run.advance()
    checkpoints.save([run])
    monkeypatch.undo()
    again = SAERun(make_spec(), make_store())
    assert not checkpoints.restore([again]) and again.step == 0
    assert "not of this trial" in caplog.text
