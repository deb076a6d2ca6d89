"""What is killed at the broker's side or beside it: workers, clients, the broker, the session."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from broker_bench import SPEC, curve, ends, row, rung, soon, waiting

from raysae.journal import read_journal
from raysae.pool.broker import MAX_ATTEMPTS, BrokerState
from raysae.pool.jobs import HaltedError

# --- Lost workers ---------------------------------------------------------------------------------


def test_the_trials_of_lost_workers_go_first_in_their_order(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        for number in range(4):
            await broker.submit(number, {"number": number})
        for group in range(2):
            await broker.next_jobs(group, "a")
        await broker.register(1, "", "b")  # all were restarted; this one is ready first
        assert (await soon(broker.next_jobs(1, "b")))[0]["number"] == 0
        assert (await soon(broker.next_jobs(0, "b")))[0]["number"] == 1
        await broker.rung(0, rung(1, last=True), curve(1))
        assert (await soon(broker.next_jobs(1, "b")))[0]["number"] == 2

    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["attempts"], end["curve"]) == ("finished", 2, curve(1))


def test_a_worker_that_starts_again_loses_nothing_it_had_finished(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await broker.submit(0, SPEC)
        await broker.next_jobs(0, "a")
        await broker.rung(0, rung(1, last=True), curve(1))
        await broker.register(0, "", "b")
        await waiting(broker.next_jobs(0, "b"))

    play(scenario)
    assert [end["state"] for end in ends(journal)] == ["finished"]


@pytest.mark.parametrize("gets", ["no further", "further"])
def test_a_trial_that_takes_its_workers_down_at_one_place_fails(gets: str, play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        for life in range(MAX_ATTEMPTS + 1):
            await broker.register(0, "", f"generation {life}")
            if life < MAX_ATTEMPTS or gets == "further":
                assert await soon(broker.next_jobs(0, f"generation {life}")) == [SPEC]
                await broker.progress(0, row(7 + (life if gets == "further" else 0)))
                await broker.lost([0])
        if gets == "no further":
            event = await soon(broker.next_event(0))
            assert event["kind"] == "failed" and "its worker died" in event["error"]

    play(scenario)
    assert [end["state"] for end in ends(journal)] == (["failed"] if gets == "no further" else [])


LIVES = 3 * MAX_ATTEMPTS


async def live(broker: BrokerState, life: int, trials: int, lost: list[int] | None) -> list[int]:
    """One set of workers, a trial for each, from its start to its end: which worker got one.

    `lost` are those that then die; None: they were all stopped, because a node joined.
    """
    name = f"generation {life}"
    taken = []
    for group in range(trials):
        await broker.register(group, "", name)
        call = asyncio.create_task(broker.next_jobs(group, name))
        for _ in range(20):
            await asyncio.sleep(0)
        if call.done():
            taken += [spec["number"] for spec in call.result()]
        else:
            call.cancel()
    for number in taken:
        await broker.progress(number, row(7))
    if lost is not None:
        await broker.lost([job.worker for job in broker._jobs.values() if job.number in lost])
    return taken


def test_restarts_that_no_worker_died_for_count_against_no_trial(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        for number in range(4):
            await broker.submit(number, {"number": number})
        for life in range(LIVES):
            assert await live(broker, life, 4, lost=None) == [0, 1, 2, 3]

    play(scenario)
    assert ends(journal) == []


def test_only_the_trial_whose_worker_died_answers_for_it(play, journal: Path):
    """With those whose workers were beside it, and are restarted with it, the search goes on."""

    async def scenario(broker: BrokerState) -> None:
        for number in range(3):
            await broker.submit(number, {"number": number})
        taken = [await live(broker, life, 3, lost=[1]) for life in range(MAX_ATTEMPTS + 1)]
        assert taken == [[0, 1, 2], [0, 1, 2], [1], [0, 2]]

    play(scenario)
    (end,) = ends(journal)
    assert (end["trial"], end["state"]) == (1, "failed")
    assert end["error"] == "its worker died 3 times at the same place"


def test_a_suspect_that_gets_further_alone_is_none_any_more(play, journal: Path):
    """The others wait for no more than that."""

    async def scenario(broker: BrokerState) -> None:
        for number in range(3):
            await broker.submit(number, {"number": number})
        for life in range(MAX_ATTEMPTS - 1):
            await live(broker, life, 3, lost=[1])
        await broker.register(0, "", "last")
        (suspect,) = await soon(broker.next_jobs(0, "last"))
        others = [await waiting(broker.next_jobs(group, "last")) for group in (1, 2)]
        await broker.progress(1, row(7))
        await asyncio.sleep(0.01)
        assert suspect["number"] == 1 and not any(task.done() for task in others)
        await broker.progress(1, row(8))
        assert [spec["number"] for (spec,) in await soon(asyncio.gather(*others))] == [0, 2]

    play(scenario)
    assert ends(journal) == []


@pytest.mark.parametrize("alone", ["dies", "gets further"])
def test_a_trial_that_dies_beside_another_is_not_yet_the_one_to_blame(
    alone: str, play, journal: Path
):
    """Who takes all memory may not be whom the system kills for it."""

    async def scenario(broker: BrokerState) -> None:
        for number in range(2):
            await broker.submit(number, {"number": number})
        for life in range(MAX_ATTEMPTS - 1):
            assert await live(broker, life, 2, lost=[0, 1]) == [0, 1]
        # Two suspects: the first gets further alone, the second is then taken beside it, and dies.
        await broker.register(0, "", "third")
        assert (await soon(broker.next_jobs(0, "third")))[0]["number"] == 0
        await broker.progress(0, row(8))
        assert (await soon(broker.next_jobs(1, "third")))[0]["number"] == 1
        await broker.lost([1])
        await broker.register(0, "", "fourth")
        assert ends(journal) == []
        assert (await soon(broker.next_jobs(0, "fourth")))[0]["number"] == 1
        other = await waiting(broker.next_jobs(1, "fourth"))
        if alone == "dies":
            await broker.lost([0])
            await broker.register(0, "", "fifth")
            assert (await soon(broker.next_jobs(0, "fifth")))[0]["number"] == 0
        else:
            await broker.progress(1, row(9))
            assert (await soon(other))[0]["number"] == 0
        other.cancel()

    play(scenario)
    assert [(end["trial"], end["state"]) for end in ends(journal)] == (
        [(1, "failed")] if alone == "dies" else []
    )


def test_a_broker_that_is_started_again_blames_no_trial_for_what_it_did_not_see(
    play, journal: Path
):
    async def before(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        for life in range(MAX_ATTEMPTS - 1):
            await live(broker, life, 1, lost=[0])
        await broker.register(0, "", "last")
        await broker.next_jobs(0, "last")  # its last attempt, and then it gets further

    async def after(broker: BrokerState) -> None:
        await broker.lost([0])
        await broker.register(0, "", "next")
        assert await soon(broker.next_jobs(0, "next")) == [SPEC]

    play(before)
    play(after)
    assert ends(journal) == []


@pytest.mark.parametrize("how", ["told twice", "of workers that had only begun to start"])
def test_a_death_counts_once_and_for_the_trials_of_its_own_set_of_workers(
    how: str, play, journal: Path
):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        for life in range(LIVES):
            await broker.register(0, "", f"generation {life}")
            assert await soon(broker.next_jobs(0, f"generation {life}")) == [SPEC]
            if how == "told twice":
                await broker.lost([])
            else:  # all were stopped for a node that joined, and of the new ones one has died
                await broker.starting(f"another before {life + 1}")
            await broker.lost([0])

    play(scenario)
    assert ends(journal) == []


@pytest.mark.parametrize("died", ["waiting for the decision", "after the decision"])
def test_a_rung_scored_again_is_recorded_once_and_decided_once(died: str, play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await broker.submit(0, SPEC)
        await broker.next_jobs(0, "a")
        worker = await waiting(broker.rung(0, rung(2), curve(2)))
        assert (await soon(broker.next_event(0)))["tokens"] == 20
        if died == "after the decision":
            await broker.proceed(0, 20)
            await soon(worker)
        await broker.register(0, "", "b")
        await broker.next_jobs(0, "b")
        again = asyncio.create_task(broker.rung(0, rung(2, score=0.9), curve(2)))
        if died == "waiting for the decision":
            await asyncio.sleep(0)
            assert not again.done()
            assert (await soon(broker.next_event(0)))["score"] == 0.1
            await broker.proceed(0, 20)
        assert await soon(again) == "go"
        client = await waiting(broker.next_event(0))
        assert await soon(broker.rung(0, rung(3, last=True), curve(3))) == "stop"
        assert (await soon(client))["tokens"] == 30
        worker.cancel()

    play(scenario)
    rungs = [r["tokens"] for r in read_journal(journal) if r["event"] == "rung"]
    assert rungs == [20, 30]


def test_a_trial_stopped_at_a_rung_that_its_worker_did_not_survive_is_stopped(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        worker = await waiting(broker.rung(0, rung(2, score=0.3), curve(2)))
        await broker.register(0, "", "b")  # a restart, while Tune makes up its mind
        await broker.cancel(0)
        await waiting(broker.next_jobs(0, "b"))
        worker.cancel()

    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["rung"]["score"], end["curve"]) == ("stopped", 0.3, curve(2))


def test_a_dead_workers_call_for_a_trial_does_not_swallow_one(play):
    # Ray does not end an actor's running call when its caller dies.
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        dead = await waiting(broker.next_jobs(0, "a"))
        await broker.register(0, "", "b")
        alive = asyncio.create_task(broker.next_jobs(0, "b"))
        await asyncio.sleep(0)
        await broker.submit(0, SPEC)
        assert await soon(alive) == [SPEC]
        assert await soon(dead) is None

    play(scenario)


def test_a_worker_whose_answer_was_lost_is_given_the_same_trial_again(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await broker.submit(0, SPEC)
        await broker.submit(1, SPEC | {"number": 1})
        assert await soon(broker.next_jobs(0, "a")) == [SPEC]
        assert await soon(broker.next_jobs(0, "a")) == [SPEC]

    play(scenario)
    assert [r["event"] for r in read_journal(journal)].count("start") == 1


# --- A broker that is started again, its clients and workers alive --------------------------------


def test_a_restarted_broker_goes_on_where_it_was(play, journal: Path):
    async def before(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        for number in range(3):
            await broker.submit(number, {"number": number})
        await broker.next_jobs(0, "a")
        await broker.next_jobs(1, "a")
        await broker.rung(1, rung(1, last=True), curve(1))
        worker = await waiting(broker.rung(0, rung(2), curve(2)))
        worker.cancel()

    async def after(broker: BrokerState) -> None:
        worker = asyncio.create_task(broker.rung(0, rung(2), curve(2)))  # the call is repeated
        assert (await soon(broker.next_event(0)))["tokens"] == 20
        await broker.proceed(0, 20)
        assert await soon(worker) == "go"
        assert (await soon(broker.next_event(1)))["last"]
        assert (await soon(broker.next_jobs(1, "a")))[0]["number"] == 2
        states = [trial["state"] for trial in (await broker.snapshot())["trials"]]
        assert states == ["running", "finished", "running"]

    play(before)
    play(after)
    assert len(ends(journal)) == 1


def test_a_broker_restarted_with_the_pool_gives_its_trials_to_the_new_workers(play):
    async def before(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await broker.submit(0, SPEC)
        await broker.next_jobs(0, "a")

    async def after(broker: BrokerState) -> None:
        await broker.register(0, "", "b")
        assert await soon(broker.next_jobs(0, "b")) == [SPEC]

    play(before)
    play(after)


def test_a_restarted_broker_asks_for_the_store_again(play):
    async def before(broker: BrokerState) -> None:
        await broker.set_store("handle")

    async def after(broker: BrokerState) -> None:
        worker = await waiting(broker.store())
        assert not (await broker.snapshot())["store_ready"]
        await broker.set_store("handle")
        assert await soon(worker) == "handle"

    play(before)
    play(after)


# --- Another session of the search ----------------------------------------------------------------


def test_a_later_session_takes_up_what_is_asked_for_and_nothing_else(play, journal: Path):
    async def first(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        for number in range(3):
            await broker.submit(number, {"number": number})
        await broker.next_jobs(0, "a")
        await broker.rung(0, rung(1, last=True), curve(1))
        await broker.next_jobs(0, "a")
        worker = await waiting(broker.rung(1, rung(2), curve(2)))
        worker.cancel()

    async def second(broker: BrokerState) -> None:
        await broker.register(0, "", "b")
        worker = await waiting(broker.next_jobs(0, "b"))  # nobody has asked for a trial yet
        await broker.submit(1, {"number": 1})
        assert (await soon(worker))[0]["number"] == 1
        assert (await soon(broker.next_event(1)))["tokens"] == 20
        states = [trial["state"] for trial in (await broker.snapshot())["trials"]]
        assert states == ["finished", "running", "dormant"]

    play(first, session="one")
    play(second, session="two")
    assert len(ends(journal)) == 1


@pytest.mark.parametrize("cut", [1, 20])
def test_a_record_cut_off_by_a_crash_is_as_if_it_had_not_been(cut: int, play, journal: Path):
    async def first(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        await broker.rung(0, rung(1, last=True), curve(1))

    async def second(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        assert await soon(broker.next_jobs(0)) == [SPEC]
        await broker.rung(0, rung(1, last=True), curve(1))

    play(first, session="one")
    *lines, end = journal.read_bytes().splitlines(keepends=True)
    assert b'"end"' in end and b'"rung"' in lines[-1]
    journal.write_bytes(b"".join(lines)[:-cut])
    play(second, session="two")
    assert [end["state"] for end in ends(journal)] == ["finished"]
    assert [r["event"] for r in read_journal(journal)].count("rung") == 1


@pytest.mark.parametrize("asks", ["a worker", "nobody"])
@pytest.mark.parametrize("session", ["one", "two"])
def test_a_trial_whose_last_rung_was_recorded_has_finished(
    session: str, asks: str, play, journal: Path
):
    """The broker was killed between that record and the next, or the disk was full."""

    async def first(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await broker.submit(0, SPEC)
        await broker.next_jobs(0, "a")
        await broker.rung(0, rung(3, last=True), curve(3))

    async def second(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        if asks == "a worker":
            await broker.register(0, "", "b")
            await waiting(broker.next_jobs(0, "b"))
        assert (await soon(broker.next_event(0)))["last"]
        await broker.cancel(0)

    play(first, session="one")
    lines = journal.read_text().splitlines(keepends=True)
    assert '"event": "end"' in lines[-1]
    journal.write_text("".join(lines[:-1]))
    play(second, session)
    (end,) = ends(journal)
    assert (end["state"], end["rung"]["tokens"], end["curve"]) == ("finished", 30, curve(3))


@pytest.mark.parametrize("call", ["cancel", "fail", "abandon"])
def test_a_trial_whose_end_could_not_be_recorded_still_finishes(
    call: str, play, journal: Path, monkeypatch: pytest.MonkeyPatch
):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        with monkeypatch.context() as patch:
            patch.setattr(broker, "_end", lambda *_: None)
            await broker.rung(0, rung(3, last=True), curve(3))
        await (broker.abandon("gone") if call == "abandon" else getattr(broker, call)(*arguments))

    arguments = (0, "raised") if call == "fail" else (0,)
    play(scenario)
    (end,) = ends(journal)
    assert (end["state"], end["error"], end["curve"]) == ("finished", "", curve(3))


# --- Pausing and halting --------------------------------------------------------------------------


def test_a_pause_waits_until_every_trial_in_flight_is_saved(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        for number in range(3):
            await broker.submit(number, {"number": number})
        for group in range(2):
            await broker.next_jobs(group, "a")
        at_rung = await waiting(broker.rung(0, rung(2), curve(2)))
        pause = await waiting(broker.pause(5))
        assert await soon(at_rung) == "pause"
        assert await soon(broker.progress(1, row(1))) == "pause"
        await broker.cancel(0)  # a client's end, not a decision
        await broker.paused(0)
        assert not pause.done()
        await broker.paused(1)
        assert await soon(pause) is True
        assert await soon(broker.next_jobs(0, "a")) is None

    play(scenario)
    assert ends(journal) == []


def test_a_pause_does_not_wait_for_ever(play):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        assert await soon(broker.pause(0.01)) is False

    play(scenario)


def test_a_halted_search_fails_no_trial_and_says_why(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        await broker.halt("no more GPUs")
        await broker.halt("and then something else")
        assert await broker.health() == ("no more GPUs", False)
        assert await soon(broker.progress(0, row(1))) == "pause"
        assert await soon(broker.store()) is None

    play(scenario)
    assert ends(journal) == []


@pytest.mark.parametrize("end", ["halt", "pause", "close"])
def test_a_trial_does_not_fail_while_the_search_ends(end: str, play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.submit(0, SPEC)
        await broker.next_jobs(0)
        if end == "pause":
            await broker.pause(0.01)
        else:
            await (broker.halt("the harvest failed") if end == "halt" else broker.close())
        assert not await broker.fail(0, "an object was lost", curve(1))

    play(scenario)
    assert ends(journal) == []


def test_a_full_disk_halts_the_search_and_says_so():
    async def main() -> None:
        broker = BrokerState("/dev/full")  # every write: no space left on device
        with pytest.raises(HaltedError, match="/dev/full cannot be written: No space left"):
            await broker.submit(0, SPEC)
        assert "No space left" in (await broker.health())[0]

    asyncio.run(main())
