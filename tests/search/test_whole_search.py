"""One whole search through Ray, as a user starts it, and what it leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sae_lens import SAE
from small_hub import small_world

from raysae.analysis.conditioning import COLUMNS as CONDITIONING_COLUMNS
from raysae.analysis.tables import TRIAL_COLUMNS
from raysae.journal import JOURNAL, ended_trials, read_journal
from raysae.store.activations import local_store
from raysae.training.loop import train
from raysae.training.run import Progress, Rung, SAERun
from raysae.training.spec import TrialSpec
from raysae.unlearning import (
    CachedEvaluator,
    SAEBenchEvaluator,
    build_cache,
    default_eval_config,
    halve,
)
from raysae.worlds import load_world
from raysae.worlds.model import load_model

pytestmark = pytest.mark.search


@pytest.fixture(scope="module")
def search(seen):
    """The run folder and what was printed."""
    return seen.out, seen.stdout


@pytest.fixture(scope="module")
def world():
    return load_world("embedded")


@pytest.fixture(scope="module")
def model(world):
    torch.set_num_threads(1)
    return load_model(world)


def test_every_trial_was_trained_and_explained(search):
    trials = pd.read_parquet(search[0] / "trials.parquet")
    assert (trials["stage"] == "search").sum() == 3
    assert (trials["training_steps"] == 512).all()
    assert (trials["state"] == "finished").all()
    assert (trials["cause"].str.len() > 0).all()
    assert trials["score"].nunique() > 1
    assert trials.loc[0, "regularizer"] == "none"
    assert set(TRIAL_COLUMNS) <= set(trials.columns)


def test_the_best_is_confirmed_beside_the_baselines_with_fresh_seeds(search):
    trials = pd.read_parquet(search[0] / "trials.parquet")
    searched = trials[trials["stage"] == "search"]
    saes = pd.read_parquet(search[0] / "seeds.parquet")
    confirmed = saes[saes["stage"] == "confirmation"]
    best = searched.sort_values("score", ascending=False, kind="stable").iloc[0]
    candidate = confirmed[confirmed["run"] == f"trial {best['trial']}"]
    assert set(candidate["regularizer"]) == {best["regularizer"]}
    # Two seeds, which two workers share.
    assert set(confirmed.groupby("run")["seed"].nunique()) == {2} and len(candidate) == 2
    plan = json.loads((search[0] / "about.json").read_text())["plan"]
    assert confirmed.groupby("run")["trial"].nunique().eq(min(2, plan["workers"])).all()
    assert not set(confirmed["seed"]) & set(searched["seed"])
    baselines = {"none", "fixed_orthogonal"} - {best["regularizer"]}
    assert baselines <= set(confirmed["regularizer"])
    assert set(confirmed["k"]) == {best["k"]}
    verdicts = pd.read_csv(search[0] / "confirmation.csv")
    assert set(verdicts["baseline"]) == baselines
    for _, row in verdicts.iterrows():
        others = confirmed[confirmed["run"].str.startswith(f"{row['baseline']} beside")]
        difference = candidate["heldout_score"].mean() - others["heldout_score"].mean()
        assert row["difference"] == pytest.approx(difference)
        difference = candidate["transferred_score"].mean() - others["transferred_score"].mean()
        assert row["transferred_difference"] == pytest.approx(difference)
    assert "Confirmation: trial" in search[1]


def test_every_finished_trial_was_probed(search):
    trials = pd.read_parquet(search[0] / "trials.parquet")
    assert trials["sae_top_1"].between(0.5, 1.0).all()
    assert trials["llm_top_1"].nunique() == 1


def test_the_run_folder_holds_what_the_readme_promises(search):
    out = search[0]
    for name in ("trials", "seeds", "curves", "conditioning"):
        parquet, csv = pd.read_parquet(out / f"{name}.parquet"), pd.read_csv(out / f"{name}.csv")
        assert len(parquet) == len(csv) > 0
    conditioning = pd.read_parquet(out / "conditioning.parquet")
    assert list(conditioning.columns) == list(CONDITIONING_COLUMNS)
    assert {"all", "forget", "retain"} <= set(conditioning["group"])
    about = json.loads((out / "about.json").read_text())
    assert about["versions"]["sae-bench"] == "0.6.0"
    assert len(about["world_fingerprint"]) == 64
    assert about["store"] == about["sessions"][0]["store"]
    assert f"Store unchanged: {about['store']['sha256'][:12]} (" in search[1]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["hook"] == "blocks.0.hook_resid_post"
    assert (out / "optuna.journal").stat().st_size > 0


def test_the_terminal_shows_dashboard_leaderboard_best_and_baseline(search):
    for words in (
        "Ray dashboard: http",
        "Leaderboard",
        "(baseline)",
        "Best: trial",
        str(search[0]),
    ):
        assert words in search[1]


@pytest.fixture
def best(search):
    """The best SAE as SAELens loads it, the steps that it was trained for, and its stored score."""
    folder = search[0] / "best"
    stored = json.loads((folder / "unlearning_eval_results.json").read_text())
    steps = json.loads((folder / "trial.json").read_text())["training_steps"]
    score = stored["eval_result_metrics"]["unlearning"]["unlearning_score"]
    return SAE.load_from_disk(folder), steps, score


@pytest.fixture(scope="module")
def evaluator(world, model):
    config = default_eval_config(world)
    cache = build_cache(world, model, world.default_hook_name, config)
    return CachedEvaluator(world, model, cache, config)


def test_sae_lens_loads_the_best_sae_and_it_has_its_stored_score(best, evaluator):
    sae, steps, score = best
    assert evaluator.evaluate(sae, training_steps=steps).score == score


def test_saebench_gives_the_best_sae_the_answers_that_it_is_scored_by(best, model, tmp_path):
    """On some of the questions and texts: it asks all of them below."""
    sae, steps, _ = best
    few = small_world(n_forget=24, n_retain=12, n_texts=300)
    known = {name: tuple(range(len(asked))) for name, asked in few.questions.items()}
    few, config = replace(few, known_questions=known), default_eval_config(few)
    hook = few.default_hook_name
    cache = build_cache(few, model, hook, config)
    fast = CachedEvaluator(few, model, cache, config).evaluate(sae, training_steps=steps)
    slow = SAEBenchEvaluator(few, model, hook, config, tmp_path).evaluate(sae, training_steps=steps)
    turned = [(rows != fast.baseline[name]).sum() for name, rows in fast.is_correct.items()]
    assert sum(turned) > 20
    assert slow.to_dict() | {"evaluator": ""} == fast.to_dict() | {"evaluator": ""}
    for name, rows in slow.is_correct.items():
        assert np.array_equal(fast.is_correct[name], rows), name


@pytest.mark.slow
def test_saebench_gives_the_best_sae_its_stored_score(best, world, model, tmp_path):
    sae, steps, score = best
    config = default_eval_config(world)
    reference = SAEBenchEvaluator(world, model, world.default_hook_name, config, tmp_path)
    assert reference.evaluate(sae, training_steps=steps).score == score


def test_a_trial_is_the_mean_of_its_seeds_with_their_spread_beside_it(search):
    trials = pd.read_parquet(search[0] / "trials.parquet").set_index("trial")
    seeds = pd.read_parquet(search[0] / "seeds.parquet")
    searched = seeds[seeds["stage"] == "search"]
    assert (searched.groupby("trial")["seed"].nunique() == 2).all()
    for figure in ("score", "heldout_score", "transferred_score", "saebench_score"):
        by_trial = seeds.groupby("trial")[figure]
        assert trials[figure].to_dict() == pytest.approx(by_trial.mean().to_dict())
        # A trial of the confirmation may have a single seed, which has no spread.
        spread = pytest.approx(by_trial.std().to_dict(), nan_ok=True)
        assert trials[f"{figure}_std"].to_dict() == spread
    assert trials["score_std"].max() > 0


def test_the_same_trial_without_ray_gives_the_same_numbers(search, world, model, evaluator):
    record = ended_trials(read_journal(search[0] / JOURNAL))[1]
    events: list[list[Progress | Rung]] = []
    store = local_store(world, model, world.default_hook_name)
    runs = [SAERun(member, store) for member in TrialSpec(**record["spec"]).members()]
    train(
        runs,
        lambda saes, steps: [evaluator.evaluate(sae, training_steps=steps) for sae in saes],
        lambda told: events.append(told) or [True] * len(told),
    )
    assert len(events[-1]) == len(record["rung"]["seeds"]) == 2
    for rung, kept in zip(events[-1], record["rung"]["seeds"], strict=True):
        assert isinstance(rung, Rung)
        assert rung.result.score == kept["saebench_score"]
        halves = halve(rung.result, 0)
        assert halves.search.score == kept["score"]
        assert halves.heldout.score == kept["heldout_score"]
        assert halves.transferred.score == kept["transferred_score"]
        assert rung.result.to_dict() == kept["result"]
        assert rung.metrics == kept["metrics"]
    curve = [[e.metrics["loss"] for e in told] for told in events if isinstance(told[0], Progress)]
    assert np.mean(curve, axis=1) == pytest.approx([point["loss"] for point in record["curve"]])
