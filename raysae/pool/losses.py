"""Which workers have died: Ray Train restarts all of them when one does, or when nodes join, and a
trial answers for the death of its own worker alone.

Imports nothing heavy: it lives in the process that watches over the pool.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from raysae.pool.client import BROKER_NAME


class Losses(UserCallback):
    """Tells the broker of workers that have died, before Ray Train starts others."""

    def __init__(self, namespace: str, workers_per_trial: int) -> None:
        """
        Args:
            namespace: of the search.
            workers_per_trial: processes of a worker group.
        """
        self._namespace, self._per_trial = namespace, workers_per_trial

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train's: what ended workers, by their rank."""
        died = [rank for rank, error in worker_exceptions.items() if _died(error)]
        groups = sorted({rank // self._per_trial for rank in died})
        broker = ray.get_actor(BROKER_NAME, namespace=self._namespace)
        ray.get(broker.lost.remote(groups))


def _died(error: Exception) -> bool:
    """Whether the process has died: what a trial raises ends it at once, and what else a worker
    raises is no trial's doing. Nor is the loss of a node that is taken away."""
    if isinstance(error, WorkerHealthCheckFailedError):
        return not getattr(error.health_check_failure, "preempted", False)
    return isinstance(error, WorkerHealthCheckTimeoutError)
