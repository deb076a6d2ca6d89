"""A worker without Ray: its broker, evaluator and artifacts are stand-ins that take notes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from raysae.analysis.seeds import SCORES
from raysae.pool.worker import Worker, WorkerConfig
from raysae.training.collective import Alone
from raysae.training.run import Rung, SAERun
from raysae.training.spec import TrialSpec

Decide = Callable[[str, int, dict[str, Any]], str]


class FakeBroker:
    """Notes what it is told by trial, and answers as `decide(call, number, record)` says."""

    def __init__(self, decide: Decide) -> None:
        self.decide = decide
        self.rows: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        self.rungs: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        self.failed: dict[int, str] = {}
        self.saved: list[int] = []
        self.halted = ""
        self.over = False

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=partial(getattr(type(self), f"_{name}"), self))

    def _progress(self, number: int, row: dict[str, Any]) -> str:
        self.rows[number].append(row)
        return self.decide("progress", number, row)

    def _words(self, numbers: list[int]) -> list[str]:
        return [self.decide("words", number, {}) for number in numbers]

    def _rung(self, number: int, record: dict[str, Any], curve: list[dict[str, Any]]) -> str:
        self.rungs[number].append(record)
        assert curve[-1]["step"] == record["step"]
        return "stop" if record["last"] else self.decide("rung", number, record)

    def _fail(self, number: int, reason: str, curve: list[dict[str, Any]]) -> bool:
        if self.over:
            return False
        self.failed[number] = reason
        return True

    def _paused(self, number: int) -> None:
        self.saved.append(number)

    def _halt(self, reason: str) -> None:
        self.halted = reason


class FakeArtifacts:
    """Records of what the weights are, instead of files."""

    def __init__(self, folder: Path, *_: Any) -> None:
        self.folder = folder

    def measure(self, run: SAERun) -> list[dict[str, Any]]:
        return [
            {"step": run.step, "seed": run.spec.seed, "weight": float(run.sae.W_dec.detach()[3, 5])}
        ]

    def write(self, spec: TrialSpec, rung: Rung, probing: Any) -> dict[str, Any]:
        score = rung.result.score
        return {
            "step": rung.step,
            "tokens": rung.tokens,
            "last": rung.last,
            "metrics": rung.metrics,
            "measured": rung.measured,
            "cause": "",
            "sparse_probing": probing,
            "dense_features": 0,
            "train_seconds": 1.0,
            "score_seconds": 1.0,
            **dict.fromkeys(("objective", *SCORES), score),
            "seed": spec.seed,
        }


class FakeEvaluator:
    """Scores an SAE by a number that any change of its weights would change."""

    known_questions: ClassVar = {"forget": 9, "retain": 20}

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.questions: list[dict[str, np.ndarray] | None] = []

    def evaluate_many(
        self,
        saes: list[Any],
        *,
        training_steps: int,
        questions: dict[str, np.ndarray] | None,
    ) -> list[Any]:
        self.asked.append((training_steps, len(saes)))
        self.questions.append(questions)
        return [SimpleNamespace(score=self.score(sae)) for sae in saes]

    def score(self, sae: Any) -> float:
        return float(sae.W_enc.detach().double().abs().sum() + sae.W_dec.detach()[3, 5])


def make_worker(
    run_dir: Path,
    source: Any,
    broker: FakeBroker,
    make_evaluator: Callable[[], FakeEvaluator],
    collective: Alone | None = None,
    checkpoint_seconds: float = 3600.0,
) -> Worker:
    """A worker of a search whose trials are scored only; packs of up to four."""
    settings: dict[str, Any] = dict.fromkeys((f.name for f in fields(WorkerConfig)), "")
    settings |= {"evals": (), "trials_per_pack": 4, "split_seed": 7, "run_dir": str(run_dir)}
    settings |= {"checkpoint_seconds": checkpoint_seconds}
    source.publish = lambda: None
    run_dir.mkdir(exist_ok=True)
    world: Any = SimpleNamespace(sae_model_name="")
    evaluator: Any = make_evaluator
    nothing: Any = None
    return Worker(
        config=WorkerConfig(**settings),
        broker=broker,
        generation="",
        group=0,
        collective=collective or Alone(),
        device="cpu",
        world=world,
        eval_config=nothing,
        make_evaluator=evaluator,
        make_probing=nothing,
        source=source,
    )
