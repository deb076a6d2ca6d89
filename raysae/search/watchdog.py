"""Whether anybody works on a search: a pool that waits for room on its cluster says nothing.

Its room may be held by another search that began in the same seconds, or may have gone with a node;
a cluster that grows on demand takes minutes to have it.
"""

from __future__ import annotations

from collections.abc import Callable

PATIENCE_SECONDS = 60.0
"""A search without a worker is said to be one after so long, and again each time twice as long."""


class Watchdog:
    """Told how long no worker has been heard of; says it, and when it is time to stop."""

    def __init__(self, needs: str, has: Callable[[], str], stop_after: float | None) -> None:
        """
        Args:
            needs: what one trial takes of the cluster, in words.
            has: says what the cluster has.
            stop_after: seconds after which the search should stop; None: never.
        """
        self._needs, self._has, self._stop_after = needs, has, stop_after
        self._next = PATIENCE_SECONDS
        self.note = ""
        """For people who look at the search meanwhile; "" while there are workers."""

    def look(self, silent: float) -> str:
        """A line to print, if it is time for one.

        Args:
            silent: seconds since the last word of a worker, or since there could be one.
        """
        if silent < PATIENCE_SECONDS:
            self._next, self.note = PATIENCE_SECONDS, ""
            return ""
        self.note = f"no worker for {silent:.0f} s"
        if silent < self._next:
            return ""
        while self._next <= silent:
            self._next *= 2
        until = self._stop_after
        then = "" if until is None else f"; it stops after {until:.0f} s, and can be gone on with"
        return f"{self.note}: {self._has()}; the search needs {self._needs}{then}"

    def reason_to_stop(self, silent: float) -> str:
        """Why the search should stop now; "": it should not."""
        if self._stop_after is None or silent < self._stop_after:
            return ""
        return (
            f"no worker for {silent:.0f} s (resources.worker_timeout): {self._has()}; the search "
            f"needs {self._needs}"
        )
