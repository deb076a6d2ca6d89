"""Two halves of the questions: one that a search sees, one on which it is believed.

The best of many trials is flattered by having been picked on the very questions that rank it. The
known questions are split once, by seed; the sampler sees the score on one half, and every trial
that is trained to its end has its score on the other half beside it. Features are chosen on the
corpora, not on questions, so one evaluation serves both. At a rung on the way only the first half
is asked: nobody reads the other before the end, and asking is most of what a score costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysae.unlearning.result import Intervention, UnlearningResult


@dataclass(frozen=True)
class Halves:
    """One evaluation on either half of the questions."""

    search: UnlearningResult
    heldout: UnlearningResult | None
    """None where the search half alone was asked."""
    transferred: Intervention | None
    """The intervention that is best on the search half, counted on the held-out half: what one gets
    who picks on one half and asks the other. None where the search half's score is 0, or where it
    alone was asked."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: scores, causes and counts of the chosen interventions."""
        found = self.transferred
        return {
            "search": _brief(self.search),
            "heldout": None if self.heldout is None else _brief(self.heldout),
            "transferred": None
            if found is None
            else {
                "forget_correct": found.forget_correct,
                "forget_total": found.forget_total,
                "retain_correct": found.retain_correct,
                "retain_total": found.retain_total,
            },
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
        return Halves(result, result, None)
    chosen = split_questions({n: v.shape[1] for n, v in result.is_correct.items()}, seed)
    search, heldout = result.on(chosen), result.on({n: ~mask for n, mask in chosen.items()})
    transferred = None
    if search.best is not None:
        transferred = heldout.interventions[search.interventions.index(search.best)]
    return Halves(search, heldout, transferred)


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


def _brief(result: UnlearningResult) -> dict[str, Any]:
    """`UnlearningResult.to_dict` without the list of interventions."""
    return {k: v for k, v in result.to_dict().items() if k != "interventions"}
