"""Ray Tune with Optuna: who is tried next, and who is stopped early."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from raysae.config import RunConfig
from raysae.pool.client import trial_client
from raysae.search.cluster import Plan
from raysae.search.loggers import logger_callbacks
from raysae.space import FloatRange, IntRange, Parameter
from raysae.training.spec import TrialSpec

METRIC, MODE = "objective", "max"
CLIENT_CPUS = 0.001
"""Tune wants a trial to hold something; the pool's workers hold the CPUs that do the work."""


class BaselineSparingASHA(ASHAScheduler):
    """ASHA that never stops the baseline: what the others are compared with must be trained."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        is_baseline = trial.config.get("spec", {}).get("number") == 0
        return self.CONTINUE if is_baseline and not result.get("failed") else decision


def run_tune(
    config: RunConfig,
    plan: Plan,
    namespace: str,
    run_dir: Path,
    trials: list[TrialSpec] | None = None,
) -> None:
    """Run a search, or the given trials; returns when every one has ended.

    Results are in the journal.

    Args:
        config: of the search.
        plan: how many trials at a time.
        namespace: of the broker.
        run_dir: for the state of Tune and Optuna.
        trials: run these; None lets the sampler choose.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    confirmation = trials is not None and trials[0].stage == "confirmation"
    chosen: dict[str, Any] = {"namespace": namespace}
    if trials is not None:
        chosen["spec"] = tune.grid_search([spec.to_dict() for spec in trials])
    tuner = tune.Tuner(
        tune.with_resources(trial_client, {"CPU": CLIENT_CPUS}),
        param_space=None if trials is None else chosen,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode=MODE,
            search_alg=None
            if trials is not None
            else _search_algorithm(config, namespace, run_dir),
            scheduler=FIFOScheduler() if confirmation else _scheduler(config),
            num_samples=1 if trials is not None else config.search.num_samples,
            max_concurrent_trials=plan.concurrent_trials,
            reuse_actors=True,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name="tune-confirmation" if confirmation else "tune",
            storage_path=str(run_dir),
            callbacks=logger_callbacks(config.loggers, run_dir),
            verbose=0,
        ),
    )
    tuner.fit()


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


def _search_algorithm(config: RunConfig, namespace: str, run_dir: Path) -> OptunaSearch:
    search = config.search
    sampler: optuna.samplers.BaseSampler
    if search.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(
            seed=search.seed,
            n_startup_trials=search.startup_trials,
            multivariate=True,
            group=True,  # conditional spaces: each branch is modelled by itself
            constant_liar=True,  # trials in flight count, so that workers do not try the same
        )
    else:
        sampler = optuna.samplers.RandomSampler(seed=search.seed)

    return OptunaSearch(
        space=DefineByRun(config, namespace),
        metric=METRIC,
        mode=MODE,
        sampler=sampler,
        points_to_evaluate=[baseline_point(config)],
        study_name="raysae",
        storage=JournalStorage(JournalFileBackend(str(run_dir / "optuna.journal"))),
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


def _scheduler(config: RunConfig) -> TrialScheduler:
    rungs, scheduler = config.rungs, config.search.scheduler
    if scheduler.name == "none" or len(rungs) == 1:
        return FIFOScheduler()
    return BaselineSparingASHA(
        time_attr="tokens",
        max_t=rungs[-1],
        grace_period=rungs[0],
        reduction_factor=scheduler.reduction_factor,
    )
