"""Two halves of the questions: one that a search sees, one on which it is believed.

The best of many trials is flattered by having been picked on the very questions that rank it. The
known questions are split once, by seed; the sampler sees the score on one half, and every trial
that is trained to its end has its score on the other half beside it. Features are chosen on the
corpora, not on questions, so one evaluation serves both. At a rung on the way only the first half
is asked: nobody reads the other before the end, and asking is most of what a score costs.

A score is the best of SAEBench's interventions on the questions that it is reported on, on the
held-out half too. The transferred score chooses on one half and reports on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from raysae.unlearning.result import Intervention, UnlearningResult, intervention_to_dict
from raysae.unlearning.scoring import RETAIN_GATE, unlearning_score


class TransferStatus(StrEnum):
    """Why the transferred score is what it is; every member but `ok` means 0.0."""

    ok = "ok"
    nothing_chosen = "nothing_chosen"
    retain_gate_failed = "retain_gate_failed"
    no_effect = "no_effect"


@dataclass(frozen=True)
class Transfer:
    """The intervention that gives the search half its score, read on the held-out half: what one
    gets who picks on one half and asks the other."""

    score: float
    """The transferred score: 1 minus its forget accuracy on the held-out half, 0 where it keeps
    less than 99 % of the retain questions there, or leaves as many of the others right as the model
    does by itself. Never above the held-out half's own score, which
    is the best of all interventions there."""
    status: TransferStatus
    cause: str
    """One sentence with the figures behind the status."""
    intervention: Intervention | None
    """With its counts on the held-out half; None where the search half's score is 0."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the intervention's fields, where there is one, beside the others."""
        counts = {} if self.intervention is None else intervention_to_dict(self.intervention)
        return {"score": self.score, "status": self.status.value, "cause": self.cause, **counts}


@dataclass(frozen=True)
class Halves:
    """One evaluation on either half of the questions."""

    search: UnlearningResult
    heldout: UnlearningResult | None
    """None where the search half alone was asked."""
    transferred: Transfer | None
    """From the search half to the held-out one; None where the first alone was asked."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: scores, causes and counts of the chosen interventions."""
        return {
            "search": _brief(self.search),
            "heldout": None if self.heldout is None else _brief(self.heldout),
            "transferred": None if self.transferred is None else self.transferred.to_dict(),
        }


def halve(result: UnlearningResult, seed: int) -> Halves:
    """Split an evaluation's questions by seed; a result without answers is the same on both.

    Args:
        result: on all known questions, or on the search half of that seed.
        seed: of the split.
    """
    if result.partial:
        return Halves(result, None, None)
    if not result.is_correct:
        return Halves(result, result, _transfer(result, result))
    chosen = split_questions({n: v.shape[1] for n, v in result.is_correct.items()}, seed)
    search, heldout = result.on(chosen), result.on({n: ~mask for n, mask in chosen.items()})
    return Halves(search, heldout, _transfer(search, heldout))


def split_questions(counts: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """By data set, bool (questions,): True for the half that the search sees, the larger one.

    The split of a data set depends on the seed, its name and its size, not on the other data sets.
    """
    chosen = {}
    for name, count in counts.items():
        rng = np.random.default_rng([seed, *name.encode()])
        mask = np.zeros(count, dtype=bool)
        mask[rng.permutation(count)[: (count + 1) // 2]] = True
        chosen[name] = mask
    return chosen


def _transfer(search: UnlearningResult, heldout: UnlearningResult) -> Transfer:
    if search.best is None:
        cause = f"no intervention was chosen: on the questions that the search saw {search.cause}"
        return Transfer(0.0, TransferStatus.nothing_chosen, cause, None)
    row = search.interventions.index(search.best)
    found = heldout.interventions[row]
    unaided = heldout.unaided_forget_correct
    # By SAEBench's rule, as if it were the only intervention.
    score = unlearning_score({name: rows[[row]] for name, rows in heldout.is_correct.items()})
    score = score if found.forget_correct < unaided else 0.0
    cause = (
        "the intervention chosen on the questions that the search saw leaves "
        f"{found.forget_correct} of {found.forget_total} held-out forget questions right and "
        f"{found.retain_correct} of {found.retain_total} to retain ({found.retain_accuracy:.1%})"
    )
    if unaided < found.forget_total:
        cause += f", where by itself the model gets {unaided} of {found.forget_total} right"
    if not found.passes_gate:
        status, cause = TransferStatus.retain_gate_failed, f"{cause}, fewer than {RETAIN_GATE:.0%}"
    else:
        status = TransferStatus.ok if score > 0 else TransferStatus.no_effect
    return Transfer(score, status, cause, found)


def _brief(result: UnlearningResult) -> dict[str, Any]:
    """`UnlearningResult.to_dict` without the list of interventions."""
    return {k: v for k, v in result.to_dict().items() if k != "interventions"}
