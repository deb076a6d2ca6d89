"""Journal records → tidy tables: one row a trial, an SAE, a point of a curve, a group."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.analysis.conditioning import COLUMNS as CONDITIONING_COLUMNS
from raysae.analysis.seeds import SCORES, asked, seed_records
from raysae.training.spec import SEED_STRIDE, config_hash
from raysae.worlds.world import SAEBENCH

TRIAL_COLUMNS: dict[str, str] = {
    "trial": "number of the trial, from 0 (the baseline)",
    "state": "finished: trained to the end; stopped: early, by the scheduler; failed: see error",
    "stage": "search, or confirmation: the best and the baselines trained again with fresh seeds",
    "run": "name of the run, grid point or candidate that the trial is a seed of",
    "score": "unlearning score on the half of the questions that the search sees, at the last rung "
    "reached; 0 to 1, higher is better; 0 where under no intervention more is missed than without",
    "heldout_score": "the same on the other half, which no sampler sees; missing where `questions` "
    "is not all",
    "transferred_score": "the intervention that gives `score`, read on that other half: 1 − its "
    "forget accuracy there, 0 where it keeps less than 99 % of the retain questions there; never "
    "above heldout_score, which chooses anew; missing where `questions` is not all",
    "saebench_score": "SAEBench's own score, on all questions, the model's own errors in it: "
    "comparable with published ones; in "
    "worlds of fewer permutations it is called score_of_N_orders, and compares with none; missing "
    "where `questions` is not all",
    "questions": "asked at the last rung reached: all; or search half, of a trial that was stopped "
    "before its end; missing where it reached no rung",
    "score_std": "sample standard deviation of the score over the trial's seeds",
    "heldout_score_std": "the same of heldout_score",
    "transferred_score_std": "the same of transferred_score",
    "saebench_score_std": "the same of saebench_score",
    "frontier": "mean loss of forget accuracy over retain accuracies of 0.9 to 1, search half",
    "status": "why the score is what it is: ok, the cause of a 0.0, diverged (the cause says at "
    "which step), or failed",
    "cause": "the status in a sentence, with its figures",
    "regularizer": "method",
    "alpha": "weight of the penalty",
    "alpha_schedule": "schedule of the weight",
    "group_update_period": "training steps between two regroupings, where the method regroups",
    "architecture": "SAELens architecture",
    "d_sae": "number of features",
    "k": "active features a token (topk, batchtopk)",
    "l1_coefficient": "weight of the L1 term (standard, gated)",
    "l0_coefficient": "weight of the L0 term (jumprelu)",
    "seed": "of weights and batches",
    "seeds": "SAEs of the trial; scores, losses, L0 and the like are their means, statuses, counts "
    "and conditioning those of the one with the median score",
    "training_steps": "optimiser steps trained; of a failed trial those of its last logged row",
    "tokens": "activation rows seen in training",
    "forget_accuracy": "share of known forget questions still right at the best intervention",
    "retain_accuracy": "the same for the retain questions",
    "forget_correct": "count behind forget_accuracy",
    "forget_total": "known forget questions",
    "retain_correct": "count behind retain_accuracy",
    "retain_total": "known retain questions",
    "heldout_forget_accuracy": "of the intervention chosen on the search half, on the other half; "
    "missing where that was not asked",
    "heldout_retain_accuracy": "the same for the retain questions",
    "transferred_status": "why transferred_score is what it is: ok, nothing_chosen (score is 0), "
    "retain_gate_failed or no_effect on the other half; as its cause and counts, of the seed with "
    "the median score",
    "transferred_cause": "the same in a sentence, with its figures",
    "transferred_forget_correct": "count behind heldout_forget_accuracy",
    "transferred_forget_total": "known forget questions of the other half",
    "transferred_retain_correct": "count behind heldout_retain_accuracy",
    "transferred_retain_total": "known retain questions of the other half",
    "best_retain_threshold": "of the best intervention",
    "best_n_features": "of the best intervention: features clamped",
    "best_multiplier": "of the best intervention: clamped to minus this",
    "eligible_features_0.001": "features below retain threshold 0.001",
    "eligible_features_0.01": "features below retain threshold 0.01",
    "loss": "total training loss, mean over the last logged steps",
    "l2_loss": "reconstruction term, summed over d_in, activations scaled to norm √d_in",
    "sparsity_loss": "L1 term (standard)",
    "auxiliary_loss": "dead-feature term (topk, batchtopk)",
    "penalty": "the regularizer's penalty, before α",
    "l0": "mean number of active features a token",
    "explained_variance": "1 − residual variance / variance",
    "dead_features": "features that have not fired for `dead_after` steps",
    "l0_std": "sample standard deviation of l0 over the trial's seeds",
    "explained_variance_std": "the same of explained_variance",
    "dead_features_std": "the same of dead_features",
    "dense_features": "features that fire on more than a tenth of the tokens, mean of the rates on "
    "forget and retain tokens",
    "condition_number": "σ_max/σ_min of all decoder rows over the non-zero spectrum",
    "numerical_rank": "singular values of all decoder rows above tolerance × σ_max (count)",
    "effective_rank": "exp of the entropy of the decoder's normalised singular values",
    "stable_rank": "‖D‖²_F / σ_max² of all decoder rows",
    "coherence": "largest |cos| between two decoder rows",
    "forget_retain_overlap": "‖Q_fᵀQ_r‖²_F / min(k_f, k_r) of the selective subspaces, 0 to 1",
    "forget_retain_squared_cosine": "d_in × mean cos² over pairs of a forget and a retain feature; "
    "1: as random directions",
    "largest_principal_angle": "between the selective subspaces, radians",
    "adjusted_rand_index": "of the groups at the last rung and at the one before: 1 the same, 0 as "
    "by chance",
    "train_seconds": "wall time in training, s",
    "score_seconds": "wall time in scoring at the last rung, s",
    "wall_seconds": "from the start of the trial on its worker to its end, s",
    "gpu_hours": "wall_seconds × workers of the trial / workers a GPU / trials a pack, h; 0 on the "
    "CPU",
    "tokens_per_second": "tokens × seeds / train_seconds",
    "attempts": "1, or more if a worker died under it",
    "config_hash": "12 hex digits over everything that decides the trial's numbers but its number",
    "error": "why it failed",
    "git_commit": "of the source tree of the search",
    "versions": "of raysae, Python and the packages, as JSON",
}
"""Columns of `trials.parquet` with their meaning; parameters of a method or schedule are added as
`regularizer.<name>` and `alpha_schedule.<name>`, those of training as `training.<name>`, and with
`evals: [sparse_probing]` the test accuracies of SAEBench's probes, `sae_top_<k>` and `sae` of the
SAE's best k or all features, `llm_top_<k>` and `llm` of the language model's own activations."""

DIVERGED = "diverged"
# What `raysae.training.run` raises, whose import takes torch's seconds.
DIVERGED_ERROR = "TrainingDivergedError"

SPREAD = ("l0", "explained_variance", "dead_features")
"""Training figures of which a spread over seeds is given."""

TIME_COLUMNS = (
    "train_seconds", "score_seconds", "wall_seconds", "gpu_hours", "tokens_per_second",
)  # fmt: skip
"""Columns that differ between two runs of the same search."""


CONDITIONING = (
    "condition_number", "numerical_rank", "effective_rank", "stable_rank", "coherence",
    "forget_retain_overlap", "forget_retain_squared_cosine", "largest_principal_angle",
    "adjusted_rand_index",
)  # fmt: skip
"""Columns of the trials table that come from the "all" row of the conditioning at the last rung."""


CURVE_COLUMNS: dict[str, str] = {
    "trial": "number of the trial",
    "step": "optimiser steps trained when the row was logged (steps)",
    "tokens": "activation rows seen by then (rows)",
    "loss": "total training loss, mean over the steps since the row before and over the trial's "
    "seeds (as all figures here)",
    "l2_loss": "reconstruction term, summed over d_in, activations scaled to norm √d_in",
    "sparsity_loss": "L1 or L0 term; 0 where k features are chosen",
    "auxiliary_loss": "dead-feature term (topk, batchtopk)",
    "penalty": "the regularizer's penalty, before α (1: as random directions)",
    "alpha": "weight of the penalty at this step, moved by its schedule; the trial's own α, the "
    "schedule's largest, is in the trials table",
    "l0": "mean number of active features a token (count)",
    "explained_variance": "1 − residual variance / variance (share, at most 1)",
    "dead_features": "features that have not fired for `dead_after` steps, at this step (count)",
    "lr": "learning rate after this step",
    "group_stability": "adjusted Rand index of the groups before and after a regrouping, mean over "
    "those since the row before (1: the same, 0: as by chance); nan where there was none",
}
"""Columns of `curves.parquet` with their meaning and unit."""


def trials_table(ended: list[dict[str, Any]], about: dict[str, Any] | None = None) -> pd.DataFrame:
    """One row a trial, columns as in `TRIAL_COLUMNS`, in the order of the trials' numbers.

    Args:
        ended: the journal's `end` records.
        about: the run's `about.json`, for versions, commit and GPUs; None where there is none.
    """
    frame = pd.DataFrame([trial_row(record) | _origin(record, about) for record in ended])
    return _in_order(frame)


def best_first(trials: pd.DataFrame) -> pd.DataFrame:
    """Rows of `trials_table` by score, equal ones (zeros, most often) by the frontier below it."""
    by = ["score", "frontier"] if "frontier" in trials else ["score"]
    return trials.sort_values(by, ascending=False, kind="stable")


def seeds_table(ended: list[dict[str, Any]], about: dict[str, Any] | None = None) -> pd.DataFrame:
    """One row an SAE, with its own figures: columns as in `TRIAL_COLUMNS`, and `seed_index`.

    The SAEs of a trial are trained side by side: `wall_seconds` are the trial's, `gpu_hours` an
    equal share. `about` as for `trials_table`.
    """
    rows = []
    for record in ended:
        spec, rungs = record["spec"], seed_records(record["rung"])
        origin = _origin(record, about)
        if origin.get("gpu_hours") is not None:
            origin["gpu_hours"] /= len(rungs)
        for index, rung in enumerate(rungs):
            seed = spec["seed"] + index * SEED_STRIDE
            row = trial_row(record | {"rung": rung, "spec": spec | {"seed": seed}})
            rows.append(row | origin | {"seeds": 1, "seed_index": index})
    return _in_order(pd.DataFrame(rows))


def curves_table(ended: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a (trial, logged step), means over seeds; columns as in `CURVE_COLUMNS`."""
    rows = [{"trial": r["trial"], **point} for r in ended for point in r["curve"]]
    return pd.DataFrame(rows, columns=list(CURVE_COLUMNS))


def conditioning_rows(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a (trial, seed, step, group), at every rung; columns as in `conditioning.COLUMNS`."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        if record["event"] == "rung":
            for index, seed in enumerate(seed_records(record)):
                # Journals did not always have what was measured on the way.
                for row in [*seed.get("measured", []), *seed["conditioning"]]:
                    rows[(row["trial"], index, row["step"], row["group"])] = {"seed": index} | row
    return pd.DataFrame(list(rows.values()), columns=list(CONDITIONING_COLUMNS))


def write_tables(run_dir: Path, records: list[dict[str, Any]], ended: list[dict[str, Any]]) -> None:
    """Write trials, seeds, curves and conditioning to the run folder, as Parquet and CSV each."""
    path = run_dir / "about.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    tables = {
        "trials": rename_score(trials_table(ended, about), about),
        "seeds": rename_score(seeds_table(ended, about), about),
        "curves": curves_table(ended),
        "conditioning": conditioning_rows(records),
    }
    save_tables(run_dir, tables)


def save_tables(run_dir: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write tables by name, as Parquet and CSV each."""
    for name, table in tables.items():
        table.to_parquet(run_dir / f"{name}.parquet", index=False)
        table.to_csv(run_dir / f"{name}.csv", index=False)


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """The documented columns, then those of methods, schedules and the like."""
    extra = sorted(set(frame.columns) - set(TRIAL_COLUMNS))
    frame = frame.reindex(columns=[*TRIAL_COLUMNS, *extra])
    # A column of nothing but None would be one of objects.
    return frame.astype({name: float for score in SCORES for name in (score, f"{score}_std")})


def rename_score(table: pd.DataFrame, about: dict[str, Any] | None) -> pd.DataFrame:
    """The table with `saebench_score` under the name that is its due: SAEBench's own is that of
    questions known under all orders of their choices.
    """
    name = (about or {}).get("score_name", SAEBENCH)
    if name == SAEBENCH:
        return table
    due = name.replace(" ", "_")
    return table.rename(columns={"saebench_score": due, "saebench_score_std": f"{due}_std"})


def _origin(record: dict[str, Any], about: dict[str, Any] | None) -> dict[str, Any]:
    """Where and with what a trial ran."""
    started, ended = record.get("started"), record.get("ended")
    # Journals did not always have a start.
    seconds = None if started is None or ended is None else ended - started
    row: dict[str, Any] = {"wall_seconds": seconds}
    if about is None:
        return row
    plan = about["plan"]
    # Plans did not always have packs, nor workers that share a GPU.
    shares = plan.get("trials_per_pack", 1) * plan.get("workers_per_gpu", 1)
    gpus = plan["workers_per_trial"] / shares if plan["gpus"] else 0
    return row | {
        "gpu_hours": None if seconds is None else seconds * gpus / 3600,
        "git_commit": about["git_commit"],
        "versions": json.dumps({"python": about["python"]} | about["versions"]),
    }


def _trained(record: dict[str, Any]) -> dict[str, int]:
    """How far it was trained: to its last rung, or where it failed to the last logged step."""
    steps = [(point["step"], point["tokens"]) for point in record["curve"][-1:]]
    rung = record["rung"]
    step, tokens = max([(rung.get("step", 0), rung.get("tokens", 0)), *steps])
    return {"training_steps": step, "tokens": tokens}


def _status(record: dict[str, Any]) -> str:
    """Why the score is what it is."""
    if record["state"] == "failed":
        return DIVERGED if record["error"].startswith(DIVERGED_ERROR) else "failed"
    return str(record["rung"]["status"])


def trial_row(record: dict[str, Any]) -> dict[str, Any]:
    """A row of `trials_table` from an `end` record, without what `_origin` adds."""
    spec, rung = record["spec"], record["rung"]
    regularizer, schedule = dict(spec["regularizer"]), dict(spec["alpha_schedule"])
    row: dict[str, Any] = {
        "trial": record["trial"],
        "state": record["state"],
        "stage": spec["stage"],
        "run": spec["run"],
        "score": rung.get("score", 0.0),  # without a rung what the sampler was told
        "heldout_score": rung.get("heldout_score"),
        "transferred_score": rung.get("transferred_score"),
        "saebench_score": rung.get("saebench_score"),
        "questions": asked(rung) if rung else None,
        "status": _status(record),
        "cause": rung.get("cause") if record["state"] != "failed" and rung else record["error"],
        "regularizer": regularizer.pop("name"),
        "alpha": spec["alpha"],
        "alpha_schedule": schedule.pop("name"),
        "group_update_period": regularizer.pop("group_update_period", None),
        "architecture": spec["sae"]["architecture"],
        "d_sae": spec["sae"]["d_sae"],
        "k": spec["sae"]["k"],
        "l1_coefficient": spec["sae"]["l1_coefficient"],
        "l0_coefficient": spec["sae"]["l0_coefficient"],
        "seed": spec["seed"],
        "seeds": spec.get("seeds", 1),
        **_trained(record),
        "attempts": record["attempts"],
        "config_hash": config_hash(spec),
        "error": record["error"],
    }
    row |= {f"regularizer.{name}": value for name, value in regularizer.items()}
    row |= {f"alpha_schedule.{name}": value for name, value in schedule.items()}
    training = {n: v for n, v in spec["training"].items() if not isinstance(v, list | tuple)}
    row |= {f"training.{name}": value for name, value in training.items()}
    if not rung:
        return row
    metrics = rung["metrics"]
    row |= {name: metrics[name] for name in metrics if name in TRIAL_COLUMNS and name != "alpha"}
    row |= {name: rung[name] for name in ("train_seconds", "score_seconds")}
    row |= {f"{name}_std": rung.get(f"{name}_std") for name in SCORES}
    seeds = [seed["metrics"] for seed in seed_records(rung)]
    if len(seeds) > 1:
        row |= {f"{name}_std": statistics.stdev(s[name] for s in seeds) for name in SPREAD}
    row["tokens_per_second"] = rung["tokens"] * row["seeds"] / rung["train_seconds"]
    result = rung["halves"]["search"]
    row["frontier"] = result["frontier"]
    row |= rung.get("sparse_probing") or {}
    for threshold, count in result["eligible_features"].items():
        row[f"eligible_features_{threshold}"] = count
    best = result["best"]
    if best:
        row |= {
            "forget_accuracy": best["forget_correct"] / best["forget_total"],
            "retain_accuracy": best["retain_correct"] / best["retain_total"],
            "best_retain_threshold": best["retain_threshold"],
            "best_n_features": best["n_features_used"],
            "best_multiplier": best["multiplier"],
        }
        names = ("forget_correct", "forget_total", "retain_correct", "retain_total")
        row |= {name: best[name] for name in names}
    transferred = rung["halves"]["transferred"] or {}
    # Journals did not always have more than the counts.
    row |= {f"transferred_{name}": transferred.get(name) for name in ("status", "cause")}
    if "forget_total" in transferred:
        for side in ("forget", "retain"):
            right, total = transferred[f"{side}_correct"], transferred[f"{side}_total"]
            row[f"heldout_{side}_accuracy"] = right / total
            row |= {f"transferred_{side}_correct": right, f"transferred_{side}_total": total}
    whole = next(r for r in rung["conditioning"] if r["group"] == "all")
    # A journal of an older version lacks what was added since.
    row["dense_features"] = rung.get("dense_features")
    return row | {name: whole.get(name) for name in CONDITIONING}
