"""A node of the cluster is lost in the middle of a search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from victims import Search, results

from raysae.journal import JOURNAL, read_journal

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

OPTIONS = [
    "--smoke",
    *("--num-samples", "4"),
    *("--set", "search.sampler=random"),
    *("--set", "resources.checkpoint_seconds=0.5"),
    *("--set", "training.batch_size=256"),
    *("--set", "training.tokens=262144"),
]
"""What is tried does not depend on the order of results, which two workers do not keep."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    yield nodes
    nodes.shutdown()


def test_a_search_goes_on_without_a_lost_node(cluster: Cluster, tmp_path: Path):
    lost = cluster.add_node(num_cpus=1)
    out = tmp_path / "run"
    search = Search(
        out,
        *OPTIONS,
        *("--set", "resources.workers=2"),
        *("--address", cluster.address),
        *("--out", str(out)),
        RAY_AUTH_MODE="disabled",
    )
    assert search.wait_for_more("start", 1, 200), search.tail()
    workers = {r["worker"] for r in read_journal(out / JOURNAL) if r["event"] == "start"}
    assert workers == {0, 1}, "both nodes must be at work"
    cluster.remove_node(lost, allow_graceful=False)
    assert search.wait(400) == 0, search.tail()
    generations = {r["generation"] for r in read_journal(out / JOURNAL) if r["event"] == "start"}
    assert len(generations) == 2

    alone = tmp_path / "alone"
    undisturbed = Search(alone, *OPTIONS, "--out", str(alone))
    assert undisturbed.wait(400) == 0, undisturbed.tail()
    assert results(out) == results(alone)
