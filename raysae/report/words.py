"""The report's sentences: what was found, how sure it is, and what cannot be said."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from raysae.analysis.describe import (
    NOT_ASKED,
    TRANSFERRED,
    by_transferred,
    describe,
    difference_of,
    disagreement,
    p_of,
    why_not_asked,
    word_of,
)
from raysae.analysis.predictors import (
    MIN_CONFIGURATIONS,
    MIN_TRIALS,
    OUTCOMES,
    PREDICTORS,
    SENSITIVITY,
)
from raysae.analysis.statistics import SIGNIFICANT
from raysae.report.run import Run
from raysae.report.style import Plot
from raysae.worlds.world import SAEBENCH


def headline(run: Run) -> str:
    """The answer in one sentence."""
    if run.trials.empty:
        return "No trial has ended: there is nothing to report yet."
    if run.scored.empty:
        return f"Every trial failed ({len(run.searched)}): there is no score."
    if not run.runs.empty:
        return _study_headline(run)
    if run.finished.empty:
        return "No trial was trained to its end: the scores below are of trials stopped early."
    best = run.finished.iloc[0]
    name = describe(run.specs[best["trial"]])
    if best["score"] == 0:
        return f"Every trial trained to its end has score 0; the first because: {best['cause']}."
    if run.confirmation.empty:
        return (
            f"The best of {len(run.scored)} trials is {name}: a lead, not a proof, since nothing "
            "was trained again with fresh seeds."
        )
    against_none = run.confirmation[run.confirmation["baseline"] == "none"]
    winners = against_none[against_none["beats"]]
    if not winners.empty:
        winner = winners.sort_values("difference", ascending=False).iloc[0]
        return (
            f"{describe(run.specs[winner['candidate']])} separates better than an SAE without a "
            f"regularizer: held-out score {_difference(winner)} over {winner['seeds']} fresh seeds"
            f"{_but(run, winner['candidate'])}{_caution(winner)}."
        )
    if against_none.empty:
        return f"The best trial, {name}, has no regularizer itself: none of the methods beat it."
    top = against_none.sort_values("difference", ascending=False).iloc[0]
    found = (
        "The best of this search are worse than an SAE without a regularizer"
        if top["worse"]
        else "No configuration of this search is shown to beat an SAE without a regularizer"
    )
    return (
        f"{found}: with fresh seeds {describe(run.specs[top['candidate']])} differs from it by "
        f"{_difference(top)} in held-out score{_caution(top)}."
    )


def _caution(row: pd.Series[Any]) -> str:
    """What the transferred score says, for who reads no further, where it does not agree."""
    other = disagreement(row.to_dict())
    return f"; caution: {other}" if other else ""


def _but(run: Run, candidate: int) -> str:
    """What the winner loses to, for who reads no further."""
    rows = run.confirmation
    lost = rows[(rows["candidate"] == candidate) & rows["worse"]]
    if lost.empty:
        return ""
    row = lost.iloc[0]
    return f"; but worse than {row['baseline']} by as sure a measure, {_difference(row)}"


def _study_headline(run: Run) -> str:
    runs = run.runs[run.runs["seeds"] > 0]
    if runs.empty:
        return "No run has a seed that was trained to its end."
    best = runs.sort_values("heldout_score", ascending=False).iloc[0]
    first = (
        f"The best of {len(runs)} runs by held-out score is {best['run']}: "
        f"{best['heldout_score']:.3f}, mean of {best['seeds']} seed{_s(best['seeds'])}"
    )
    if "difference" not in runs or runs["difference"].isna().all():
        return first + "."
    return f"{first}. {_against_baseline(runs[runs['difference'].notna()])}"


def _against_baseline(compared: pd.DataFrame) -> str:
    """What is shown of the runs of a study against the run without a regularizer, and what not."""
    if compared["difference_low"].isna().all():
        return (
            "With one seed each nothing is shown of how they differ from the run without a "
            "regularizer."
        )
    parts = []
    for column, one, several in (("beats", "beats", "beat"), ("worse", "is worse", "are worse")):
        names = compared.loc[compared[column].astype(bool), "run"].tolist()
        if names:
            verb = (one if len(names) == 1 else several) + (" than" if column == "worse" else "")
            parts.append(f"{', '.join(names)} {verb} the run without a regularizer")
    left = len(compared) - int(compared[["beats", "worse"]].astype(bool).to_numpy().sum())
    of = "" if len(compared) == 1 else f" after Holm's correction for {len(compared)} comparisons"
    test = f"paired t-test over seeds, p < {SIGNIFICANT}{of}"
    if not parts:
        return f"No run is shown to differ from the run without a regularizer ({test})."
    rest = f" No difference is shown of the other {left}." if left else ""
    return f"By held-out scores {'; '.join(parts)} ({test}).{rest}"


def _on_all(run: Run) -> str:
    """Name of the score on all questions."""
    name = run.about.get("score_name", SAEBENCH)
    return "SAEBench's score, all questions" if name == SAEBENCH else f"{name}, all questions"


def best_facts(run: Run) -> list[tuple[str, str]]:
    """The best trial of a search in name–value pairs; [] where none was trained to its end."""
    if run.finished.empty or not run.runs.empty:
        return []
    best = run.finished.iloc[0]
    trial = best["trial"]
    facts = [
        ("best configuration", f"trial {trial}: {describe(run.specs[trial])}"),
        (
            f"score, questions the search saw{_seeds(best)}",
            f"{_spread(best, 'score')}, the best of {len(run.scored)}",
        ),
        ("score, held-out questions", f"{_spread(best, 'heldout_score')}{_wilson(run, trial)}"),
        *_transferred_fact(run, best),
        (_on_all(run), _spread(best, "saebench_score")),
    ]
    again = run.confirmation[run.confirmation["candidate"] == trial]
    if not again.empty:
        row = again.iloc[0]
        transferred = row["candidate_transferred"]
        also = "" if pd.isna(transferred) else f" and {transferred:.3f} transferred"
        facts.append(
            (
                "the same, trained again",
                f"{row['candidate_heldout']:.3f} held-out{also}, mean of {row['seeds']} fresh "
                "seeds",
            )
        )
    baseline = run.finished[run.finished["regularizer"] == "none"]
    if not baseline.empty and baseline.iloc[0]["trial"] != trial:
        row = baseline.iloc[0]
        facts.append(
            (
                "best without a regularizer",
                f"trial {row['trial']}: {_spread(row, 'score')}, "
                f"held-out {_spread(row, 'heldout_score')} "
                f"({describe(run.specs[row['trial']])})",
            )
        )
    if best["status"] != "ok":
        facts.append(("why it is 0", str(best["cause"])))
    return facts


def why(run: Run, importances: Plot | None) -> list[str]:
    """What the score went with, a line each: the searched parameters, and conditioning."""
    if run.scored.empty:
        return []
    lines = [] if importances is None else [f"{importances.title}."]
    return [*lines, _conditioning_line(run)]


def _conditioning_line(run: Run) -> str:
    """The paragraph of `prediction` in one line."""
    table = run.associations
    table = table[~table["predictor"].isin(SENSITIVITY[1:])]
    if table.empty or table["rho"].isna().all():
        return "Whether conditioning predicts the score cannot be said from this run."
    last = table[table["step"] == table["step"].max()]
    found = last[last["evidence"]]
    at = f"at step {last['step'].iloc[0]}, {last['trials'].max()} SAEs"
    if found.empty:
        return (
            "No figure of conditioning or overlap is shown to predict the score beyond L0, "
            f"explained variance and dead features ({at})."
        )
    return (
        f"Beyond L0, explained variance and dead features the score goes with "
        f"{_list(found, 'partial')} ({at})."
    )


def spread_note(run: Run) -> str:
    """What ± means on the leaderboard, and how far the means without one spread; "" for one seed a
    trial."""
    scored = run.scored
    if scored.empty or scored["seeds"].max() <= 1:
        return ""
    note = (
        "±: standard deviation over the seeds of a trial; counts, status and κ are those of the "
        "seed with the median score."
    )
    spread = scored[["l0_std", "explained_variance_std"]].apply(pd.to_numeric).max()
    if spread.isna().any():
        return note
    return (
        f"{note} L0 and EV are means over seeds too, which differ by at most "
        f"± {spread['l0_std']:.2g} and ± {spread['explained_variance_std']:.2g}."
    )


def stopped_note(run: Run) -> str:
    """Why some trials have no held-out score; "" where all have one."""
    scored = run.scored
    why = why_not_asked(scored.loc[scored["heldout_score"].isna(), "training_steps"].tolist())
    return f"{NOT_ASKED}: {why}." if why else ""


def _seeds(row: pd.Series[Any]) -> str:
    return "" if row["seeds"] == 1 else f" ({row['seeds']} seeds)"


def _spread(row: pd.Series[Any], figure: str) -> str:
    spread = row[f"{figure}_std"]
    return f"{row[figure]:.3f}" + ("" if pd.isna(spread) else f" ± {spread:.3f}")


def _wilson(run: Run, trial: int) -> str:
    """The held-out score's interval by the questions' number."""
    return _interval(run, trial, run.results[trial]["halves"]["heldout"]["best"])


def _transferred_fact(run: Run, best: pd.Series[Any]) -> list[tuple[str, str]]:
    """The transferred score of a trial, with its interval or why the median seed's is 0; [] where
    the journal has none."""
    if pd.isna(best["transferred_score"]):
        return []
    found = run.results[best["trial"]]["halves"]["transferred"]
    if found["status"] == "ok":
        behind = _interval(run, best["trial"], found)
    else:
        whose = "the median seed's is 0" if "seeds" in run.results[best["trial"]] else "why"
        behind = f"; {whose}: {found['cause']}"
    score = _spread(best, "transferred_score")
    return [("score, transferred to held-out ones", f"{score}{behind}")]


def transferred_note(run: Run) -> str:
    """What the transferred score is, with how many trials' it was 0 and why; "" without one."""
    scored = run.scored[run.scored["transferred_score"].notna()]
    if scored.empty:
        return ""
    statuses = scored.loc[scored["transferred_status"] != "ok", "transferred_status"]
    counts = ", ".join(f"{count} × {status}" for status, count in statuses.value_counts().items())
    zeros = f" Median seeds for which it is 0: {counts}." if counts else ""
    return f"{TRANSFERRED.capitalize()}.{zeros}"


def _interval(run: Run, trial: int, best: dict[str, Any] | None) -> str:
    """Of 1 − the forget accuracy of an intervention, Wilson's, by the questions' number."""
    if not best or "forget_interval" not in best:
        return ""
    low, high = best["forget_interval"]
    whose = "; the median seed's" if "seeds" in run.results[trial] else ""
    return (
        f"{whose} [{1 - high:.3f}, {1 - low:.3f}] by the number of questions "
        f"({best['forget_total']})"
    )


def verdict(run: Run, row: pd.Series[Any]) -> str:
    """One line of the confirmation."""
    transferred = _with_minus(by_transferred(row.to_dict()))
    return (
        f"Trial {row['candidate']} ({describe(run.specs[row['candidate']])}) "
        f"{word_of(row.to_dict())} "
        f"{row['baseline']} at equal budget and sparsity: held-out "
        f"{row['candidate_heldout']:.3f} against {row['baseline_heldout']:.3f}, difference "
        f"{_difference(row)}, {p_of(row.to_dict())}, ahead in {row['wins']} of {row['seeds']} "
        f"fresh seeds.{f' {transferred}.' if transferred else ''}"
    )


def prediction(run: Run) -> str:
    """Whether conditioning or overlap predict the score, in one paragraph."""
    table = run.associations
    if table.empty:
        by_step = run.rungs.groupby("step")["configuration"].agg(["size", "nunique"])
        most = by_step.max() if len(by_step) else {"size": 0, "nunique": 0}
        return (
            "Whether conditioning or overlap predict the unlearning score cannot be said from this "
            f"run: it needs {MIN_TRIALS} SAEs of {MIN_CONFIGURATIONS} configurations scored at one "
            f"training step, and there are at most {most['size']} of {most['nunique']}."
        )
    asked = table[~table["predictor"].isin(SENSITIVITY[1:])]
    if asked["rho"].isna().all():
        return (
            "Whether conditioning or overlap predict the unlearning score cannot be said from this "
            "run: all scores are the same."
        )
    parts = []
    for step, part in asked.groupby("step"):
        parts.append(_at_step(int(str(step)), part))
    return " ".join(
        text for text in [*parts, _saturation(run), _tolerance(table), _limits(asked)] if text
    )


def _at_step(step: int, part: pd.DataFrame) -> str:
    usable = part[part["partial_low"].notna()]
    head = (
        f"At training step {step}, over {part['trials'].max()} SAEs of "
        f"{part['configurations'].max()} configurations{_outcome(part)}:"
    )
    plain = part[(part["rho_low"] > 0) | (part["rho_high"] < 0)]
    found = usable[usable["evidence"]]
    leads = usable[
        ((usable["partial_low"] > 0) | (usable["partial_high"] < 0)) & ~usable["evidence"]
    ]
    if plain.empty:
        first = "no figure of conditioning or overlap goes with the score,"
    else:
        alone = "by itself goes" if len(plain) == 1 else "go by themselves"
        first = f"{_list(plain, 'rho')} {alone} with the score,"
    if found.empty:
        second = (
            "and beyond L0, explained variance and dead features there is no evidence for any of "
            f"the {len(usable)}."
        )
    else:
        second = (
            "and what holds beyond L0, explained variance and dead features is "
            f"{_list(found, 'partial')}."
        )
    third = (
        f" {_list(leads, 'partial')} would stand out if it had been the only question; among "
        f"{len(usable)}, chance makes one such a find now and then."
        if not leads.empty
        else ""
    )
    return f"{head} {first} {second}{third}"


def _outcome(part: pd.DataFrame) -> str:
    """By which score, where it is not that on all questions."""
    outcome = part["outcome"].iloc[0]
    return "" if outcome == next(iter(OUTCOMES)) else f", by {OUTCOMES[outcome]}"


def _list(rows: pd.DataFrame, kind: str) -> str:
    words = [
        f"{PREDICTORS[row['predictor']]} (ρ {_signed(row[kind], 2)} "
        f"[{_signed(row[f'{kind}_low'], 2)}, {_signed(row[f'{kind}_high'], 2)}])"
        for _, row in rows.iterrows()
    ]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _tolerance(table: pd.DataFrame) -> str:
    last = table[(table["step"] == table["step"].max()) & table["predictor"].isin(SENSITIVITY)]
    last = last.dropna(subset=["partial"])
    if len(last) < 2:
        return (
            "How far this hangs on the tolerance of the numerical rank is not in this run's "
            "journal."
        )
    spread = last["partial"].max() - last["partial"].min()
    if spread < 0.05:
        return (
            "The tolerance of the numerical rank makes no difference: κ at cut-offs from rounding "
            f"to 1e-2 gives partial correlations within {spread:.2f} of each other."
        )
    values = ", ".join(
        f"{PREDICTORS[row['predictor']]}: {_signed(row['partial'], 2)}"
        for _, row in last.iterrows()
    )
    return f"The answer for κ hangs on the tolerance of the numerical rank ({values})."


def _saturation(run: Run) -> str:
    """The overlap of two row spaces says nothing once one of them fills the space."""
    last = run.rungs[run.rungs["step"] == run.rungs["step"].max()]
    full = int((last["forget_retain_overlap"] > 1 - 1e-9).sum())
    if full < len(last) / 4:
        return ""
    return (
        f"The overlap is 1 in {full} of {len(last)} SAEs at the last step, because the features "
        "of one side span the whole residual stream: among those it cannot tell."
    )


def _limits(asked: pd.DataFrame) -> str:
    text = (
        "These are correlations among trials whose regularizer moves both sides: none is a cause."
    )
    width = (asked["partial_high"] - asked["partial_low"]).median()
    if width > 0.5:
        text += (
            f" The intervals are {width:.1f} wide (median), so that even moderate relations can "
            "hide in them."
        )
    return text


def _difference(row: pd.Series[Any]) -> str:
    return _with_minus(difference_of(row.to_dict()))


def _with_minus(text: str) -> str:
    """With real minus signs in front of numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def _signed(value: float, digits: int = 3) -> str:
    """With its sign and a real minus; 0 has none."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def stability(run: Run) -> str:
    """How far groups stay the same at a regrouping, early in training and late."""
    curves = run.curves.dropna(subset=["group_stability"])
    if curves.empty:
        return (
            "Group stability: no trial of this run regrouped its features after the first time, or "
            "its journal is older than the measure (adjusted Rand index)."
        )
    curves = curves.merge(run.trials[["trial", "regularizer"]], on="trial")
    values = curves["group_stability"]
    by = curves.groupby("regularizer")["group_stability"].median().sort_values()
    parts = ", ".join(f"{name} {value:.2f}" for name, value in by.items())
    middle = curves["step"].max() / 2
    early, late = values[curves["step"] <= middle], values[curves["step"] > middle]
    course = (
        f" Up to step {middle:.0f} it is {early.median():.2f}, later {late.median():.2f}."
        if len(early) and len(late)
        else ""
    )
    return (
        "Group stability: at a regrouping the new groups agree with the old ones with an adjusted "
        f"Rand index of {values.median():.2f} (median of {len(values)} rows of the curves; 1: the "
        f"same groups, 0: as by chance; by regularizer: {parts}).{course}"
    )


def budget(run: Run) -> list[tuple[str, str]]:
    """What the run cost, in name–value pairs."""
    trials, facts = run.trials, run.facts
    states = trials["state"].value_counts()
    rows = [
        (
            "trials",
            f"{len(trials)}: "
            + ", ".join(
                f"{states[s]} {s}" for s in ("finished", "stopped", "failed") if s in states
            ),
        )
    ]
    confirmation = int((trials["stage"] == "confirmation").sum())
    if confirmation:
        rows.append(("of them in the confirmation", str(confirmation)))
    rows.append(("activation rows trained on", f"{trials['tokens'].sum():,.0f}"))
    for column, name in (("train_seconds", "training"), ("score_seconds", "scoring, last rungs")):
        rows.append((name, f"{pd.to_numeric(trials[column]).sum():,.0f} s"))
    planned = pd.Series([s["rungs"][-1] for s in run.specs.values()], dtype=float).sum()
    if planned and len(run.searched):
        saved = 1 - trials["tokens"].sum() / planned
        rows.append(("saved by stopping early", f"{saved:.0%} of the planned training"))
    hours = pd.to_numeric(trials["gpu_hours"], errors="coerce")
    if hours.notna().any():
        rows.append(("GPU-hours", f"{hours.sum():.2f}" if hours.sum() else "0 (ran on the CPU)"))
    names = {"wall_seconds": "wall time", "first_result_seconds": "first result after"}
    rows += [(name, f"{facts[key]:,.0f} s") for key, name in names.items() if key in facts]
    if "busy_share" in facts:
        rows.append(("training and scoring", f"{facts['busy_share']:.0%} of wall × workers"))
    if "peak_gib" in facts:
        rows.append(("peak memory", f"{facts['peak_gib']:.1f} GiB"))
    return rows
