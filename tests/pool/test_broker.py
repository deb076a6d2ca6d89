"""The life of a trial at the broker: asked for, trained, scored, decided on, ended."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from broker_bench import SPEC, curve, ends, row, rung, soon, waiting

from raysae.journal import ended_trials, read_journal
from raysae.pool.broker import BrokerState

# --- A trial's life -------------------------------------------------------------------------------


def test_a_trial_is_trained_scored_twice_and_finished(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "0:0")
        await broker.submit(0, SPEC)
        assert await soon(broker.next_jobs(0)) == [SPEC]
        client = await waiting(broker.next_event(0))

        assert await soon(broker.progress(0, row(1))) == "go"
        assert await soon(broker.progress(0, row(2))) == "go"
        worker = await waiting(broker.rung(0, rung(2, score=0.1), curve(2)))
        assert await soon(client) == {"kind": "rung", **rung(2, score=0.1)}
        assert not worker.done()
        await broker.proceed(0, 20)
        assert await soon(worker) == "go"

        await broker.progress(0, row(3))
        client = await waiting(broker.next_event(0))
        assert await soon(broker.rung(0, rung(3, score=0.2, last=True), curve(3))) == "stop"
        assert (await soon(client))["last"]
        await broker.cancel(0)  # the client's goodbye changes nothing

    play(scenario)
    records = read_journal(journal)
    assert [r["event"] for r in records] == ["submit", "start", "rung", "proceed", "rung", "end"]
    end = records[-1]
    assert (end["state"], end["trial"], end["attempts"], end["error"]) == ("finished", 0, 1, "")
    assert end["spec"] == SPEC
    assert end["curve"] == curve(3)
    assert end["rung"] == rung(3, score=0.2, last=True)


def test_a_worker_waits_for_a_trial_and_a_client_for_its_worker(play):
    async def scenario(broker: BrokerState) -> None:
        worker = await waiting(broker.next_jobs(0))
        await broker.submit(0, SPEC)
        assert await soon(worker) == [SPEC]
        await waiting(broker.next_event(0))

    play(scenario)


def test_trials_are_handed_out_oldest_first_and_once(play):
    async def scenario(broker: BrokerState) -> None:
        for number in range(4):
            await broker.submit(number, {"number": number})
        jobs = [await soon(broker.next_jobs(group)) for group in range(4)]
        assert [job["number"] for (job,) in jobs] == [0, 1, 2, 3]
        await waiting(broker.next_jobs(4))

    play(scenario)


def test_of_many_waiting_workers_each_gets_another_trial(play):
    async def scenario(broker: BrokerState) -> None:
        workers = [await waiting(broker.next_jobs(group)) for group in range(3)]
        for number in range(3):
            await broker.submit(number, {"number": number})
        jobs = await soon(asyncio.gather(*workers))
        assert sorted(job["number"] for (job,) in jobs) == [0, 1, 2]

    play(scenario)


def test_trials_do_not_hear_of_each_other(play):
    async def scenario(broker: BrokerState) -> None:
        for number in range(2):
            await broker.submit(number, {"number": number})
            await broker.next_jobs(number)
        first = await waiting(broker.rung(0, rung(1), curve(1)))
        second = await waiting(broker.rung(1, rung(1), curve(1)))
        await broker.proceed(1, 10)
        assert await soon(second) == "go"
        assert not first.done()
        await broker.cancel(0)
        assert await soon(first) == "stop"

    play(scenario)


def test_a_number_stands_for_one_spec(play):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.submit(0, SPEC)  # its client was started again
        with pytest.raises(ValueError, match="trial 0"):
            await broker.submit(0, SPEC | {"seed": 6})
        assert await soon(broker.next_jobs(0)) == [SPEC]
        await waiting(broker.next_jobs(1))

    play(scenario)


def test_a_decision_made_before_the_next_rung_does_not_count_for_it(play):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        worker = await waiting(broker.rung(0, rung(1), curve(1)))
        await broker.proceed(0, 10)
        assert await soon(worker) == "go"
        worker = await waiting(broker.rung(0, rung(2), curve(2)))
        await broker.proceed(0, 10)  # said again
        await asyncio.sleep(0)
        assert not worker.done()
        await broker.proceed(0, 20)
        assert await soon(worker) == "go"

    play(scenario)


# --- Ended early ----------------------------------------------------------------------------------


def test_a_trial_stopped_at_a_rung_keeps_the_result_of_that_rung(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        await broker.progress(0, row(1))
        worker = await waiting(broker.rung(0, rung(1, score=0.3), curve(1)))
        await broker.next_event(0)
        await broker.cancel(0)
        assert await soon(worker) == "stop"

    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["rung"]["score"], end["error"]) == ("stopped", 0.3, "")
    assert end["curve"] == curve(1)


def test_a_trial_cancelled_while_it_waits_is_never_handed_out(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, {"number": 0})
        await broker.submit(1, {"number": 1})
        await broker.cancel(0)
        assert (await soon(broker.next_jobs(0)))[0]["number"] == 1
        await waiting(broker.next_jobs(1))

    play(scenario)
    (end,) = ends(journal)
    assert (end["trial"], end["state"], end["attempts"]) == (0, "failed", 0)
    assert "cancelled before its first rung" in end["error"]


def test_a_worker_learns_of_a_cancelled_trial_with_its_next_row_or_rung(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        await broker.cancel(0)
        assert await soon(broker.progress(0, row(1))) == "stop"
        assert await soon(broker.rung(0, rung(1), curve(1))) == "stop"

    play(scenario)
    assert [end["state"] for end in ends(journal)] == ["failed"]


def test_a_worker_learns_between_two_rows_what_it_would_with_the_next(play):
    async def scenario(broker: BrokerState) -> None:
        for number in (0, 1):
            await broker.submit(number, SPEC | {"number": number})
            await broker.next_jobs(number)
        assert await soon(broker.words([0, 1])) == ["go", "go"]
        await broker.cancel(1)
        assert await soon(broker.words([0, 1])) == ["go", "stop"]
        await broker.pause(0.0)
        assert await soon(broker.words([0, 1])) == ["pause", "stop"]

    play(scenario)


@pytest.mark.parametrize("times", [1, 3])
def test_cancelling_an_ended_or_unknown_trial_changes_nothing(times: int, play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        await broker.rung(0, rung(1, last=True), curve(1))
        for _ in range(times):
            await broker.cancel(0)
            await broker.cancel(99)

    play(scenario)
    assert [end["state"] for end in ends(journal)] == ["finished"]


def test_a_trial_that_raised_fails_alone(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        for number in range(2):
            await broker.submit(number, {"number": number})
        await broker.next_jobs(0)
        await broker.progress(0, row(1))
        await broker.fail(0, "TrainingDivergedError: loss is nan", [row(1)])
        event = await soon(broker.next_event(0))
        assert event == {"kind": "failed", "error": "TrainingDivergedError: loss is nan"}
        await broker.cancel(0)
        assert (await soon(broker.next_jobs(0)))[0]["number"] == 1

    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["error"]) == ("failed", "TrainingDivergedError: loss is nan")
    assert (end["rung"], end["curve"]) == ({}, [row(1)])


# --- The end of the pool --------------------------------------------------------------------------


def test_silence_lasts_from_the_last_beat_of_a_worker(play, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("raysae.pool.broker.time.monotonic", lambda: now[0])

    async def scenario(broker: BrokerState) -> None:
        now[0] += 30
        assert await soon(broker.silence()) == now[0] - 100
        await broker.alive()
        assert await soon(broker.silence()) == 0
        now[0] += 7
        assert await soon(broker.silence()) == 7

    play(scenario)


def test_closing_wakes_every_worker(play):
    async def scenario(broker: BrokerState) -> None:
        workers = [await waiting(broker.next_jobs(group)) for group in range(3)]
        await broker.close()
        assert await soon(asyncio.gather(*workers)) == [None, None, None]
        assert await soon(broker.next_jobs(0)) is None

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


@pytest.mark.parametrize("end", ["close", "halt"])
def test_nobody_waits_for_a_first_worker_that_will_not_come(end: str, play):
    async def scenario(broker: BrokerState) -> None:
        others = [await waiting(broker.first_worker()) for _ in range(2)]
        await (broker.close() if end == "close" else broker.halt("no more GPUs"))
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
        await broker.next_jobs(0)

        client = await waiting(broker.next_event(0))

        def spy(descriptor: int) -> None:
            fsync(descriptor)
            synced.append((len(read_journal(journal)), not client.done()))

        monkeypatch.setattr(os, "fsync", spy)
        if kind == "failure":
            await broker.fail(0, "because")
        else:
            worker = asyncio.create_task(
                broker.rung(0, rung(1, last=kind == "last rung"), curve(1))
            )
        await soon(client)
        if kind == "rung":
            worker.cancel()

    play(scenario)
    before, records = 2, len(read_journal(journal))  # submit and start
    assert records - before == (2 if kind == "last rung" else 1)
    assert synced == [(n, True) for n in range(before + 1, records + 1)]


def test_a_journal_that_exists_is_added_to(play, journal: Path):
    journal.write_text('{"event": "proceed", "trial": 9, "tokens": 1}\n')

    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.cancel(0)

    play(scenario)
    assert [record["trial"] for record in read_journal(journal)] == [9, 0, 0]


def test_every_trial_ends_once_in_the_journal(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        for number in range(4):
            await broker.submit(number, {"number": number})
        for number in range(3):
            await broker.next_jobs(number)
        await broker.rung(0, rung(1, last=True), curve(1))
        await broker.fail(1, "raised")
        await broker.fail(1, "raised again")
        await broker.fail(0, "raised after its end")
        await broker.cancel(2)
        await broker.cancel(3)
        await broker.abandon("gone")

    play(scenario)
    assert sorted(end["trial"] for end in ends(journal)) == [0, 1, 2, 3]
    states = [end["state"] for end in ended_trials(read_journal(journal))]
    assert states == ["finished", "failed", "failed", "failed"]


def test_the_snapshot_shows_every_trial(play):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(1, "0:1", tier="shared memory")
        for number in range(3):
            await broker.submit(number, {"number": number})
        await broker.next_jobs(1)
        await broker.progress(0, row(4))
        worker = await waiting(broker.rung(0, rung(4, score=0.3), curve(4)))
        await broker.next_jobs(0)
        await broker.fail(1, "because")
        snapshot = await broker.snapshot()
        assert snapshot["workers"] == {1: "0:1"}
        assert snapshot["tiers"] == ["shared memory"]
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
            await broker.next_jobs(number)
        for step in (1, 2, 3):
            await broker.progress(0, row(step))
        await broker.progress(1, row(1))
        assert await broker.rows({}) == {0: [row(1), row(2), row(3)], 1: [row(1)]}
        assert await broker.rows({0: 2, 1: 1}) == {0: [row(3)]}

    play(scenario)
