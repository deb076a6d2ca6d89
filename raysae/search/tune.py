"""Ray Tune with Optuna: who is tried next, and who is stopped early."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from raysae.config import RunConfig
from raysae.journal import ended_trials
from raysae.pool.client import trial_client
from raysae.search.cluster import Plan
from raysae.search.loggers import logger_callbacks
from raysae.search.study import (
    STUDY,
    ResumableSearch,
    SeededByTrial,
    decided_rungs,
    open_storage,
)
from raysae.space import FloatRange, IntRange, Parameter
from raysae.training.spec import TrialSpec

METRIC, MODE = "objective", "max"
LEVEL = "level"
"""Reduction factor to the power of a rung's index: what ASHA takes for the time, so that trials of
other lengths or batch sizes are compared at the same rung."""
CLIENT = {"CPU": 0.0, "memory": 1.0}
"""Tune wants a trial to hold something: a byte. The CPUs are the pool's, which do the work; a pool
that shrinks with its cluster counts on all of them.
"""
CLIENT_FAILURES = 20


class BaselineSparingASHA(ASHAScheduler):
    """ASHA that never stops the baseline: what the others are compared with must be trained.

    It begins with the rungs that an earlier session of the search has decided on.
    """

    def __init__(self, past: list[dict[str, Any]], rungs: int, reduction_factor: int) -> None:
        """
        Args:
            past: of `decided_rungs`.
            rungs: at which trials may be stopped, at least 1; their end not counted.
            reduction_factor: one in so many goes on.
        """
        super().__init__(
            time_attr=LEVEL,
            grace_period=1,
            max_t=reduction_factor**rungs,
            reduction_factor=reduction_factor,
        )
        self._past = past

    def _at_level(self, result: dict[str, Any], rungs: Sequence[int]) -> dict[str, Any]:
        tokens = result["tokens"]
        index = list(rungs).index(tokens)
        level = self._max_t if tokens == rungs[-1] else self._reduction_factor**index
        return result | {LEVEL: level}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        done = bool(super().set_search_properties(metric, mode, **spec))
        past, self._past = self._past, []
        for result in past:
            trial = SimpleNamespace(trial_id=f"past {result['number']}", config={})
            self.on_trial_add(None, trial)  # type: ignore[arg-type]
            at_level = self._at_level(result, result["rungs"])
            super().on_trial_result(None, trial, at_level)  # type: ignore[arg-type]
        return done

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        spec = trial.config["spec"]
        result = self._at_level(result, spec["rungs"])
        decision = super().on_trial_result(tune_controller, trial, result)
        is_baseline = spec["number"] == 0
        return self.CONTINUE if is_baseline and not result.get("failed") else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing is new: every result was told when it came.

        ASHA would take the last one for the rung at which an earlier session knew the trial by
        another id, and count the trial there twice.
        """


def run_tune(
    config: RunConfig,
    plan: Plan,
    namespace: str,
    run_dir: Path,
    trials: list[TrialSpec] | None,
    records: list[dict[str, Any]],
    in_flight: list[int] | None,
) -> None:
    """Run a search, or the given trials; returns when every one has ended.

    Results are in the journal.

    Args:
        config: of the search.
        plan: how many trials at a time.
        namespace: of the broker.
        run_dir: for the state of Tune and Optuna.
        trials: run these; None lets the sampler choose.
        records: the journal, empty for a new search: trials that have ended are not run again, and
            those in flight are gone on with.
        in_flight: Optuna's ids of the latter, see `reconcile`; None where its study has no trial.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    ended = {record["trial"] for record in ended_trials(records)}
    if trials is not None:
        trials = [spec for spec in trials if spec.number not in ended]
    missing = config.search.num_samples - len(ended) if trials is None else len(trials)
    if missing <= 0:
        return
    confirmation = trials is not None and trials[0].stage == "confirmation"
    chosen: dict[str, Any] = {"namespace": namespace}
    if trials is not None:
        chosen["spec"] = tune.grid_search([spec.to_dict() for spec in trials])
    tuner = tune.Tuner(
        tune.with_resources(trial_client, CLIENT),
        param_space=None if trials is None else chosen,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode=MODE,
            search_alg=None
            if trials is not None
            else _search_algorithm(config, namespace, run_dir, in_flight),
            scheduler=FIFOScheduler() if confirmation else _scheduler(config, records),
            num_samples=1 if trials is not None else missing,
            max_concurrent_trials=plan.concurrent_trials,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name=namespace + ("-confirmation" if confirmation else ""),
            storage_path=str(run_dir / "tune"),
            callbacks=logger_callbacks(config.loggers, run_dir),
            verbose=0,
            # A client holds nothing: one that was killed is started again, and attaches.
            failure_config=tune.FailureConfig(max_failures=CLIENT_FAILURES),
        ),
    )
    tuner.fit()


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.config['spec']['number']:04d}"


def _folder_name(trial: Any) -> str:
    return f"client_{trial.config['spec']['number']:04d}"


@dataclass(frozen=True)
class DefineByRun:
    """Optuna's define-by-run function: suggests a configuration and adds the trial made of it.

    A class and not a closure because Tune pickles it into its experiment state.
    """

    config: RunConfig
    namespace: str

    def __call__(self, trial: Any) -> dict[str, Any]:
        assert self.config.space is not None
        spec = self.config.trial_spec(trial.number, self.config.space.sample(trial))
        return {"spec": spec.to_dict(), "namespace": self.namespace}


def _search_algorithm(
    config: RunConfig, namespace: str, run_dir: Path, in_flight: list[int] | None
) -> OptunaSearch:
    search = config.search
    make: Callable[[int], optuna.samplers.BaseSampler] = optuna.samplers.RandomSampler
    if search.sampler == "tpe":
        make = partial(_tpe, search.startup_trials)
    return ResumableSearch(
        space=DefineByRun(config, namespace),
        metric=METRIC,
        mode=MODE,
        sampler=SeededByTrial(make, search.seed),
        points_to_evaluate=None if in_flight is not None else [baseline_point(config)],
        study_name=STUDY,
        storage=open_storage(run_dir),
        in_flight=in_flight or [],
    )


def _tpe(startup_trials: int, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=startup_trials,
        multivariate=True,
        group=True,  # conditional spaces: each branch is modelled by itself
        constant_liar=True,  # trials in flight count, so that workers do not try the same
    )


def baseline_point(config: RunConfig) -> dict[str, Any]:
    """Trial 0: the baseline regularizer, every searched SAE and training value in mid-range."""
    assert config.space is not None
    point: dict[str, Any] = {"regularizer": config.objective.baseline}
    for section in ("sae", "training"):
        for name, parameter in getattr(config.space, section).items():
            middle = _middle(parameter)
            if middle is not None:
                point[f"{section}.{name}"] = middle
    return point


def _middle(parameter: Parameter) -> float | int | None:
    """The geometric (log) or arithmetic middle of a range; None where there is no range."""
    if isinstance(parameter, IntRange | FloatRange):
        low, high = parameter.extremes
        middle = (low * high) ** 0.5 if parameter.log else (low + high) / 2  # type: ignore[operator]
        return round(middle) if isinstance(parameter, IntRange) else float(middle)
    return None


def _scheduler(config: RunConfig, records: list[dict[str, Any]]) -> TrialScheduler:
    scheduler = config.search.scheduler
    rungs = len(scheduler.shares())
    if not rungs:
        return FIFOScheduler()
    return BaselineSparingASHA(decided_rungs(records), rungs, scheduler.reduction_factor)
