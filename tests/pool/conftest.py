"""A broker that writes to a journal of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from broker_bench import Scenario

from raysae.pool.broker import BrokerState


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@pytest.fixture
def play(journal: Path) -> Callable[..., None]:
    """Run a scenario with a new broker, which goes on with what the journal holds."""

    def run(scenario: Scenario, session: str = "one") -> None:
        async def main() -> None:
            await scenario(BrokerState(str(journal), session))

        asyncio.run(main())

    return run
