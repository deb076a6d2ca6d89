"""What Tune, and through it the experiment trackers, hear of a trial."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from raysae.pool import client

Event = dict[str, Any]


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Event]], list[Event]]:
    """Run a client against a broker that has these events for it; what it reported."""

    def run(events: list[Event]) -> list[Event]:
        told: list[Event] = []
        coming = iter(events)
        calls = {"submit": None, "proceed": None, "cancel": None}
        broker = SimpleNamespace(
            next_event=SimpleNamespace(remote=lambda _: next(coming)),
            **{name: SimpleNamespace(remote=lambda *_: None) for name in calls},
        )
        monkeypatch.setattr("ray.get_actor", lambda *_, **__: broker)
        monkeypatch.setattr("ray.get", lambda answer: answer)
        monkeypatch.setattr(client.tune, "report", told.append)
        client.trial_client({"namespace": "here", "spec": {"number": 3, "rungs": [512, 1536]}})
        return told

    return run


def rung(tokens: int, **scores: Any) -> Event:
    event = {"kind": "rung", "tokens": tokens, "step": tokens // 64, "last": tokens == 1536}
    return event | {"objective": 0.5, "metrics": {"l0": 4.0}} | scores


def test_before_the_end_there_is_no_score_on_questions_that_were_not_asked(reported):
    unasked = ("heldout_score", "transferred_score", "saebench_score")
    first, last = reported(
        [
            rung(512, score=0.5) | dict.fromkeys(unasked),
            rung(1536, score=0.6, heldout_score=0.4, transferred_score=0.3, saebench_score=0.45),
        ]
    )
    assert not set(unasked) & first.keys()
    assert (first["score"], first["objective"], first["l0"]) == (0.5, 0.5, 4.0)
    assert tuple(last[name] for name in unasked) == (0.4, 0.3, 0.45)


def test_a_rung_of_an_older_version_is_reported_with_the_scores_that_it_has(reported):
    (only,) = reported([rung(1536, score=0.6, heldout_score=0.4, saebench_score=0.45)])
    assert (only["heldout_score"], only["saebench_score"]) == (0.4, 0.45)
    assert "transferred_score" not in only


def test_a_failed_trial_has_the_worst_objective_and_no_scores(reported):
    (only,) = reported([{"kind": "failed", "error": "loss is nan"}])
    assert only == {"objective": 0.0, "tokens": 1536, "number": 3, "failed": True}
