"""What an unlearning evaluation returns: SAEBench's score, and which of its causes a 0.0 has.

The score is sae-bench 0.6.0's: 1 minus the smallest accuracy on the forget questions over the
interventions that keep at least 99 % of the retain questions. It is 0.0 for an SAE that was never
trained, for one without an eligible feature, for one whose every intervention costs retain
questions, and for one whose interventions change nothing: `UnlearningStatus` tells them apart.

Questions are chosen because the model knows them; asked again, in bfloat16 or in other batches, it
may miss some. SAEBench then gives an SAE that does nothing the score of the model's own errors.
Its number stays as it is under its name, and the status and the cause say whose it is; on a part of
the questions, by which a search chooses and is judged, such a score counts as 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from typing import Any

import numpy as np
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.eval_output import (
    UnlearningEvalOutput,
    UnlearningMetricCategories,
    UnlearningMetrics,
)
from sae_bench.sae_bench_utils import get_eval_uuid

from raysae.unlearning.grid import GridPoint
from raysae.unlearning.scoring import (
    NOT_RETAIN_SETS,
    RETAIN_GATE,
    best_row,
    pooled_retain,
    unlearning_score,
)
from raysae.worlds.world import FORGET_SET

MIN_KNOWN_QUESTIONS = 20
"""Known questions needed on either side; SAEBench itself asks for one."""

FRONTIER_FROM, FRONTIER_LEVELS = 0.9, 101

UNTRAINED_CAUSE = "the SAE was trained for 0 steps, so nothing was evaluated"


class UnlearningStatus(StrEnum):
    """Why the score is what it is; every member but `ok` means that no intervention makes the model
    forget: a score of 0.0, or on all questions of what the model misses by itself, see `cause`."""

    ok = "ok"
    untrained = "untrained"
    no_eligible_features = "no_eligible_features"
    retain_gate_failed = "retain_gate_failed"
    no_effect = "no_effect"
    too_few_known_questions = "too_few_known_questions"


@dataclass(frozen=True)
class Intervention:
    """One point of SAEBench's grid and how many questions survive it."""

    retain_threshold: float
    n_features: int
    """Requested; the grid's value."""
    n_features_used: int
    """Fewer than requested where fewer are eligible."""
    features: tuple[int, ...]
    multiplier: int
    """A chosen feature that fires is set to minus this, in activation units."""
    forget_correct: int
    forget_total: int
    retain_correct: int
    retain_total: int

    @property
    def forget_accuracy(self) -> float:
        return self.forget_correct / self.forget_total

    @property
    def retain_accuracy(self) -> float:
        return self.retain_correct / self.retain_total

    @property
    def passes_gate(self) -> bool:
        """True when the pooled retain accuracy is at least 0.99."""
        return self.retain_accuracy >= RETAIN_GATE


@dataclass(frozen=True, eq=False)
class UnlearningResult:
    """Everything one evaluation found out; arrays are by question and by feature."""

    score: float
    """SAEBench's unlearning score, 0 (nothing unlearnt) to 1. On a part of the questions, of which
    SAEBench has none, by the same rule, but 0 where no intervention that passes the gate leaves
    fewer forget questions right than the model does by itself."""
    status: UnlearningStatus
    cause: str
    """One sentence with the figures behind the status."""
    eligible_features: dict[float, int]
    """By retain threshold: features that fire on less than that share of the retain tokens and
    on some forget token."""
    interventions: tuple[Intervention, ...]
    """All of the grid, in SAEBench's order: threshold, then features, then multiplier."""
    best: Intervention | None
    """The intervention that gives the score; None when none makes the model forget."""
    baseline_forget_correct: int
    baseline_forget_total: int
    baseline_retain_correct: int
    baseline_retain_total: int
    evaluator: str
    """``saebench`` or ``cached``."""
    forget_sparsity: np.ndarray
    """(d_sae,) share of the forget tokens on which each feature fires; six decimals."""
    retain_sparsity: np.ndarray
    """(d_sae,) the same on the retain tokens."""
    is_correct: Mapping[str, np.ndarray]
    """By data set: bool (len(interventions), known questions), rows as in `interventions`."""
    baseline: Mapping[str, np.ndarray]
    """By data set: bool (known questions,), right without an intervention."""
    partial: bool = False
    """Whether only a part of the known questions was asked: the score is then not SAEBench's."""

    @property
    def unaided_forget_correct(self) -> int:
        """Forget questions that the model gets right by itself: without an intervention or under
        one without features, whichever are fewer. What is right under an intervention is only
        forgetting where it is less than that."""
        return _unaided(self.interventions, self.baseline_forget_correct)

    @property
    def frontier(self) -> float:
        """How much can be forgotten at what cost, a graded companion of the score; in [0, 1].

        Mean over required retain accuracies r from 0.9 to 1 of the largest loss of forget accuracy,
        from what it is without an intervention, among the interventions that keep at least r (0
        where none does). Unlike the score it has no cliff at 0.99: an SAE that just misses the gate
        is told from one that separates nothing.
        """
        if not self.interventions:
            return 0.0
        unaided = self.unaided_forget_correct / self.baseline_forget_total
        # Not quite the decimals, so that an accuracy of exactly 0.94 keeps 0.94.
        levels = np.linspace(FRONTIER_FROM, 1.0, FRONTIER_LEVELS) - 1e-9
        losses = [
            max(
                [
                    unaided - i.forget_accuracy
                    for i in self.interventions
                    if i.retain_accuracy >= level
                ]
                + [0.0]
            )
            for level in levels
        ]
        return float(np.mean(losses))

    def on(self, questions: Mapping[str, np.ndarray]) -> UnlearningResult:
        """The result on a part of the questions, by SAEBench's rule; features stay as they are.

        Args:
            questions: by data set, bool (known questions,).
        """
        if not self.is_correct:
            return self
        is_correct = {name: rows[:, questions[name]] for name, rows in self.is_correct.items()}
        return make_result(
            evaluator=self.evaluator,
            score=unlearning_score(is_correct),
            grid=[
                GridPoint(i.retain_threshold, i.n_features, i.multiplier, i.features)
                for i in self.interventions
            ],
            is_correct=is_correct,
            baseline={name: right[questions[name]] for name, right in self.baseline.items()},
            forget_sparsity=self.forget_sparsity,
            retain_sparsity=self.retain_sparsity,
            eligible=self.eligible_features,
            partial=self.partial or not all(np.all(mask) for mask in questions.values()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as plain JSON types."""
        return {
            "score": self.score,
            "status": self.status.value,
            "cause": self.cause,
            "frontier": self.frontier,
            "evaluator": self.evaluator,
            "eligible_features": {str(k): n for k, n in self.eligible_features.items()},
            "baseline_forget_correct": self.baseline_forget_correct,
            "baseline_forget_total": self.baseline_forget_total,
            "baseline_retain_correct": self.baseline_retain_correct,
            "baseline_retain_total": self.baseline_retain_total,
            "best": None if self.best is None else intervention_to_dict(self.best),
            "interventions": [intervention_to_dict(i) for i in self.interventions],
        }

    def to_saebench_output(
        self,
        config: UnlearningEvalConfig,
        sae_cfg_dict: dict[str, Any],
        *,
        sae_release: str,
        sae_id: str = "custom_sae",
    ) -> UnlearningEvalOutput:
        """SAEBench's own result object, as its `run_eval` builds it for a custom SAE.

        Args:
            config: of the evaluation.
            sae_cfg_dict: the SAE's configuration, e.g. `raysae.unlearning.sae_cfg_dict(sae, ...)`.
            sae_release: name of the SAE; SAEBench names the result file after it.
            sae_id: SAEBench says ``custom_sae`` for every SAE object.

        `to_dict()` goes along as ``eval_result_unstructured``. SAEBench fills
        ``sae_bench_commit_hash`` with the commit of whatever repository the process runs in; the
        installed release is named instead.
        """
        return UnlearningEvalOutput(
            eval_config=config,
            eval_id=get_eval_uuid(),
            datetime_epoch_millis=int(time.time() * 1000),
            eval_result_metrics=UnlearningMetricCategories(
                unlearning=UnlearningMetrics(unlearning_score=self.score)
            ),
            eval_result_details=[],
            sae_bench_commit_hash=f"sae-bench {version('sae-bench')}",
            sae_lens_id=sae_id,
            sae_lens_release_id=sae_release,
            sae_lens_version=version("sae-lens"),
            sae_cfg_dict=sae_cfg_dict,
            eval_result_unstructured=self.to_dict(),
        )


def make_result(
    *,
    evaluator: str,
    score: float,
    grid: Sequence[GridPoint],
    is_correct: Mapping[str, np.ndarray],
    baseline: Mapping[str, np.ndarray],
    forget_sparsity: np.ndarray,
    retain_sparsity: np.ndarray,
    eligible: dict[float, int],
    partial: bool = False,
) -> UnlearningResult:
    """Count, name the status and its cause, and put the result together.

    Args:
        evaluator: ``saebench`` or ``cached``.
        score: SAEBench's, or its rule's on a part of the questions.
        grid: the interventions, in SAEBench's order.
        is_correct: by data set, bool (len(grid), questions).
        baseline: by data set, bool (questions,), answers without an intervention.
        forget_sparsity, retain_sparsity: (d_sae,).
        eligible: by retain threshold, the number of eligible features.
        partial: whether the questions are a part of the known ones.
    """
    forget, retain = is_correct[FORGET_SET], pooled_retain(is_correct)
    interventions = tuple(
        Intervention(
            retain_threshold=p.retain_threshold,
            n_features=p.n_features,
            n_features_used=len(p.features),
            features=p.features,
            multiplier=p.multiplier,
            forget_correct=int(forget[row].sum()),
            forget_total=forget.shape[1],
            retain_correct=int(retain[row].sum()),
            retain_total=retain.shape[1],
        )
        for row, p in enumerate(grid)
    )
    unaided = _unaided(interventions, int(baseline[FORGET_SET].sum()))
    row = best_row(is_correct) if score > 0 else None
    # The lowest of those that pass: where it is no lower than without it, none makes forget.
    best = (
        None if row is None or interventions[row].forget_correct >= unaided else interventions[row]
    )
    if partial and best is None:
        score = 0.0
    status, cause = _explain(interventions, best, eligible, forget_sparsity, retain_sparsity)
    if unaided < forget.shape[1]:
        cause += f"; by itself the model gets {unaided} of {forget.shape[1]} forget questions right"
        cause += f", which is all of the score of {score:.4f}" if score > 0 and best is None else ""
    base_retain = np.concatenate([v for k, v in baseline.items() if k not in NOT_RETAIN_SETS])
    return UnlearningResult(
        score=score,
        status=status,
        cause=cause,
        eligible_features=eligible,
        interventions=interventions,
        best=best,
        baseline_forget_correct=int(baseline[FORGET_SET].sum()),
        baseline_forget_total=len(baseline[FORGET_SET]),
        baseline_retain_correct=int(base_retain.sum()),
        baseline_retain_total=len(base_retain),
        evaluator=evaluator,
        forget_sparsity=forget_sparsity,
        retain_sparsity=retain_sparsity,
        is_correct=dict(is_correct),
        baseline=dict(baseline),
        partial=partial,
    )


def check_questions(questions: Mapping[str, np.ndarray], known: Mapping[str, int]) -> None:
    """Check that masks choose among the known questions, and leave some of each data set.

    Args:
        questions: by data set, bool (known questions,).
        known: known questions by data set.

    Raises ValueError where they do not.
    """
    found = {name: np.shape(mask) for name, mask in questions.items()}
    expected = {name: (count,) for name, count in known.items()}
    if found != expected:
        raise ValueError(f"questions must be masks of shapes {expected}, not {found}")
    if not all(np.any(mask) for mask in questions.values()):
        raise ValueError("questions must leave at least one of each data set")


def refused(evaluator: str, status: UnlearningStatus, cause: str) -> UnlearningResult:
    """A result of score 0.0 for what was not evaluated; its arrays are empty."""
    none = np.zeros(0)
    return UnlearningResult(
        0.0, status, cause, {}, (), None, 0, 0, 0, 0, evaluator, none, none, {}, {}
    )


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of an accuracy of k in n (Wilson, 1927)."""
    from scipy.stats import binomtest  # here: it takes a moment to load

    interval = binomtest(k, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def too_few_known(counts: Mapping[str, int], minimum: int) -> str | None:
    """A sentence saying what the model knows, or None if that is enough.

    Args:
        counts: known questions by data set.
        minimum: needed of the forget set and of all retain sets together. SAEBench cannot run with
            any data set empty, so that is too few whatever the minimum.
    """
    forget = counts.get(FORGET_SET, 0)
    retain = sum(n for name, n in counts.items() if name not in NOT_RETAIN_SETS)
    if forget >= minimum and retain >= minimum and all(counts.values()):
        return None
    known = ", ".join(f"{name} {n}" for name, n in counts.items())
    return (
        f"too few questions are answered right under all permutations of their choices: {forget} "
        f"to forget and {retain} to retain, at least {minimum} of each needed and none of the data "
        f"sets empty (by data set: {known})"
    )


def _unaided(interventions: Sequence[Intervention], baseline_forget_correct: int) -> int:
    """See `UnlearningResult.unaided_forget_correct`."""
    without = [i.forget_correct for i in interventions if not i.n_features_used]
    return min([baseline_forget_correct, *without])


def _explain(
    interventions: Sequence[Intervention],
    best: Intervention | None,
    eligible: Mapping[float, int],
    forget_sparsity: np.ndarray,
    retain_sparsity: np.ndarray,
) -> tuple[UnlearningStatus, str]:
    # Without features an intervention leaves the model alone: it passes the gate, proving nothing.
    real = [i for i in interventions if i.n_features_used]
    if not real:
        widest = max(eligible)
        quiet = int((retain_sparsity < widest).sum())
        firing = int((forget_sparsity > 0).sum())
        return UnlearningStatus.no_eligible_features, (
            f"of {len(retain_sparsity)} features {quiet} fire on less than {widest:g} of the "
            f"retain tokens and {firing} fire on some forget token, but none does both, so no "
            "intervention changes anything"
        )
    passing = [i for i in real if i.passes_gate]
    if not passing:
        near = max(real, key=lambda i: i.retain_correct)
        return UnlearningStatus.retain_gate_failed, (
            f"none of {len(real)} interventions keeps {RETAIN_GATE:.0%} of the retain questions; "
            f"the nearest keeps {near.retain_correct} of {near.retain_total} "
            f"({near.retain_accuracy:.1%})"
        )
    if best is None:
        least = min(i.forget_correct for i in passing)
        left = f"all {least}" if least == passing[0].forget_total else f"no fewer than {least}"
        return UnlearningStatus.no_effect, (
            f"{len(passing)} of {len(real)} interventions keep {RETAIN_GATE:.0%} of the retain "
            f"questions, and {left} forget questions stay right under them"
        )
    return UnlearningStatus.ok, (
        f"{best.n_features_used} features clamped to -{best.multiplier} (retain threshold "
        f"{best.retain_threshold:g}) leave {best.forget_correct} of {best.forget_total} forget "
        f"questions right and {best.retain_correct} of {best.retain_total} retain questions; "
        f"{len(passing)} of {len(real)} interventions pass the gate"
    )


def intervention_to_dict(intervention: Intervention) -> dict[str, Any]:
    """Plain JSON types: fields, accuracies with their Wilson intervals, and `passes_gate`."""
    return asdict(intervention) | {
        "features": list(intervention.features),
        "forget_accuracy": intervention.forget_accuracy,
        "forget_interval": list(
            wilson_interval(intervention.forget_correct, intervention.forget_total)
        ),
        "retain_accuracy": intervention.retain_accuracy,
        "retain_interval": list(
            wilson_interval(intervention.retain_correct, intervention.retain_total)
        ),
        "passes_gate": intervention.passes_gate,
    }
