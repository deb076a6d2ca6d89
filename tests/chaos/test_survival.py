"""Parts of a search are killed, and it ends with exactly the results of the undisturbed one.

Which is also to say that two runs with the same seed and one worker give the same tables.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from small_s3 import serving
from victims import Search, differences, results

from raysae.analysis.tables import TIME_COLUMNS

pytestmark = pytest.mark.chaos

TRIALS = 10
OPTIONS = [
    "--smoke",
    *("--num-samples", str(TRIALS)),
    *("--set", "resources.workers=1"),
    *("--set", "resources.checkpoint_seconds=0.5"),
    *("--set", "search.startup_trials=1"),
    *("--set", "search.seeds_per_trial=1"),
    *("--set", "search.scheduler.name=asha"),
    *("--set", "training.batch_size=256"),
    *("--set", "training.tokens=131072"),
]
"""One worker, so that the sampler hears of results in the same order; TPE and ASHA learn from them.
"""
VICTIMS = ["driver", "worker", "client", "broker", "controller", "interrupt"]
"""In random order; before them, the two tasks that fill the store, which come only once."""
SEED = 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    search = Search(out, *OPTIONS, "--out", str(out))
    assert search.wait(600) == 0, search.tail()
    return out


def test_a_search_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    undisturbed: Path, tmp_path: Path
):
    """One kill of each kind, in random order, each a few seconds after a worker took a trial.

    The resumed search is one on another machine: its run folder lies elsewhere, and its cache is
    that of the other search.
    """
    rng = random.Random(SEED)
    victims = rng.sample(VICTIMS, len(VICTIMS))
    out = tmp_path / "run"
    search = Search(out, *OPTIONS, "--out", str(out), RAYSAE_CACHE=str(tmp_path / "cache"))
    assert search.wait_until(lambda: search.kill_all("harvest") > 0, 180), search.tail()
    assert search.wait_until(lambda: search.kill_all("evaluation") > 0, 180), search.tail()
    killed = []
    for victim in victims:
        starts = 0 if not killed else search.events("start")
        if killed and killed[-1] in ("client", "broker"):
            starts -= 1  # no worker was lost
        search.wait_for_more("start", starts, 180)
        time.sleep(rng.uniform(1, 8))
        if search.ended:
            break
        if victim in ("driver", "interrupt"):
            if victim == "driver":
                search.kill()
            else:
                search.process.send_signal(2)
                assert search.wait(60) == 130, search.tail()
                assert f"--resume {out}" in search.tail()
            out = Path(shutil.move(out, tmp_path / f"moved-{victim}"))
            search = Search(out, "--resume", str(out))
        else:
            search.kill_all(victim)
        killed.append(victim)
    assert search.wait(400) == 0, search.tail()
    assert killed == victims, "the search ended before everything was tried: make it longer"

    assert differences(results(out), results(undisturbed)) == []
    tables = [pd.read_parquet(path / "trials.parquet") for path in (undisturbed, out)]
    kept = [c for c in tables[0].columns if c not in (*TIME_COLUMNS, "attempts")]
    pd.testing.assert_frame_equal(tables[0][kept], tables[1][kept])
    storage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    study = optuna.load_study(study_name="raysae", storage=storage)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * TRIALS


@pytest.mark.slow
def test_a_search_that_cannot_score_says_why_and_fails_no_trial(undisturbed: Path, tmp_path: Path):
    """What scoring needs is killed as often as it is begun; resumed, the search gets it."""
    out = tmp_path / "run"
    search = Search(out, *OPTIONS, "--out", str(out), RAYSAE_CACHE=str(tmp_path / "cache"))
    kills = 0

    def killing() -> bool:
        nonlocal kills
        kills += search.kill_all("evaluation")
        return False

    search.wait_until(killing, 300)  # until the search has ended
    assert search.wait(60) == 1, search.tail()
    assert kills > 3, "Ray begins a task that died three times again"
    assert "the search stopped: " in search.tail() and "WorkerCrashedError" in search.tail()
    assert f"--resume {out}" in search.tail()
    assert results(out) == []
    search = Search(out, "--resume", str(out))
    assert search.wait(400) == 0, search.tail()
    assert differences(results(out), results(undisturbed)) == []


@pytest.mark.slow
def test_a_search_whose_machine_is_lost_goes_on_elsewhere_from_its_mirror(
    undisturbed: Path, tmp_path: Path
):
    """Killed with a trial in flight, then interrupted in the next place, as a spot instance is that
    is given notice; both times the run folder is gone, and the copy lies in a store like S3.
    """
    elsewhere = tmp_path / "elsewhere"
    with serving() as store:

        def copied() -> dict[str, bytes]:
            return {k.removeprefix("pre/run/"): v for k, v in store.objects.items()}

        def checkpoints() -> list[str]:
            return [name for name in copied() if name.endswith("checkpoint.pt")]

        out, address = tmp_path / "run", f"{store.address}/pre/run{store.query}"
        place = f"{store.address}/pre{store.query}"
        search = Search(out, *OPTIONS, "--out", str(out), "--storage", place)
        ends = b'"event": "end"'
        assert search.wait_until(
            lambda: copied().get("journal.jsonl", b"").count(ends) >= 2, 300
        ), search.tail()
        search.kill()
        shutil.rmtree(out)

        out, started = tmp_path / "next", b'"event": "start"'
        before = copied()["journal.jsonl"].count(started)
        search = Search(out, "--resume", address, "--out", str(out))
        journal = out / "journal.jsonl"
        assert search.wait_until(
            lambda: journal.exists() and journal.read_bytes().count(started) > before, 300
        ), search.tail()
        begun = time.time()  # what is older has come from the mirror
        assert search.wait_until(
            lambda: any(p.stat().st_mtime > begun for p in out.glob("trials/*/checkpoint.pt")), 300
        ), search.tail()
        search.process.send_signal(2)
        assert search.wait(90) == 130, search.tail()
        assert "Mirror: s3://bucket/pre/run" in search.tail()
        assert checkpoints()
        shutil.rmtree(out)

        search = Search(elsewhere, "--resume", address, "--out", str(elsewhere))
        assert search.wait(600) == 0, search.tail()
        assert "Mirror: s3://bucket/pre/run" in search.tail()
        assert differences(results(elsewhere), results(undisturbed)) == []
        assert checkpoints() == []
        for name in ("trials.parquet", "report.html", "journal.jsonl", "best/cfg.json"):
            assert copied()[name] == (elsewhere / name).read_bytes()
        assert [name for name, data in copied().items() if b"me:secret" in data] == []
