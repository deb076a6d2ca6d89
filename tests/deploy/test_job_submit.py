"""`ray job submit` on a cluster with a token: the search runs there, and its output comes back."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raysae.journal import JOURNAL, ended_trials, read_journal

pytestmark = [pytest.mark.search, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
SECONDS = 600


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[dict[str, str], str]]:
    """The environment of who has the token of a cluster that was just started; its address."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    folder = Path(f"/tmp/raysae-{port}")  # sockets have short names
    start = [
        *(str(RAY), "start", "--head", "--block", "--num-cpus", "2"),
        *("--node-ip-address", "127.0.0.1", "--port", str(port)),
        *("--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(free_port())),
        *("--temp-dir", str(folder), "--disable-usage-stats"),
    ]
    own = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "head.log").open("wb") as log:
        head = psutil.Popen(start, env=own, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + SECONDS
        while subprocess.run([RAY, "job", "list"], env=environment, capture_output=True).returncode:
            assert head.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(1)
        yield environment, f"127.0.0.1:{port}"
    finally:
        processes = [head, *head.children(recursive=True)] if head.is_running() else []
        for process in processes[:1]:
            process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=30)
        for process in alive:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def submit(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", "--", sys.executable, str(ROOT / "run_search.py"), *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def test_a_search_is_submitted_as_a_job_and_its_output_comes_back(
    cluster: tuple[dict[str, str], str], tmp_path: Path
):
    environment, _ = cluster
    out = tmp_path / "run"
    options = ["--smoke", "--set", "resources.workers=1", "--address", "auto", "--out", str(out)]
    done = submit(environment, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Leaderboard: 3 trials" in done.stdout
    assert "succeeded" in done.stdout
    assert len(ended_trials(read_journal(out / JOURNAL))) == 3

    refused = submit(environment, *options)
    assert refused.returncode != 0
    assert "exists already" in refused.stdout

    stranger = {**environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    (tmp_path / "other").write_text("f" * 64)
    assert submit(stranger, *options).returncode != 0


def test_a_plan_for_a_cluster_names_its_nodes_and_refuses_what_it_has_not(
    cluster: tuple[dict[str, str], str],
):
    environment, address = cluster

    def plan(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "run_search.py"), "--plan", "--address", address]
        return subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, timeout=SECONDS
        )

    fits = plan()
    assert fits.returncode == 0, fits.stderr
    lines = fits.stdout.splitlines()
    assert len([line for line in lines if line.startswith("node ")]) == 1
    assert any(": 2 CPUs and 0 GPUs for Ray" in line for line in lines)
    refused = plan("--set", "resources.workers=9")
    assert refused.returncode == 2
    assert "set resources.workers to at most 1" in refused.stderr
