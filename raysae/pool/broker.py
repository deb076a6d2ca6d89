"""The broker: one actor between the trials, which ask for work, and the workers, which do it.

Who waits for whom: a trial client waits in `next_event` for its worker; a worker waits in
`next_jobs` for trials, and in `rung` for the client's decision to go on or stop. Nothing else
blocks.

Anybody may be killed at any time, and Ray repeats calls that a death cut off, so every call may
come twice. What has happened is in the journal, fsynced, before anyone hears of it, and a broker
that is started anew begins with what it says there: `raysae.pool.jobs`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

import ray

from raysae.journal import append, cut_partial_line, read_journal
from raysae.pool.jobs import ENDED, HaltedError, Job, end_record, replay

MAX_ATTEMPTS = 3
"""Workers that a trial may take down at one place, before it is the trial that fails; the last of
them with no other trial in flight, because it may have been one beside it, or the memory of all.
"""
PACK_SECONDS = 0.5
"""A worker that trains several trials together waits so long for more than one: trials that end
together are followed by some that come together, each after its own client's round with Tune.
"""


class BrokerState:
    """The broker's logic, an ordinary asyncio class; `Broker` is the same as a Ray actor."""

    def __init__(self, journal: str, session: str = "") -> None:
        """
        Args:
            journal: path; what is there already is gone on with.
            session: id of the driver's process; a broker that is restarted within a session finds
                its clients and workers alive, one of a later session finds none.
        """
        self._journal = Path(journal)
        self._session = session
        self._wake = asyncio.Condition()
        self._closed = self._pausing = False
        self._halted = ""
        self._store: Any = None
        self._some_worker = False
        self._heard = time.monotonic()
        self._generation = ""
        self._losses_known = False
        """Of the generation's workers: what is told of later is another's."""
        self._workers: dict[int, str] = {}
        self._tiers: dict[int, str] = {}
        self._asking = 0
        cut_partial_line(self._journal)
        self._jobs = replay(read_journal(self._journal), session)
        waiting = [job for job in self._jobs.values() if job.state == "waiting"]
        self._queue = deque(job.number for job in waiting)
        with suppress(HaltedError):  # the driver hears of it
            for job in self._jobs.values():
                if job.end_is_missing:
                    self._end(job, "finished")

    async def _notify(self) -> None:
        async with self._wake:
            self._wake.notify_all()

    async def _wait_for(self, predicate: Any) -> None:
        async with self._wake:
            await self._wake.wait_for(predicate)

    # ---- what everyone shares

    async def set_store(self, handle: Any) -> None:
        """Publish the store's handle; workers wait for it in `store`."""
        self._store = handle
        await self._notify()

    async def store(self) -> Any:
        """The store's handle, as soon as it is there; None when the search is over."""
        await self._wait_for(lambda: self._store is not None or self._over)
        return self._store

    async def close(self) -> None:
        """No more trials: waiting workers get None and leave their loop."""
        self._closed = True
        await self._notify()

    async def pause(self, seconds: float) -> bool:
        """Have the trials in flight saved, to be taken up by a later session.

        True when all of them are; False when that took longer than `seconds`.
        """
        self._pausing = True
        await self._notify()
        try:
            await asyncio.wait_for(self._wait_for(lambda: not self._running()), seconds)
        except TimeoutError:
            return False
        return True

    async def halt(self, reason: str) -> None:
        """The search cannot go on; the driver reads the reason in the snapshot, and stops."""
        self._halted = self._halted or reason
        await self._notify()

    async def abandon(self, reason: str) -> None:
        """Fail every open trial: its client is gone and will not come back."""
        for job in self._jobs.values():
            if job.state in ("waiting", "running"):
                self._fail(job, reason)
        await self._notify()

    @property
    def _over(self) -> bool:
        return self._closed or self._pausing or bool(self._halted)

    def _running(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.state == "running"]

    # ---- trial clients

    async def submit(self, number: int, spec: dict[str, Any]) -> None:
        """Queue a trial, or attach to the one of that number; its spec must then be equal."""
        job = self._jobs.get(number)
        if job is not None and job.spec != spec:
            raise ValueError(f"trial {number} was submitted before, with another spec")
        if job is None:
            job = self._jobs[number] = Job(number, spec)
        if job.state != "dormant":
            return
        self._write("submit", job, spec=spec, session=self._session)
        job.state, job.attempt = "waiting", 0
        self._queue.append(number)
        await self._notify()

    async def next_event(self, number: int) -> dict[str, Any]:
        """The rung that waits for a decision, or the trial's failure; waits for either.

        Asked again before `proceed`, it says the same again.
        """
        job = self._jobs[number]
        await self._wait_for(lambda: job.undecided or job.state in ("failed", "stopped"))
        if job.state in ("failed", "stopped"):
            return {"kind": "failed", "error": job.error}
        return {"kind": "rung", **job.rung}

    async def proceed(self, number: int, tokens: int) -> None:
        """The trial may train on after the rung at `tokens`."""
        job = self._jobs[number]
        if tokens > job.proceeded and job.state not in ENDED:
            self._write("proceed", job, tokens=tokens)
            job.proceeded = tokens
            await self._notify()

    async def cancel(self, number: int) -> None:
        """Nobody wants more of the trial; one that has finished is left as it is.

        While the search pauses this is only its clients' end.
        """
        job = self._jobs.get(number)
        if job is None or job.state in (*ENDED, "dormant") or self._over:
            return
        if job.rung:
            self._end(job, "stopped")
        else:
            self._fail(job, "cancelled before its first rung")
        await self._notify()

    # ---- workers

    async def first_worker(self) -> None:
        """Returns as soon as one worker has started, or none will."""
        await self._wait_for(lambda: self._some_worker or self._over)

    async def alive(self) -> None:
        """A worker's process is there, whatever it is doing; see `raysae.pool.heartbeat`."""
        self._heard = time.monotonic()

    async def starting(self, generation: str = "") -> None:
        """The calling worker, of that generation, has its imports behind it."""
        self._some_worker = True
        if generation != self._generation:
            self._losses_known = True
        await self._notify()

    async def lost(self, groups: list[int]) -> None:
        """Workers of these groups have died; Ray Train stops the others and starts new ones."""
        if self._losses_known:
            return
        self._losses_known = True
        for job in self._running():
            job.worker_died = job.worker in groups

    async def register(self, group: int, where: str, generation: str = "", tier: str = "") -> None:
        """A worker group is ready.

        Args:
            group: its index.
            where: for people.
            generation: the same for all workers that Ray Train started together. It restarts all
                of them when one is lost or nodes join, so with a new generation every older worker
                is gone, and their trials are queued anew. That counts against those alone whose
                worker died, see `lost`.
            tier: of the store, from which it has its batches, in words.
        """
        self._adopt(generation)
        self._workers[group], self._tiers[group] = where, tier
        await self._notify()

    def _adopt(self, generation: str) -> None:
        if generation == self._generation:
            return
        self._generation, self._workers, self._tiers = generation, {}, {}
        self._losses_known = False
        for job in reversed(self._running()):
            if job.generation == generation:
                continue
            if not job.worker_died:
                job.attempt -= 1
            elif job.attempt >= MAX_ATTEMPTS and job.alone:
                self._fail(job, f"its worker died {job.attempt} times at the same place")
                continue
            job.state, job.worker = "waiting", None
            self._queue.appendleft(job.number)

    async def next_jobs(
        self, group: int, generation: str = "", most: int = 1
    ) -> list[dict[str, Any]] | None:
        """The specs of the next trial, oldest first, and of those that can be trained with it.

        None when the search is over. A worker that died while it waited here must not be given a
        trial: once another generation has registered, the old call returns None to nobody.

        Args:
            group: which worker asks.
            generation: of the worker.
            most: trials that it trains together.
        """
        if not self._generation:  # a restarted broker does not know it yet
            self._adopt(generation)
            await self._notify()

        def outdated() -> bool:
            return generation != self._generation

        def mine() -> list[Job]:
            # It asks, so it has none: the answer to its last call was lost.
            return [job for job in self._running() if job.worker == group]

        def settled() -> bool:
            return bool(mine()) or self._over or outdated()

        def available() -> bool:
            return bool(self._queue) and not any(map(_on_trial_alone, self._running()))

        self._asking += 1
        try:
            while True:
                await self._wait_for(lambda: settled() or available())
                if most > 1:
                    await self._moment(lambda: settled() or len(self._queue) >= most * self._asking)
                if settled() or available():  # nobody has taken what there was
                    break
            if outdated() or self._over:
                return None
            if not mine():
                self._hand_out(self._choose(most), group, generation)
        finally:
            self._asking -= 1
        return [job.spec for job in mine()]

    async def _moment(self, enough: Callable[[], bool]) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wait_for(enough), PACK_SECONDS)

    def _choose(self, most: int) -> list[Job]:
        """The oldest waiting trial and others that can join it; no more than leaves the other
        workers that wait their share.

        Where nothing is in flight, as after every restart, suspects come first: alone.
        """
        first, *others = [self._jobs[number] for number in self._queue]
        suspects = [job for job in (first, *others) if _suspect(job)]
        if suspects and not self._running():
            return suspects[:1]
        share = ceil(len(self._queue) / self._asking)
        room = 1 if _suspect(first) else min(most, share)
        chosen = [first]
        for job in others:
            if len(chosen) < room and not _suspect(job) and job.can_join(first):
                chosen.append(job)
        return chosen

    def _hand_out(self, jobs: list[Job], group: int, generation: str) -> None:
        alone = len(jobs) == 1 and not self._running()
        for job in jobs:
            self._queue.remove(job.number)
            job.state, job.worker, job.generation = "running", group, generation
            job.attempt += 1
            job.attempts += 1
            job.alone, job.worker_died = alone, False
            job.pack = jobs[0].number
            job.started = job.started or time.time()
            self._write(
                "start",
                job,
                worker=group,
                generation=generation,
                attempt=job.attempt,
                pack=job.pack,
            )

    async def progress(self, number: int, row: dict[str, Any]) -> str:
        """Show a row of the training curve; "go", or "stop", or "pause": save the trial and leave.

        A trial that gets further than ever is not one that takes its workers down.
        """
        job = self._jobs[number]
        job.progress = row
        job.rows.append(row)
        if row["tokens"] > job.furthest:
            was_alone = _on_trial_alone(job)
            job.furthest, job.attempt = row["tokens"], 1
            if was_alone:
                await self._notify()
        return self._word(job)

    async def words(self, numbers: list[int]) -> list[str]:
        """What `progress` would answer each of these trials; asked between two rows."""
        return [self._word(self._jobs[number]) for number in numbers]

    async def rung(self, number: int, record: dict[str, Any], curve: list[dict[str, Any]]) -> str:
        """Record a scored rung, tell the client, and wait for its decision: as in `progress`.

        A rung that was recorded before, by a worker that died since, is not recorded again.

        Args:
            number: of the trial.
            record: of the rung.
            curve: all rows so far; what the journal keeps of them when the trial ends here.
        """
        job = self._jobs[number]
        if job.state in ENDED:
            return "stop"
        tokens = record["tokens"]
        job.curve = curve
        if tokens > job.rung.get("tokens", 0):
            self._write("rung", job, **record, curve=curve)
            job.rung = record
        if record["last"]:
            self._end(job, "finished")
            await self._notify()
            return "stop"
        await self._notify()
        await self._wait_for(
            lambda: (
                job.proceeded >= tokens or job.state in ENDED or self._over or job.worker is None
            )
        )
        return self._word(job)

    async def paused(self, number: int) -> None:
        """The worker has saved the trial and left it."""
        job = self._jobs[number]
        if job.state == "running":
            job.state, job.worker = "dormant", None
            await self._notify()

    async def fail(
        self, number: int, reason: str, curve: list[dict[str, Any]] | None = None
    ) -> bool:
        """The trial raised; its client and the journal hear why, and the search goes on.

        False where the search is over: what its end does to a trial is not to be held against it.
        """
        job = self._jobs[number]
        if self._over and job.state not in ENDED:
            return False
        self._fail(job, reason, curve)
        await self._notify()
        return True

    def _word(self, job: Job) -> str:
        if job.state in ENDED:
            return "stop"
        return "pause" if self._over else "go"

    # ---- observers

    async def health(self) -> tuple[str, bool]:
        """Why the search was halted, empty if it was not; and whether the store is known."""
        return self._halted, self._store is not None

    async def silence(self) -> float:
        """Seconds since a worker was heard of, or since this broker began."""
        return time.monotonic() - self._heard

    async def snapshot(self) -> dict[str, Any]:
        """State of every trial, for the live display."""
        return {
            "workers": dict(self._workers),
            "tiers": sorted({tier for tier in self._tiers.values() if tier}),
            "store_ready": self._store is not None,
            "trials": [job.snapshot() for job in self._jobs.values()],
        }

    async def rows(self, after: dict[int, int]) -> dict[int, list[dict[str, Any]]]:
        """Rows of the training curves past those steps, by trial; all of a trial without one."""
        new = {
            job.number: [row for row in job.rows if row["step"] > after.get(job.number, -1)]
            for job in self._jobs.values()
        }
        return {number: rows for number, rows in new.items() if rows}

    # ---- inner

    def _fail(self, job: Job, reason: str, curve: list[dict[str, Any]] | None = None) -> None:
        if job.state in ENDED:
            return
        if not job.fully_trained:
            job.error, job.curve = reason, job.curve if curve is None else curve
        self._end(job, "failed")

    def _end(self, job: Job, state: str) -> None:
        if job.fully_trained:
            state = "finished"
        self._append(end_record(job, state))
        if job.number in self._queue:
            self._queue.remove(job.number)
        job.state = state

    def _write(self, event: str, job: Job, **fields: Any) -> None:
        self._append({"event": event, "trial": job.number, "time": time.time(), **fields})

    def _append(self, record: dict[str, Any]) -> None:
        try:
            append(self._journal, record)
        except OSError as error:
            self._halted = f"{self._journal} cannot be written: {error.strerror}"
            raise HaltedError(self._halted) from None


def _suspect(job: Job) -> bool:
    """Whether a waiting trial has but one attempt left."""
    return job.attempt >= MAX_ATTEMPTS - 1


def _on_trial_alone(job: Job) -> bool:
    """Whether a running trial is at its last attempt, with nobody beside it."""
    return job.alone and job.attempt >= MAX_ATTEMPTS


Broker: Any = ray.remote(BrokerState)
OPTIONS = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1, "max_task_retries": -1}
"""Every waiting trial and worker holds one call."""
