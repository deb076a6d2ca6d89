"""What the terminal shows: one line a trial at any width, and nothing lost without a terminal."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from raysae.analysis.describe import describe
from raysae.search.live import LiveDisplay, View
from raysae.search.progress import Expected, Standing

Trial = Callable[..., dict[str, Any]]
FOLDER = "runs/orth-20261122-180637"


@pytest.fixture
def trial(make_spec) -> Trial:
    """A trial of the broker's snapshot with a long configuration."""

    def make(number: int, state: str, score: float | None = None, **changes: Any) -> dict[str, Any]:
        grouped = {"group_update_period": 203, "n_groups": 16}
        spec = make_spec(
            "topk", "grouped", grouped, alpha=0.0217, schedule="linear_warmup", number=number
        )
        tokens = 1536 if state == "finished" else 768
        rung = {"score": score, "status": None if score is None else "ok", "tokens": tokens}
        figures = {"loss": 1.25, "l0": 4.0, "explained_variance": 0.99, "penalty": 0.5}
        figures |= {"alpha": 0.1, "dead_features": 3.0}
        return {
            "number": number,
            "state": state,
            "spec": spec.to_dict(),
            "error": "",
            "rung": rung,
            "tokens": tokens,
            "started": 0.0,
            **figures,
        } | changes

    return make


def view(*trials: dict[str, Any], expected: int = 24, **changes: Any) -> View:
    places = (("dashboard", "http://127.0.0.1:8265"), ("folder   ", FOLDER))
    standing = Standing(list(trials), Expected(expected), now=100.0, tokens_per_second=41_234.5)
    return View(standing, "orth", 100.0, places, **changes)


def drawn(shown: View, width: int, height: int = 40) -> list[str]:
    console = Console(file=StringIO(), width=width, height=height, force_terminal=True)
    with console.capture() as capture:
        console.print(shown)
    plain = Console(file=StringIO(), width=width, height=height)
    with plain.capture() as words:
        plain.print(shown)
    assert len(capture.get().splitlines()) == len(words.get().splitlines())
    return [line.rstrip() for line in words.get().splitlines()]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_trial_takes_one_line_at_any_width(width: int, trial: Trial):
    trials = [trial(n, "finished", 0.01 * n) for n in range(5)] + [trial(5, "running")]
    lines = drawn(view(*trials), width)
    assert max(map(cell_len, lines)) <= width
    # Headline, bar, best, the table's head, a line a trial, a line a place.
    assert len(lines) == 4 + len(trials) + 2
    assert sum("grouped period=203" in line for line in lines) == len(trials) + 1


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (80, ["L0"]),
        (120, ["loss", "L0", "EV"]),
        (200, ["loss", "L0", "EV", "penalty", "α", "dead"]),
    ],
)
def test_a_wider_terminal_shows_more_figures(width: int, figures: list[str], trial: Trial):
    head = drawn(view(trial(0, "running")), width)[2].split()
    assert head == ["trial", "state", "trained", "score", *figures, "configuration"]


def test_the_head_has_trials_times_rate_and_best(trial: Trial):
    lines = drawn(view(trial(0, "finished", 0.25), trial(1, "stopped", 0.5), expected=4), 120)
    assert lines[0].split() == ["orth", "2", "of", "4", "trials", "·", "1", "stopped"]
    assert "1:40, about 1:40 left, 41,234 tokens/s" in lines[1]
    assert lines[2].startswith("best  trial 0  0.250  grouped")
    assert [line.split() for line in lines[-2:]] == [
        ["dashboard", "http://127.0.0.1:8265"],
        ["folder", FOLDER],
    ]


def test_a_search_that_is_over_shows_its_best_trials_and_no_time_left(trial: Trial):
    trials = [trial(0, "finished", 0.25), trial(1, "finished", 0.5), trial(2, "stopped", 0.375)]
    lines = drawn(view(*trials, over=True), 120)
    assert "left" not in lines[1]
    assert [line.split()[0] for line in lines[4:7]] == ["1", "2", "0"]


def test_many_trials_fit_the_height_and_the_best_is_always_there(trial: Trial):
    trials = [trial(n, "finished", 0.9 if n == 3 else 0.1) for n in range(60)]
    trials += [trial(n, "running") for n in range(60, 63)]
    lines = drawn(view(*trials), 120, height=24)
    assert len(lines) < 24
    rows = [line.split()[0] for line in lines if line.split()[1:2] in (["finished"], ["running"])]
    assert rows[:4] == ["60", "61", "62", "59"]
    assert rows[-1] == "3"
    assert f"{63 - len(rows)} more" in lines[-3]


def test_a_failed_trial_shows_why_and_a_zero_its_cause(trial: Trial):
    failed = trial(0, "failed", error="TrainingDivergedError: loss is nan\nat step 3")
    zero = trial(1, "finished", 0.0)
    zero["rung"]["status"] = "no_effect"
    text = "\n".join(drawn(view(failed, zero), 160))
    assert "TrainingDivergedError: loss is nan at step 3" in text
    assert "[no_effect]" in text


def test_markup_in_an_error_is_text(trial: Trial):
    lines = drawn(view(trial(0, "failed", error="bad [red]value[/red]")), 120)
    assert any("bad [red]value[/red]" in line for line in lines)


def test_a_trial_whose_rung_has_no_score_yet_is_being_scored(trial: Trial):
    at_rung = trial(0, "running", tokens=1536)
    assert any("scoring" in line for line in drawn(view(at_rung), 120))
    at_rung["rung"] = {"score": 0.1, "status": "ok", "tokens": 1536}
    assert not any("scoring" in line for line in drawn(view(at_rung), 120))


# --- The display ----------------------------------------------------------------------------------


def test_without_a_terminal_every_end_is_one_line_once(trial: Trial):
    out = StringIO()
    display = LiveDisplay(Console(file=out, width=60))
    first, second = trial(0, "finished", 0.25), trial(1, "failed", error="because")
    display.update(view(trial(0, "running")))
    display.update(view(first, trial(1, "running")))
    display.update(view(first, second, expected=2))
    display.close(view(first, second, expected=2))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("[   100 s] trial   0 finished  0.250  grouped period=203")
    assert lines[0].endswith("  ok")
    assert lines[1].endswith("  because")


def test_on_a_terminal_nothing_is_left_of_a_search_that_came_to_its_end(trial: Trial):
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    display = LiveDisplay(console)
    done = view(trial(0, "finished", 0.25), expected=1)
    display.update(done)
    assert "0.250" in out.getvalue()
    display.close(done)
    assert "Stopped" not in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")  # the last line of the table is erased
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back


@pytest.mark.parametrize("terminal", [True, False])
def test_a_search_that_was_stopped_ends_with_how_far_it_came(terminal: bool, trial: Trial):
    out = StringIO()
    display = LiveDisplay(Console(file=out, width=100, force_terminal=terminal))
    seen = view(trial(0, "finished", 0.25), trial(1, "running"), expected=4)
    display.update(seen)
    display.close(seen)
    last = out.getvalue().splitlines()[-1]
    assert "Stopped after 1:40: 1 of 4 trials have ended; best so far: trial 0, 0.250" in last


def test_a_search_that_never_began_ends_without_a_word():
    out = StringIO()
    LiveDisplay(Console(file=out, width=100)).close(None)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("architecture", "words"),
    [("topk", "none k=4"), ("standard", "none l1=0.5"), ("jumprelu", "none l0=0.1")],
)
def test_the_sparsity_is_that_of_the_architecture(architecture: str, words: str, make_spec):
    assert describe(make_spec(architecture, alpha=0.0).to_dict()) == words
