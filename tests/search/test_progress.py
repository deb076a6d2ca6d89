"""Where a search stands: figures from made-up trials, against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from raysae.search.progress import Expected, Standing, TokenRate, from_journal, with_earlier


def trial(number: int, state: str, tokens: int = 0, **changes: Any) -> dict[str, Any]:
    score = changes.pop("score", None)
    stage = changes.pop("stage", "search")
    return {
        "number": number,
        "state": state,
        "spec": {"stage": stage, "rungs": [300, 900]},
        "error": "",
        "rung": {} if score is None else {"score": score, "status": "ok", "tokens": tokens},
        "tokens": tokens,
        "started": 100.0,
    } | changes


def standing(*trials: dict[str, Any], search: int = 6, confirmation: int = 0) -> Standing:
    return Standing(list(trials), Expected(search, confirmation), now=200.0)


def test_trials_are_counted_by_state_and_the_total_is_never_less_than_there_are():
    seen = standing(trial(0, "finished"), trial(1, "running"), trial(2, "failed"), search=2)
    assert (len(seen.ended), len(seen.running), seen.total) == (2, 1, 3)
    assert seen.counts == {"finished": 1, "running": 1, "failed": 1}
    assert standing(search=4, confirmation=6).total == 10


def test_the_best_was_trained_to_its_end_if_any_was():
    stopped = trial(0, "stopped", 300, score=0.9)
    finished = trial(1, "finished", 900, score=0.2)
    confirming = trial(2, "finished", 900, score=0.95, stage="confirmation")
    assert standing(stopped, confirming).best is stopped
    assert standing(stopped, finished, confirming).best is finished
    assert standing(trial(3, "running")).best is None


def test_the_time_left_is_the_work_left_at_the_rate_so_far():
    # 1200 + 300 tokens in 100 s: 15 a second. Trials that ended had 600 on average: of 6, 4 are to
    # come, of which one has 300 behind it; and two of a confirmation have 900 each.
    seen = standing(
        trial(0, "finished", 900),
        trial(1, "stopped", 300),
        trial(2, "running", 300),
        confirmation=2,
    )
    assert seen.seconds_left == pytest.approx((4 * 600 - 300 + 2 * 900) / 15)


def test_a_confirmation_under_way_counts_only_what_is_left_of_it():
    seen = standing(
        trial(0, "finished", 900),
        trial(1, "finished", 900, stage="confirmation"),
        trial(2, "running", 600, stage="confirmation"),
        search=1,
        confirmation=2,
    )
    assert seen.seconds_left == pytest.approx(300 / 24)


def test_without_an_end_nothing_is_said_about_the_time_left():
    assert standing(trial(0, "running", 300)).seconds_left is None
    assert standing(trial(0, "failed", 300)).seconds_left is None
    assert standing().seconds_left is None


def test_the_rate_is_that_of_the_last_seconds():
    rate = TokenRate()
    assert rate.update(0.0, 0) == 0.0
    assert rate.update(10.0, 500) == pytest.approx(50)
    assert rate.update(20.0, 2500) == pytest.approx(2500 / 20)
    assert rate.update(30.0, 4500) == pytest.approx(4000 / 20)  # since 10 s


def test_a_trial_that_is_trained_again_does_not_make_the_rate_negative():
    rate = TokenRate()
    rate.update(0.0, 1000)
    assert rate.update(5.0, 100) == 0.0


def test_what_ended_before_a_restart_is_kept_and_what_is_known_now_wins():
    earlier = {0: trial(0, "finished"), 1: trial(1, "failed")}
    merged = with_earlier([trial(2, "running"), trial(1, "running")], earlier)
    assert [(t["number"], t["state"]) for t in merged] == [
        (0, "finished"),
        (1, "running"),
        (2, "running"),
    ]


def test_records_of_the_journal_look_like_trials_of_the_broker():
    rung = {"score": 0.5, "status": "ok", "tokens": 900, "step": 9, "metrics": {"l0": 4.0}}
    record = {"trial": 3, "state": "finished", "spec": {"stage": "search"}, "error": ""}
    record |= {"rung": rung, "started": 1.0, "ended": 2.0, "curve": []}
    failed = record | {"trial": 4, "state": "failed", "error": "why", "rung": {}}
    done, lost = from_journal([record, failed])
    assert (done["number"], done["rung"]["score"], done["l0"], done["tokens"]) == (3, 0.5, 4.0, 900)
    assert (lost["error"], lost["rung"]) == ("why", {})
