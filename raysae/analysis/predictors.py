"""Does the conditioning of a decoder predict its unlearning score, beyond what is known to matter?

Rank correlations, plain and partial, with intervals by bootstrap over configurations: seeds of one
configuration are no independent witnesses. Trials are compared at equal training steps only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits

from raysae.analysis.seeds import SCORES, seed_records

PREDICTORS = {
    "condition_number": "κ of the decoder",
    "condition_number_at_1e-06": "κ, tolerance 1e-6",
    "condition_number_at_0.001": "κ, tolerance 1e-3",
    "condition_number_at_0.01": "κ, tolerance 1e-2",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "coherence": "coherence",
    "forget_condition": "κ of forget features / random",
    "retain_condition": "κ of retain features / random",
    "forget_retain_overlap": "forget–retain subspace overlap",
    "forget_retain_squared_cosine": "forget–retain squared cosine",
    "median_principal_angle": "median principal angle",
    "adjusted_rand_index": "group stability (adjusted Rand)",
}
"""Columns of the rungs table that are asked, with their names for a reader."""

SENSITIVITY = tuple(name for name in PREDICTORS if name.startswith("condition_number"))
"""The same κ at several tolerances of the numerical rank."""

COVARIATES = {"l0": "L0", "explained_variance": "explained variance", "dead_features": "dead"}
"""What a partial correlation holds fixed."""

OUTCOMES = {
    "saebench_score": "the score on all questions",
    "score": "the score on the questions that the search sees",
}
"""Columns of the rungs table that are predicted, with their names for a reader: `outcome_of`."""

MIN_TRIALS = 12
"""SAEs scored at one step. Below, an interval by bootstrap promises more than there is."""

MIN_CONFIGURATIONS = max(10, len(COVARIATES) + 3)
"""Different configurations among them, which are what is resampled: of three with five seeds each,
resamples are so few that chance alone has some interval leave out 0 in half of the cases, and a
partial correlation needs more of them than it holds fixed."""

MOST_EQUAL = 0.75
"""Share of the SAEs that may have one and the same value of a predictor: what lies at its bound in
nearly all of them says something about the few others alone."""

RESAMPLES = 2000

ASSOCIATION_COLUMNS = {
    "step": "training step of the rung (steps)",
    "outcome": "which score, a column of the rungs table: saebench_score where all SAEs at this "
    "step were asked all questions, else score",
    "predictor": "column of the rungs table",
    "trials": "SAEs compared, of a trial of several seeds each (count)",
    "configurations": "different configurations among them, which are resampled (count)",
    "rho": "Spearman rank correlation with the score (−1..1); nan if either is constant",
    "rho_low": "2.5 % of it over resamples",
    "rho_high": "97.5 %",
    "partial": "the same of what L0, explained variance and dead features leave of the ranks",
    "partial_low": "2.5 % of it over resamples",
    "partial_high": "97.5 %",
    "evidence": "whether the partial correlation's interval, widened for the number of predictors "
    "asked (Bonferroni), leaves out 0 (bool)",
}
"""Columns of `associations_table` with their meaning and unit."""


def rungs_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row an SAE that was scored, (trial, seed, step): scores, training figures, conditioning.

    Args:
        records: the whole journal.

    Returns:
        `trial`, `seed` (index), `step`, `configuration` (equal for seeds of one configuration), the
        scores, `objective`, the training metrics, the "all" row of the conditioning, and
        `forget_condition` and `retain_condition`: κ of those groups over the median of random rows
        of the same size.
    """
    from raysae.training.spec import config_hash

    # Neither seeds nor rungs make a configuration another: the best is trained twice.
    same = {"seed": 0, "seeds": 1, "rungs": []}
    configurations = {
        record["trial"]: config_hash(record["spec"] | same)
        for record in records
        if record["event"] == "end"
    }
    rows: dict[tuple[int, int, int], dict[str, Any]] = {}
    for record in records:
        if record["event"] != "rung":
            continue
        trial = record["trial"]
        for row in rung_rows(record):
            row["configuration"] = configurations.get(trial, f"trial {trial}")
            rows[trial, row["seed"], record["step"]] = row
    return (
        pd.DataFrame(list(rows.values())).sort_values(["step", "trial", "seed"], ignore_index=True)
        if (rows)
        else pd.DataFrame(columns=["trial", "seed", "step", "configuration", *SCORES, *PREDICTORS])
    )


def outcome_of(rungs: pd.DataFrame) -> str:
    """Which of `OUTCOMES` these rows of the rungs table can be compared by.

    On all questions where all have that score: a half is noisier.
    """
    whole, half = OUTCOMES
    return whole if rungs[whole].notna().all() else half


def rung_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `rungs_table` from one record of a rung, without their configuration."""
    rows = []
    for index, seed in enumerate(seed_records(record)):
        groups = {row["group"]: row for row in seed["conditioning"]}
        row = groups["all"] | seed["metrics"] | {name: seed.get(name) for name in SCORES}
        row |= {"trial": record["trial"], "seed": index}
        # What the sampler was told; journals did not always have it by seed.
        row["objective"] = seed.get("objective", seed["score"])
        for side in ("forget", "retain"):
            row[f"{side}_condition"] = _against_random(groups[side])
        rows.append(row)
    return rows


def associations_table(rungs: pd.DataFrame) -> pd.DataFrame:
    """One row a (step, predictor), columns as in `ASSOCIATION_COLUMNS`.

    Steps at which fewer SAEs than `MIN_TRIALS` or `MIN_CONFIGURATIONS` of them were scored are
    left out, and so are predictors that fewer have, or of which more than `MOST_EQUAL` have the
    same value.
    """
    rows: list[dict[str, Any]] = []
    for step, at_step in rungs.groupby("step"):
        asked = [name for name in PREDICTORS if name in at_step]
        present = at_step[asked].apply(pd.to_numeric, errors="coerce").replace(np.inf, np.nan)
        asked = [name for name in asked if _varies(present[name])]
        # Predictors that the same trials have share their resamples.
        masks = {name: tuple(present[name].notna()) for name in asked}
        outcome = outcome_of(at_step)
        for mask in dict.fromkeys(masks.values()):
            part = at_step[list(mask)]
            configurations = part["configuration"].nunique()
            if len(part) < MIN_TRIALS or configurations < MIN_CONFIGURATIONS:
                continue
            names = [name for name in asked if masks[name] == mask]
            found = _associate(
                present.loc[list(mask), names].to_numpy(dtype=float),
                part[outcome].to_numpy(dtype=float),
                part[list(COVARIATES)].to_numpy(dtype=float),
                part["configuration"].to_numpy(),
                comparisons=len(set(asked) - set(SENSITIVITY[1:])),
            )
            head = {"step": step, "outcome": outcome, "trials": len(part)}
            head["configurations"] = configurations
            rows += [
                head | {"predictor": name} | row for name, row in zip(names, found, strict=True)
            ]
    table = pd.DataFrame(rows, columns=list(ASSOCIATION_COLUMNS))
    order = {name: i for i, name in enumerate(PREDICTORS)}
    return table.sort_values(
        ["step", "predictor"], key=lambda c: c.map(order) if c.name == "predictor" else c,
        ignore_index=True,
    )  # fmt: skip


def _varies(values: pd.Series[float]) -> bool:
    """Whether enough of them differ, to six digits."""
    counts = values.dropna().map("{:.6g}".format).value_counts()
    return not counts.empty and bool(counts.iloc[0] <= MOST_EQUAL * counts.sum())


def rank_correlations(
    predictors: np.ndarray, outcome: np.ndarray, covariates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Spearman correlations of each predictor with the outcome, plain and partial.

    Partial: of the residuals that a linear fit of the covariates' ranks leaves of the ranks.

    Args:
        predictors: (n, p).
        outcome: (n,).
        covariates: (n, q); constant ones change nothing.

    Returns:
        Two vectors (p,), −1 to 1; nan where either side does not vary (beyond rounding).
    """
    everything = rankdata(np.column_stack([outcome, predictors, covariates]), axis=0)
    everything -= everything.mean(axis=0)
    return _of_ranks(everything, predictors.shape[1])


def _of_ranks(everything: np.ndarray, predictors: int) -> tuple[np.ndarray, np.ndarray]:
    """`rank_correlations` from centred ranks: outcome, predictors, covariates (n, 1 + p + q)."""
    ranks, design = np.split(everything, [1 + predictors], axis=1)
    fitted = design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
    return _correlations(ranks, ranks), _correlations(ranks - fitted, ranks)


class Resampled:
    """`rank_correlations` of samples in which rows are taken several times or not at all.

    Ranks follow from how often each value is taken, without sorting anything anew.
    """

    def __init__(self, predictors: np.ndarray, outcome: np.ndarray, covariates: np.ndarray) -> None:
        """As `rank_correlations`."""
        columns = np.column_stack([outcome, predictors, covariates]).T
        self._codes = [np.unique(column, return_inverse=True)[1] for column in columns]
        self._predictors = predictors.shape[1]

    def correlations(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the sample that takes row i `times[i]` times (n,), in whole numbers."""
        taken = times > 0
        weights = times[taken].astype(float)
        ranks = np.empty((len(weights), len(self._codes)))
        for column, codes in enumerate(self._codes):
            mine = codes[taken]
            counts = np.bincount(mine, weights)
            # Equal values share the mean of their ranks.
            ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[mine]
        ranks -= weights @ ranks / weights.sum()
        return _of_ranks(ranks * np.sqrt(weights)[:, None], self._predictors)


def _correlations(residuals: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Of column 0 with the others; nan where a residual is nothing but rounding of its ranks."""
    norms = np.linalg.norm(residuals, axis=0)
    left = norms > 1e-9 * np.maximum(np.linalg.norm(ranks, axis=0), 1)
    products = residuals[:, 1:].T @ residuals[:, 0]
    scale = norms[1:] * norms[0]
    usable = left[1:] & left[0]
    result = np.full(len(products), np.nan)
    np.divide(products, scale, out=result, where=usable)
    return np.clip(result, -1, 1)


def _associate(
    predictors: np.ndarray,
    outcome: np.ndarray,
    covariates: np.ndarray,
    configurations: np.ndarray,
    comparisons: int,
) -> list[dict[str, Any]]:
    names, member = np.unique(configurations, return_inverse=True)
    sample = Resampled(predictors, outcome, covariates)
    rng = np.random.default_rng(0)
    plain, partial = rank_correlations(predictors, outcome, covariates)
    resampled = []
    with threadpool_limits(limits=1):  # thousands of tiny fits: threads would only wait
        for _ in range(RESAMPLES):
            chosen = rng.integers(len(names), size=len(names))
            times = np.bincount(chosen, minlength=len(names))[member]
            resampled.append(sample.correlations(times))
    draws = np.array(resampled)  # (resamples, 2, p)
    results = []
    for i in range(len(plain)):
        row: dict[str, Any] = {"rho": plain[i], "partial": partial[i], "evidence": False}
        for kind, name in enumerate(("rho", "partial")):
            defined = draws[:, kind, i][np.isfinite(draws[:, kind, i])]
            # A predictor that hardly varies is constant in many resamples.
            enough = np.isfinite(row[name]) and len(defined) > 0.9 * RESAMPLES
            low, high = np.quantile(defined, (0.025, 0.975)) if enough else (np.nan, np.nan)
            row |= {f"{name}_low": low, f"{name}_high": high}
            if name == "partial" and enough:
                tail = 0.025 / max(comparisons, 1)
                wide = np.quantile(defined, (tail, 1 - tail))
                row["evidence"] = bool(wide[0] > 0 or wide[1] < 0)
        results.append(row)
    return results


def _against_random(row: dict[str, Any]) -> float:
    measured, random = row["condition_number"], row["random_condition_number_p50"]
    return np.nan if measured is None or random is None else measured / random
