"""Whole searches on small checkpoints of the three families, offline, as a user starts them.

The Gemma-2 model is the embedded world's, which knows its questions; the others are random, so that
what they know in one order of the choices is luck, and in 24 orders nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from ray.cluster_utils import Cluster
from sae_lens import SAE
from small_hub import small_world, write_data, write_gemma, write_random

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    small = small_world(n_forget=120, n_retain=40)
    write_data(folder / "data", small)
    texts = [*small.forget_texts, *small.retain_texts]
    write_gemma(folder / "data/tiny/gemma-2-2b-it")
    write_random(folder / "data/tiny/neox", "neox", texts)
    write_random(folder / "data/tiny/llama", "llama", texts)
    (folder / "space.yaml").write_text(SPACE)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One Ray for all searches: most of a small search is the start of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
        )
        yield made
        made.shutdown()


def search(
    folder: Path, cluster: Cluster, model: str, permutations: int
) -> subprocess.CompletedProcess[str]:
    name = f"{model}-{permutations}"
    world = folder / f"{name}.yaml"
    world.write_text(WORLD.format(model=model, permutations=permutations))
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
    ],
)
def test_a_search_on_a_model_of_the_hub(
    folder: Path, cluster: Cluster, model: str, permutations: int, score: str
):
    done = search(folder, cluster, model, permutations)
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
    if model == "gemma-2-2b-it":  # knows everything, and some of it can be switched off
        assert (trials["forget_total"] == 60).all()
        assert trials[score].max() > 0
    else:
        assert set(trials["status"]) <= {"ok", "no_effect"}
        counted = trials.loc[trials["status"] == "ok", "forget_total"]
        assert counted.between(10, 59).all()  # half of those known in one order
    sae = SAE.load_from_disk(str(out / "best"))
    assert sae.cfg.metadata.model_name == model
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["world"]["folder"] == str(folder / "data")
    assert (out / "report.html").is_file() and not (out / "report_error.log").exists()


def test_a_model_that_is_too_weak_ends_the_search_before_training(folder: Path, cluster: Cluster):
    done = search(folder, cluster, "neox", 24)
    errors = done.stderr
    assert done.returncode == 2, done.stdout + errors
    assert "neox is too weak for this protocol: it answers 0 of 120 wmdp-bio, " in errors
    assert "so nothing was trained" in errors
    assert "world.permutations=1: " in errors
    assert "is then called 'score of 1 order'" in errors
    assert "--resume" not in errors
    assert not (folder / "neox-24" / "trials").exists()
