"""A search in a process of its own, as a user starts it, watched from outside while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import optuna
import psutil
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from test_tensorboard import scalars

from raysae.search.status import STATUS_FILE, read_status

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 900
"""Seconds, after which the search hangs."""
LISTEN_SECONDS = 5.0


@dataclass
class Seen:
    """What was seen of the search while it ran."""

    out: Path
    stdout: str = ""
    states: set[str] = field(default_factory=set)
    running_tokens: set[int] = field(default_factory=set)
    metrics: str = ""
    optuna_trials: set[int] = field(default_factory=set)
    curve_points: int = 0
    listening: dict[str, set[str]] = field(default_factory=dict)
    """By process, of the search's: the addresses at which it waits for connections."""
    listened: float = 0.0
    """When that was looked at."""
    unasked: int = 0
    """Status code of the dashboard's answer to who has no token."""

    def look(self, pid: int) -> None:
        self.listen(pid)
        if not (self.out / STATUS_FILE).exists():
            return
        folder = read_status(self.out)
        self.states.add(folder.state)
        self.running_tokens |= {t.get("tokens", 0) for t in folder.view.standing.running}
        if (self.out / "optuna.journal").exists():
            self.optuna_trials.add(len(study(self.out).trials))
        first = scalars(self.out / "tensorboard" / "0000").get("train/loss", [])
        self.curve_points = self.curve_points or len(first)
        text = scrape(self.out)
        if text.count("raysae_") > self.metrics.count("raysae_"):
            self.metrics = text
        self.unasked = self.unasked or ask_dashboard(self.out)

    def listen(self, pid: int) -> None:
        """Look at the ports of the search's process and of all that it has started, now and then:
        that reads all that these have open.
        """
        if time.monotonic() - self.listened < LISTEN_SECONDS:
            return
        self.listened = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            search = psutil.Process(pid)
            for process in [search, *search.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    self._listen(process)

    def _listen(self, process: psutil.Process) -> None:
        connections = process.net_connections("inet")
        found = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
        if found:
            name = " ".join(process.cmdline())[:200]
            self.listening.setdefault(name, set()).update(found)


def study(out: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    return optuna.load_study(study_name="raysae", storage=storage)


def scrape(out: Path) -> str:
    """The metrics endpoint that the status file names."""
    (address,) = json.loads((out / STATUS_FILE).read_text())["metrics"]
    try:
        with urllib.request.urlopen(address, timeout=5) as page:
            return str(page.read().decode())
    except OSError:  # named before it answers, or after it is gone
        return ""


def beyond_this_machine(seen: Seen) -> dict[str, set[str]]:
    """The processes that others can reach, and the addresses at which they listen."""
    far = {
        name: {ip for ip in found if not ip_address(ip.removeprefix("::ffff:")).is_loopback}
        for name, found in seen.listening.items()
    }
    return {name: found for name, found in far.items() if found}


def ask_dashboard(out: Path) -> int:
    """The status code with which the dashboard's API answers a request without a token; 0: none."""
    address = json.loads((out / STATUS_FILE).read_text())["dashboard"]
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5) as page:
            return int(page.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:  # it is gone, or busy
        return 0


def observe(out: Path, *options: str) -> Seen:
    """Run the main job to its end, its working directory somewhere else, as when installed."""
    command = [sys.executable, str(ROOT / "run_search.py"), "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    seen = Seen(out)
    with (out.parent / "stdout").open("w+") as stdout:
        process = subprocess.Popen(
            command, cwd=out.parent, env=environment, stdout=stdout, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + DEADLINE
        try:
            while process.poll() is None:
                assert time.monotonic() < end, "the search hangs"
                seen.look(process.pid)
                time.sleep(0.5)
        finally:
            process.kill()
            process.wait()
        stdout.seek(0)
        seen.stdout = stdout.read()
    assert process.returncode == 0, seen.stdout
    return seen
