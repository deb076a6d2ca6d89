"""What Tune and Train call: the thin client of a trial, and the way into a worker.

Imports nothing heavy: clients live in processes of their own, next to the workers that do the work.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import ray.train
from ray import tune

from raysae.imports import imports_without_gc
from raysae.pool.heartbeat import beating

BROKER_NAME = "raysae-broker"
WORST_OBJECTIVE = 0.0


def serve_pool(settings: dict[str, Any]) -> None:
    """`train_loop_per_worker` of the pool: the driver pickles this by name, and need not spend the
    twenty seconds that the worker's imports take.

    On a machine with fewer than two cores a worker, imports of all workers at once would only delay
    each other: the first goes ahead, and brings the first result while the others start.
    """
    context = ray.train.get_context()
    broker = ray.get_actor(BROKER_NAME, namespace=settings["namespace"])
    with beating(broker):
        crowded = (os.cpu_count() or 1) < 2 * context.get_local_world_size()
        if crowded and settings["workers_per_trial"] == 1 and context.get_world_rank() > 0:
            ray.get(broker.first_worker.remote())
        with imports_without_gc():
            from raysae.pool.worker import serve

        serve(settings)


def trial_client(config: dict[str, Any]) -> None:
    """Tune's trainable. `config["spec"]` is a `TrialSpec` as plain data, `config["namespace"]` the
    search's; other keys are what the sampler suggested.

    A failed trial reports the worst score: the sampler must be told something finite. A client that
    was killed is started again by Tune, attaches to its trial and hears what was not decided on.
    """
    broker = ray.get_actor(BROKER_NAME, namespace=config["namespace"])
    spec = config["spec"]
    number = spec["number"]
    ray.get(broker.submit.remote(number, spec))
    try:
        while True:
            event = ray.get(broker.next_event.remote(number))
            failed = event["kind"] == "failed"
            tokens = spec["rungs"][-1] if failed else event["tokens"]
            tune.report(
                {
                    "objective": WORST_OBJECTIVE if failed else event["objective"],
                    "tokens": tokens,
                    "number": number,
                    "failed": failed,
                    **({} if failed else _figures(event)),
                }
            )
            if failed or event["last"]:
                return
            ray.get(broker.proceed.remote(number, tokens))
    finally:
        ray.get(broker.cancel.remote(number))


def _figures(event: dict[str, Any]) -> dict[str, float]:
    """What a rung has beside the objective, for experiment trackers.

    Before the last one it has no score on the questions that the search does not see.
    """
    names = ("score", "heldout_score", "transferred_score", "saebench_score", "step")
    metrics: dict[str, float] = event["metrics"]
    return {name: event[name] for name in names if event.get(name) is not None} | metrics
