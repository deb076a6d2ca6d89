"""Gauges: what is set, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raysae.pool import waits
from raysae.pool.waits import WORKER_METRICS, TimedSource
from raysae.search import gauges
from raysae.search.gauges import SEARCH_GAUGES, SearchGauges
from raysae.search.progress import Expected, Standing

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "raysae.json"
COUNTERS = {"raysae_batch_wait_seconds", "raysae_batches"}


class Metric:
    """Stands in for a metric of Ray's, which needs Ray: keeps what it is told."""

    made: dict[str, Metric]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys, self.values, self.defaults = tag_keys, {}, {}
        assert description
        Metric.made[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.defaults = tags

    def _key(self, tags: dict[str, str] | None) -> tuple[str, ...]:
        merged = self.defaults | (tags or {})
        assert set(merged) == set(self.tag_keys)
        return tuple(merged[key] for key in self.tag_keys)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[self._key(tags)] = value

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value >= 0
        self.values[self._key(tags)] = self.values.get(self._key(tags), 0.0) + value


@pytest.fixture
def made(monkeypatch) -> dict[str, Metric]:
    monkeypatch.setattr(Metric, "made", {}, raising=False)
    monkeypatch.setattr(gauges, "Gauge", Metric)
    monkeypatch.setattr(waits, "Gauge", Metric)
    monkeypatch.setattr(waits, "Counter", Metric)
    return Metric.made


def trial(number: int, state: str, score: float | None) -> dict[str, Any]:
    spec = {"stage": "search", "rungs": [10]}
    return {"number": number, "state": state, "spec": spec, "rung": {"score": score}}


def test_the_search_says_its_best_score_its_trials_and_its_rate(made):
    search = SearchGauges("orth")
    search.update(Standing([trial(0, "running", None)], Expected(4, 3), now=0.0))
    assert ("orth",) not in made["raysae_best_score"].values
    assert made["raysae_tokens_per_second"].values == {("orth",): 0.0}
    trials = [trial(0, "finished", 0.25), trial(1, "finished", 0.5), trial(2, "failed", None)]
    search.update(Standing(trials, Expected(4, 3), now=0.0, tokens_per_second=500.0))
    assert made["raysae_best_score"].values == {("orth",): 0.5}
    assert made["raysae_tokens_per_second"].values == {("orth",): 500.0}
    assert made["raysae_trials_expected"].values == {("orth",): 7}
    by_state = made["raysae_trials"].values
    assert by_state[("orth", "finished")] == 2 and by_state[("orth", "failed")] == 1
    assert by_state[("orth", "running")] == 0  # of the update before


class Batches:
    d_in = 16

    def batch(self, seed: int, step: int, *, rank: int) -> tuple[int, int, int]:
        return seed, step, rank

    def batches(self, seeds: list[int], step: int) -> tuple[list[int], int]:
        return seeds, step

    def with_forget_share(self, forget_share: float) -> Batches:
        other = Batches()
        other.d_in = round(100 * forget_share)
        return other


def test_a_timed_source_gives_the_sources_batches_and_adds_up_its_waits(made, monkeypatch):
    clock = iter([10.0, 10.5, 20.0, 20.25, 30.0, 31.0, 40.0, 40.5])
    monkeypatch.setattr(waits.time, "perf_counter", lambda: next(clock))
    source = TimedSource(Batches(), "0/1", {"object_store": 4096})
    assert source.d_in == 16
    assert source.batch(3, 4, rank=1) == (3, 4, 1)
    source.batch(3, 5, rank=1)
    assert made["raysae_batch_wait_seconds"].values == {}  # a step does not pay for it
    source.publish()
    assert made["raysae_batch_wait_seconds"].values == {("0/1",): 0.75}
    assert made["raysae_batches"].values == {("0/1",): 2}
    assert made["raysae_store_bytes"].values == {("object_store",): 4096}
    source.publish()
    source.batch(3, 6, rank=1)
    source.publish()
    assert made["raysae_batch_wait_seconds"].values == {("0/1",): 1.75}
    assert source.batches([3, 4, 5], 7) == ([3, 4, 5], 7)  # of the SAEs of a pack
    source.publish()
    assert made["raysae_batch_wait_seconds"].values == {("0/1",): 2.25}
    assert made["raysae_batches"].values == {("0/1",): 6}


def test_batches_of_another_share_are_timed_too(made, monkeypatch):
    clock = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr(waits.time, "perf_counter", lambda: next(clock))
    source = TimedSource(Batches(), "0/1", {})
    quarter = source.with_forget_share(0.25)
    assert (source.d_in, quarter.d_in) == (16, 25)
    assert source.with_forget_share(0.25) is quarter  # SAEs of a pack are gathered for together
    quarter.batch(3, 4, rank=1)
    source.batch(3, 4, rank=1)
    source.publish()
    assert made["raysae_batch_wait_seconds"].values == {("0/1",): 0.75}
    assert made["raysae_batches"].values == {("0/1",): 2}


def test_the_dashboard_asks_for_nothing_that_is_not_exported(made):
    SearchGauges("orth")
    TimedSource(Batches(), "0", {})
    assert set(made) == set(SEARCH_GAUGES) | set(WORKER_METRICS)
    exported = {f"ray_{name}{'_total' if name in COUNTERS else ''}" for name in made}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    queries += [v["query"]["query"] for v in variables if v["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert asked <= exported
    assert exported <= asked, "exported, and shown nowhere"


def test_the_dashboard_filters_by_labels_that_its_metrics_have(made):
    SearchGauges("orth")
    TimedSource(Batches(), "0", {})
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for name, labels in re.findall(r"ray_(raysae_\w+)\{([^}]*)\}", target["expr"]):
                used = set(re.findall(r"(\w+)=~?\"", labels))
                assert used <= set(made[name.removesuffix("_total")].tag_keys)
