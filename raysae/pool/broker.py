"""The broker: one actor between the trials, which ask for work, and the workers, which do it.

Who waits for whom: a trial client waits in `next_event` for its worker; a worker waits in
`next_job` for a trial, and in `rung` for the client's decision to go on or stop. Nothing else
blocks. Every result is in the journal, fsynced, before anyone hears of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

MAX_ATTEMPTS = 3


@dataclass
class _Job:
    number: int
    spec: dict[str, Any]
    state: str = "waiting"  # waiting, running, finished, stopped, failed
    worker: int | None = None
    attempt: int = 0
    cancelled: bool = False
    submitted: float = field(default_factory=time.time)
    progress: dict[str, Any] = field(default_factory=dict)
    rung: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    decision: asyncio.Event = field(default_factory=asyncio.Event)


class BrokerState:
    """The broker's logic, an ordinary asyncio class; `Broker` is the same as a Ray actor."""

    def __init__(self, journal: str) -> None:
        self._journal = Path(journal)
        self._jobs: dict[int, _Job] = {}
        self._queue: deque[int] = deque()
        self._wake = asyncio.Condition()
        self._closed = False
        self._store: Any = None
        self._store_ready = asyncio.Event()
        self._pool_error = ""
        self._some_worker = asyncio.Event()
        self._workers: dict[int, str] = {}
        self._starts: dict[int, int] = {}

    # ---- what everyone shares

    async def set_store(self, handle: Any) -> None:
        """Publish the store's handle; workers wait for it in `store`."""
        self._store = handle
        self._store_ready.set()

    async def store(self) -> Any:
        """The store's handle, as soon as it is there."""
        await self._store_ready.wait()
        return self._store

    async def close(self) -> None:
        """No more trials: waiting workers get None and leave their loop."""
        self._closed = True
        self._store_ready.set()
        self._some_worker.set()
        async with self._wake:
            self._wake.notify_all()

    async def pool_failed(self, reason: str) -> None:
        """The worker pool is gone: every open trial fails, and every later one at once."""
        self._pool_error = reason
        self._some_worker.set()
        for job in list(self._jobs.values()):
            self._fail(job, reason)

    # ---- trial clients

    async def submit(self, number: int, spec: dict[str, Any]) -> None:
        """Queue a trial. A number that is already known is an error."""
        if number in self._jobs:
            raise ValueError(f"trial {number} was submitted before")
        job = self._jobs[number] = _Job(number, spec)
        if self._pool_error:
            self._fail(job, self._pool_error)
            return
        async with self._wake:
            self._queue.append(number)
            self._wake.notify_all()

    async def next_event(self, number: int) -> dict[str, Any]:
        """The trial's next rung, or its failure; waits for it."""
        return await self._jobs[number].events.get()

    async def proceed(self, number: int) -> None:
        """The trial may train on after the rung it reported."""
        self._jobs[number].decision.set()

    async def cancel(self, number: int) -> None:
        """Nobody wants more of the trial; a finished one is left as it is."""
        job = self._jobs.get(number)
        if job is None or job.state in ("finished", "failed", "stopped"):
            return
        if job.state == "waiting":
            self._queue.remove(number)
        job.cancelled = True
        if job.rung:
            self._end(job, "stopped")
        else:
            job.error = "cancelled before its first rung"
            self._end(job, "failed")
        job.decision.set()

    # ---- workers

    async def first_worker(self) -> None:
        """Returns as soon as one worker has started, or none will."""
        await self._some_worker.wait()

    async def starting(self) -> None:
        """The calling worker has its imports behind it."""
        self._some_worker.set()

    async def register(self, group: int, where: str) -> None:
        """A worker group starts, or starts again after a crash: its lost trial is queued anew."""
        self._workers[group] = where
        self._starts[group] = self._starts.get(group, 0) + 1
        async with self._wake:
            self._wake.notify_all()
        for job in list(self._jobs.values()):
            if job.worker == group and job.state == "running":
                await self._requeue(job)

    async def _requeue(self, job: _Job) -> None:
        job.worker, job.curve = None, []
        if job.attempt >= MAX_ATTEMPTS:
            self._fail(job, f"its worker died {job.attempt} times")
            return
        job.state = "waiting"
        async with self._wake:
            self._queue.appendleft(job.number)
            self._wake.notify_all()

    async def next_job(self, group: int) -> dict[str, Any] | None:
        """The next trial's spec, oldest first; None when the search is over.

        A worker that died while it waited here must not be given a trial: once its successor has
        registered, the old call returns None to nobody.
        """
        start = self._starts.get(group, 0)

        def outdated() -> bool:
            return self._starts.get(group, 0) != start

        async with self._wake:
            await self._wake.wait_for(lambda: self._queue or self._closed or outdated())
            if outdated() or not self._queue:
                return None
            job = self._jobs[self._queue.popleft()]
        job.state, job.worker, job.attempt = "running", group, job.attempt + 1
        # What the client has heard already must survive a worker's death.
        job.progress = {"started": time.time(), "reported": job.progress.get("reported", 0)}
        return job.spec

    async def progress(self, number: int, row: dict[str, Any]) -> bool:
        """Record a row of the training curves; True: stop, the trial is cancelled."""
        job = self._jobs[number]
        job.curve.append(row)
        job.progress |= row
        return job.cancelled

    async def rung(self, number: int, record: dict[str, Any]) -> bool:
        """Record a scored rung, tell the client, and wait; True: train on."""
        job = self._jobs[number]
        if job.cancelled:
            return False
        replayed = job.attempt > 1 and record["tokens"] <= job.progress.get("reported", 0)
        job.rung = record
        job.progress["score"] = record["score"]
        job.progress["reported"] = record["tokens"]
        self._write({"event": "rung", "trial": number, "time": time.time(), **record})
        if record["last"]:
            self._end(job, "finished")
        if not replayed:
            job.decision.clear()
            job.events.put_nowait({"kind": "rung", **record})
        if record["last"]:
            return False
        if not replayed:
            await job.decision.wait()
        return not job.cancelled

    async def fail(self, number: int, reason: str) -> None:
        """The trial raised; its client and the journal hear why, and the search goes on."""
        self._fail(self._jobs[number], reason)

    # ---- observers

    async def snapshot(self) -> dict[str, Any]:
        """State of every trial, for the live display."""
        return {
            "workers": dict(self._workers),
            "store_ready": self._store is not None,
            "trials": [
                {
                    "number": job.number,
                    "state": job.state,
                    "spec": job.spec,
                    "error": job.error,
                    "rung": {k: job.rung.get(k) for k in ("score", "status", "tokens", "l0")},
                    **job.progress,
                }
                for job in self._jobs.values()
            ],
        }

    async def rows(self, after: dict[int, int]) -> dict[int, list[dict[str, Any]]]:
        """Rows of the training curves past those steps, by trial; all of a trial without one."""
        new = {
            job.number: [row for row in job.curve if row["step"] > after.get(job.number, -1)]
            for job in self._jobs.values()
        }
        return {number: rows for number, rows in new.items() if rows}

    # ---- inner

    def _fail(self, job: _Job, reason: str) -> None:
        if job.state in ("finished", "failed", "stopped"):
            return
        if job.number in self._queue:
            self._queue.remove(job.number)
        job.error = reason
        self._end(job, "failed")
        job.events.put_nowait({"kind": "failed", "error": reason})
        job.decision.set()

    def _end(self, job: _Job, state: str) -> None:
        job.state = state
        self._write(
            {
                "event": "end",
                "trial": job.number,
                "state": state,
                "spec": job.spec,
                "error": job.error,
                "attempts": job.attempt,
                "worker": job.worker,
                "submitted": job.submitted,
                "started": job.progress.get("started"),
                "ended": time.time(),
                "rung": job.rung,
                "curve": job.curve,
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


Broker: Any = ray.remote(BrokerState)
OPTIONS = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": 0}
"""Every waiting trial and worker holds one call."""
