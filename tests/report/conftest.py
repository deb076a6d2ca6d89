"""A made-up search and a made-up study, each with its report, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from synthetic_runs import write_search, write_study
from threadpoolctl import threadpool_limits

from raysae.analysis import plots, predictors
from raysae.report import fanova, style
from raysae.report.build import build_report


@pytest.fixture(autouse=True, scope="session")
def quick() -> Iterator[None]:
    """Few resamples, coarse pictures; one thread, since all matrices are tiny."""
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(limits=1):
        patch.setattr(predictors, "RESAMPLES", 50)
        patch.setattr(fanova, "SHUFFLES", 19)
        patch.setattr(style, "DPI", 60)
        patch.setattr(plots, "DPI", 60)
        yield


@pytest.fixture(scope="session")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search of 24 trials with its report; not to be changed."""
    folder = write_search(tmp_path_factory.mktemp("runs") / "search", 24)
    build_report(folder)
    return folder


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of three runs and two seeds with its report; not to be changed."""
    folder = write_study(tmp_path_factory.mktemp("runs") / "study", 3, 2)
    build_report(folder)
    return folder


@pytest.fixture
def copied(search: Path, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the search's folder without its report, to be changed."""

    def make() -> Path:
        ignore = shutil.ignore_patterns("report.html", "figures", "reproduce.yaml")
        return Path(shutil.copytree(search, tmp_path / "copy", ignore=ignore))

    return make
