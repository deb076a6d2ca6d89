"""One search from start to end: Ray, store, pool, Tune, tables, the best SAE."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import threading
import time
import traceback
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from raysae import __version__
from raysae.config import RunConfig
from raysae.errors import UserError
from raysae.pool.folder import RESULT_FILE, SAE_FOLDER, TRIAL_FILE, trial_folder
from raysae.search import cluster
from raysae.search.journal import JOURNAL, ended_trials, read_journal
from raysae.worlds.world import WORLDS, World, check_hook, load_world

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
) -> SearchOutcome:
    """Run the whole search. `config` must come from `resolve`.

    Args:
        config: what to search.
        run_dir: new folder for everything that comes out.
        console: for progress and summary.
        address: Ray cluster to join; None starts Ray on this machine.
        started: when its user started it, for the times it prints; None for now.

    Raises:
        UserError: Ray cannot be reached, or the plan does not fit.
    """
    started = time.time() if started is None else started
    world = fetch_world(config)
    namespace = f"raysae-{uuid.uuid4().hex[:8]}"
    console.print(f"raysae {__version__}: {config.num_trials} trials, "
                  f"results in {run_dir}", highlight=False, soft_wrap=True)  # fmt: skip
    plan, dashboard = cluster.start(config, address, namespace)
    import ray

    from raysae.pool.broker import OPTIONS, Broker
    from raysae.pool.client import BROKER_NAME

    console.print(
        f"Ray dashboard: {dashboard or 'not available'}   {plan.workers} workers, "
        f"{plan.concurrent_trials} trials at a time",
        highlight=False,
    )
    _write_about(config, run_dir, plan, world)
    memory = _MemoryWatch()
    broker = Broker.options(name=BROKER_NAME, **OPTIONS).remote(str(run_dir / JOURNAL))
    background: list[threading.Thread] = []
    try:
        background.append(_background(_run_pool, config, plan, namespace, run_dir, broker))
        background.append(_background(_harvest, config, run_dir, broker))
        from raysae.search.confirm import confirmation_trials
        from raysae.search.live import LiveDisplay
        from raysae.search.tune import run_tune

        with LiveDisplay(
            console,
            lambda: ray.get(broker.snapshot.remote()),
            config.num_trials,
            f"{run_dir}   dashboard {dashboard}",
            started,
        ) as display:
            run_tune(config, plan, namespace, run_dir, config.fixed_trials() or None)
            if config.is_search and config.confirm.top:
                trials = confirmation_trials(config, ended_trials(read_journal(run_dir / JOURNAL)))
                display.expect(len(trials))
                if trials:
                    run_tune(config, plan, namespace, run_dir, trials)
        peak = memory.stop()
        ray.get(broker.close.remote())
        for thread in background:
            thread.join(60)
    finally:
        memory.stop()
        ray.shutdown()
    return _conclude(run_dir, plan, console, started, peak)


def _background(target: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=target.__name__, daemon=True)
    thread.start()
    return thread


def _harvest(config: RunConfig, run_dir: Path, broker: Any) -> None:
    """Fill the store and publish it; if that fails, no trial can run."""
    import ray

    from raysae.store.harvest import harvest

    try:
        assert config.hook is not None
        handle, cache_ready = harvest(
            config.world,
            config.hook,
            config.resources.store_dtype,
            evaluation_cache=config.objective.evaluator == "cached",
            tasks_at_a_time=cluster.HARVEST_CPUS,
        )
        # Nested, the reference reaches the broker unopened: opening it would import torch there.
        ray.get(broker.set_store.remote([ray.put(handle)]))
        if cache_ready is not None:
            ray.get(cache_ready)
    except Exception as error:
        (run_dir / "harvest_error.log").write_text(str(error), encoding="utf-8")
        ray.get(broker.pool_failed.remote(f"harvest failed: {last_line(error)}"))
        ray.get(broker.close.remote())


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
            "run_dir": str(run_dir),
        },
        scaling_config=ScalingConfig(
            num_workers=plan.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.threads_per_worker}
            | ({"GPU": 1} if resources.use_gpu else {}),
        ),
        run_config=TrainRunConfig(
            name="pool",
            storage_path=str(run_dir / "pool"),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    reason = "the worker pool ended before the search did"
    try:
        trainer.fit()
    except Exception as error:
        (run_dir / "pool_error.log").write_text(str(error), encoding="utf-8")
        reason = f"the worker pool failed: {last_line(error)} (log: {run_dir / 'pool_error.log'})"
    if ray.is_initialized():
        ray.get(broker.pool_failed.remote(reason))


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


def _write_about(config: RunConfig, run_dir: Path, plan: cluster.Plan, world: World) -> None:
    resolved = config.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    (run_dir / "config.yaml").write_text(text, encoding="utf-8")
    about = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"raysae": __version__} | {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
        "world_fingerprint": world.fingerprint(),
        "seed": config.search.seed,
        "plan": vars(plan),
    }
    (run_dir / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


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
    wall = time.time() - started
    busy = sum(record["rung"].get("train_seconds", 0.0) for record in ended)
    busy += sum(record["score_seconds"] for record in rungs)
    facts = {
        "wall_seconds": wall,
        "first_result_seconds": min((r["time"] for r in rungs), default=time.time()) - started,
        "busy_share": busy / (wall * plan.groups),
        "peak_gib": peak_gib,
    }
    finished = trials[(trials["state"] == "finished") & (trials["stage"] == "search")]
    if not finished.empty:
        best = int(finished.sort_values("score", ascending=False, kind="stable").iloc[0]["trial"])
        copy_best(run_dir, best)
    note = _report(run_dir, facts)
    facts |= {"wall_seconds": time.time() - started, "report_seconds": time.time() - started - wall}
    (run_dir / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    print_summary(console, trials, ended, confirmation, run_dir, facts)
    console.print(note, markup=False, highlight=False, soft_wrap=True)
    failed = trials[trials["state"] == "failed"]
    return SearchOutcome(
        run_dir=run_dir,
        trials=len(trials),
        failed=len(failed),
        first_error="" if failed.empty else str(failed.iloc[0]["error"]),
    )


def _report(run_dir: Path, facts: dict[str, Any]) -> str:
    """Write the report and say where it is; a search is not lost with its report."""
    from raysae.report.build import build_report

    # The page tells what the run cost up to here.
    (run_dir / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    try:
        return f"Report: {build_report(run_dir).path}"
    except Exception as error:
        (run_dir / "report_error.log").write_text(traceback.format_exc(), encoding="utf-8")
        return (
            f"The report failed: {type(error).__name__}: {last_line(error)} (log: "
            f"{run_dir / 'report_error.log'}); everything else is there. Once more: raysae report "
            f"{run_dir}"
        )


def copy_best(run_dir: Path, trial: int) -> None:
    """`best/` = the SAELens SAE of that trial, with its result and its spec beside it."""
    source, target = trial_folder(run_dir, trial), run_dir / "best"
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
