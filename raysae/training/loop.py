"""Training from start to end: advance, stop at every rung to be scored, go on or be stopped.

`train` drives SAEs in lock-step and calls back with every row of the
curves and every scored rung; whoever drives it (a test, a script, a worker of the pool) answers
which of them go on. The numbers do not depend on who that is, nor on where it saves them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from raysae.training.pack import Pack, can_pack
from raysae.training.run import Progress, Rung, SAERun, TrainingDivergedError, UnderWay
from raysae.unlearning import UnlearningResult

CURVE_POINTS = 64

Event = Progress | Rung
Events = list[Progress | TrainingDivergedError] | list[Rung]
"""One of each run: a row of its curve, or why it has none; or a scored rung."""
Evaluate = Callable[[SAE, int], UnlearningResult]
OnEvent = Callable[[Event], bool]
Measure = Callable[[SAERun], list[dict[str, Any]]]
"""An SAE in training → rows of plain data."""

QUARTERS = (0.25, 0.5, 0.75)
"""Shares of the training after which an SAE is measured, if it is not scored there."""

AGREE_SECONDS = 1.0
"""About so often the workers of a trial agree on whether its driver wants it between two rows."""
MOST_LONGER = 8
"""Times as many steps until they agree again: the first ones are no measure of the later."""


@dataclass(frozen=True)
class Between:
    """What a driver does between two rows of the curves, which can be many minutes apart."""

    is_due: Callable[[], bool]
    """Whether it wants to; asked after every step, and must cost nothing beside one."""
    act: Callable[[], list[bool]]
    """Whether each of the runs that are left goes on. Their states can be taken here as at a row,
    see `SAERun.state_dict`. Called on rank 0 only, whose word is passed on."""


def train_one(
    run: SAERun,
    evaluate: Evaluate,
    on_event: OnEvent,
    before_scoring: Callable[[], object] = lambda: None,
) -> None:
    """`train` of a single SAE: `evaluate` and `on_event` take one and answer for one.

    Raises:
        TrainingDivergedError: its loss became NaN or infinite, or exploded.
    """
    diverged: list[TrainingDivergedError] = []

    def on_events(events: Events) -> list[bool]:
        (event,) = events
        if isinstance(event, TrainingDivergedError):
            diverged.append(event)
            return [False]
        return [on_event(event)]

    train([run], lambda saes, steps: [evaluate(saes[0], steps)], on_events, before_scoring)
    if diverged:
        raise diverged[0]


def train(
    runs: Sequence[SAERun],
    evaluate: Callable[[list[SAE], int], list[UnlearningResult]],
    on_events: Callable[[Events], list[bool]],
    before_scoring: Callable[[], object] = lambda: None,
    measure: Measure | None = None,
    between: Between | None = None,
) -> None:
    """Train to the end, or until told to stop.

    A run whose loss becomes NaN or infinite, or explodes, leaves; the others go on as without it.

    Args:
        runs: SAEs that may share their steps, see `can_pack`, and have the same rungs.
        evaluate: (SAEs in raw units, training steps so far) → their unlearning results; before the
            last rung they may be on a part of the questions.
        on_events: told of every row of the curves and every rung, one a run, in the order of the
            runs that are left; False ends that run, and the others go on. In place of its row a run
            that diverged has the error, and ends whatever the answer. Called on rank 0 of a
            data-parallel trial only, whose word is passed on; so is `evaluate`.
        before_scoring: called before `evaluate`, on rank 0; its time counts neither as training nor
            as scoring.
        measure: called with every run at `QUARTERS`, on rank 0; its rows come with the next rung,
            its time counts neither as training nor as scoring.
        between: for what cannot wait for the next row; None: nothing.

    Raises:
        ValueError: the runs cannot share their steps.
    """
    runs, first = list(runs), runs[0]
    lengths = {(run.spec.rungs, run.spec.training.steps, run.scored_step) for run in runs}
    if len(lengths) > 1 or not can_pack(runs):
        raise ValueError("SAEs that are trained together share shapes, position and rungs")
    total, batch_size = first.spec.training.steps, first.spec.training.batch_size
    rung_steps = [math.ceil(tokens / batch_size) for tokens in first.spec.rungs]
    # Rates belong to the SAE as it is scored, not to what it was at the beginning.
    rates_start = {(a + b) // 2 for a, b in pairwise([0, *rung_steps])}
    quarters = {math.ceil(share * total) for share in QUARTERS} - set(rung_steps)
    log_every = max(1, total // CURVE_POINTS)
    advance = stepper(runs)
    row = _Row(runs)
    moments = None if between is None else _Moments(between, first)
    clock = _Clock(runs)

    def keep(going: list[SAERun]) -> None:
        """Go on with these alone, on a clock of their own."""
        nonlocal runs, advance, clock
        if len(going) < len(runs):
            _let_go_of_batches([run for run in runs if run not in going], going)
            row.keep([i for i, run in enumerate(runs) if run in going])
            runs = going
            advance = stepper(runs) if runs else advance
        clock = _Clock(runs)

    try:
        while True:
            step = runs[0].step
            # First, because a trial may have been taken up again between training and scoring.
            if step in rung_steps and runs[0].scored_step < step:
                clock.stop()
                events: list[Rung] = []
                if first.collective.rank == 0:
                    before_scoring()
                    events = _score(runs, evaluate)
                going = _tell(runs, on_events, events)
                for run in going:
                    run.scored_step, run.measured = step, []
                keep(going)
                if not runs:
                    return
            if step == total:
                return
            row.add(advance())
            step += 1
            # Before rates are counted anew: it looks at them.
            if measure is not None and step in quarters and first.collective.rank == 0:
                clock.stop()
                for run in runs:
                    run.measured += measure(run)
                clock = _Clock(runs)
            if step in rates_start:
                for run in runs:
                    run.firing.reset_rates()
            if step in rung_steps or step % log_every == 0:
                rows = row.end(runs)
                clock.stop()
                going = _tell(runs, on_events, rows)
                keep(going)
            elif moments is not None and moments.is_one(step):
                clock.stop()
                row.hand_over(runs)
                going = _agreed(runs, moments.act)
                for run in runs:
                    run.under_way = None
                keep(going)
            if not runs:
                return
    finally:
        _let_go_of_batches(runs, [])


def _let_go_of_batches(gone: Sequence[SAERun], going: Sequence[SAERun]) -> None:
    """Have sources drop what lies ready for runs that have ended, and for none that has not."""
    trained_on = {(id(run.source), run.spec.batches) for run in going}
    for run in gone:
        if (id(run.source), run.spec.batches) not in trained_on:
            run.source.done_with([run.spec.batches])


class _Clock:
    """Counts the time since it was made as training, in equal parts to the runs."""

    def __init__(self, runs: Sequence[SAERun]) -> None:
        self._runs, self._started = list(runs), time.perf_counter()

    def stop(self) -> None:
        seconds = time.perf_counter() - self._started
        for run in self._runs:
            run.train_seconds += seconds / len(self._runs)


def stepper(runs: Sequence[SAERun]) -> Callable[[], dict[str, Tensor]]:
    """One step of all runs: stacked, or by SAELens' own step where that is asked for or several
    workers share a trial. Returns losses by name, (m,)."""
    if runs[0].collective.size == 1 and runs[0].spec.training.step == "packed":
        return Pack(runs).advance

    def advance() -> dict[str, Tensor]:
        losses = [run.advance() for run in runs]
        return {name: torch.stack([loss[name] for loss in losses]) for name in losses[0]}

    return advance


class _Row:
    """The row of the curves that is under way: sums over its steps so far, on the device."""

    def __init__(self, runs: Sequence[SAERun]) -> None:
        """Empty, or as a checkpoint between two rows has left it."""
        self._steps = 0
        self._sums: dict[str, Tensor] = {}
        """Of losses, (m,) by name."""
        parts = [run.under_way for run in runs if run.under_way is not None]
        if not parts:
            return
        assert len(parts) == len(runs) and len({part.steps for part in parts}) == 1
        self._steps, rank = parts[0].steps, runs[0].collective.rank
        none = torch.zeros_like(parts[0].sums["loss"])
        for name in dict.fromkeys(name for part in parts for name in part.sums):
            found = [part.sums.get(name, none)[rank] for part in parts]
            self._sums[name] = torch.stack(found)
        for run in runs:
            run.under_way = None

    def add(self, losses: dict[str, Tensor]) -> None:
        """The losses of a step, (m,) by name; they are written over."""
        if not self._sums:
            self._sums = losses
        elif self._sums.keys() == losses.keys():
            torch._foreach_add_(list(self._sums.values()), [losses[name] for name in self._sums])
        else:
            # Other runs are beside these than before. What only those had was 0 in these.
            sums = self._sums
            self._sums = {k: v + sums[k] if k in sums else v for k, v in losses.items()}
        self._steps += 1

    def keep(self, places: list[int]) -> None:
        """Go on with the sums of the runs in these places alone."""
        self._sums = {name: sums[places] for name, sums in self._sums.items()}

    def hand_over(self, runs: Sequence[SAERun]) -> None:
        """Give each run its part, for a checkpoint: the sums of every worker of the trial."""
        collective, of_ranks = runs[0].collective, {}
        for name, sums in self._sums.items():
            own = sums.new_zeros((collective.size, len(runs)))
            own[collective.rank] = sums
            of_ranks[name] = collective.sum_(own)
        for i, run in enumerate(runs):
            own_sums = {name: every[:, i].clone() for name, every in of_ranks.items()}
            run.under_way = UnderWay(self._steps, own_sums)

    def end(self, runs: Sequence[SAERun]) -> list[Progress | TrainingDivergedError]:
        """A row of the curve for each run, means over its steps; the only synchronisation."""
        names, collective = sorted(self._sums), runs[0].collective
        values = torch.stack([self._sums[name].float() for name in names]) / self._steps
        values = collective.sum_(values) / collective.size
        self._steps, self._sums = 0, {}
        return [
            _row(run, dict(zip(names, means, strict=True)))
            for run, means in zip(runs, values.T.tolist(), strict=True)
        ]


class _Moments:
    """The steps between two rows at which a driver is given the word: the same on every rank."""

    def __init__(self, between: Between, run: SAERun) -> None:
        self.act = between.act
        self._is_due, self._collective = between.is_due, run.collective
        self._last, self._ahead = run.step, 1
        self._seen = time.perf_counter()

    def is_one(self, step: int) -> bool:
        """Whether this step is one; workers that train together ask each other now and then."""
        if self._collective.size == 1:
            return self._is_due()
        if step < self._last + self._ahead:
            return False
        word: Any = None
        if self._collective.rank == 0:
            now = time.perf_counter()
            each = (now - self._seen) / (step - self._last)
            ahead = min(MOST_LONGER * self._ahead, int(AGREE_SECONDS / max(each, 1e-9)))
            word, self._seen = (self._is_due(), max(1, ahead)), now
        word = self._collective.broadcast(word)
        self._last, (due, self._ahead) = step, word
        return bool(due)


def _row(run: SAERun, means: dict[str, float]) -> Progress | TrainingDivergedError:
    try:
        return run.add_to_curve(means)
    except TrainingDivergedError as error:
        return error


def _score(
    runs: Sequence[SAERun], evaluate: Callable[[list[SAE], int], list[UnlearningResult]]
) -> list[Rung]:
    started = time.perf_counter()
    saes = [run.export() for run in runs]
    results = evaluate(saes, runs[0].step)
    seconds = (time.perf_counter() - started) / len(runs)
    return [
        run.rung(sae, result, seconds) for run, sae, result in zip(runs, saes, results, strict=True)
    ]


def _tell(
    runs: Sequence[SAERun], on_events: Callable[[Events], list[bool]], events: Events
) -> list[SAERun]:
    """The runs that go on by rank 0's answer, on every rank."""

    def answers() -> list[bool]:
        told = zip(events, on_events(events), strict=True)
        return [yes and not isinstance(event, TrainingDivergedError) for event, yes in told]

    return _agreed(runs, answers)


def _agreed(runs: Sequence[SAERun], ask: Callable[[], list[bool]]) -> list[SAERun]:
    """The runs that go on by what rank 0 hears, on every rank."""
    collective = runs[0].collective
    answers: Any = ask() if collective.rank == 0 else None
    if collective.size > 1:
        answers = collective.broadcast(answers)
    return [run for run, goes_on in zip(runs, answers, strict=True) if goes_on]
