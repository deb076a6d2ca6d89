"""The life of a trial at the broker: asked for, trained, scored, decided on, lost and found."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from raysae.pool.broker import MAX_ATTEMPTS, BrokerState
from raysae.search.journal import ended_trials, read_journal

T = TypeVar("T")
Scenario = Callable[[BrokerState], Coroutine[Any, Any, None]]
SPEC = {"number": 0, "seed": 5}


async def soon(result: Awaitable[T]) -> T:
    """The result, which must not need anything else to happen first."""
    return await asyncio.wait_for(result, 2)


async def waiting(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """The call as a task, which must not end before something else happens."""
    task = asyncio.create_task(coroutine)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done(), task.result()
    return task


def row(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "loss": 1 / step}


def rung(step: int, score: float = 0.1, last: bool = False) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "score": score, "status": "ok", "last": last}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@pytest.fixture
def play(journal: Path) -> Callable[[Scenario], None]:
    """Run a scenario with a new broker."""

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            await scenario(BrokerState(str(journal)))

        asyncio.run(main())

    return run


def ends(journal: Path) -> list[dict[str, Any]]:
    return [record for record in read_journal(journal) if record["event"] == "end"]


# --- A trial's life -------------------------------------------------------------------------------


def test_a_trial_is_trained_scored_twice_and_finished(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "0:0")
        await broker.submit(0, SPEC)
        assert await soon(broker.next_job(0)) == SPEC
        client = await waiting(broker.next_event(0))

        assert await soon(broker.progress(0, row(1))) is False
        assert await soon(broker.progress(0, row(2))) is False
        worker = await waiting(broker.rung(0, rung(2, score=0.1)))
        assert await soon(client) == {"kind": "rung", **rung(2, score=0.1)}
        assert not worker.done()
        await broker.proceed(0)
        assert await soon(worker) is True

        await broker.progress(0, row(3))
        client = await waiting(broker.next_event(0))
        assert await soon(broker.rung(0, rung(3, score=0.2, last=True))) is False
        assert (await soon(client))["last"]
        await broker.cancel(0)  # the client's goodbye changes nothing

    play(scenario)
    records = read_journal(journal)
    assert [r["event"] for r in records] == ["rung", "rung", "end"]
    end = records[-1]
    assert (end["state"], end["trial"], end["attempts"], end["error"]) == ("finished", 0, 1, "")
    assert end["spec"] == SPEC
    assert end["curve"] == [row(1), row(2), row(3)]
    assert end["rung"] == rung(3, score=0.2, last=True)


def test_a_worker_waits_for_a_trial_and_a_client_for_its_worker(play):
    async def scenario(broker: BrokerState) -> None:
        worker = await waiting(broker.next_job(0))
        await broker.submit(0, SPEC)
        assert await soon(worker) == SPEC
        await waiting(broker.next_event(0))

    play(scenario)


def test_trials_are_handed_out_oldest_first_and_once(play):
    async def scenario(broker: BrokerState) -> None:
        for number in range(4):
            await broker.submit(number, {"number": number})
        jobs = [await soon(broker.next_job(group)) for group in (0, 1, 0, 1)]
        assert [job["number"] for job in jobs] == [0, 1, 2, 3]
        await waiting(broker.next_job(0))

    play(scenario)


def test_of_many_waiting_workers_each_gets_another_trial(play):
    async def scenario(broker: BrokerState) -> None:
        workers = [await waiting(broker.next_job(group)) for group in range(3)]
        for number in range(3):
            await broker.submit(number, {"number": number})
        jobs = await soon(asyncio.gather(*workers))
        assert sorted(job["number"] for job in jobs) == [0, 1, 2]

    play(scenario)


def test_trials_do_not_hear_of_each_other(play):
    async def scenario(broker: BrokerState) -> None:
        for number in range(2):
            await broker.submit(number, {"number": number})
            await broker.next_job(number)
        first = await waiting(broker.rung(0, rung(1)))
        second = await waiting(broker.rung(1, rung(1)))
        await broker.proceed(1)
        assert await soon(second) is True
        assert not first.done()
        await broker.cancel(0)
        assert await soon(first) is False

    play(scenario)


def test_a_number_can_be_submitted_once(play):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        with pytest.raises(ValueError, match="trial 0"):
            await broker.submit(0, SPEC)

    play(scenario)


def test_a_decision_made_before_the_next_rung_does_not_count_for_it(play):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        worker = await waiting(broker.rung(0, rung(1)))
        await broker.proceed(0)
        assert await soon(worker)
        worker = await waiting(broker.rung(0, rung(2)))
        await broker.proceed(0)
        assert await soon(worker)

    play(scenario)


# --- Ended early ----------------------------------------------------------------------------------


def test_a_trial_stopped_at_a_rung_keeps_the_result_of_that_rung(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        await broker.progress(0, row(1))
        worker = await waiting(broker.rung(0, rung(1, score=0.3)))
        await broker.next_event(0)
        await broker.cancel(0)
        assert await soon(worker) is False

    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["rung"]["score"], end["error"]) == ("stopped", 0.3, "")
    assert end["curve"] == [row(1)]


def test_a_trial_cancelled_while_it_waits_is_never_handed_out(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, {"number": 0})
        await broker.submit(1, {"number": 1})
        await broker.cancel(0)
        assert (await soon(broker.next_job(0)))["number"] == 1
        await waiting(broker.next_job(0))

    play(scenario)
    (end,) = ends(journal)
    assert (end["trial"], end["state"], end["attempts"]) == (0, "failed", 0)
    assert "cancelled before its first rung" in end["error"]


def test_a_worker_learns_of_a_cancelled_trial_with_its_next_row_or_rung(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        await broker.cancel(0)
        assert await soon(broker.progress(0, row(1))) is True
        assert await soon(broker.rung(0, rung(1))) is False

    play(scenario)
    assert [end["state"] for end in ends(journal)] == ["failed"]


@pytest.mark.parametrize("times", [1, 3])
def test_cancelling_an_ended_or_unknown_trial_changes_nothing(times: int, play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        await broker.rung(0, rung(1, last=True))
        for _ in range(times):
            await broker.cancel(0)
            await broker.cancel(99)

    play(scenario)
    assert [end["state"] for end in ends(journal)] == ["finished"]


def test_a_trial_that_raised_fails_alone(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        for number in range(2):
            await broker.submit(number, {"number": number})
        await broker.next_job(0)
        await broker.progress(0, row(1))
        await broker.fail(0, "TrainingDivergedError: loss is nan")
        event = await soon(broker.next_event(0))
        assert event == {"kind": "failed", "error": "TrainingDivergedError: loss is nan"}
        await broker.cancel(0)
        assert (await soon(broker.next_job(0)))["number"] == 1

    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["error"]) == ("failed", "TrainingDivergedError: loss is nan")
    assert (end["rung"], end["curve"]) == ({}, [row(1)])


# --- Lost workers ---------------------------------------------------------------------------------


def test_the_trial_of_a_worker_that_starts_again_goes_first(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "0:0")
        for number in range(3):
            await broker.submit(number, {"number": number})
        await broker.next_job(0)
        await broker.next_job(1)
        await broker.progress(0, row(1))
        await broker.register(0, "0:0")
        assert (await soon(broker.next_job(0)))["number"] == 0
        await broker.progress(0, row(1))
        await broker.rung(0, rung(1, last=True))
        assert (await soon(broker.next_job(0)))["number"] == 2

    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["attempts"]) == ("finished", 2)
    assert end["curve"] == [row(1)]  # of the attempt that counts, not of both


def test_a_worker_that_starts_again_loses_nothing_it_had_finished(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        await broker.rung(0, rung(1, last=True))
        await broker.register(0, "0:0")
        await waiting(broker.next_job(0))

    play(scenario)
    assert [end["state"] for end in ends(journal)] == ["finished"]


def test_a_trial_that_takes_its_workers_down_fails_in_the_end(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        for _ in range(MAX_ATTEMPTS):
            await broker.register(0, "0:0")
            assert await soon(broker.next_job(0)) == SPEC
        await broker.register(0, "0:0")
        event = await soon(broker.next_event(0))
        assert event == {"kind": "failed", "error": f"its worker died {MAX_ATTEMPTS} times"}
        await waiting(broker.next_job(0))

    play(scenario)
    assert [(end["state"], end["attempts"]) for end in ends(journal)] == [("failed", MAX_ATTEMPTS)]


@pytest.mark.parametrize("died", ["waiting for the decision", "after the decision"])
def test_a_rung_scored_again_after_a_crash_is_told_once(died: str, play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        worker = await waiting(broker.rung(0, rung(2)))
        if died == "waiting for the decision":
            worker.cancel()
        assert (await soon(broker.next_event(0)))["tokens"] == 20
        await broker.proceed(0)

        await broker.register(0, "0:0")
        await broker.next_job(0)
        assert await soon(broker.rung(0, rung(2))) is True  # decided before: no second wait
        client = await waiting(broker.next_event(0))
        assert await soon(broker.rung(0, rung(3, last=True))) is False
        assert (await soon(client))["tokens"] == 30

    play(scenario)
    assert [(end["state"], end["rung"]["tokens"]) for end in ends(journal)] == [("finished", 30)]


def test_a_trial_stopped_at_a_rung_that_its_worker_did_not_survive_is_stopped(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        worker = await waiting(broker.rung(0, rung(2, score=0.3)))
        await broker.next_event(0)
        worker.cancel()
        await broker.register(0, "0:0")  # a restart, while Tune makes up its mind
        await broker.cancel(0)
        await waiting(broker.next_job(0))

    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["rung"].get("score")) == ("stopped", 0.3)


def test_a_dead_workers_call_for_a_trial_does_not_swallow_one(play):
    # Ray does not end an actor's running call when its caller dies.
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "0:0")
        dead = await waiting(broker.next_job(0))
        await broker.register(0, "0:0")
        alive = asyncio.create_task(broker.next_job(0))
        await asyncio.sleep(0)
        await broker.submit(0, SPEC)
        assert await soon(alive) == SPEC
        assert not dead.done() or dead.result() is None

    play(scenario)


def test_a_restart_of_the_whole_pool_leaves_no_trial_with_a_dead_worker(play):
    async def scenario(broker: BrokerState) -> None:
        for group in range(2):
            await broker.register(group, f"0:{group}")
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        await waiting(broker.next_job(1))  # idle when worker 0 takes the pool down
        for group in range(2):
            await broker.register(group, f"0:{group}")
        alive = [asyncio.create_task(broker.next_job(group)) for group in range(2)]
        done, _ = await asyncio.wait(alive, timeout=2, return_when="FIRST_COMPLETED")
        assert [task.result() for task in done] == [SPEC]

    play(scenario)


# --- The pool's end -------------------------------------------------------------------------------


def test_when_the_pool_fails_open_trials_fail_and_later_ones_at_once(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        for number in range(3):
            await broker.submit(number, {"number": number})
        await broker.next_job(0)
        await broker.rung(0, rung(1, last=True))
        await broker.next_event(0)
        await broker.next_job(0)
        await broker.pool_failed("no more GPUs")
        await broker.submit(3, {"number": 3})
        for number in (1, 2, 3):
            event = await soon(broker.next_event(number))
            assert event == {"kind": "failed", "error": "no more GPUs"}

    play(scenario)
    found = {end["trial"]: (end["state"], end["error"]) for end in ends(journal)}
    failed = ("failed", "no more GPUs")
    assert found == {0: ("finished", ""), 1: failed, 2: failed, 3: failed}


def test_when_the_pool_fails_no_worker_waits_for_a_decision_any_more(play):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)
        worker = await waiting(broker.rung(0, rung(1)))
        await broker.pool_failed("gone")
        await soon(worker)

    play(scenario)


def test_a_failed_trial_is_not_handed_out(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.pool_failed("gone")
        worker = await waiting(broker.next_job(0))
        await broker.close()
        assert await soon(worker) is None

    play(scenario)
    assert [end["state"] for end in ends(journal)] == ["failed"]


def test_closing_wakes_every_worker(play):
    async def scenario(broker: BrokerState) -> None:
        workers = [await waiting(broker.next_job(group)) for group in range(3)]
        await broker.close()
        assert await soon(asyncio.gather(*workers)) == [None, None, None]
        assert await soon(broker.next_job(0)) is None

    play(scenario)


def test_the_store_is_waited_for(play):
    async def scenario(broker: BrokerState) -> None:
        workers = [await waiting(broker.store()) for _ in range(2)]
        assert (await broker.snapshot())["store_ready"] is False
        await broker.set_store("handle")
        assert await soon(asyncio.gather(*workers)) == ["handle", "handle"]
        assert await soon(broker.store()) == "handle"
        assert (await broker.snapshot())["store_ready"] is True

    play(scenario)


def test_closing_ends_the_wait_for_a_store_that_will_not_come(play):
    async def scenario(broker: BrokerState) -> None:
        worker = await waiting(broker.store())
        await broker.close()
        assert await soon(worker) is None

    play(scenario)


# --- One worker's imports at a time ---------------------------------------------------------------


def test_the_others_wait_until_one_worker_has_started(play):
    async def scenario(broker: BrokerState) -> None:
        others = [await waiting(broker.first_worker()) for _ in range(3)]
        await broker.register(1, "0:1")  # says nothing about imports
        await broker.submit(0, SPEC)
        assert not any(task.done() for task in others)
        await broker.starting()
        await soon(asyncio.gather(*others))
        await soon(broker.first_worker())  # one that comes later need not wait
        await broker.starting()

    play(scenario)


@pytest.mark.parametrize("end", ["close", "pool_failed"])
def test_nobody_waits_for_a_first_worker_that_will_not_come(end: str, play):
    async def scenario(broker: BrokerState) -> None:
        others = [await waiting(broker.first_worker()) for _ in range(2)]
        await (broker.close() if end == "close" else broker.pool_failed("no more GPUs"))
        await soon(asyncio.gather(*others))

    play(scenario)


# --- The journal, and the display -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rung", "last rung", "failure"])
def test_a_result_is_on_disk_before_the_client_hears_of_it(
    kind: str, play, journal: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[tuple[int, bool]] = []
    fsync = os.fsync

    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_job(0)

        def spy(descriptor: int) -> None:
            fsync(descriptor)
            synced.append((len(read_journal(journal)), broker._jobs[0].events.empty()))

        monkeypatch.setattr(os, "fsync", spy)
        if kind == "failure":
            await broker.fail(0, "because")
        else:
            worker = asyncio.create_task(broker.rung(0, rung(1, last=kind == "last rung")))
            await asyncio.sleep(0)
        await soon(broker.next_event(0))
        if kind == "rung":
            worker.cancel()

    play(scenario)
    records = len(read_journal(journal))
    assert records == (2 if kind == "last rung" else 1)
    assert synced == [(n, True) for n in range(1, records + 1)]


def test_a_journal_that_exists_is_added_to(play, journal: Path):
    journal.write_text('{"event": "rung", "trial": 9}\n')

    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.cancel(0)

    play(scenario)
    assert [record["trial"] for record in read_journal(journal)] == [9, 0]


def test_every_trial_ends_once_in_the_journal(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        for number in range(4):
            await broker.submit(number, {"number": number})
        for number in range(3):
            await broker.next_job(number)
        await broker.rung(0, rung(1, last=True))
        await broker.fail(1, "raised")
        await broker.fail(1, "raised again")
        await broker.fail(0, "raised after its end")
        await broker.cancel(2)
        await broker.cancel(3)
        await broker.pool_failed("gone")

    play(scenario)
    assert sorted(end["trial"] for end in ends(journal)) == [0, 1, 2, 3]
    states = [end["state"] for end in ended_trials(read_journal(journal))]
    assert states == ["finished", "failed", "failed", "failed"]


def test_the_snapshot_shows_every_trial(play):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(1, "0:1")
        for number in range(3):
            await broker.submit(number, {"number": number})
        await broker.next_job(1)
        await broker.progress(0, row(4))
        worker = await waiting(broker.rung(0, rung(4, score=0.3)))
        await broker.next_job(0)
        await broker.fail(1, "because")
        snapshot = await broker.snapshot()
        assert snapshot["workers"] == {1: "0:1"}
        running, failed, queued = snapshot["trials"]
        assert (running["state"], running["tokens"], running["loss"]) == ("running", 40, 0.25)
        assert running["rung"] == {"score": 0.3, "status": "ok", "tokens": 40, "l0": None}
        assert (failed["state"], failed["error"]) == ("failed", "because")
        assert (queued["state"], queued["number"]) == ("waiting", 2)
        assert queued["rung"]["score"] is None
        worker.cancel()

    play(scenario)


def test_rows_are_those_that_the_observer_has_not_seen(play):
    async def scenario(broker: BrokerState) -> None:
        for number in range(3):
            await broker.submit(number, {"number": number})
            await broker.next_job(number)
        for step in (1, 2, 3):
            await broker.progress(0, row(step))
        await broker.progress(1, row(1))
        assert await broker.rows({}) == {0: [row(1), row(2), row(3)], 1: [row(1)]}
        assert await broker.rows({0: 2, 1: 1}) == {0: [row(3)]}

    play(scenario)
