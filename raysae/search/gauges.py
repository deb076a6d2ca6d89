"""What the search says of itself on Ray's metrics endpoints, for Prometheus and Grafana.

`deploy/grafana/raysae.json` is the dashboard for these names; on the endpoint Ray puts `ray_`
before them. What the workers say is in `raysae.pool.waits`.
"""

from __future__ import annotations

from ray.util.metrics import Gauge

from raysae.search.progress import Standing

STATES = ("waiting", "running", "finished", "stopped", "failed")
SEARCH_GAUGES = {
    "raysae_best_score": "Best unlearning score of the search, on the half that it sees",
    "raysae_trials": "Trials by state",
    "raysae_trials_expected": "Trials in all, those of the confirmation at most",
    "raysae_tokens_per_second": "Activation rows trained on, over all trials",
}


class SearchGauges:
    """Sets the gauges of one search; to be made after Ray is up."""

    def __init__(self, run: str) -> None:
        """`run`: name of the search, the tag by which two on one cluster are told apart."""
        self._gauges = {
            name: Gauge(
                name, words, tag_keys=("run", "state") if name == "raysae_trials" else ("run",)
            )
            for name, words in SEARCH_GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def update(self, standing: Standing) -> None:
        """Set every gauge; the best score from the first score on."""
        if standing.best is not None:
            self._gauges["raysae_best_score"].set(standing.best["rung"]["score"])
        for state in {*STATES, *standing.counts}:
            self._gauges["raysae_trials"].set(standing.counts[state], tags={"state": state})
        self._gauges["raysae_trials_expected"].set(standing.total)
        self._gauges["raysae_tokens_per_second"].set(standing.tokens_per_second or 0.0)
