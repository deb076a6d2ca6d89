"""A study through Ray: its table on the terminal and in a file, and its five figures."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console

from raysae.config import load_config
from raysae.search.run import resolve, run_search

pytestmark = pytest.mark.search

STUDY = """
sae: {architecture: standard, d_sae: 256, l1_coefficient: 2.0}
training: {tokens: 32_768, batch_size: 512, lr: 3.0e-3}
search: {seeds: 2, scheduler: {name: none}}
resources: {workers: 1}
runs:
  0 baseline: {regularizer: {name: none}}
  1 grouping:
    regularizer: {name: grouped, group_update_period: 16}
    alpha: 1.0
"""
FIGURES = ["unlearning_score", "l2_loss", "sparsity_loss", "loss", "training_curves"]


def test_a_study_ends_with_its_table_and_figures(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    out, printed = tmp_path / "run", io.StringIO()
    out.mkdir()
    console = Console(file=printed, width=200)
    outcome = run_search(resolve(load_config(tmp_path / "study.yaml")), out, console)
    assert (outcome.trials, outcome.failed) == (4, 0), outcome.first_error

    trials, runs = pd.read_csv(out / "trials.csv"), pd.read_csv(out / "runs.csv")
    assert (trials["training_steps"] == 64).all()
    assert runs["run"].tolist() == ["0 baseline", "1 grouping"]
    assert (runs[["seeds", "failed", "training_steps"]] == [2, 0, 64]).all(axis=None)
    for name in ("score", "heldout_score", "l2_loss", "sparsity_loss", "loss", "l0"):
        means = trials.groupby("run", sort=False)[name].mean()
        assert runs[name].tolist() == pytest.approx(means.tolist()), name
        assert runs[f"{name}_std"].notna().all(), name
    held_out = trials.pivot_table(index="seed", columns="run", values="heldout_score")
    difference = (held_out["1 grouping"] - held_out["0 baseline"]).mean()
    assert runs.loc[1, "difference"] == pytest.approx(difference)

    lines = printed.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Runs: mean"))
    header, baseline, grouping = lines[start + 1 : start + 4]
    for name in ("run", "seeds", "score", "held-out", "− baseline", "L2 loss", "sparsity", "loss",
                 "L0", "EV", "dead", "κ", "steps"):  # fmt: skip
        assert name in header
    for line, (_, row) in zip((baseline, grouping), runs.iterrows(), strict=True):
        assert line.startswith(row["run"])
        assert f"{row['score']:.3f} ± {row['score_std']:.3f}" in line
        assert f"{row['heldout_score']:.3f} ± {row['heldout_score_std']:.3f}" in line
        assert f"{row['l2_loss']:.2f} ± {row['l2_loss_std']:.2f}" in line
        assert " 64" in line
        why = row["zeros"] if isinstance(row["zeros"], str) else ""
        assert (row["score"] > 0 or why) and why in line

    figures = out / "figures"
    assert {f"{name}.png" for name in FIGURES} <= {path.name for path in figures.iterdir()}
    for name in FIGURES:
        image = imread(figures / f"{name}.png")[..., :3]
        assert (image.min(axis=-1) < 0.9).sum() > 1000, f"{name} is blank"
