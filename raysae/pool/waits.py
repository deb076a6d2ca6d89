"""How long a worker waits for its batches, and how large the store is that they come from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from ray.util.metrics import Counter, Gauge

WORKER_METRICS = {
    "raysae_batch_wait_seconds": "Seconds spent waiting for batches",
    "raysae_batches": "Batches trained on",
    "raysae_store_bytes": "Bytes of the activation store by tier",
}


@dataclass
class _Waits:
    seconds: float = 0.0
    batches: int = 0


class TimedSource:
    """An `ActivationSource` that keeps the time of its batches; everything else is passed on.

    A step must not pay for its being measured: the sums go to Ray's metrics in `publish`, which is
    called as often as a curve gets a row.
    """

    def __init__(self, source: Any, worker: str, tiers: dict[str, int]) -> None:
        """
        Args:
            source: where batches come from.
            worker: which worker this is, a tag.
            tiers: bytes of the store by tier, e.g. {"object_store": …}.
        """
        self._source = source
        self._waits = _Waits()
        self._shares: WeakValueDictionary[float, TimedSource] = WeakValueDictionary()
        """Of those that somebody trains on, as the source has them: equal ones are one."""
        self._metrics: dict[str, Any] = {
            name: Counter(name, WORKER_METRICS[name], tag_keys=("worker",))
            for name in ("raysae_batch_wait_seconds", "raysae_batches")
        }
        for counter in self._metrics.values():
            counter.set_default_tags({"worker": worker})
        words = WORKER_METRICS["raysae_store_bytes"]
        self._size = Gauge("raysae_store_bytes", words, tag_keys=("tier",))
        self._tiers = tiers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def with_forget_share(self, forget_share: float) -> TimedSource:
        """As the source's; its batches are timed with the others."""
        made = self._shares.get(forget_share)
        if made is None:
            made = object.__new__(type(self))
            vars(made).update(vars(self))
            made._source = self._source.with_forget_share(forget_share)
            self._shares[forget_share] = made
        return made

    def batch(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's; timed."""
        return self._timed(1, self._source.batch, *args, **kwargs)

    def batches(self, seeds: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """As the source's; timed."""
        return self._timed(len(seeds), self._source.batches, seeds, *args, **kwargs)

    def _timed(self, count: int, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        made = make(*args, **kwargs)
        self._waits.seconds += time.perf_counter() - started
        self._waits.batches += count
        return made

    def publish(self) -> None:
        """Add what has been measured since the last call to Ray's metrics."""
        if self._waits.batches:
            self._metrics["raysae_batch_wait_seconds"].inc(self._waits.seconds)
            self._metrics["raysae_batches"].inc(self._waits.batches)
            self._waits.seconds, self._waits.batches = 0.0, 0
        for tier, n_bytes in self._tiers.items():
            self._size.set(n_bytes, tags={"tier": tier})
