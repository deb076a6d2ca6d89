"""One thread a process, who runs beside whom, and the small synthetic things that tests share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Read when the libraries are loaded: matrices are tiny here, and two processes share the cores.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

from raysae.store.batches import ChunkedActivations  # noqa: E402
from raysae.training.spec import SPARSITY_FIELD, TrialSpec  # noqa: E402
from raysae.worlds.world import FORGET_SET, RETAIN_SETS  # noqa: E402

SPARSITY = {"k": 4, "l1_coefficient": 0.5, "l0_coefficient": 0.1}
STARTS_RAY = re.compile(r"^pytestmark = .*\bmark\.(search|chaos|ray)\b", re.MULTILINE)
ORDER = ("ray", "", "chaos")


@cache
def kind(path: Path) -> str:
    """Of the tests of a file, by their marks: "chaos", other ones that start "ray", or ""."""
    found = STARTS_RAY.search(path.read_text(encoding="utf-8"))
    return "" if found is None else "chaos" if found[1] == "chaos" else "ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray begins: it takes longest. Chaos, alone as long as most of it, is last."""
    items.sort(key=lambda item: ORDER.index(kind(item.path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`-n 2`), what starts Ray is one process's, test after test, and chaos
    another's; it has a Ray of its own.

    The other works off the rest, a file at a time, and then chaos: about as much.
    """
    # Not xdist's groups: pytest 9.2 does not take the names that xdist 3.8 gives to their tests.
    from xdist.scheduler import LoadFileScheduling

    class OneStartsRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return kind(config.rootpath / file) or file

    config.option.loadscopereorder = False
    return OneStartsRay(config, log)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Searches of the tests share a cache of their own, and leave the user's alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def sparse_rows() -> Callable[..., np.ndarray]:
    """(n_rows, d_in) float32: sums of a few of `n_features` random directions, plus an offset.

    A dictionary of `n_features` unit rows explains them, so an SAE can learn them.
    """

    def make(n_rows: int = 512, d_in: int = 16, n_features: int = 24, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        directions = rng.standard_normal((n_features, d_in))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        fires = rng.random((n_rows, n_features)) < 3 / n_features
        strength = 1 + rng.random((n_rows, n_features))
        offset = 0.5 * rng.standard_normal(d_in)
        return ((fires * strength) @ directions * 5 + offset).astype(np.float32)

    return make


@pytest.fixture
def make_store(sparse_rows: Callable[..., np.ndarray]) -> Callable[..., ChunkedActivations]:
    """A store of three chunks of unequal length over `rows` (default: `sparse_rows()`).

    Every third row is labelled as forget. Scale, mean and variance are those of the rows.
    """

    def make(
        rows: np.ndarray | None = None, device: str = "cpu", **kwargs: Any
    ) -> ChunkedActivations:
        rows = sparse_rows(**kwargs) if rows is None else rows
        n_rows, d_in = rows.shape
        mean = rows.astype(np.float64).mean(0)
        cuts = [n_rows // 5, n_rows // 2]
        return ChunkedActivations(
            np.split(rows, cuts),
            np.arange(n_rows) % 3 == 0,
            scale=float(np.sqrt(d_in) / np.linalg.norm(rows, axis=1).mean()),
            mean=mean.astype(np.float32),
            variance=float(((rows - mean) ** 2).sum(1).mean()),
            device=device,
            resident=device != "cpu",
        )

    return make


@pytest.fixture
def make_spec() -> Callable[..., TrialSpec]:
    """A trial of `steps` steps of `batch_size` rows; other keywords as in `TrialSpec`.

    Methods are given by name, with a dictionary of their parameters beside it.
    """

    def make(
        architecture: str = "topk",
        regularizer: str = "none",
        parameters: dict[str, Any] | None = None,
        *,
        alpha: float = 1.0,
        schedule: str = "constant",
        steps: int = 24,
        batch_size: int = 64,
        d_sae: int = 32,
        sparsity: float | None = None,
        rungs: tuple[int, ...] | None = None,
        number: int = 0,
        seed: int = 3,
        run: str = "",
        stage: str = "search",
        **training: Any,
    ) -> TrialSpec:
        field = SPARSITY_FIELD[architecture]
        value = SPARSITY[field] if sparsity is None else sparsity
        return TrialSpec(
            number=number,
            seed=seed,
            run=run,
            stage=stage,
            sae={"architecture": architecture, "d_sae": d_sae, field: value},
            training={"tokens": steps * batch_size, "batch_size": batch_size} | training,
            regularizer={"name": regularizer} | (parameters or {}),
            alpha=alpha,
            alpha_schedule={"name": schedule},
            rungs=rungs or (steps * batch_size,),
        )

    return make


@pytest.fixture
def fake_result() -> Callable[..., Any]:
    """The `UnlearningResult` of made-up answers, for tests that score nothing.

    100 questions to forget and 40 to retain, known without an intervention. The one intervention
    clamps two features: the first `100 · score` questions to forget go wrong, none to retain.
    """
    from raysae.unlearning.grid import GridPoint
    from raysae.unlearning.result import UnlearningResult, make_result

    def make(score: float = 0.25, d_sae: int = 32) -> UnlearningResult:
        baseline = {FORGET_SET: np.ones(100, dtype=bool)}
        baseline |= {name: np.ones(10, dtype=bool) for name in RETAIN_SETS}
        is_correct = {name: right[None].copy() for name, right in baseline.items()}
        is_correct[FORGET_SET][0, : round(100 * score)] = False
        return make_result(
            evaluator="cached",
            score=score,
            grid=[GridPoint(0.01, 10, 100, (0, 1))],
            is_correct=is_correct,
            baseline=baseline,
            forget_sparsity=np.full(d_sae, 0.5),
            retain_sparsity=np.zeros(d_sae),
            eligible={0.001: 1, 0.01: 2},
        )

    return make
