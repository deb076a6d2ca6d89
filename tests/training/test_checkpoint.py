"""A trial's checkpoint: taken up bit for bit, replaced as a whole, left aside if no good."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from training_bench import small, train

from raysae.training.checkpoint import CHECKPOINT_FILE, SHARE, Checkpoints, Pace
from raysae.training.loop import train as train_together
from raysae.training.run import Progress, Rung, SAERun


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
