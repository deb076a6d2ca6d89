"""Optuna's study of a search: the same suggestions whatever was interrupted, and no trial lost.

The study is a journal file in the run folder. A later session of the search reads it beside our own
journal: what one of them knows, the other learns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from raysae.journal import JOURNAL, append, cut_partial_line, read_journal
from raysae.pool.client import WORST_OBJECTIVE
from raysae.pool.jobs import ENDED, end_record, replay

STUDY = "raysae"
STUDY_FILE = "optuna.journal"


def open_storage(run_dir: Path) -> BaseStorage:
    """The study's storage in a run folder, for the one process that holds the folder's lock."""
    path = run_dir / STUDY_FILE
    # Of a driver that was killed while it wrote.
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    cut_partial_line(path)
    return JournalStorage(JournalFileBackend(str(path)))


class SeededByTrial(BaseSampler):
    """A sampler whose random numbers depend on the trial and the parameter, not on what came
    before: a search that was interrupted suggests what it would have suggested.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        """`make` makes a sampler from its seed."""
        self._make, self._seed = make, seed
        self._relative = make(seed)

    def _sampler(self, trial: FrozenTrial, name: str) -> BaseSampler:
        words = f"{self._seed} {trial.number} {name}".encode()
        return self._make(int.from_bytes(hashlib.sha256(words).digest()[:4], "little"))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        self._relative = self._sampler(trial, "")
        return self._relative.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._relative.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampler = self._sampler(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class ResumableSearch(OptunaSearch):
    """Suggests the trials in flight again, under their old numbers, before it asks for new ones."""

    def __init__(self, *, in_flight: list[int], **settings: Any) -> None:
        """
        Args:
            in_flight: Optuna's ids of trials that have begun and not ended.
        """
        super().__init__(**settings)
        self._in_flight = list(in_flight)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if trial_id not in self._ot_trials and self._in_flight:
            assert self._ot_study is not None
            found = optuna.trial.Trial(self._ot_study, self._in_flight.pop(0))
            self._ot_trials[trial_id] = found
        suggestion: dict[str, Any] | None = super().suggest(trial_id)
        return suggestion


def reconcile(run_dir: Path, storage: BaseStorage) -> list[int] | None:
    """Make study and journal agree before a session begins.

    A trial that has ended in the journal is told to the study, as its client would have told it;
    one that Optuna was told of, because the scheduler stopped it, is ended in the journal. One that
    was scored for the last time has finished, though a crash kept that from being recorded.

    Returns:
        Optuna's ids of the trials in flight, by number; None where there is no trial yet.
    """
    if STUDY not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=STUDY, storage=storage)
    if not study.trials:
        return None
    path = run_dir / JOURNAL
    cut_partial_line(path)
    jobs = replay(read_journal(path), session="")
    for unended in [job for job in jobs.values() if job.end_is_missing]:
        append(path, end_record(unended, "finished"))
        unended.state = "finished"
    in_flight = []
    for trial in study.trials:
        job = jobs.get(trial.number)
        ended = job is not None and job.state in ENDED
        if trial.state == TrialState.RUNNING and job is not None and ended:
            failed = job.state == "failed"
            study.tell(trial.number, WORST_OBJECTIVE if failed else job.rung["objective"])
        elif trial.state == TrialState.RUNNING:
            in_flight.append(trial._trial_id)
        elif trial.state.is_finished() and job is not None and not ended:
            append(path, end_record(job, "stopped"))
    return in_flight


def decided_rungs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the scheduler has decided on in earlier sessions, in the order in which it heard of it:
    {"number", "tokens", "rungs", "objective"} of every rung but the last, of trials that went on or
    ended; "rungs" are the tokens of all of the trial's.
    """
    jobs = replay(records, session="")
    decided = []
    for record in records:
        if record["event"] != "rung" or record["last"]:
            continue
        job = jobs[record["trial"]]
        if job.state in ENDED or job.proceeded >= record["tokens"]:
            decided.append(
                {
                    "number": record["trial"],
                    "tokens": record["tokens"],
                    "rungs": job.spec["rungs"],
                    "objective": record["objective"],
                }
            )
    return decided
