"""What a search says at its end: the words and numbers that a reader needs are there."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from raysae.analysis.confirmation import COLUMNS
from raysae.analysis.describe import TRANSFERRED
from raysae.analysis.runs import FIGURES, runs_table
from raysae.search.summary import SHOWN, print_summary
from raysae.training.spec import TrialSpec

FACTS = {
    "wall_seconds": 321.4,
    "first_result_seconds": 45.6,
    "busy_share": 0.783,
    "peak_gib": 5.25,
}
NO_VERDICTS = pd.DataFrame(columns=list(COLUMNS))
COUNTS = ("forget_correct", "forget_total", "retain_correct", "retain_total")


class Ended:
    """Rows of a trials table and the journal's records behind them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []

    def add(self, spec: TrialSpec, score: float, **changes: Any) -> None:
        row: dict[str, Any] = {
            "trial": spec.number,
            "state": "finished",
            "stage": spec.stage,
            "run": spec.run,
            "seed": spec.seed,
            "seeds": spec.seeds,
            "score_std": np.nan,
            "heldout_score_std": np.nan,
            "saebench_score_std": np.nan,
            "dead_features_std": np.nan,
            "regularizer": spec.regularizer.name,
            "status": "ok",
            "error": "",
            "tokens": 1536,
            "training_steps": 24,
        }
        row |= dict.fromkeys(FIGURES, 0.0) | {"score": score}
        row |= {"heldout_score": score / 2, "saebench_score": score / 4}
        row |= dict(zip(COUNTS, (20 - round(20 * score), 20, 199, 200), strict=True))
        row |= {"l0": 4.25, "explained_variance": 0.875, "dead_features": 3.0}
        self.rows.append(row | {"condition_number": 12.34} | changes)
        self.records.append({"trial": spec.number, "spec": spec.to_dict()})

    def fail(self, spec: TrialSpec, error: str) -> None:
        nothing = dict.fromkeys((*FIGURES, *COUNTS), np.nan)
        nothing |= {"tokens": 0, "training_steps": 0}
        nothing |= {"state": "failed", "status": "failed", "error": error}
        self.add(spec, 0.0)
        self.rows[-1] |= nothing | {"score": 0.0}


@pytest.fixture
def ended() -> Ended:
    return Ended()


@pytest.fixture
def summary(ended: Ended) -> Callable[..., list[str]]:
    """The lines that are printed, without spaces at their ends."""

    def lines(confirmation: pd.DataFrame = NO_VERDICTS, width: int = 200) -> list[str]:
        out = StringIO()
        console = Console(file=out, width=width)
        trials = pd.DataFrame(ended.rows)
        runs = runs_table(trials[trials["stage"] == "search"])
        folder = Path("/runs/mine")
        print_summary(console, trials, ended.records, confirmation, runs, folder, FACTS)
        return [line.rstrip() for line in out.getvalue().splitlines()]

    return lines


def table_rows(lines: list[str]) -> list[list[str]]:
    """The words of the leaderboard's rows: those that begin with a trial's number and score."""
    return [line.split() for line in lines if re.match(r" *\d+  +\d\.\d{3} ", line)]


def only(lines: list[str], start: str) -> str:
    (line,) = (line for line in lines if line.startswith(start))
    return line


# --- A search -------------------------------------------------------------------------------------


def test_the_leaderboard_has_every_figure_of_a_trial(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0, alpha=0.0), 0.1)
    grouped = {"group_update_period": 7, "n_groups": 3}
    spec = make_spec("topk", "grouped", grouped, number=1, alpha=0.3, schedule="cosine")
    ended.add(spec, 0.4)
    lines = summary()
    header = next(line for line in lines if "held-out" in line and "SAEBench" in line)
    names = "trial score held-out SAEBench forget retain L0 EV dead κ steps configuration"
    assert header.split() == names.split()
    figures = "0.400 0.200 0.100 12/20 199/200 4.2 0.875 3 12.3 24"
    words = "grouped period=7 groups=3 α=0.3 cosine k=4"
    first, second = table_rows(lines)
    assert first == ["1", *figures.split(), *words.split()]
    assert second[:2] == ["0", "0.100"]
    assert second[-3:] == ["none", "k=4", "(baseline)"]


def test_those_trained_longest_come_first_then_the_best(ended: Ended, summary, make_spec):
    for number, (tokens, score) in enumerate([(512, 0.9), (1536, 0.2), (512, 0.1), (1536, 0.5)]):
        state = "finished" if tokens == 1536 else "stopped"
        ended.add(make_spec(number=number), score, tokens=tokens, state=state)
    assert [row[0] for row in table_rows(summary())] == ["3", "1", "0", "2"]


def test_the_best_is_named_beside_the_baseline(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0, alpha=0.0), 0.1)
    ended.add(make_spec(number=1, regularizer="fixed_orthogonal", alpha=0.5), 0.4)
    ended.add(make_spec(number=2, regularizer="fixed_orthogonal"), 0.3)
    lines = summary()
    best = only(lines, "Best:")
    assert "trial 1, unlearning score 0.400 (held-out 0.200): fixed_orthogonal α=0.5" in best
    baseline = only(lines, "Baseline:")
    assert "trial 0, unlearning score 0.100 (held-out 0.050): none k=4" in baseline
    assert "difference +0.300" in baseline
    assert "picked among 3" in baseline


def test_the_best_has_the_highest_score_however_long_its_run_was_to_be(
    ended: Ended, summary, make_spec
):
    ended.add(make_spec(number=0, steps=24), 0.1)
    ended.add(make_spec(number=1, steps=12), 0.4, tokens=768)
    assert "trial 1," in only(summary(), "Best:")


def test_a_trial_that_was_stopped_is_not_the_best(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0), 0.1)
    ended.add(make_spec(number=1), 0.9, tokens=512, state="stopped")
    lines = summary()
    assert "trial 0," in only(lines, "Best:")
    assert not [line for line in lines if line.startswith("Baseline:")]


def test_a_stopped_trial_has_a_dash_and_a_reason_instead_of_a_held_out_score(
    ended: Ended, summary, make_spec
):
    ended.add(make_spec(number=0), 0.1)
    unasked = dict.fromkeys(("heldout_score", "saebench_score"), np.nan)
    for number, step in ((1, 12), (2, 6), (3, 12)):
        early = {"tokens": 64 * step, "training_steps": step, "state": "stopped"}
        ended.add(make_spec(number=number), 0.3, **early | unasked)
    lines = summary()
    first, *stopped = table_rows(lines)
    assert "–" not in first
    assert len(stopped) == 3 and all(row[1:4] == ["0.300", "–", "–"] for row in stopped)
    text = " ".join(" ".join(lines).split())
    assert "–: stopped at step 6 or 12: scored on the questions searched on alone" in text
    assert "nan" not in text


def test_the_cause_of_a_zero_is_beside_it(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0), 0.0, status="retain_gate_failed", forget_correct=np.nan)
    (row,) = table_rows(summary())
    assert "[retain_gate_failed]" in row
    assert "nan" not in " ".join(row)


def test_the_baseline_is_shown_even_behind_all_others(ended: Ended, summary, make_spec):
    for number in range(SHOWN + 5):
        ended.add(make_spec(number=number), 0.01 * number)
    lines = summary()
    numbers = [row[0] for row in table_rows(lines)]
    assert numbers == [*(str(n) for n in range(SHOWN + 4, 4, -1)), "0"]
    assert any("15 trials" in line for line in lines)


def test_failed_trials_are_named_with_their_reason(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0), 0.1)
    for number, error in enumerate(["loss is nan", "out of [red]memory", "loss is nan"], 1):
        ended.fail(make_spec(number=number), error)
    lines = summary()
    assert only(lines, "failed: trial 1, 3") == "failed: trial 1, 3: loss is nan"
    assert only(lines, "failed: trial 2") == "failed: trial 2: out of [red]memory"
    assert [row[0] for row in table_rows(lines)] == ["0"]


def test_a_search_of_failed_trials_ends_with_their_reasons(ended: Ended, summary, make_spec):
    ended.fail(make_spec(number=0), "the pool is gone")
    lines = summary()
    assert "failed: trial 0: the pool is gone" in lines
    assert not [line for line in lines if line.startswith("Best:")]


def test_times_memory_and_places_are_named(ended: Ended, summary, make_spec):
    ended.add(make_spec(), 0.1)
    text = "\n".join(summary())
    assert "321 s in all, first result after 46 s; 78% of wall" in text
    assert "peak memory 5.2 GiB" in text
    assert "Everything is in /runs/mine" in text
    for name in ("trials.parquet", "journal.jsonl", "best/", "trials/NNNN/"):
        assert name in text


# --- A study --------------------------------------------------------------------------------------


def test_a_study_ends_with_its_runs(ended: Ended, summary, make_spec):
    for seed, (base, strong) in enumerate([(0.2, 0.6), (0.0, 0.4), (0.4, 0.8)]):
        ended.add(
            make_spec(number=2 * seed, run="0 baseline", seed=seed),
            base,
            status="ok" if base else "no_effect",
            l2_loss=10.0 + seed,
        )
        spec = make_spec(number=2 * seed + 1, run="1 strong", seed=seed, regularizer="grouped")
        ended.add(spec, strong, l2_loss=20.0)
    lines = summary(width=220)
    baseline, strong = only(lines, "0 baseline"), only(lines, "1 strong")
    assert "3  0.200 ± 0.200  0.100 ± 0.100" in baseline
    assert "11.00 ± 1.00" in baseline
    assert "1 × no_effect" in baseline
    assert "3  0.600 ± 0.200  0.300 ± 0.100  +0.200 [+0.200, +0.200]" in strong
    assert "20.00 ± 0.00" in strong
    assert "0.875" in strong and " 4.2 ± 0.0 " in strong
    assert not [line for line in lines if "Leaderboard" in line or line.startswith("Best:")]


def test_a_study_of_one_seed_shows_no_spread(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0, run="only"), 0.25)
    row = only(summary(), "only")
    assert row.split()[:4] == ["only", "1", "0.250", "0.125"]
    assert "±" not in row


def test_failed_seeds_of_a_study_are_named(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0, run="weak", seed=0), 0.25)
    ended.fail(make_spec(number=1, run="weak", seed=1), "loss is nan")
    lines = summary()
    assert only(lines, "weak").split()[:3] == ["weak", "1", "0.250"]
    assert "failed: trial 1: loss is nan" in lines


# --- A confirmation -------------------------------------------------------------------------------


def verdict(**changes: Any) -> dict[str, Any]:
    row = {
        "candidate": 1,
        "baseline": "none",
        "seeds": 3,
        "candidate_heldout": 0.5,
        "baseline_heldout": 0.25,
        "difference": 0.25,
        "low": 0.125,
        "high": 0.375,
        "p": 0.0123,
        "p_holm": 0.0246,
        "wins": 3,
        "beats": True,
        "worse": False,
    }
    return row | changes


def test_a_confirmation_says_who_beats_whom_by_how_much(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0), 0.1)
    ended.add(make_spec(number=1, regularizer="importance", alpha=0.5), 0.4)
    ended.add(make_spec(number=2, stage="confirmation", run="trial 1"), 0.9)
    unclear = {"baseline": "fixed_orthogonal", "low": -0.125, "wins": 2, "beats": False}
    table = pd.DataFrame([verdict(), verdict(**unclear)], columns=list(COLUMNS))
    lines = summary(table)
    first, second = (line for line in lines if line.startswith("Confirmation:"))
    assert "trial 1 (importance α=0.5 constant k=4) beats none" in first
    assert "held-out score 0.500 against 0.250" in first
    figures = "difference +0.250 [+0.125, +0.375], p 0.012 (Holm 0.025), ahead in 3 of 3"
    assert f"{figures} fresh seeds" in first
    assert "is not shown to beat fixed_orthogonal" in second
    assert "[-0.125, +0.375], p 0.012 (Holm 0.025), ahead in 2 of 3 fresh seeds" in second


def test_a_candidate_that_is_worse_is_called_that(ended: Ended, summary, make_spec):
    for number in range(2):
        ended.add(make_spec(number=number), 0.1)
    row = verdict(difference=-0.25, low=-0.375, high=-0.125, wins=0, beats=False, worse=True)
    alone = verdict(seeds=1, low=np.nan, high=np.nan, p=1.0, p_holm=1.0, beats=False)
    lines = summary(pd.DataFrame([row, alone], columns=list(COLUMNS)))
    first, second = (line for line in lines if line.startswith("Confirmation:"))
    assert ") is worse than none at" in first
    assert "difference -0.250 [-0.375, -0.125], p 0.012" in first
    assert ") is not shown to beat none at" in second and "difference +0.250, p 1 (" in second


def test_a_confirmation_says_what_the_transferred_score_says(ended: Ended, summary, make_spec):
    for number in range(2):
        ended.add(make_spec(number=number), 0.1)
    other = {
        f"transferred_{name}": verdict()[name] for name in ("low", "high", "p", "p_holm", "wins")
    }
    other |= {"candidate_transferred": 0.375, "baseline_transferred": 0.125}
    other |= {"transferred_difference": 0.25, "transferred_beats": True, "transferred_worse": False}
    differs = other | {"transferred_beats": False, "transferred_low": -0.25}
    table = pd.DataFrame([verdict(**other), verdict(**differs)], columns=list(COLUMNS))
    lines = summary(table)
    first, second = (line for line in lines if line.startswith("Confirmation:"))
    figures = "0.375 against 0.125, difference +0.250 [+0.125, +0.375], p 0.012 (Holm 0.025), "
    figures += "ahead in 3 of 3"
    assert first.endswith(f"3 of 3 fresh seeds. By the transferred score: {figures}")
    assert "Caution, by the transferred score it is not shown to beat it: 0.375" in second
    assert TRANSFERRED in lines
    old = summary(pd.DataFrame([verdict()], columns=list(COLUMNS)))
    assert only(old, "Confirmation:").endswith("ahead in 3 of 3 fresh seeds")
    assert not [line for line in old if "transferred" in line]


def test_trials_of_the_confirmation_are_not_on_the_leaderboard(ended: Ended, summary, make_spec):
    ended.add(make_spec(number=0), 0.1)
    ended.add(make_spec(number=1, stage="confirmation", run="trial 0"), 0.9)
    ended.fail(make_spec(number=2, stage="confirmation", run="trial 0"), "lost")
    lines = summary()
    assert [row[0] for row in table_rows(lines)] == ["0"]
    assert "trial 0," in only(lines, "Best:")
    assert "failed: trial 2: lost" in lines
    assert not [line for line in lines if line.startswith("Confirmation:")]
