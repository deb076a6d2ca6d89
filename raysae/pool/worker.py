"""The loop of a Ray Train worker: hold model, store and evaluator; serve trials until closed."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist

from raysae.pool.artifacts import Artifacts
from raysae.pool.client import BROKER_NAME
from raysae.store.harvest import StoreHandle
from raysae.training.collective import Alone, Group
from raysae.training.loop import Progress, Rung, TrialRun
from raysae.training.spec import TrialSpec
from raysae.unlearning import CachedEvaluator, SAEBenchEvaluator, default_eval_config
from raysae.worlds import load_world
from raysae.worlds.model import load_model


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to know; the same for all workers of a search."""

    namespace: str
    world: str
    hook: str
    evaluator: str
    workers_per_trial: int
    threads: int
    run_dir: str


def serve(settings: dict[str, Any]) -> None:
    """`train_loop_per_worker` of the pool's one Ray Train run; returns when the broker closes."""
    config = WorkerConfig(**settings)
    torch.set_num_threads(config.threads)
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    group, collective = _join_group(rank, size, config.workers_per_trial)
    leader = collective.rank == 0
    broker = ray.get_actor(BROKER_NAME, namespace=config.namespace)
    world = load_world(config.world)
    device = str(ray.train.torch.get_device())
    model = load_model(world, device=device) if leader else None
    store: StoreHandle | None = ray.get(broker.store.remote())
    if store is None:  # closed before it began
        return
    source = store.open(device)
    evaluator: CachedEvaluator | SAEBenchEvaluator | None = None
    eval_config = default_eval_config(world)
    if leader and config.evaluator == "cached":
        evaluator = CachedEvaluator(world, model, ray.get(store.evaluation_cache), eval_config)
    elif leader:
        work_dir = Path(config.run_dir) / "saebench"
        evaluator = SAEBenchEvaluator(world, model, config.hook, eval_config, work_dir)
    if leader:
        ray.get(broker.register.remote(group, f"{context.get_node_rank()}:{rank}"))
    while True:
        job = ray.get(broker.next_job.remote(group)) if leader else None
        job = collective.broadcast(job)
        if job is None:
            return
        spec = TrialSpec(**job)
        folder = Path(config.run_dir) / "trials" / f"{spec.number:04d}"
        try:
            run = TrialRun(
                spec,
                source,
                model_name=world.saebench_model_name,
                hook_name=config.hook,
                device=device,
                collective=collective,
            )
            _drive(run, broker, evaluator, Artifacts(folder, world, config.hook, eval_config))
        except Exception as error:
            folder.mkdir(parents=True, exist_ok=True)
            log = folder / "error.log"
            log.write_text(traceback.format_exc())
            if leader:
                reason = f"{type(error).__name__}: {error}"
                ray.get(broker.fail.remote(spec.number, f"{reason} (log: {log})"))
            if collective.size > 1:
                # The other workers of the trial are waiting in a collective that will not come:
                # only a restart of the group by Ray Train brings them back.
                raise


def _join_group(rank: int, size: int, per_trial: int) -> tuple[int, Alone]:
    """The worker's group of `per_trial` workers: its index, and how its members talk."""
    if per_trial == 1:
        return rank, Alone()
    mine: Alone | None = None
    for start in range(0, size, per_trial):
        # Every process must create every group, in the same order.
        members = dist.new_group(list(range(start, start + per_trial)))
        if start <= rank < start + per_trial:
            mine = Group(members)
    assert mine is not None, "the pool's size is a multiple of workers_per_trial"
    return rank // per_trial, mine


def _drive(
    run: TrialRun,
    broker: Any,
    evaluator: CachedEvaluator | SAEBenchEvaluator | None,
    artifacts: Artifacts,
) -> None:
    """Train and score one trial, telling the broker; ends early when it says so."""
    number, cpu = run.spec.number, time.process_time()

    def evaluate(sae: Any, steps: int) -> Any:
        assert evaluator is not None, "only rank 0 of a trial scores it"
        return evaluator.evaluate(sae, training_steps=steps)

    def on_event(event: Progress | Rung) -> bool:
        if isinstance(event, Progress):
            row = {"step": event.step, "tokens": event.tokens, **event.metrics}
            return not ray.get(broker.progress.remote(number, row))
        record = artifacts.write(run.spec, event)
        record["cpu_seconds"] = time.process_time() - cpu
        return bool(ray.get(broker.rung.remote(number, record)))

    run.train(evaluate, on_event)
