"""A search in a process of its own, as a user starts it, watched from outside while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from test_tensorboard import scalars

from raysae.search.status import STATUS_FILE, read_status

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 400
"""Seconds, after which the search hangs."""


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

    def look(self) -> None:
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
                seen.look()
                time.sleep(0.5)
        finally:
            process.kill()
            process.wait()
        stdout.seek(0)
        seen.stdout = stdout.read()
    assert process.returncode == 0, seen.stdout
    return seen
