"""The loop of a Ray Train worker: hold model, store and evaluator; serve trials until closed."""

from __future__ import annotations

import logging
import platform
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig

from raysae.errors import no_room
from raysae.pool.artifacts import Artifacts
from raysae.pool.client import BROKER_NAME
from raysae.pool.errors import UnavailableError, halts, needed, own, restarts
from raysae.pool.folder import seed_folder, trial_folder
from raysae.pool.jobs import HaltedError
from raysae.pool.together import Evaluator, Together
from raysae.pool.trial import TrialAtWork
from raysae.pool.waits import TimedSource
from raysae.sparse_probing import SparseProbing
from raysae.store.handle import Sharing, StoreHandle
from raysae.training.checkpoint import Pace
from raysae.training.collective import Alone, Group
from raysae.training.run import Rung, SAERun
from raysae.training.spec import TrialSpec
from raysae.unlearning import CachedEvaluator, SAEBenchEvaluator, default_eval_config
from raysae.worlds import World, load_world
from raysae.worlds.model import load_model
from raysae.worlds.spec import HubWorld, LocalWorld

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to know; the same for all workers of a search."""

    namespace: str
    world: str | HubWorld | LocalWorld
    hook: str
    evaluator: str
    split_seed: int
    frontier_weight: float
    evals: tuple[str, ...]
    workers_per_trial: int
    workers_per_gpu: int
    trials_per_pack: int
    threads: int
    use_gpu: bool
    checkpoint_seconds: float
    run_dir: str


def serve(settings: dict[str, Any]) -> None:
    """`train_loop_per_worker` of the pool's one Ray Train run; returns when the broker closes.

    An error before the first trial would come back at every restart: it ends the pool at once. A
    killed process does not pass here, and is restarted by Ray Train.
    """
    config = WorkerConfig(**settings)
    broker = ray.get_actor(BROKER_NAME, namespace=config.namespace)
    elsewhere = not_shared(Path(config.run_dir))
    if elsewhere:
        ray.get(broker.halt.remote(elsewhere))
        return
    try:
        worker = _set_up(config, broker)
    except Exception as error:
        path = Path(config.run_dir) / "worker_error.log"
        path.write_text(traceback.format_exc(), encoding="utf-8")
        reason = f"a worker cannot start: {type(error).__name__}: {error} (log: {path})"
        ray.get(broker.halt.remote(reason))
        return
    if worker is not None:
        worker.serve()


def not_shared(run_dir: Path) -> str:
    """Why a worker cannot write its results where the search will look for them; "" if it can."""
    if (run_dir / "config.yaml").is_file():
        return ""
    return (
        f"the worker on {platform.node()} does not see the run folder {run_dir}: it must lie on a "
        "file system that all nodes share (NFS, Lustre, EFS, …); move it to one, or set --out to "
        "one"
    )


def _set_up(config: WorkerConfig, broker: Any) -> Worker | None:
    """Everything that is paid for once; None when the search was closed before it began, and for a
    worker more than fill whole groups.
    """
    # Ray Train gives every set of workers that it starts a placement group of its own.
    generation = ray.get_runtime_context().get_placement_group_id() or ""
    ray.get(broker.starting.remote(generation))
    torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # but in training steps, see `TrainingSpec.tf32`
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    joined = _join_group(rank, size, config.workers_per_trial)
    if joined is None:
        return None
    group, collective = joined
    leader = collective.rank == 0
    world = load_world(config.world, checked=True)
    eval_config = default_eval_config(world)
    device = _device(config.use_gpu)
    # Only the first worker of a trial scores it, and needs the language model.
    model = load_model(world, device=device) if leader else None
    published = ray.get(broker.store.remote())
    if published is None:
        return None
    store: StoreHandle = ray.get(published[0])
    if world.known_questions is None:
        world = replace(world, known_questions=store.known_questions)

    def make_evaluator() -> Evaluator:
        assert model is not None, "only the first worker of a trial scores it"
        if store.evaluation_cache is not None:
            return CachedEvaluator(world, model, store.open_evaluation_cache(), eval_config)
        work_dir = Path(config.run_dir) / "saebench" / str(group)
        return SAEBenchEvaluator(world, model, config.hook, eval_config, work_dir)

    def make_probing() -> SparseProbing:
        assert model is not None, "only the first worker of a trial scores it"
        folder = Path(config.run_dir) / "sparse_probing" / str(group)
        folder.mkdir(parents=True, exist_ok=True)
        probed = model
        if world.score_model_path is not None:  # the texts are put to the model of the SAE
            probed = load_model(world, device=device, trained_on=True)
        return SparseProbing(world, probed, config.hook, folder)

    source = store.open(device, _sharing(config, generation))
    if leader:
        where = f"node {context.get_node_rank()}, rank {rank}"
        ray.get(broker.register.remote(group, where, generation, source.where))
    return Worker(
        config=config,
        broker=broker,
        generation=generation,
        group=group,
        collective=collective,
        device=device,
        world=world,
        eval_config=eval_config,
        make_evaluator=make_evaluator,
        make_probing=make_probing,
        source=TimedSource(source, f"{context.get_node_rank()}/{rank}", store.bytes_by_tier()),
    )


@dataclass
class Worker:
    """What one process of the pool holds for the whole search, and the loop that uses it."""

    config: WorkerConfig
    broker: Any
    generation: str
    group: int
    collective: Alone
    device: str
    world: World
    eval_config: UnlearningEvalConfig
    make_evaluator: Callable[[], Evaluator]
    make_probing: Callable[[], SparseProbing]
    source: TimedSource

    @cached_property
    def evaluator(self) -> Evaluator:
        """Waits for the evaluation cache, which is still being filled when training begins."""
        return needed("trials cannot be scored", self.make_evaluator)

    @cached_property
    def probing(self) -> SparseProbing:
        """Made when the first trial is probed: most searches ask for none."""
        return needed("trials cannot be probed", self.make_probing)

    def serve(self) -> None:
        """Take trials from the broker until it has no more."""
        leader = self.collective.rank == 0
        while True:
            jobs: Any = None
            if leader:
                most = self.config.trials_per_pack
                jobs = ray.get(self.broker.next_jobs.remote(self.group, self.generation, most))
            jobs = self.collective.broadcast(jobs)
            if jobs is None:
                return
            self._run([TrialSpec.model_validate(job) for job in jobs])

    def _run(self, specs: list[TrialSpec]) -> None:
        """Train and score trials; an error of a trial's own reaches the journal, not the loop.

        Those that are taken up at different positions are trained one position after the other.
        """
        at: defaultdict[tuple[int, int], list[TrialAtWork]] = defaultdict(list)
        for trial in map(self._begin, specs):
            if not trial.over:
                at[trial.position].append(trial)
        for trials in at.values():
            self._train(trials)

    def _begin(self, spec: TrialSpec) -> TrialAtWork:
        config = self.config
        folder = trial_folder(Path(config.run_dir), spec.number)
        artifacts = [
            Artifacts(
                seed_folder(folder, index, spec.seeds),
                self.world,
                config.hook,
                self.eval_config,
                config.split_seed,
                config.frontier_weight,
                index,
            )
            for index in range(spec.seeds)
        ]
        trial = TrialAtWork(spec, folder, self.broker, artifacts)
        try:
            trial.begin([self._make_run(member) for member in spec.members()])
        except Exception as error:
            self._raised([trial], error)
        return trial

    def _make_run(self, spec: TrialSpec) -> SAERun:
        return SAERun(
            spec,
            self.source,
            model_name=self.world.sae_model_name,
            hook_name=self.config.hook,
            device=self.device,
            collective=self.collective,
        )

    def _train(self, trials: list[TrialAtWork]) -> None:
        """Train trials together, to the end of each.

        An error of a step or of scoring does not say whose it is: the trials then go on one by one
        from their checkpoints, and who raises again ends with it.
        """
        together = Together(
            trials,
            evaluator=lambda: self.evaluator,
            probe=self._probe,
            publish=self.source.publish,
            pace=Pace(self.config.checkpoint_seconds),
            split_seed=self.config.split_seed,
        )
        try:
            together.train()
            return
        except Exception as error:
            left = [trial for trial in trials if not trial.over]
            if len(left) == 1 or not own(error):
                self._raised(left, error)
                return
            numbers = [trial.number for trial in left]
            log.warning("trials %s go on one by one", numbers, exc_info=error)
        for trial in trials:
            trial.runs = []  # perhaps there was no memory for all of them
        for trial in left:
            self._run([trial.spec])

    def _raised(self, trials: list[TrialAtWork], error: Exception) -> None:
        """One trial alone has raised, or all of them for what is no trial's doing."""
        if restarts(error):
            raise error  # this worker cannot go on, and Ray Train restarts it
        halting = error if halts(error) else None
        if halting is None:
            try:
                for trial in trials:
                    trial.fail(error)
            except Exception as another:
                if not halts(another):
                    raise
                halting = another
        if halting is not None:
            self._halt(trials, halting)
        if self.collective.size > 1:
            # The other workers of the trial are waiting in a collective that will not come:
            # only a restart of the group by Ray Train brings them back.
            raise error

    def _halt(self, trials: list[TrialAtWork], error: Exception) -> None:
        """The search cannot go on; the trials stay as their checkpoints have them."""
        words, missing = no_room(error), UnavailableError | ray.exceptions.RayError
        if isinstance(error, HaltedError):
            pass  # the broker knows
        elif words and not isinstance(error, missing):
            where = trials[0].folder if trials else self.config.run_dir
            ray.get(self.broker.halt.remote(f"{where} cannot be written to: {words}"))
        else:
            path = Path(self.config.run_dir) / "worker_error.log"
            ray.get(self.broker.halt.remote(f"{halts(error)} (log: {path})"))
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        for trial in trials:
            if not trial.over:
                trial.abandon()

    def _probe(self, rung: Rung) -> dict[str, float] | None:
        """Sparse probing of a finished SAE, where it is asked for."""
        if not rung.last or "sparse_probing" not in self.config.evals:
            return None
        return self.probing.evaluate(rung.sae)


def _device(use_gpu: bool) -> str:
    """The GPU that Ray Train gave this worker, or the CPU."""
    if not use_gpu:
        return "cpu"
    from ray.train.torch import get_device

    return str(get_device())


def _sharing(config: WorkerConfig, generation: str) -> Sharing | None:
    """With whom this worker has one copy of the activations on its GPU, where it is not alone.

    Workers of an earlier generation may still be on their way out, and take what they hold along.
    """
    if not config.use_gpu or config.workers_per_gpu == 1:
        return None
    return Sharing(f"{config.namespace}:{generation}", config.workers_per_gpu)


def _join_group(rank: int, size: int, per_trial: int) -> tuple[int, Alone] | None:
    """The worker's group of `per_trial` workers: its index, and how its members talk.

    None for those left over, where a lost node has left workers that fill no whole group.
    """
    if per_trial == 1:
        return rank, Alone()
    mine: Alone | None = None
    for start in range(0, size - per_trial + 1, per_trial):
        # Every process must create every group, in the same order.
        members = dist.new_group(list(range(start, start + per_trial)))
        if start <= rank < start + per_trial:
            assert isinstance(members, dist.ProcessGroup)
            mine = Group(members)
    return None if mine is None else (rank // per_trial, mine)
