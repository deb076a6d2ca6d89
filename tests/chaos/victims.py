"""A search in a process of its own, and ways to kill parts of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from raysae.journal import JOURNAL, read_journal

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = {
    "worker": ("ray::RayTrainWorker",),
    "client": ("ray::ImplicitFunc",),
    "broker": ("ray::Broker",),
    "controller": ("ray::TrainController",),
    "harvest": ("ray::tokenize", "ray::harvest_piece"),
    "evaluation": ("ray::evaluation_cache",),
}
"""How Ray's names of a search's processes begin. The store is no process of its own: its chunks lie
with Ray's node, and are the driver's."""


class Search:
    """`run_search.py` with some options, its output in a file beside the run folder."""

    def __init__(self, out: Path, *options: str, **variables: str) -> None:
        self.out = out
        self.log = out.with_suffix(".log")
        command = [sys.executable, str(ROOT / "run_search.py"), *options]
        environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **variables}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=out.parent, env=environment, stdout=log, stderr=log
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float) -> int:
        """Exit code; the search must end by itself in that time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.tail()}") from None

    def wait_until(self, predicate: Callable[[], bool], seconds: float) -> bool:
        """Whether `predicate` became true before the search ended; fails if neither happens."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if predicate():
                return True
            if self.ended:
                return False
            time.sleep(0.1)
        self.kill()
        raise AssertionError(f"nothing happened in {seconds} s:\n{self.tail()}")

    def wait_for_more(self, kind: str, than: int, seconds: float) -> bool:
        """As `wait_until`, for more than so many records of a kind."""
        return self.wait_until(lambda: self.events(kind) > than, seconds)

    def events(self, kind: str) -> int:
        """Number of the journal's records of that kind."""
        return sum(r["event"] == kind for r in read_journal(self.out / JOURNAL))

    def children(self, kind: str) -> list[psutil.Process]:
        """The search's processes of a kind of `PROCESSES`."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    command = child.cmdline()
                    if command and command[0].startswith(PROCESSES[kind]):
                        found.append(child)
        return found

    def kill_all(self, kind: str) -> int:
        """SIGKILL for all of a kind of `PROCESSES`; how many there were."""
        found = self.children(kind)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return len(found)

    def kill(self) -> None:
        """SIGKILL for the driver; the processes that Ray started for it follow by themselves."""
        children = []
        if not self.ended:
            children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        for child in alive:  # agents of Ray that outlive their node
            child.kill()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def untimed(rung: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in rung.items() if not k.endswith("_seconds")}


def results(out: Path) -> list[dict[str, object]]:
    """What a search found, without times, workers and attempts: by trial, its end."""
    kept = []
    for record in read_journal(out / JOURNAL):
        if record["event"] != "end":
            continue
        rung = untimed(record["rung"])
        if "seeds" in rung:
            rung["seeds"] = [untimed(seed) for seed in rung["seeds"]]
        fields = {k: record[k] for k in ("trial", "state", "spec", "error", "curve")}
        kept.append(json.loads(json.dumps({**fields, "rung": rung})))
    return sorted(kept, key=lambda r: int(str(r["trial"])))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two results differ, a line each: an assertion of equality would print all of both."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        pairs = [(f"{where}.{key}", one.get(key), other.get(key)) for key in keys]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [f"{where}: {one!r} != {other!r}"]
    return [line for path, a, b in pairs for line in differences(a, b, path)]
