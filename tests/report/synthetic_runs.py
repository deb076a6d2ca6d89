"""Run folders of made-up searches, written through the code that writes real ones.

Specs come from the default space through Optuna, conditioning from random decoders, results from
made-up answers to made-up questions. Only training is missing: the score follows α, k and chance.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raysae.analysis.conditioning import conditioning_table
from raysae.analysis.seeds import over_seeds
from raysae.analysis.tables import write_tables
from raysae.config import RunConfig, find_space, load_config
from raysae.journal import JOURNAL, ended_trials
from raysae.pool.folder import trial_folder
from raysae.search.confirm import confirmation_trials
from raysae.search.tune import baseline_point
from raysae.training.spec import TrialSpec
from raysae.unlearning import result as unlearning_result
from raysae.unlearning.grid import GridPoint
from raysae.unlearning.halves import halve, split_questions
from raysae.unlearning.result import UnlearningResult, make_result, wilson_interval
from raysae.unlearning.scoring import unlearning_score
from raysae.worlds.world import FORGET_SET, RETAIN_SETS

GRID = [
    GridPoint(threshold, n, multiplier, tuple(range(n)))
    for threshold in (0.001, 0.01)
    for n in (10, 20)
    for multiplier in (25, 50, 100, 200)
]
D_IN, D_SAE = 8, 24
ABOUT = {
    "started": "2026-01-01T00:00:00+00:00",
    "versions": {"raysae": "0.1.0"},
    "python": "3.11.7",
    "platform": "made up",
    "git_commit": "0" * 40,
    "world_fingerprint": "none",
    "seed": 0,
    "plan": {"workers": 2, "workers_per_trial": 1, "concurrent_trials": 2, "gpus": 0},
}
FACTS = {
    "wall_seconds": 600.0, "first_result_seconds": 60.0, "busy_share": 0.9, "peak_gib": 2.5,
}  # fmt: skip
Record = dict[str, Any]
FAILED = optuna.trial.TrialState.FAIL

# scipy's takes milliseconds, and thousands of made-up counts repeat themselves.
_quick_intervals = mock.patch.object(
    unlearning_result, "wilson_interval", lru_cache(maxsize=None)(wilson_interval)
)


@_quick_intervals
def write_search(
    folder: Path,
    trials: int,
    *,
    seed: int = 0,
    constant: bool = False,
    failing: float = 0.05,
    confirm: bool = True,
) -> Path:
    """A finished search in `folder`, which is made; returns it.

    Args:
        folder: new.
        trials: of the search.
        seed: of everything that is made up.
        constant: whether all scores are the same.
        failing: share of trials that fail before their first rung.
        confirm: whether the best are trained again.
    """
    config = load_config(find_space("orth.yaml"), {"search.num_samples": trials})
    config = config.model_copy(update={"hook": "blocks.0.hook_resid_post"})
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(baseline_point(config))
    assert config.space is not None
    records: list[Record] = []
    for number in range(trials):
        asked = study.ask()
        spec = config.trial_spec(number, config.space.sample(asked))
        made = trial_records(spec, rng, constant=constant, fails=number and rng.random() < failing)
        records += made
        rung = made[-1]["rung"]
        study.tell(asked, rung["objective"]) if rung else study.tell(asked, state=FAILED)
    # Written at once: a storage on disk is synchronised at every parameter.
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    kept = optuna.create_study(study_name="raysae", storage=storage, direction="maximize")
    kept.add_trials(study.trials)
    if confirm:
        for spec in confirmation_trials(config, ended_trials(records), seeds_per_trial=4):
            records += trial_records(spec, rng, constant=constant)
    write_folder(folder, config, records)
    return folder


@_quick_intervals
def write_study(folder: Path, runs: int, seeds: int) -> Path:
    """A finished study of fixed runs, without Optuna."""
    space = {
        "training": {"tokens": 65_536, "batch_size": 256},
        "search": {"seeds": seeds},
        "sae": {"architecture": "topk", "d_sae": D_SAE},
        "runs": {
            f"run {i}": {
                "regularizer": {"name": "none" if i == 0 else "fixed_orthogonal"},
                "alpha": 0.1 * i,
                "sae": {"k": 4},
            }
            for i in range(runs)
        },
    }
    folder.mkdir(parents=True)
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space), encoding="utf-8")
    config = load_config(path)
    rng = np.random.default_rng(0)
    records = [r for spec in config.fixed_trials() for r in trial_records(spec, rng, stops=False)]
    write_folder(folder, config, records)
    return folder


def write_folder(folder: Path, config: RunConfig, records: list[Record]) -> None:
    """What a search leaves beside its trials' folders."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    (folder / JOURNAL).write_text(text, encoding="utf-8")
    resolved = config.model_dump(mode="json", by_alias=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
    (folder / "about.json").write_text(json.dumps(ABOUT), encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps(FACTS), encoding="utf-8")
    ended = ended_trials(records)
    write_tables(folder, records, ended)
    for record in ended:
        trial_folder(folder, record["trial"]).mkdir(parents=True, exist_ok=True)


def trial_records(
    spec: TrialSpec,
    rng: np.random.Generator,
    *,
    constant: bool = False,
    fails: bool = False,
    stops: bool = True,
) -> list[Record]:
    """The rungs of one trial and its end; trials that score low are stopped at their first rung."""
    quality = 0.5 - 0.02 * (spec.sae.k or 5) - 0.03 * abs(np.log10(spec.alpha or 1)) ** 2
    quality = 0.3 if constant else float(np.clip(quality + 0.05 * rng.standard_normal(), 0, 0.9))
    batch = spec.training.batch_size
    records: list[Record] = []
    end = {
        "event": "end", "trial": spec.number, "spec": spec.to_dict(), "error": "", "attempts": 1,
        "worker": 0, "submitted": 0.0, "started": 1.0, "ended": 21.0,
    }  # fmt: skip
    if fails:
        why = f"TrainingDivergedError: loss is nan at step {rng.integers(3)}"
        return [end | {"state": "failed", "error": why, "rung": {}, "curve": []}]
    for tokens in spec.rungs:
        last = tokens == spec.rungs[-1]
        share = 1.0 if constant else tokens / spec.rungs[-1]
        arguments = (spec, rng, tokens // batch, tokens, quality * (0.6 + 0.4 * share), last)
        rung = over_seeds([_rung(*arguments, seed) for seed in range(spec.seeds)])
        records.append({"event": "rung", "trial": spec.number, "time": 1.0, **rung})
        if stops and not last and spec.stage == "search" and spec.number and rng.random() < 0.6:
            break
    state = "finished" if last else "stopped"
    steps = range(1, rung["step"] + 1, max(1, spec.training.steps // 64))
    curve = [{"step": s, "tokens": s * batch, **_metrics(spec, s)} for s in steps]
    if hasattr(spec.regularizer, "n_groups"):
        stability = np.random.default_rng(spec.number)
        for row in curve[5::5]:
            row["group_stability"] = float(stability.uniform(0.2, 1.0))
    return [*records, end | {"state": state, "rung": rung, "curve": curve}]


def _rung(
    spec: TrialSpec,
    rng: np.random.Generator,
    step: int,
    tokens: int,
    quality: float,
    last: bool,
    seed: int,
) -> Record:
    decoder = rng.standard_normal((D_SAE, D_IN))
    rates = np.r_[np.ones(6), np.zeros(6), np.ones(12)], np.r_[np.zeros(6), np.ones(18)]
    groups = None
    if hasattr(spec.regularizer, "n_groups"):
        groups = rng.integers(0, 3, D_SAE), rng.integers(0, 3, D_SAE) if last else None
    table = conditioning_table(
        decoder, *rates, *(groups or ()), trial=spec.number, step=step, seed=seed, baseline_draws=2
    )
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    way = (0.5, 0.75) if last and len(spec.rungs) > 1 else ()
    measured = [
        {name: None if name.startswith("random_") else value for name, value in row.items()}
        | {"step": round(share * step)}
        for share in way
        for row in rows[:4]
    ]
    result = _result(rng, quality)
    if not last:
        counts = {name: len(known) for name, known in result.baseline.items()}
        result = result.on(split_questions(counts, 0))
    halves = halve(result, 0)
    return {
        "step": step,
        "tokens": tokens,
        "last": last,
        "objective": halves.search.score,
        "score": halves.search.score,
        "status": halves.search.status.value,
        "cause": halves.search.cause,
        "questions": "all" if last else "search half",
        "heldout_score": halves.heldout.score if halves.heldout else None,
        "transferred_score": halves.transferred.score if halves.transferred else None,
        "saebench_score": result.score if last else None,
        "halves": halves.to_dict(),
        "result": result.to_dict(),
        "sparse_probing": None,
        "metrics": _metrics(spec, step),
        "dense_features": 3,
        "conditioning": rows,
        "measured": measured,
        "train_seconds": 10.0,
        "score_seconds": 3.0,
    }


def _result(rng: np.random.Generator, quality: float) -> UnlearningResult:
    """Stronger interventions forget more and cost more; `quality` is lost at no cost."""
    baseline = {FORGET_SET: np.ones(120, dtype=bool)}
    baseline |= {name: np.ones(60, dtype=bool) for name in RETAIN_SETS}
    strength = np.array([p.multiplier * p.n_features / 4000 for p in GRID])
    lost = {name: np.maximum(strength - 0.6, 0) for name in RETAIN_SETS}
    lost[FORGET_SET] = strength * quality
    right = {
        name: np.arange(len(known)) >= lost[name][:, None] * len(known)
        for name, known in baseline.items()
    }
    for answers in right.values():
        rng.permuted(answers, axis=1, out=answers)
    return make_result(
        evaluator="cached",
        score=unlearning_score(right),
        grid=GRID,
        is_correct=right,
        baseline=baseline,
        forget_sparsity=np.full(D_SAE, 0.5),
        retain_sparsity=np.zeros(D_SAE),
        eligible={0.001: 20, 0.01: 20},
    )


def _metrics(spec: TrialSpec, step: int) -> dict[str, float]:
    loss = 5.0 / step
    return {
        "loss": loss, "l2_loss": 0.8 * loss, "sparsity_loss": 0.1 * loss, "auxiliary_loss": 0.0,
        "penalty": 0.2 * loss, "alpha": spec.alpha, "l0": float(spec.sae.k or 5),
        "explained_variance": 1 - 0.1 / step, "dead_features": float(spec.number % 5), "lr": 1e-3,
    }  # fmt: skip
