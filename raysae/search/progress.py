"""Where a search stands: from the state of its trials to the figures that a person asks for.

Light on purpose, neither Ray nor torch: `raysae status` answers at once.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

ENDED = ("finished", "stopped", "failed")
RATE_SECONDS = 15.0


@dataclass(frozen=True)
class Expected:
    """How many trials will come; those of the confirmation at most, until they are chosen."""

    search: int
    confirmation: int = 0


@dataclass(frozen=True)
class Standing:
    """Figures of a search at one moment.

    `trials` are entries of the broker's `snapshot`, or of `from_journal`; times are in seconds
    since the epoch.
    """

    trials: list[dict[str, Any]]
    expected: Expected
    now: float
    tokens_per_second: float | None = None
    counts: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", Counter(trial["state"] for trial in self.trials))

    @property
    def ended(self) -> list[dict[str, Any]]:
        """Trials that have ended, by number."""
        return [trial for trial in self.trials if trial["state"] in ENDED]

    @property
    def running(self) -> list[dict[str, Any]]:
        """Trials in training, by number."""
        return [trial for trial in self.trials if trial["state"] == "running"]

    @property
    def total(self) -> int:
        """Trials in all, never less than there are."""
        return max(self.expected.search + self.expected.confirmation, len(self.trials))

    @property
    def best(self) -> dict[str, Any] | None:
        """The best of the search by its rule: trained to the end; until one is, the best so far."""
        searched = [
            trial
            for trial in self.trials
            if is_search(trial) and trial["rung"].get("score") is not None
        ]
        finished = [trial for trial in searched if trial["state"] == "finished"]
        return max(finished or searched, key=lambda trial: trial["rung"]["score"], default=None)

    @property
    def seconds_left(self) -> float | None:
        """Work left over the rate so far, in tokens; None before a trial has ended.

        A trial to come counts as the mean of those that have ended, which early stopping shortens;
        one of the confirmation is trained to its end.
        """
        started = [t["started"] for t in self.trials if t.get("started") is not None]
        ended = [trial for trial in self.ended if is_search(trial) and trial["state"] != "failed"]
        done = sum(tokens(trial) for trial in self.trials)
        if not ended or not done or self.now <= min(started, default=self.now):
            return None
        mean = sum(tokens(trial) for trial in ended) / len(ended)
        full = max(trial["spec"]["rungs"][-1] for trial in self.trials)
        left = 0.0
        for stage, each in (("search", mean), ("confirmation", full)):
            trials = [t for t in self.trials if t["spec"]["stage"] == stage]
            to_come = getattr(self.expected, stage) - sum(t["state"] in ENDED for t in trials)
            under_way = sum(tokens(t) for t in trials if t["state"] not in ENDED)
            left += max(0.0, to_come * each - under_way)
        return float(left * (self.now - min(started)) / done)


class TokenRate:
    """Tokens a second over the last seconds, from totals that are told now and then."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, now: float, total: int) -> float:
        """The rate at `now`; a worker that lost its trial does not make it negative."""
        self._seen.append((now, total))
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_SECONDS:
            self._seen.popleft()
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return max(0.0, (last - first) / (end - start)) if end > start else 0.0


def tokens(trial: dict[str, Any]) -> int:
    """Tokens that a trial has been trained on."""
    return int(trial.get("tokens") or trial["rung"].get("tokens") or 0)


def is_search(trial: dict[str, Any]) -> bool:
    """Whether the trial belongs to the search and not to its confirmation."""
    return bool(trial["spec"]["stage"] == "search")


def with_earlier(
    trials: list[dict[str, Any]], ended: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    """`trials`, and those of `ended` that they lack, by number.

    A search that was started again has a broker that knows nothing of what ended before.
    """
    known = {trial["number"]: trial for trial in trials}
    return [trial for _, trial in sorted((ended | known).items())]


def from_journal(ended: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`end` records of the journal in the form of the broker's snapshot."""
    return [
        {
            "number": record["trial"],
            "state": record["state"],
            "spec": record["spec"],
            "error": record["error"],
            "rung": record["rung"],
            "started": record.get("started"),  # journals did not always have one
            "ended": record.get("ended"),
            **record["rung"].get("metrics", {}),
            **{key: record["rung"][key] for key in ("step", "tokens") if key in record["rung"]},
        }
        for record in ended
    ]
