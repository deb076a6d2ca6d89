"""One search from start to end: Ray, store, pool, Tune, tables, the best SAE."""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raysae import __version__
from raysae.config import RunConfig, load_config
from raysae.errors import InterruptedSearchError, UserError, first_line, last_line, no_room
from raysae.journal import JOURNAL, ended_trials, read_journal
from raysae.pool.folder import trial_folder
from raysae.run_files import read_object, read_records, require
from raysae.search import cluster
from raysae.search.about import add_plan, write_about
from raysae.search.conclude import SearchOutcome, conclude
from raysae.search.ending import (
    ABOUT_FILE,
    CONFIG_FILE,
    clear_ends,
    forget,
    how_to_go_on,
)
from raysae.search.integrity import check_store
from raysae.search.interrupt import INTERRUPTED, Interruption, interruptible
from raysae.search.lock import LOCK_FILE, lock
from raysae.search.loggers import check_loggers
from raysae.search.mirror import CHECKPOINT, mirroring
from raysae.search.plan import shortages
from raysae.search.services import MemoryWatch, Store, background, run_pool
from raysae.search.watchdog import Watchdog
from raysae.storage import MANIFEST, Location, is_address, public
from raysae.worlds.presets import shape_of
from raysae.worlds.world import World, check_hook, load_world

if TYPE_CHECKING:
    from raysae.search.watch import Watch
    from raysae.training.spec import TrialSpec

PAUSE_SECONDS = 30
"""Time for a trial in flight to reach a place where it can be saved; scoring takes the longest."""
LEAVE_SECONDS = 15
"""Time for the pool to end, where a search ends early."""

LEFT_BEHIND = {LOCK_FILE, MANIFEST}
"""Of a search that did not begin: its folder can be used for another."""

ABOUT_FIELDS = ("sessions", "started", "world_fingerprint")
ABOUT_ADVICE = (
    "a search is not gone on with unless it says which world it was of; restore it from a mirror "
    "or a copy of the run folder, if there is one"
)


def check_folder(option: str, path: str | None) -> None:
    """Refuse what is no folder of this machine's file system.

    The journal is fsynced line by line, checkpoints are replaced as a whole, and the folder is
    locked: object stores have none of these.

    Raises:
        UserError: an address like s3://….
    """
    if path is not None and is_address(path):
        raise UserError(
            f"{option} {public(path)}: must be a folder; a search writes to a file system, on a "
            "cluster to one that all nodes share (NFS, Lustre, EFS, …); an object store gets "
            "a copy of its run folder with --storage"
        )


def choose_run_dir(out: str | None, name: str) -> Path:
    """Path of a new run folder: `out`, or `runs/<name>-<date>-<time>`.

    Raises:
        UserError: it exists and there is something in it, or is no folder of a file system.
    """
    check_folder("--out", out)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = (Path(out) if out else Path("runs") / f"{name}-{stamp}").absolute()
    if run_dir.exists() and (
        not run_dir.is_dir() or any(path.name not in LEFT_BEHIND for path in run_dir.iterdir())
    ):
        raise UserError(f"--out {run_dir}: exists already; choose a new folder, or remove it")
    return run_dir


def make_run_dir(run_dir: Path) -> Path:
    """Make the folder of `choose_run_dir`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".write-test"
        probe.touch()
        probe.unlink()
        (run_dir / MANIFEST).unlink(missing_ok=True)  # where another search would have been copied
    except OSError as error:
        raise UserError(f"--out {run_dir}: cannot be written: {error.strerror}") from None
    return run_dir


def resolve(config: RunConfig, address: str | None = None) -> RunConfig:
    """Fill in what the world and the machine decide, and check it against the model's own config.

    Of a cluster that is to be joined (`address`) nothing is asked yet: `use_gpu: auto` takes its
    GPUs.

    The address of the storage loses its secrets here: a resolved config is written and sent about.

    Raises:
        UserError: the model has no such hook point, or a logger cannot be used.
    """
    check_loggers(config.loggers)
    check_folder("resources.cache", config.resources.cache)
    shape = shape_of(config.world)
    hook = config.hook or shape.default_hook_name
    try:
        check_hook(shape, hook)
    except ValueError as error:
        raise UserError(f"hook: {error}") from None
    storage = None if config.storage is None else public(config.storage)
    resources = config.resources
    if resources.use_gpu == "auto":
        use_gpu = address is not None or bool(cluster.list_gpus())
        resources = resources.model_copy(update={"use_gpu": use_gpu})
    return config.model_copy(update={"hook": hook, "storage": storage, "resources": resources})


def load_run(run_dir: Path) -> RunConfig:
    """The config of a run folder, as its search resolved it.

    Raises:
        UserError: there is no search in the folder, or its records cannot be read.
    """
    for name in (CONFIG_FILE, ABOUT_FILE):
        if not (run_dir / name).is_file():
            raise UserError(
                f"--resume {run_dir}: no search has begun there (it has no {name}); start one with "
                "python run_search.py --space orth.yaml"
            )
    config = load_config(run_dir / CONFIG_FILE)
    about = run_dir / ABOUT_FILE
    require(read_object(about, ABOUT_ADVICE), ABOUT_FIELDS, about, ABOUT_ADVICE)
    read_records(run_dir)
    return config


def fetch_world(config: RunConfig) -> World:
    """The search's world, fetched where it is one of the hub's.

    Raises:
        UserError: it cannot be had, or is not what it should be; the message says what is missing.
    """
    return load_world(config.world)


def run_search(
    config: RunConfig,
    run_dir: Path,
    console: Console,
    *,
    address: str | None = None,
    storage: Location | None = None,
    started: float | None = None,
    resume: bool = False,
) -> SearchOutcome:
    """Run the whole search. `config` must come from `resolve`.

    Args:
        config: what to search.
        run_dir: new folder for everything that comes out, or that of an interrupted search.
        console: for progress and summary.
        address: Ray cluster to join; None starts Ray on this machine.
        storage: where a copy of the run folder is kept, from `reserve`; None: nowhere.
        started: when its user started it, for the times it prints; None for now.
        resume: go on with the search of the run folder, `config` being its own.

    Raises:
        UserError: Ray cannot be reached, the plan does not fit, or another search is at work in
            the run folder; or the store was written to, after everything else is there.
        InterruptedSearchError: it was stopped, or had to stop, and can be resumed.
    """
    started = time.time() if started is None else started
    world = fetch_world(config)
    with (
        clear_ends(run_dir),
        lock(run_dir),
        interruptible() as interruption,
        mirroring(run_dir, storage, console) as finish_mirror,
    ):
        in_flight = _take_up(run_dir, world) if resume else None
        # First of all: from here on there is a search to go on with.
        changed = write_about(config, run_dir, world, started)
        records = read_journal(run_dir / JOURNAL)
        console.print(
            f"raysae {__version__}: {config.num_trials} trials, results in {run_dir}"
            + (f", {len(ended_trials(records))} trials have ended before" if resume else ""),
            highlight=False,
            soft_wrap=True,
        )
        broker: Any = None
        threads: list[threading.Thread] = []
        closing: threading.Thread | None = None
        store: Store | None = None
        memory = MemoryWatch()
        try:
            # Ray's dashboard shows it with the pool's run, the trials' experiment and the broker.
            shown = re.sub(r"[^\w.-]", "-", run_dir.name)[:40]
            namespace = f"raysae-{shown}-{uuid.uuid4().hex[:8]}"
            if address is None:
                for line in shortages(config, world, run_dir):
                    console.print(f"Short of {line}", markup=False, highlight=False, soft_wrap=True)
            plan, dashboard = cluster.start(config, address, namespace, world)
            add_plan(run_dir, plan)
            console.print(
                f"Ray dashboard: {dashboard or 'not available'}   {plan.workers} workers, "
                f"{plan.concurrent_trials} trials at a time",
                highlight=False,
            )
            if changed:
                console.print(
                    f"Not as when the search began, and scores may differ for it: {changed}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
            broker = _start_broker(run_dir, namespace)
            threads += [background(run_pool, config, plan, namespace, run_dir, broker)]
            store = Store(config, plan, broker, console, run_dir)
            threads.append(background(store.fill))
            watchdog = Watchdog(
                cluster.needed(config.resources, plan.workers_per_trial),
                cluster.has_in_words,
                config.resources.worker_timeout,
            )
            from raysae.search.progress import Expected
            from raysae.search.watch import Watch

            with (
                _guarded(broker, store, interruption, watchdog, console),
                Watch(
                    console,
                    partial(_poll, broker),
                    run_dir,
                    Expected(config.num_trials, config.max_confirmation(plan.at_a_time)),
                    dashboard=dashboard,
                    metrics=cluster.metrics_addresses(),
                    started=started,
                    note=lambda: watchdog.note,
                ) as watch,
            ):
                _run_trials(config, plan, namespace, run_dir, broker, records, in_flight, watch)
            changed_store = ""
            if store.held is not None:
                line, changed_store = check_store(store.held)
                if line:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            peak = memory.stop()
            # Pool and Ray end one process after the other, seconds of waiting; nothing below needs
            # them.
            closing = background(_close, broker, threads)
        except KeyboardInterrupt:
            if store is not None and store.refused:
                raise UserError(store.refused) from None
            raise _interrupted(interruption.reason, run_dir, broker, console) from None
        except cluster.RayStartError as error:
            raise InterruptedSearchError(f"{error}; {how_to_go_on(run_dir)}", code=1) from error
        except UserError:
            if broker is None and not resume:
                forget(run_dir)
            raise
        except Exception as error:
            reason = interruption.reason or _why_stopped(error)
            if not reason:
                raise
            raise _interrupted(reason, run_dir, broker, console) from error
        finally:
            memory.stop()
            if closing is None:
                finish_mirror()
                _leave(broker, threads)
        try:
            outcome = conclude(run_dir, plan.groups, console, started, peak)
        finally:
            closing.join()
        if changed_store:
            raise UserError(changed_store)
        return outcome


def _why_stopped(error: Exception) -> str:
    """Of an error that ends a search which can be gone on with; "" of any other."""
    from raysae.pool.jobs import HaltedError

    full = no_room(error)
    if full:
        return f"{full}; make room"
    return last_line(error) if isinstance(error, HaltedError) else ""


def _take_up(run_dir: Path, world: World) -> list[int] | None:
    """Make the journals of an interrupted search agree; Optuna's ids of the trials in flight.

    Raises:
        UserError: the world is not what it was.
    """
    from raysae.search.study import STUDY_FILE, open_storage, reconcile

    about = json.loads((run_dir / ABOUT_FILE).read_text(encoding="utf-8"))
    if about["world_fingerprint"] != world.fingerprint():
        raise UserError(
            f"--resume {run_dir}: the world {world.name!r} is not the one of that search any more "
            f"(fingerprint {world.fingerprint()[:12]}, then {about['world_fingerprint'][:12]}); "
            "scores would not be comparable: start a new search"
        )
    try:
        storage = open_storage(run_dir)
    except (ValueError, KeyError, TypeError) as error:  # what Optuna raises on lines not its own
        raise UserError(
            f"--resume {run_dir}: {run_dir / STUDY_FILE} cannot be read "
            f"({type(error).__name__}: {first_line(error)}); restore it from a mirror or a copy of "
            "the run folder, if there is one"
        ) from None
    in_flight = reconcile(run_dir, storage)
    _sweep(run_dir)
    return in_flight


def _sweep(run_dir: Path) -> None:
    """Remove the checkpoints of trials that are over, which a worker that was killed had left."""
    records = read_journal(run_dir / JOURNAL)
    for number in {r["trial"] for r in records if r["event"] == "end" or r.get("last")}:
        (trial_folder(run_dir, number) / CHECKPOINT).unlink(missing_ok=True)


def _start_broker(run_dir: Path, session: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from raysae.pool.broker import OPTIONS, Broker
    from raysae.pool.client import BROKER_NAME

    # It writes the journal, which is here.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = OPTIONS | {"name": BROKER_NAME, "scheduling_strategy": here}
    return Broker.options(**options).remote(str(run_dir / JOURNAL), session)


def _poll(broker: Any, seen: dict[int, int]) -> Any:
    """What a `Watch` asks the broker for."""
    import ray

    return ray.get([broker.snapshot.remote(), broker.rows.remote(seen)])


@contextmanager
def _guarded(
    broker: Any, store: Store, interruption: Interruption, watchdog: Watchdog, console: Console
) -> Iterator[None]:
    """Give a restarted broker the store again, and end a search that was halted, or on which
    nobody works."""
    import ray

    done = threading.Event()

    def guard() -> None:
        while not done.wait(1.0):
            asked = [broker.health.remote(), broker.silence.remote()]
            (halted, store_ready), silent = ray.get(asked)
            line = watchdog.look(silent)
            if line:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            halted = halted or watchdog.reason_to_stop(silent)
            if halted:
                interruption.stop(halted)
                return
            if not store_ready:
                store.publish()

    thread = background(guard)
    try:
        yield
    finally:
        done.set()
        thread.join()


def _run_trials(
    config: RunConfig,
    plan: cluster.Plan,
    namespace: str,
    run_dir: Path,
    broker: Any,
    records: list[dict[str, Any]],
    in_flight: list[int] | None,
    watch: Watch,
) -> None:
    """The search or the fixed trials, then the confirmation; what has ended before stays so."""
    import ray

    from raysae.search.tune import run_tune

    def run(trials: list[TrialSpec] | None) -> None:
        run_tune(config, plan, namespace, run_dir, trials, records, in_flight)
        ray.get(broker.abandon.remote("its Tune trial ended without it"))

    run(config.fixed_trials() or None)
    if config.is_search and config.confirm.top:
        # brings pandas and SciPy
        from raysae.search.confirm import begun_with, confirmation_trials

        journal = read_journal(run_dir / JOURNAL)
        seeds = begun_with(journal) or config.confirm.seeds_per_trial(plan.at_a_time)
        trials = confirmation_trials(config, ended_trials(journal), seeds)
        watch.confirm(len(trials))
        if trials:
            run(trials)


def _close(broker: Any, threads: list[threading.Thread]) -> None:
    """End pool, store and Ray."""
    import ray

    try:
        ray.get(broker.close.remote())
        for thread in threads:
            thread.join(60)
    finally:
        _shut_down()


def _leave(broker: Any, threads: list[threading.Thread]) -> None:
    """End Ray under a search that has not come to its end.

    Its threads first: one that asks Ray for something afterwards would end the process, and what
    there is to be said to the user with it.
    """
    import ray

    if broker is not None:
        with suppress(ray.exceptions.RayError):  # it may be gone
            ray.get(broker.close.remote(), timeout=5)
    deadline = time.monotonic() + LEAVE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    _shut_down()


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
        + f"; {how_to_go_on(run_dir)}{doubt}",
        code=1 if reason else INTERRUPTED,
    )


def _shut_down() -> None:
    import ray

    ray.shutdown()
