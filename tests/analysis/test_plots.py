"""A study's figures: five files, none of them blank, whatever became of the seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from raysae.analysis import plots
from raysae.analysis.plots import furthest, plot_schedules, plot_study

NAMES = ["unlearning_score", "l2_loss", "sparsity_loss", "loss", "training_curves"]
FIGURES = ("loss", "l2_loss", "sparsity_loss", "l0", "explained_variance", "penalty")


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 30)


def study(runs: int, seeds: int, failed: tuple[int, ...] = ()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trials and curves of a study; failed trials have no figures and a curve of one step."""
    rng = np.random.default_rng(0)
    trials: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for number in range(runs * seeds):
        ok = number not in failed
        figures = {name: float(rng.random()) if ok else np.nan for name in FIGURES}
        trials.append(
            {
                "trial": number,
                "run": f"run {number % runs}",
                "state": "finished" if ok else "failed",
                "score": float(rng.random()) if ok else 0.0,
                "heldout_score": float(rng.random()) if ok else 0.0,
            }
            | figures
        )
        for step in range(0, 50 if ok else 10, 10):
            values = {name: 100 * float(rng.random()) / (1 + step) for name in FIGURES}
            curves.append({"trial": number, "step": step, "tokens": 64 * step} | values)
    return pd.DataFrame(trials), pd.DataFrame(curves)


def assert_drawn(paths: list[Path], folder: Path) -> None:
    assert paths == [folder / f"{name}.png" for name in NAMES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        image = imread(path)[..., :3]
        assert (image.min(axis=-1) < 0.9).sum() > 100, f"{path.name} is blank"


@pytest.mark.parametrize(
    ("runs", "seeds", "failed"),
    [(3, 2, (0, 3, 5)), (9, 2, ())],
    ids=["a failed run and a failed seed", "more runs than colours"],
)
def test_a_study_has_five_figures(runs: int, seeds: int, failed: tuple[int, ...], tmp_path: Path):
    folder = tmp_path / "new" / "figures"
    assert_drawn(plot_study(*study(runs, seeds, failed), folder), folder)


def test_a_single_seed_leaves_its_mark_and_trials_of_no_run_leave_none(tmp_path: Path):
    trials, curves = study(1, 1)
    other = pd.DataFrame([{"trial": 9, "run": "", "state": "finished", "score": 1e9}])
    before = plot_study(trials, curves, tmp_path / "before")
    assert_drawn(before, tmp_path / "before")
    moved = pd.concat([trials.assign(l2_loss=3.0), other])
    after = plot_study(moved, curves, tmp_path / "after")
    pairs = zip(before, after, strict=True)
    changed = [a.stem for a, b in pairs if not np.array_equal(imread(a), imread(b))]
    assert changed == ["l2_loss"]


def test_saes_that_choose_k_features_have_no_figure_of_a_sparsity_loss(tmp_path: Path):
    trials, curves = (table.assign(sparsity_loss=0.0) for table in study(1, 1))
    drawn = [path.stem for path in plot_study(trials, curves, tmp_path)]
    assert drawn == [name for name in NAMES if name != "sparsity_loss"]


@pytest.mark.parametrize("stopped", [(0, 3), tuple(range(6))], ids=["some", "all"])
def test_trials_without_a_held_out_score_are_drawn_with_the_other(
    stopped: tuple[int, ...], tmp_path: Path
):
    trials, curves = study(3, 2)
    trials.loc[list(stopped), "state"] = "stopped"
    trials.loc[list(stopped), "heldout_score"] = np.nan
    assert_drawn(plot_study(trials, curves, tmp_path), tmp_path)


def test_a_study_of_failed_trials_has_no_figures(tmp_path: Path):
    folder = tmp_path / "figures"
    assert plot_study(*study(1, 2, failed=(0, 1)), folder) == []
    assert not folder.exists()


def test_schedules_are_drawn_as_they_are_given_a_line_each():
    factors = {"flat": [1.0, 1.0, 1.0], "falling": [1.0, 0.5, 0.0]}
    upper, lower = plot_schedules(factors, [0.6, 0.4, 0.2], target=0.3).axes
    drawn = {line.get_label(): line.get_ydata().tolist() for line in upper.lines}
    assert drawn == factors
    overlap, target = lower.lines
    assert overlap.get_ydata().tolist() == [0.6, 0.4, 0.2]
    assert list(target.get_ydata()) == [0.3, 0.3]


def test_of_a_search_a_row_is_a_regularizer_and_what_was_stopped_is_no_part_of_its_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trials, curves = study(2, 3)
    trials = trials.assign(run="", regularizer=["none", "grouped"] * 3)
    trials.loc[5, "state"] = "stopped"
    curves = curves[(curves["trial"] != 5) | (curves["step"] < 20)]
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_figure", lambda *_: drawn.append(original(*_)) or drawn[-1])
    assert_drawn(plot_study(trials, curves, tmp_path, "regularizer"), tmp_path)
    _, axes = drawn[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "grouped"]
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
    done = trials[trials["state"] == "finished"].groupby("regularizer")["l2_loss"].mean()
    assert means == pytest.approx([done["none"], done["grouped"]])
    kept = furthest(trials, curves, "regularizer")
    assert set(kept["trial"]) == {0, 1, 2, 3, 4}


original = plots._figure
