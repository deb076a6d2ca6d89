"""Which trials a broker hands to one worker, to be trained together, and what becomes of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from broker_bench import curve, ends, row, rung, soon, waiting

from raysae.journal import read_journal
from raysae.pool import broker as module
from raysae.pool.broker import MAX_ATTEMPTS, BrokerState


def spec(number: int, **changes: Any) -> dict[str, Any]:
    """A trial's, as far as its steps depend on it; `changes` by field, whatever its section."""
    sae = {"architecture": "topk", "d_sae": 32, "matryoshka_widths": None, "k": 3 + number}
    training = {
        "batch_size": 64,
        "step": "packed",
        "autocast": "auto",
        "tf32": True,
        "lr": 1e-3 * (number + 1),
    }
    made: dict[str, Any] = {"sae": sae, "training": training, "rungs": [640, 1280], "alpha": 1.0}
    for name, value in changes.items():
        section = next((part for part in (sae, training) if name in part), made)
        section[name] = value
    return {"number": number, **made}


def numbers(jobs: list[dict[str, Any]] | None) -> list[int]:
    assert jobs is not None
    return [job["number"] for job in jobs]


async def submit(broker: BrokerState, *specs: dict[str, Any]) -> None:
    for one in specs:
        await broker.submit(one["number"], one)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment that does not end by itself."""
    monkeypatch.setattr(module, "PACK_SECONDS", 3600)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment that is over soon."""
    monkeypatch.setattr(module, "PACK_SECONDS", 0.01)


# --- Handing out ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
def test_a_worker_gets_the_oldest_trials_up_to_what_it_takes(play):
    async def scenario(broker: BrokerState) -> None:
        await submit(broker, *map(spec, range(5)))
        assert numbers(await soon(broker.next_jobs(0, most=2))) == [0, 1]
        assert numbers(await soon(broker.next_jobs(1, most=3))) == [2, 3, 4]

    play(scenario)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "other",
    [
        {"architecture": "batchtopk"},
        {"d_sae": 64},
        {"matryoshka_widths": [16, 32]},
        {"batch_size": 32},
        {"step": "saelens"},
        {"autocast": "off"},
        {"tf32": False},
        {"rungs": [640, 2560]},
        {"rungs": [1280]},
    ],
    ids=str,
)
def test_what_cannot_share_steps_goes_to_another_worker(other: dict[str, Any], play):
    async def scenario(broker: BrokerState) -> None:
        await submit(broker, spec(0), spec(1, **other), spec(2), spec(3, **other))
        assert numbers(await soon(broker.next_jobs(0, most=4))) == [0, 2]
        monkey = asyncio.create_task(broker.next_jobs(1, most=2))
        assert numbers(await soon(monkey)) == [1, 3]

    play(scenario)


@pytest.mark.usefixtures("hasty")
def test_a_trial_is_not_kept_waiting_for_others_that_do_not_come(play):
    async def scenario(broker: BrokerState) -> None:
        await submit(broker, spec(0))
        assert numbers(await soon(broker.next_jobs(0, most=2))) == [0]

    play(scenario)


@pytest.mark.usefixtures("patient")
def test_trials_that_come_one_after_the_other_are_trained_together(play):
    async def scenario(broker: BrokerState) -> None:
        worker = await waiting(broker.next_jobs(0, most=2))
        await submit(broker, spec(0))
        await asyncio.sleep(0)
        assert not worker.done()
        await submit(broker, spec(1))
        assert numbers(await soon(worker)) == [0, 1]

    play(scenario)


@pytest.mark.usefixtures("hasty")
def test_workers_that_wait_share_what_there_is(play):
    async def scenario(broker: BrokerState) -> None:
        workers = [await waiting(broker.next_jobs(group, most=4)) for group in range(2)]
        await submit(broker, spec(0), spec(1))
        jobs = await soon(asyncio.gather(*workers))
        assert sorted(map(numbers, jobs)) == [[0], [1]]

    play(scenario)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("end", ["close", "halt"])
def test_a_worker_that_waits_for_a_second_trial_hears_of_the_end(end: str, play):
    async def scenario(broker: BrokerState) -> None:
        await submit(broker, spec(0))
        worker = await waiting(broker.next_jobs(0, most=2))
        await (broker.close() if end == "close" else broker.halt("no more GPUs"))
        assert await soon(worker) is None

    play(scenario)


@pytest.mark.usefixtures("hasty")
def test_a_trial_that_is_cancelled_while_its_worker_waits_for_another_is_not_handed_out(play):
    async def scenario(broker: BrokerState) -> None:
        await submit(broker, spec(0))
        worker = await waiting(broker.next_jobs(0, most=2))
        await broker.cancel(0)
        await asyncio.sleep(0.05)
        assert not worker.done()
        await submit(broker, spec(1))
        assert numbers(await soon(worker)) == [1]

    play(scenario)


# --- On their way ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
def test_a_trial_that_is_stopped_leaves_and_its_worker_gets_no_other_before_all_have(play):
    async def scenario(broker: BrokerState) -> None:
        await submit(broker, spec(0), spec(1))
        await soon(broker.next_jobs(0, most=2))
        workers = [await waiting(broker.rung(n, rung(2), curve(2))) for n in (0, 1)]
        await broker.cancel(0)
        await broker.proceed(1, 20)
        assert await soon(asyncio.gather(*workers)) == ["stop", "go"]
        assert await soon(broker.progress(1, row(3))) == "go"
        assert await soon(broker.rung(1, rung(3, last=True), curve(3))) == "stop"
        await submit(broker, spec(2), spec(3))
        assert numbers(await soon(broker.next_jobs(0, most=2))) == [2, 3]

    play(scenario)


@pytest.mark.usefixtures("patient")
def test_a_worker_whose_answer_was_lost_is_given_the_same_trials_again(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await submit(broker, *map(spec, range(4)))
        assert numbers(await soon(broker.next_jobs(0, "a", 2))) == [0, 1]
        assert numbers(await soon(broker.next_jobs(0, "a", 2))) == [0, 1]

    async def restarted(broker: BrokerState) -> None:
        assert numbers(await soon(broker.next_jobs(0, "a", 2))) == [0, 1]
        assert numbers(await soon(broker.next_jobs(1, "a", 2))) == [2, 3]

    play(scenario)
    play(restarted)
    assert [r["trial"] for r in read_journal(journal) if r["event"] == "start"] == [0, 1, 2, 3]


@pytest.mark.usefixtures("patient")
def test_a_broker_killed_while_it_handed_out_goes_on_with_what_it_had_written(play, journal: Path):
    async def scenario(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await submit(broker, *map(spec, range(3)))
        await soon(broker.next_jobs(0, "a", 2))

    async def restarted(broker: BrokerState) -> None:
        assert numbers(await soon(broker.next_jobs(0, "a", 2))) == [0]
        assert numbers(await soon(broker.next_jobs(1, "a", 2))) == [1, 2]

    play(scenario)
    lines = journal.read_text().splitlines(keepends=True)
    assert '"start"' in lines[-1] and '"trial": 1' in lines[-1]
    journal.write_text("".join(lines[:-1]))
    play(restarted)


# --- Lost workers ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("broker_too", [False, True])
def test_trials_trained_together_are_taken_up_together(broker_too: bool, play):
    """And not with others, whose checkpoints are elsewhere."""

    async def before(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await submit(broker, *map(spec, range(4)))
        assert numbers(await soon(broker.next_jobs(0, "a", 2))) == [0, 1]
        assert numbers(await soon(broker.next_jobs(1, "a", 2))) == [2, 3]
        await broker.rung(0, rung(3, last=True), curve(3))
        await submit(broker, *map(spec, (4, 5, 6)))
        if not broker_too:
            await after(broker)

    async def after(broker: BrokerState) -> None:
        await broker.register(0, "", "b")
        assert numbers(await soon(broker.next_jobs(0, "b", 2))) == [1]
        assert numbers(await soon(broker.next_jobs(1, "b", 2))) == [2, 3]
        assert numbers(await soon(broker.next_jobs(2, "b", 2))) == [4, 5]

    play(before)
    if broker_too:
        play(after)


@pytest.mark.usefixtures("patient")
def test_a_later_session_trains_together_what_the_first_had_saved_together(play):
    async def first(broker: BrokerState) -> None:
        await broker.register(0, "", "a")
        await submit(broker, *map(spec, range(3)))
        await soon(broker.next_jobs(0, "a", 2))
        await soon(broker.next_jobs(1, "a"))

    async def second(broker: BrokerState) -> None:
        await broker.register(0, "", "b")
        await submit(broker, spec(2), spec(0), spec(1), spec(3))
        assert numbers(await soon(broker.next_jobs(0, "b", 2))) == [2]
        assert numbers(await soon(broker.next_jobs(1, "b", 2))) == [0, 1]

    play(first, session="one")
    play(second, session="two")


@pytest.mark.usefixtures("hasty")
def test_the_last_attempt_of_a_trial_is_alone(play, journal: Path):
    """Of two whose workers died, only the one that is to blame fails."""

    async def scenario(broker: BrokerState) -> None:
        await submit(broker, spec(0), spec(1))
        for life, together in enumerate([[0, 1], [0, 1], [0]]):
            await broker.register(0, "", f"life {life}")
            assert numbers(await soon(broker.next_jobs(0, f"life {life}", 2))) == together
            for number in together:
                await broker.progress(number, row(7))
            await broker.lost([0])
        await broker.register(0, "", "without 0")
        assert numbers(await soon(broker.next_jobs(0, "without 0", 2))) == [1]
        await broker.rung(1, rung(8, last=True), curve(8))

    play(scenario)
    assert MAX_ATTEMPTS == 3
    ended = {end["trial"]: (end["state"], end["attempts"]) for end in ends(journal)}
    assert ended == {0: ("failed", 3), 1: ("finished", 3)}
