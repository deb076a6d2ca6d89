"""What runs beside the trials in the search's process: pool, store and a memory watch."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raysae.config import RunConfig
from raysae.errors import UserError, in_words, last_line
from raysae.search import cluster
from raysae.search.fit import batch_misfit
from raysae.search.integrity import record_store

if TYPE_CHECKING:
    from raysae.store.handle import StoreHandle

RESIZE_SECONDS = 30.0
"""So often a pool on a cluster looks whether nodes have joined: they restart all workers."""
POOL_FAILURES = 50
"""Times that the pool may lose a worker before the search stops, to be resumed by hand."""
CONTROLLER_ATTEMPTS = 4
"""Pools one after the other, where the one process dies that watches over the workers."""


def background(target: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=target.__name__, daemon=True)
    thread.start()
    return thread


class Store:
    """Fills the activation store and publishes it, again where a broker is restarted."""

    def __init__(
        self,
        config: RunConfig,
        plan: cluster.Plan,
        broker: Any,
        console: Console,
        run_dir: Path,
    ) -> None:
        self._config, self._plan, self._run_dir = config, plan, run_dir
        self._broker, self._console = broker, console
        self._handle: Any = None
        self.held: StoreHandle | None = None
        """What is trained on, once it is there."""
        self.refused = ""
        """Why nothing can be trained on this world, or not by this search."""

    def fill(self) -> None:
        """Harvest or find again, and publish; if that fails, no trial can run."""
        import ray

        from raysae.store.cache import cache_folder
        from raysae.store.harvest import WeakModelError, harvest
        from raysae.store.places import harvest_places

        config, what = self._config, "harvest failed"
        try:
            assert config.hook is not None
            harvested = harvest(
                config.world,
                [config.hook],
                config.resources.store_dtype,
                evaluation_cache=config.objective.evaluator == "cached",
                cache=cache_folder(config.resources.cache),
                places=harvest_places(
                    ray.nodes(),
                    use_gpu=config.resources.on_gpu,
                    most=config.resources.gpus_of(self._plan.workers),
                ),
            )
            self.held = harvested.stores[config.hook]
            forget = int(self.held.is_forget.sum())
            self.refused = batch_misfit(config, forget, self.held.rows - forget)
            if self.refused:
                ray.get(self._broker.halt.remote(self.refused))
                return
            changed = record_store(self._run_dir, self.held, harvested.sources[config.hook])
            self._handle = ray.put(self.held)
            self.publish()
            self._say([*harvested.lines, *([changed] if changed else [])])
            what = "what trials are scored with cannot be computed"
            self._say(harvested.finish())
        except (WeakModelError, UserError) as error:
            # What a task raises comes with its traceback; its cause is what was said.
            self.refused = str(getattr(error, "cause", None) or error)
            ray.get(self._broker.halt.remote(self.refused))
        except Exception as error:
            ray.get(self._broker.halt.remote(f"{what}: {in_words(error)}"))

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def publish(self) -> None:
        """Tell the broker where the store is, once it is there."""
        import ray

        if self._handle is not None:
            # Nested, the reference reaches the broker unopened: opening it would import torch.
            ray.get(self._broker.set_store.remote([self._handle]))


def run_pool(
    config: RunConfig, plan: cluster.Plan, namespace: str, run_dir: Path, broker: Any
) -> None:
    """The one Ray Train run of the search; returns when the broker is closed."""
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig

    from raysae.pool.client import serve_pool
    from raysae.pool.losses import Losses

    resources = config.resources
    storage = run_dir / "pool"
    trainer = _trainer_class(plan, storage, use_gpu=resources.on_gpu)(
        serve_pool,
        train_loop_config={
            "namespace": namespace,
            "world": config.world,
            "hook": config.hook,
            "evaluator": config.objective.evaluator,
            "split_seed": config.objective.split_seed,
            "frontier_weight": config.objective.frontier_weight,
            "evals": config.evals,
            "workers_per_trial": plan.workers_per_trial,
            "workers_per_gpu": resources.workers_per_gpu,
            "trials_per_pack": plan.trials_per_pack,
            "threads": resources.threads_per_worker,
            "use_gpu": resources.on_gpu,
            "checkpoint_seconds": resources.checkpoint_seconds,
            "run_dir": str(run_dir),
        },
        scaling_config=ScalingConfig(
            num_workers=plan.pool_size,  # type: ignore[arg-type]
            use_gpu=resources.on_gpu,
            resources_per_worker={"CPU": resources.threads_per_worker}
            | ({"GPU": 1 / resources.workers_per_gpu} if resources.on_gpu else {}),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,  # type: ignore[call-arg]
        ),
        run_config=TrainRunConfig(
            name=namespace,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=POOL_FAILURES),
            callbacks=[Losses(namespace, plan.workers_per_trial)],  # type: ignore[list-item]
        ),
    )
    reason = "the worker pool ended before the search did"
    for attempts_left in reversed(range(CONTROLLER_ATTEMPTS)):
        try:
            trainer.fit()
        except Exception as error:
            # Its controller is an actor that Ray does not restart; the workers die with it.
            died = isinstance(error, ray.exceptions.RayActorError)
            if died and attempts_left and ray.is_initialized():
                continue
            log = run_dir / "pool_error.log"
            reason = f"the worker pool failed: {last_line(error)} (log: {log})"
            try:
                log.write_text(str(error), encoding="utf-8")
            except OSError as unwritten:  # of a full disk the search must still hear
                reason = f"the worker pool failed: {last_line(error)} ({unwritten})"
        break
    if ray.is_initialized():
        ray.get(broker.halt.remote(reason))


def _trainer_class(plan: cluster.Plan, storage: Path, *, use_gpu: bool) -> Any:
    """Ray Train's trainer; the one with a torch process group only where workers train together.

    Its controller and this process import torch for it, at the cost of seconds before the first
    trial; a pool whose workers train alone needs no group.
    """
    if plan.workers_per_trial > 1:
        from ray.train.torch import TorchConfig, TorchTrainer

        from raysae.pool.meeting import MeetByFile

        backend = "nccl" if use_gpu else "gloo"
        if not plan.local:
            return partial(TorchTrainer, torch_config=TorchConfig(backend=backend))
        storage.mkdir(exist_ok=True)
        return partial(TorchTrainer, torch_config=MeetByFile(backend, folder=str(storage)))
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer


class MemoryWatch:
    """Peak of the memory in use on this machine above what was in use at the start, in GiB."""

    def __init__(self) -> None:
        self._start = self._peak = _used_bytes()
        self._stop = threading.Event()
        self._thread = background(self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._peak = max(self._peak, _used_bytes())

    def stop(self) -> float:
        """Stop watching; the peak."""
        self._stop.set()
        self._thread.join()
        return (self._peak - self._start) / 2**30


def _used_bytes() -> int:
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)
