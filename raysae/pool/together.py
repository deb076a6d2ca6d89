"""Trials that a worker trains together: one step for all, each with its own word from the broker.

A trial that the broker stops, that has finished or that raised leaves, and the others go on. What
the trials have to say is said by a call for each, and awaited together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import ray
from sae_lens import SAE

from raysae.pool.trial import Probe, TrialAtWork
from raysae.training.checkpoint import Pace
from raysae.training.loop import Between, Events, train
from raysae.training.run import Rung
from raysae.unlearning import (
    CachedEvaluator,
    SAEBenchEvaluator,
    UnlearningResult,
    split_questions,
)

Evaluator = CachedEvaluator | SAEBenchEvaluator

WORD_SECONDS = 1.0
"""So often the broker is asked for its word between two rows of the curves, of which a trial has
about as many whatever its length."""


class Together:
    """Trials whose SAEs may share their steps, see `raysae.training.pack.can_pack`."""

    def __init__(
        self,
        trials: Sequence[TrialAtWork],
        *,
        evaluator: Callable[[], Evaluator],
        probe: Probe,
        publish: Callable[[], None],
        pace: Pace,
        split_seed: int,
    ) -> None:
        """
        Args:
            trials: from one position on, with the same rungs.
            evaluator: asked for before a rung is scored; may have to wait.
            probe: of a scored SAE.
            publish: called with every row of the curves, for what is measured on the way.
            pace: of the checkpoints.
            split_seed: of the questions' halves.
        """
        self._going = list(trials)
        self._evaluator, self._probe = evaluator, probe
        self._publish, self._pace, self._split_seed = publish, pace, split_seed
        self._word_due = time.monotonic() + WORD_SECONDS

    def train(self) -> None:
        """Train every trial until it has finished, is stopped, saved for later, or raised.

        Raises whatever is not one trial's own error: in a step or in scoring, where all are.
        """
        runs = [run for trial in self._going for run in trial.runs]
        kept = {
            id(run): at for t in self._going for run, at in zip(t.runs, t.artifacts, strict=True)
        }
        train(
            runs,
            self._evaluate,
            self._on_events,
            before_scoring=self._evaluator,
            measure=lambda run: kept[id(run)].measure(run),
            between=Between(self._is_due, self._between_rows),
        )

    def _evaluate(self, saes: list[SAE], steps: int) -> list[UnlearningResult]:
        """On all questions at the end of training; at a rung before it on the search half, which
        is all that sampler and scheduler are told of."""
        evaluator, questions = self._evaluator(), None
        if steps < self._going[0].spec.training.steps:
            questions = split_questions(evaluator.known_questions, self._split_seed)
        return evaluator.evaluate_many(saes, training_steps=steps, questions=questions)

    def _on_events(self, events: Events) -> list[bool]:
        trials, remaining = self._going, iter(events)
        told = []
        for trial in trials:
            own = [next(remaining) for _ in trial.runs]
            with trial.alone_with_errors():
                told.append((trial, trial.tell(own, self._probe)))
        self._obey([trial for trial, _ in told], ray.get([word for _, word in told]))
        if not isinstance(events[0], Rung):
            self._publish()
            self._save_if_due()
        return [not trial.over for trial in trials for _ in trial.runs]

    def _is_due(self) -> bool:
        return time.monotonic() >= self._word_due or self._pace.is_due()

    def _between_rows(self) -> list[bool]:
        """Hear whether anybody is to leave, and save the others if it is time."""
        trials = self._going
        numbers = [trial.number for trial in trials]
        self._obey(trials, ray.get(trials[0].broker.words.remote(numbers)))
        self._save_if_due()
        return [not trial.over for trial in trials for _ in trial.runs]

    def _obey(self, trials: Sequence[TrialAtWork], words: Sequence[str]) -> None:
        # Who is saved with the others can be taken up with them.
        pausing = "pause" in words
        for trial, word in zip(trials, words, strict=True):
            with trial.alone_with_errors():
                if word == "stop":
                    trial.stop()
                elif pausing:
                    trial.pause()
        self._going = [trial for trial in self._going if not trial.over]
        self._word_due = time.monotonic() + WORD_SECONDS

    def _save_if_due(self) -> None:
        if not self._pace.is_due():
            return
        with self._pace.saving():
            for trial in self._going:
                with trial.alone_with_errors():
                    trial.checkpoints.save(trial.runs)
        self._going = [trial for trial in self._going if not trial.over]
