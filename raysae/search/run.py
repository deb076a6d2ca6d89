"""One search from start to end: Ray, store, pool, Tune, tables, the best SAE."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from raysae import __version__
from raysae.config import RunConfig, load_config
from raysae.errors import InterruptedSearchError, UserError
from raysae.journal import JOURNAL, ended_trials, read_journal
from raysae.pool.folder import RESULT_FILE, SAE_FOLDER, TRIAL_FILE, trial_folder
from raysae.search import cluster
from raysae.search.interrupt import INTERRUPTED, Interruption, interruptible
from raysae.search.lock import lock
from raysae.worlds.world import WORLDS, World, check_hook, load_world

if TYPE_CHECKING:
    from raysae.search.live import LiveDisplay
    from raysae.training.spec import TrialSpec

POOL_FAILURES = 50
"""Times that the pool may lose a worker before the search stops, to be resumed by hand."""
PAUSE_SECONDS = 30
"""Time for a trial in flight to reach a place where it can be saved; scoring takes the longest."""

PACKAGES = (
    "ray", "torch", "transformers", "transformer-lens", "sae-lens", "sae-bench",
    "optuna", "datasets", "numpy", "pandas", "scikit-learn",
)  # fmt: skip


@dataclass(frozen=True)
class SearchOutcome:
    """How a search ended."""

    run_dir: Path
    trials: int
    failed: int
    first_error: str


def make_run_dir(out: str | None, name: str) -> Path:
    """A new run folder: `out`, or `runs/<name>-<date>-<time>`.

    Raises:
        UserError: it exists and is not empty, or cannot be written.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = Path(out) if out else Path("runs") / f"{name}-{stamp}"
    run_dir = run_dir.absolute()
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"--out {run_dir}: exists already; choose a new folder, or remove it")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {run_dir}: cannot be written: {error.strerror}") from None
    return run_dir


def resolve(config: RunConfig) -> RunConfig:
    """Fill in what the world decides, and check it against the model's own config.

    Raises:
        UserError: the model has no such hook point.
    """
    entry = WORLDS[config.world]
    hook = config.hook or entry.default_hook_name
    try:
        check_hook(entry, hook)
    except ValueError as error:
        raise UserError(f"hook: {error}") from None
    return config.model_copy(update={"hook": hook})


def load_run(run_dir: Path) -> RunConfig:
    """The config of a run folder, as its search resolved it.

    Raises:
        UserError: there is no search in the folder.
    """
    for name in ("config.yaml", "about.json"):
        if not (run_dir / name).is_file():
            raise UserError(
                f"--resume {run_dir}: no search has begun there (it has no {name}); start one with "
                "python run_search.py --space orth.yaml"
            )
    return load_config(run_dir / "config.yaml")


def fetch_world(config: RunConfig) -> World:
    """The search's world, fetched if it is one of the hub's.

    Raises:
        UserError: it cannot be had; the message says what is missing.
    """
    try:
        return load_world(config.world)
    except ConnectionError as error:
        raise UserError(f"world: {error}") from None


def run_search(
    config: RunConfig,
    run_dir: Path,
    console: Console,
    *,
    address: str | None = None,
    started: float | None = None,
    resume: bool = False,
) -> SearchOutcome:
    """Run the whole search. `config` must come from `resolve`.

    Args:
        config: what to search.
        run_dir: new folder for everything that comes out, or that of an interrupted search.
        console: for progress and summary.
        address: Ray cluster to join; None starts Ray on this machine.
        started: when its user started it, for the times it prints; None for now.
        resume: go on with the search of the run folder, `config` being its own.

    Raises:
        UserError: Ray cannot be reached, the plan does not fit, or another search is at work in
            the run folder.
        InterruptedSearchError: it was stopped, or had to stop, and can be resumed.
    """
    started = time.time() if started is None else started
    world = fetch_world(config)
    with lock(run_dir), interruptible() as interruption:
        in_flight = _take_up(run_dir, world) if resume else None
        records = read_journal(run_dir / JOURNAL)
        console.print(
            f"raysae {__version__}: {config.num_trials} trials, results in {run_dir}"
            + (f", {len(ended_trials(records))} trials have ended before" if resume else ""),
            highlight=False,
            soft_wrap=True,
        )
        broker: Any = None
        memory = _MemoryWatch()
        try:
            namespace = f"raysae-{uuid.uuid4().hex[:8]}"
            plan, dashboard = cluster.start(config, address, namespace)
            console.print(
                f"Ray dashboard: {dashboard or 'not available'}   {plan.workers} workers, "
                f"{plan.concurrent_trials} trials at a time",
                highlight=False,
            )
            _write_about(config, run_dir, plan, world, started)
            broker = _start_broker(run_dir, namespace)
            threads = [_background(_run_pool, config, plan, namespace, run_dir, broker)]
            store = _Store(config, broker, console)
            threads.append(_background(store.fill))
            from raysae.search.live import LiveDisplay

            note = f"{run_dir}   dashboard {dashboard}"
            watch = partial(_watch, broker, store, interruption)
            with LiveDisplay(console, watch, config.num_trials, note, started) as display:
                _run_trials(config, plan, namespace, run_dir, broker, records, in_flight, display)
            peak = memory.stop()
            _close(broker, threads)
        except KeyboardInterrupt:
            raise _interrupted(interruption.reason, run_dir, broker, console) from None
        finally:
            memory.stop()
            _shut_down()
        return _conclude(run_dir, plan, console, started, peak)


def _take_up(run_dir: Path, world: World) -> list[int] | None:
    """Make the journals of an interrupted search agree; Optuna's ids of the trials in flight.

    Raises:
        UserError: the world is not what it was.
    """
    from raysae.search.study import open_storage, reconcile

    about = json.loads((run_dir / "about.json").read_text(encoding="utf-8"))
    if about["world_fingerprint"] != world.fingerprint():
        raise UserError(
            f"--resume {run_dir}: the world {world.name!r} is not the one of that search any more "
            f"(fingerprint {world.fingerprint()[:12]}, then {about['world_fingerprint'][:12]}); "
            "scores would not be comparable: start a new search"
        )
    return reconcile(run_dir, open_storage(run_dir))


def _start_broker(run_dir: Path, session: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from raysae.pool.broker import OPTIONS, Broker
    from raysae.pool.client import BROKER_NAME

    # It writes the journal, which is here.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = OPTIONS | {"name": BROKER_NAME, "scheduling_strategy": here}
    return Broker.options(**options).remote(str(run_dir / JOURNAL), session)


def _watch(broker: Any, store: _Store, interruption: Interruption) -> dict[str, Any]:
    """The broker's snapshot; gives a restarted broker the store again, and ends a halted search."""
    import ray

    snapshot: dict[str, Any] = ray.get(broker.snapshot.remote())
    if not snapshot["store_ready"]:
        store.publish()
    if snapshot["halted"] and not interruption.reason:
        interruption.stop(snapshot["halted"])
    return snapshot


def _run_trials(
    config: RunConfig,
    plan: cluster.Plan,
    namespace: str,
    run_dir: Path,
    broker: Any,
    records: list[dict[str, Any]],
    in_flight: list[int] | None,
    display: LiveDisplay,
) -> None:
    """The search or the fixed trials, then the confirmation; what has ended before stays so."""
    import ray

    from raysae.search.confirm import confirmation_trials
    from raysae.search.tune import run_tune

    def run(trials: list[TrialSpec] | None) -> None:
        run_tune(config, plan, namespace, run_dir, trials, records, in_flight)
        ray.get(broker.abandon.remote("its Tune trial ended without it"))

    run(config.fixed_trials() or None)
    if config.is_search and config.confirm.top:
        ended = ended_trials(read_journal(run_dir / JOURNAL))
        trials = confirmation_trials(config, ended)
        display.expect(len(trials))
        if trials:
            run(trials)


def _close(broker: Any, threads: list[threading.Thread]) -> None:
    import ray

    ray.get(broker.close.remote())
    for thread in threads:
        thread.join(60)


def _interrupted(
    reason: str, run_dir: Path, broker: Any, console: Console
) -> InterruptedSearchError:
    """Have the trials in flight saved; what to tell the user."""
    import ray

    saved = broker is None
    if broker is not None:
        console.print("Stopping: the trials in flight are being saved; again Ctrl-C stops at once")
        try:
            saved = ray.get(broker.pause.remote(PAUSE_SECONDS), timeout=PAUSE_SECONDS + 5)
        except ray.exceptions.RayError as error:
            console.print(f"They could not be: {last_line(error)}", markup=False)
    doubt = "" if saved else " (trials in flight go on from an earlier checkpoint)"
    return InterruptedSearchError(
        (f"the search stopped: {reason}" if reason else "interrupted")
        + f"; go on with: python run_search.py --resume {run_dir}{doubt}",
        code=1 if reason else INTERRUPTED,
    )


def _shut_down() -> None:
    import ray

    ray.shutdown()


def _background(target: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=target.__name__, daemon=True)
    thread.start()
    return thread


class _Store:
    """Fills the activation store and publishes it, again where a broker is restarted."""

    def __init__(self, config: RunConfig, broker: Any, console: Console) -> None:
        self._config, self._broker, self._console = config, broker, console
        self._handle: Any = None

    def fill(self) -> None:
        """Harvest or find again, and publish; if that fails, no trial can run."""
        import ray

        from raysae.store.cache import cache_folder
        from raysae.store.harvest import harvest

        config = self._config
        try:
            assert config.hook is not None
            harvested = harvest(
                config.world,
                [config.hook],
                config.resources.store_dtype,
                evaluation_cache=config.objective.evaluator == "cached",
                tasks_at_a_time=cluster.HARVEST_CPUS,
                cache=cache_folder(config.resources.cache),
            )
            self._handle = ray.put(harvested.stores[config.hook])
            self.publish()
            self._say(harvested.lines)
            self._say(harvested.finish())
        except Exception as error:
            ray.get(self._broker.halt.remote(f"harvest failed: {last_line(error)}"))

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def publish(self) -> None:
        """Tell the broker where the store is, once it is there."""
        import ray

        if self._handle is not None:
            # Nested, the reference reaches the broker unopened: opening it would import torch.
            ray.get(self._broker.set_store.remote([self._handle]))


def _run_pool(
    config: RunConfig, plan: cluster.Plan, namespace: str, run_dir: Path, broker: Any
) -> None:
    """The one Ray Train run of the search; returns when the broker is closed."""
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig

    from raysae.pool.client import serve_pool

    resources = config.resources
    trainer = _trainer_class(plan, use_gpu=resources.use_gpu)(
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
            "threads": resources.threads_per_worker,
            "use_gpu": resources.use_gpu,
            "checkpoint_seconds": resources.checkpoint_seconds,
            "run_dir": str(run_dir),
        },
        scaling_config=ScalingConfig(
            num_workers=plan.pool_size,  # type: ignore[arg-type]
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.threads_per_worker}
            | ({"GPU": 1} if resources.use_gpu else {}),
        ),
        run_config=TrainRunConfig(
            name=namespace,
            storage_path=str(run_dir / "pool"),
            failure_config=FailureConfig(max_failures=POOL_FAILURES),
        ),
    )
    reason = "the worker pool ended before the search did"
    try:
        trainer.fit()
    except Exception as error:
        (run_dir / "pool_error.log").write_text(str(error), encoding="utf-8")
        reason = f"the worker pool failed: {last_line(error)} (log: {run_dir / 'pool_error.log'})"
    if ray.is_initialized():
        ray.get(broker.halt.remote(reason))


def _trainer_class(plan: cluster.Plan, *, use_gpu: bool) -> Any:
    """Ray Train's trainer; the one with a torch process group only where workers train together.

    Its controller and this process import torch for it, at the cost of seconds before the first
    trial; a pool whose workers train alone needs no group.
    """
    if plan.workers_per_trial > 1:
        from ray.train.torch import TorchConfig, TorchTrainer

        return partial(
            TorchTrainer, torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo")
        )
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer


def last_line(error: BaseException) -> str:
    """The last line of an error that carries a remote traceback: what was raised there."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _write_about(
    config: RunConfig, run_dir: Path, plan: cluster.Plan, world: World, started: float
) -> None:
    """config.yaml and about.json; a resumed search adds itself to its `sessions`."""
    path = run_dir / "about.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    session = {"started": started, "host": platform.node(), "raysae": __version__}
    resolved = config.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    (run_dir / "config.yaml").write_text(text, encoding="utf-8")
    about = {
        "sessions": [*earlier.get("sessions", []), session],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"raysae": __version__} | {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
        "world_fingerprint": world.fingerprint(),
        "seed": config.search.seed,
        "plan": vars(plan),
    }
    # As it was at the start, whatever a later session runs on.
    path.write_text(json.dumps(about | {**earlier, "sessions": about["sessions"]}, indent=1))


def _git_commit() -> str | None:
    """Commit of the source tree, with "-dirty" if it has changes; None outside of git."""
    root = Path(__file__).resolve().parent.parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _conclude(
    run_dir: Path,
    plan: cluster.Plan,
    console: Console,
    started: float,
    peak_gib: float,
) -> SearchOutcome:
    from raysae.analysis.runs import runs_table
    from raysae.analysis.tables import curves_table, trials_table, write_tables
    from raysae.search.confirm import verdicts
    from raysae.search.summary import print_summary

    records = read_journal(run_dir / JOURNAL)
    ended = ended_trials(records)
    write_tables(run_dir, records, ended)
    trials = trials_table(ended)
    confirmation, study = verdicts(ended), runs_table(trials[trials["stage"] == "search"])
    for name, table in (("confirmation", confirmation), ("runs", study)):
        if not table.empty:
            table.to_csv(run_dir / f"{name}.csv", index=False)
    if not study.empty:
        from raysae.analysis.plots import plot_study

        plot_study(trials[trials["stage"] == "search"], curves_table(ended), run_dir / "figures")
    rungs = [record for record in records if record["event"] == "rung"]
    about = json.loads((run_dir / "about.json").read_text(encoding="utf-8"))
    begun = [session["started"] for session in about["sessions"]]
    wall = time.time() - started + _time_before(begun, records)
    busy = sum(record["rung"].get("train_seconds", 0.0) for record in ended)
    busy += sum(record["score_seconds"] for record in rungs)
    facts = {
        "wall_seconds": wall,
        "first_result_seconds": min((r["time"] for r in rungs), default=time.time()) - begun[0],
        "busy_share": busy / (wall * plan.groups),
        "peak_gib": peak_gib,
    }
    (run_dir / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    finished = trials[(trials["state"] == "finished") & (trials["stage"] == "search")]
    if not finished.empty:
        best = int(finished.sort_values("score", ascending=False, kind="stable").iloc[0]["trial"])
        copy_best(run_dir, best)
    print_summary(console, trials, ended, confirmation, run_dir, facts)
    failed = trials[trials["state"] == "failed"]
    return SearchOutcome(
        run_dir=run_dir,
        trials=len(trials),
        failed=len(failed),
        first_error="" if failed.empty else str(failed.iloc[0]["error"]),
    )


def _time_before(begun: list[float], records: list[dict[str, Any]]) -> float:
    """Seconds of all sessions but the last, each from its start to its last record."""
    seconds = 0.0
    for start, following in pairwise(begun):
        times = [r["time"] for r in records if start <= r["time"] < following]
        seconds += max(times, default=start) - start
    return seconds


def copy_best(run_dir: Path, trial: int) -> None:
    """`best/` = the SAELens SAE of that trial, with its result and its spec beside it."""
    source, target = trial_folder(run_dir, trial), run_dir / "best"
    if target.exists():  # of an earlier session
        shutil.rmtree(target)
    shutil.copytree(source / SAE_FOLDER, target)
    for name in (RESULT_FILE, TRIAL_FILE):
        shutil.copy2(source / name, target / name)


class _MemoryWatch:
    """Peak of the memory in use on this machine above what was in use at the start, in GiB."""

    def __init__(self) -> None:
        self._start = self._peak = _used_bytes()
        self._stop = threading.Event()
        self._thread = _background(self._watch)

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
