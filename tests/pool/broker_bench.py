"""Scenarios of a broker: its calls one after another, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from raysae.journal import read_journal
from raysae.pool.broker import BrokerState

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


def curve(step: int) -> list[dict[str, Any]]:
    return [row(1), row(step)]


def rung(step: int, score: float = 0.1, last: bool = False) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "score": score, "status": "ok", "last": last}


def ends(journal: Path) -> list[dict[str, Any]]:
    return [record for record in read_journal(journal) if record["event"] == "end"]
