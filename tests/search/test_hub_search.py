"""Whole searches on small checkpoints of the three families, offline, as a user starts them.

The Gemma-2 model is the embedded world's, which knows its questions; the others are random, so
that what they know in one order of the choices is luck, and in 24 orders nothing. Two searches at a
time, on one Ray: most of a small search is the start of processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from ray.cluster_utils import Cluster
from sae_lens import SAE
from small_hub import note_downloads, small_world, write_data, write_gemma, write_random

from raysae.config import load_config
from raysae.store.activations import corpus_tokens
from raysae.worlds import load_world
from raysae.worlds.model import load_model

pytestmark = [pytest.mark.search, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
SPACE = """\
sae: {architecture: topk, d_sae: 128, k: 4}
training: {tokens: 32768, batch_size: 256, lr: 4.0e-3}
search: {num_samples: 2, startup_trials: 2, scheduler: {name: none}}
confirm: {top: 0}
resources: {workers: 1}
space:
  regularizer: {none: , fixed_orthogonal: }
  alpha: {float: [0.1, 1.0]}
"""
ENVIRONMENT = {
    "COLUMNS": "200",
    "HF_HUB_OFFLINE": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less to wait for
}
WORLD = """\
kind: hub
model: tiny/{model}
folder: data
seq_len: 64
hook: blocks.0.hook_resid_post
permutations: {permutations}
"""
SPLIT = "gemma-2-2b"
"""A base model; SAEs are trained on it, and the questions are put to its instruct model."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CASES = [("gemma-2-2b-it", 24), ("neox", 1), ("llama", 1), (SPLIT, 24), ("neox", 24)]
"""Model, and orders of the choices in which its questions are asked."""
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    small = small_world(n_forget=120, n_retain=40)
    write_data(folder / "data", small)
    texts = [*small.forget_texts, *small.retain_texts]
    write_gemma(folder / "data/tiny/gemma-2-2b-it")
    note_downloads(write_gemma(folder / "data/tiny" / SPLIT, noise=1.0), COMMIT)
    write_random(folder / "data/tiny/neox", "neox", texts)
    write_random(folder / "data/tiny/llama", "llama", texts)
    (folder / "space.yaml").write_text(SPACE)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False}
        )
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def searches(folder: Path, cluster: Cluster) -> Iterator[dict[tuple[str, int], Future[Done]]]:
    """All of them, under way or done."""
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(search, folder, cluster, *case) for case in CASES}
    print(f"{len(CASES)} searches in {time.monotonic() - began:.0f} s")


def search(folder: Path, cluster: Cluster, model: str, permutations: int) -> Done:
    name = f"{model}-{permutations}"
    world = folder / f"{name}.yaml"
    split = f"score_model: tiny/{model}-it\n" if model == SPLIT else ""
    world.write_text(WORLD.format(model=model, permutations=permutations) + split)
    options = ["--space", "space.yaml", "--world", world.name, "--out", name]
    return subprocess.run(
        [sys.executable, str(ROOT / "run_search.py"), *options, "--address", cluster.address],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize(
    ("model", "permutations", "score"),
    [
        ("gemma-2-2b-it", 24, "saebench_score"),
        ("neox", 1, "score_of_1_order"),
        ("llama", 1, "score_of_1_order"),
        (SPLIT, 24, "saebench_score"),
    ],
)
def test_a_search_on_a_model_of_the_hub(
    folder: Path,
    searches: dict[tuple[str, int], Future[Done]],
    model: str,
    permutations: int,
    score: str,
):
    done = searches[model, permutations].result()
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    out = folder / f"{model}-{permutations}"
    trials = pd.read_parquet(out / "trials.parquet")
    assert list(trials["state"]) == ["finished"] * 2
    assert (trials["training_steps"] == 128).all()
    assert {"saebench_score", "score_of_1_order"} & set(trials.columns) == {score}
    assert trials[score].between(0, 1).all()
    assert ("score of 1 order: on all" in output) == (permutations == 1)
    assert "known questions: wmdp-bio" in output
    if permutations == 24:  # asked of the model that knows everything
        assert (trials["forget_total"] == 60).all()
    else:
        assert set(trials["status"]) <= {"ok", "no_effect"}
        counted = trials.loc[trials["status"] == "ok", "forget_total"]
        assert counted.between(10, 59).all()  # half of those known in one order
    if model == "gemma-2-2b-it":  # some of what it knows can be switched off
        assert trials[score].max() > 0
    sae = SAE.load_from_disk(str(out / "best"))
    assert sae.cfg.metadata.model_name == model
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["world"]["folder"] == str(folder / "data")
    assert (out / "report.html").is_file() and not (out / "report_error.log").exists()


def test_an_sae_of_the_base_model_explains_that_model_and_not_the_one_it_is_scored_on(
    folder: Path, searches: dict[tuple[str, int], Future[Done]]
):
    assert searches[SPLIT, 24].result().returncode == 0
    out = folder / f"{SPLIT}-24"
    sources = json.loads((out / "about.json").read_text())["world_sources"]
    assert sources["model"] == f"tiny/{SPLIT}@{COMMIT}"
    assert sources["score_model"] == str(folder / f"data/tiny/{SPLIT}-it")

    world = load_world(load_config(out / "config.yaml").world)
    sae = SAE.load_from_disk(str(out / "best"))
    explained = {}
    for trained_on in (True, False):
        model = load_model(world, trained_on=trained_on)
        tokens = torch.from_numpy(corpus_tokens(world, model.tokenizer)["retain"][:20])
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=world.default_hook_name)
            rows = cache[world.default_hook_name][:, 1:].flatten(0, 1)
            missed = (rows - sae(rows)).pow(2).sum()
            explained[trained_on] = float(1 - missed / (rows - rows.mean(0)).pow(2).sum())
    assert explained[True] > 0.7 and explained[False] < 0.5


def test_a_model_that_is_too_weak_ends_the_search_before_training(
    folder: Path, searches: dict[tuple[str, int], Future[Done]]
):
    done = searches["neox", 24].result()
    errors = done.stderr
    assert done.returncode == 2, done.stdout + errors
    assert "neox is too weak for this protocol: it answers 0 of 120 wmdp-bio, " in errors
    assert "so nothing was trained" in errors
    assert "world.permutations=1: " in errors
    assert "is then called 'score of 1 order'" in errors
    assert "--resume" not in errors
    assert not (folder / "neox-24" / "trials").exists()
