"""Batches that a search's corpora cannot fill are refused before any trial fails on them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from raysae.config import RunConfig, find_space, load_config
from raysae.errors import UserError
from raysae.search.fit import batch_misfit
from raysae.search.plan import describe_plan
from raysae.search.run import resolve
from raysae.search.services import Store
from raysae.store.rows import mixed_batch_rows


def config(**overrides: Any) -> RunConfig:
    settings = {name.replace("__", "."): value for name, value in overrides.items()}
    return resolve(load_config(find_space("orth.yaml"), settings))


def both_kinds(share: float, batch: int, forget: int, retain: int) -> bool:
    """Whether a batch is made, and holds rows of both corpora."""
    rows = np.arange(forget + retain)
    try:
        made = mixed_batch_rows(rows[:forget], rows[forget:], share, 0, 0, batch)
    except ValueError:
        return False
    return bool((made < forget).any() and (made >= forget).any())


@pytest.mark.parametrize("batch", [1, 2, 64, 300])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("forget", "retain"), [(100, 250), (400, 20), (1000, 1000)])
def test_what_can_be_trained_is_what_the_store_can_deliver(
    share: float, batch: int, forget: int, retain: int
):
    try:
        made = config(training__forget_share=share, training__batch_size=batch)
        said = batch_misfit(made, forget, retain)
    except UserError as error:  # whatever the corpora
        said = str(error)
    assert (said == "") == both_kinds(share, batch, forget, retain)
    between = re.search(r"to between (\S+) and (\S+?)[,;]", said)
    for advised in between.groups() if between else ():
        assert both_kinds(float(advised), batch, forget, retain), said


def test_the_message_names_what_fits():
    said = batch_misfit(config(training__forget_share=0.5, training__batch_size=1000), 100, 5000)
    assert "training.forget_share: 0.5 of 1,000 rows a batch asks for 500 forget rows" in said
    assert "has 100; set it to between 0.001 and 0.1, or training.batch_size lower" in said
    said = batch_misfit(config(training__batch_size=128), 20, 50)
    assert "training.batch_size: 128 rows, and the corpora have 70" in said


@pytest.mark.parametrize("searched", [[0.2, 0.6], {"float": [0.2, 0.6]}])
def test_what_is_searched_is_looked_at_to_its_ends(searched: Any):
    made = config(space__training__forget_share=searched, training__batch_size=1000)
    assert "0.6 of 1,000" in batch_misfit(made, 500, 5000)
    assert batch_misfit(made, 600, 5000) == ""


def test_every_run_of_a_study_is_looked_at():
    runs = {name: {"regularizer": {"name": "none"}} for name in ("a", "b")}
    runs["b"]["training"] = {"forget_share": 0.9}
    made = config(runs=runs, space=None, sae__k=4, training__batch_size=1000)
    assert "0.9 of 1,000" in batch_misfit(made, 500, 5000)


def test_a_plan_refuses_a_share_that_its_world_cannot_fill():
    made = config(
        training__forget_share=0.9, training__batch_size=90_000, training__tokens=100_000_000
    )
    with pytest.raises(UserError, match=r"forget_share: 0\.9 of 90,000 rows a batch asks for"):
        describe_plan(made)
    describe_plan(config(training__forget_share=0.5))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"training__forget_share": 0.5, "training__batch_size": 64}, "asks for 32 forget rows"),
        ({"training__batch_size": 128}, "the corpora have 70"),
    ],
)
def test_a_search_is_refused_right_after_the_harvest(
    settings: dict[str, Any], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What was harvested is known exactly, and no worker is given it."""
    held = SimpleNamespace(is_forget=np.arange(70) < 20, rows=70)
    made = config(**settings)
    harvested = SimpleNamespace(stores={made.hook: held}, lines=[], finish=list)
    monkeypatch.setattr("raysae.store.harvest.harvest", lambda *_, **__: harvested)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "get", lambda value: value)
    published: list[Any] = []
    monkeypatch.setattr(ray, "put", published.append)
    told: list[str] = []
    broker = SimpleNamespace(halt=SimpleNamespace(remote=told.append))
    store = Store(made, SimpleNamespace(workers=1), broker, None, tmp_path)
    store.fill()
    assert part in store.refused and told == [store.refused]
    assert published == []


def test_the_disk_that_is_looked_at_is_that_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def usage(folder: Path) -> Any:
        here = str(folder).startswith(str(tmp_path))
        return SimpleNamespace(free=1 << 20 if here else 1 << 50)

    monkeypatch.setattr("raysae.search.plan.shutil.disk_usage", usage)
    lines = describe_plan(config(), None, tmp_path / "there" / "run")
    (short,) = [line for line in lines if "run folder: " in line and "short of" in line]
    assert str(tmp_path / "there" / "run") in short and "1.0 MiB are free" in short
    assert not [line for line in describe_plan(config()) if "disk for the run folder" in line]
