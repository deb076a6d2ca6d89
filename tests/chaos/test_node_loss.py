"""A node of the cluster is lost in the middle of a search, and another one joins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from victims import PROCESSES, Search, differences, results

from raysae.journal import JOURNAL, read_journal

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

OPTIONS = [
    "--smoke",
    *("--num-samples", "9"),
    *("--set", "search.sampler=random"),
    *("--set", "search.seeds_per_trial=2"),
    *("--set", "resources.checkpoint_seconds=0.5"),
    *("--set", "training.batch_size=256"),
    *("--set", "training.tokens=262144"),
]
"""What is tried does not depend on the order of results, which several workers do not keep."""
SECONDS = 600
"""For every step of the story; all of them together take a few minutes."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head node with room for one worker, which the test adds others to."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    yield nodes
    nodes.shutdown()


def processes_of(node: Any) -> list[psutil.Process]:
    """Everything that runs on a node of the cluster: its raylet, and what that started."""
    (raylet,) = (info.process for info in node.all_processes["raylet"])
    process = psutil.Process(raylet.pid)
    return [process, *process.children(recursive=True)]


def works(node: Any) -> bool:
    """Whether a worker of the pool lives there."""
    commands = [process.cmdline() for process in processes_of(node)]
    return any(command and command[0].startswith(PROCESSES["worker"]) for command in commands)


def starts(out: Path) -> list[tuple[str, int]]:
    """Set of workers, and worker, of every time that a trial was taken."""
    records = read_journal(out / JOURNAL)
    return [(r["generation"], r["worker"]) for r in records if r["event"] == "start"]


def test_a_search_of_three_nodes_goes_on_without_a_lost_one_and_uses_a_new_one(
    cluster: Cluster, tmp_path: Path
):
    lost, kept = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    out = tmp_path / "run"
    search = Search(
        out,
        *OPTIONS,
        *("--set", "resources.max_workers=3"),
        *("--address", cluster.address),
        *("--out", str(out)),
        RAY_AUTH_MODE="disabled",
    )
    everyone = {0, 1, 2}
    assert search.wait_until(lambda: {w for _, w in starts(out)} == everyone, SECONDS)
    assert all(works(node) for node in (cluster.head_node, lost, kept))
    (first,) = {generation for generation, _ in starts(out)}

    for process in processes_of(lost):
        process.kill()
    cluster.remove_node(lost, allow_graceful=False)
    assert search.wait_until(lambda: starts(out)[-1][0] != first, SECONDS), search.tail()
    second = starts(out)[-1][0]

    added = cluster.add_node(num_cpus=1)
    assert search.wait_until(lambda: starts(out)[-1][0] not in (first, second), SECONDS)
    assert search.wait_until(lambda: works(added), SECONDS), search.tail()
    assert search.wait(SECONDS) == 0, search.tail()
    workers = {w for generation, w in starts(out) if generation == second}
    assert workers <= {0, 1}, "two nodes were left"
    assert {w for generation, w in starts(out) if generation not in (first, second)} == everyone

    alone = tmp_path / "alone"
    undisturbed = Search(alone, *OPTIONS, "--out", str(alone))
    assert undisturbed.wait(SECONDS) == 0, undisturbed.tail()
    assert differences(results(out), results(alone)) == []
