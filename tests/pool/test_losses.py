"""Whose worker has died, of what Ray Train tells of a restart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, RayActorError, WorkerCrashedError
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from raysae.pool.losses import Losses
from raysae.store.one_copy import LostCopyError
from raysae.training.collective import LostPeerError


def killed() -> Exception:
    return WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


def preempted() -> Exception:
    failure = RayActorError(preempted=True)
    return WorkerHealthCheckFailedError("A worker health check failed.", failure)


@pytest.mark.parametrize(
    ("per_trial", "errors", "groups"),
    [
        (1, {1: killed()}, [1]),
        (1, {0: killed(), 3: WorkerHealthCheckTimeoutError("hangs")}, [0, 3]),
        (1, {2: preempted(), 1: killed()}, [1]),
        # The holder of the activations was killed, and those whom it served begin again.
        (1, {0: killed(), 1: LostCopyError("process 7"), 2: LostCopyError("process 7")}, [0]),
        (1, {0: WorkerCrashedError()}, []),
        (2, {3: killed()}, [1]),
        (2, {2: LostPeerError("closed by peer"), 3: killed()}, [1]),
        (2, {0: LostPeerError("timed out"), 1: LostPeerError("timed out")}, []),
        (2, {0: ValueError("the trial's own, which has failed"), 1: LostPeerError("x")}, []),
    ],
)
def test_the_broker_hears_of_the_groups_whose_processes_died(
    per_trial: int,
    errors: dict[int, Exception],
    groups: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[list[int]] = []
    broker = SimpleNamespace(lost=SimpleNamespace(remote=told.append))
    monkeypatch.setattr("ray.get_actor", lambda *_, **__: broker)
    monkeypatch.setattr("ray.get", lambda answer: answer)
    Losses("here", per_trial).after_exception(None, errors)
    assert told == [groups]
