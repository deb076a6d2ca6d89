"""`report.html` of a run folder, with its figures and tables beside it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.analysis.describe import NOT_ASKED
from raysae.analysis.tables import rename_score, save_tables
from raysae.errors import UserError
from raysae.journal import JOURNAL
from raysae.report.run import Run, read_run
from raysae.report.style import NAMES
from raysae.worlds.presets import label_of
from raysae.worlds.world import SAEBENCH

REPORT_FILE = "report.html"
FIGURES = "figures"
TEMPLATE = "report.html.jinja"
LEADERBOARD_ROWS = 20
FAILURE_ROWS = 50


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    path: Path
    seconds: float
    gaps: list[str]
    """What it could not say, in sentences."""


def build_report(folder: Path) -> Report:
    """Write `report.html`, `figures/*.png` and `associations.csv` into a run folder, and the
    tables of a run that has none of this state.

    The page is made from the journal and from what else is there: it comes for a run that is
    unfinished or has failed trials, and says what it cannot say.

    Raises:
        UserError: the folder is no run folder, cannot be written, or nothing in it can be read.
    """
    started = time.perf_counter()
    run = read_run(folder)
    try:
        html = _page(run)
        path = folder / REPORT_FILE
        # Beside the old one first: a report that is being read is never half a report.
        draft = path.with_suffix(".html.part")
        draft.write_text(html, encoding="utf-8")
        draft.replace(path)
        run.associations.to_csv(folder / "associations.csv", index=False)
        _write_tables(run)
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written: {error.strerror}") from None
    return Report(path, time.perf_counter() - started, run.gaps)


def _write_tables(run: Run) -> None:
    """What a search writes at its end, for one that was killed before, or has gone on since."""
    tables = {
        "trials": rename_score(run.trials, run.about),
        "seeds": rename_score(run.seeds, run.about),
        "curves": run.curves,
        "conditioning": run.conditioning,
    }
    paths = [run.folder / f"{name}{end}" for name in tables for end in (".parquet", ".csv")]
    written = (run.folder / JOURNAL).stat().st_mtime
    if not all(path.is_file() and path.stat().st_mtime >= written for path in paths):
        save_tables(run.folder, tables)
    for name, table in (("confirmation", run.confirmation), ("runs", run.runs)):
        path = run.folder / f"{name}.csv"
        if not table.empty and not path.is_file():
            rename_score(table, run.about).to_csv(path, index=False)


def _page(run: Run) -> str:
    import jinja2
    from plotly.offline import get_plotlyjs

    from raysae.report import (
        conditioning_figures,
        figures,
        optuna_figures,
        reproduce,
        study_figures,
        words,
    )

    folder = run.folder / FIGURES
    study = optuna_figures.load_study(run)
    search: list[Any] = []
    importances = None
    if study is not None:
        at = optuna_figures.at_one_step(run, study)
        search = [
            optuna_figures.history(run, study),
            optuna_figures.parallel(study),
            None if at is None else optuna_figures.slices(at),
            optuna_figures.contour(study),
        ]
        importances = optuna_figures.importances(run, at, folder)
    interactive = [plot for plot in search if plot is not None]
    space = reproduce.write_space(run)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raysae.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    environment.filters["spread"] = _plus_minus
    environment.filters["asked"] = _asked
    return environment.get_template(TEMPLATE).render(
        name=run.folder.resolve().name,
        headline=words.headline(run),
        facts=words.best_facts(run),
        verdicts=[words.verdict(run, row) for _, row in run.confirmation.iterrows()],
        gaps=run.gaps,
        leaderboard=_leaderboard(run),
        score_name=run.about.get("score_name", SAEBENCH),
        trials=len(run.searched),
        spread=words.spread_note(run),
        stopped=words.stopped_note(run),
        transferred=words.transferred_note(run),
        study=_study(run),
        sparsity=bool("sparsity_loss" in run.runs and run.runs["sparsity_loss"].any()),
        interactive=[_embed(plot) for plot in interactive],
        plotly=get_plotlyjs() if interactive else "",
        importances=importances,
        parameters=_present(
            figures.score_against(run, "alpha", folder),
            figures.score_against(run, "group_update_period", folder),
            figures.frontier(run, folder),
        ),
        prediction=words.prediction(run),
        conditioning=_present(
            conditioning_figures.associations(run, folder),
            conditioning_figures.scatter(run, folder),
            conditioning_figures.against_random(run, folder),
            conditioning_figures.over_training(run, folder),
        ),
        stability=words.stability(run),
        study_figures=study_figures.figures(run, folder) if len(run.scored) else [],
        why=words.why(run, importances),
        failures=_failures(run),
        budget=words.budget(run),
        environment=_environment(run),
        config=_config(run),
        folder=_shown(run.folder),
        space=space,
        best=(run.folder / "best").is_dir(),
    )


def _present(*plots: Any) -> list[Any]:
    return [plot for plot in plots if plot is not None]


def _embed(plot: Any) -> dict[str, str]:
    plot.figure.update_layout(
        title=None,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 12},
        margin={"t": 36},  # of the missing title
    )
    for axis in plot.figure.select_xaxes():
        axis.title.text = NAMES.get(axis.title.text, axis.title.text)
    for axis in plot.figure.select_yaxes():
        axis.title.text = NAMES.get(axis.title.text, axis.title.text)
    plot.figure.for_each_annotation(lambda a: a.update(text=NAMES.get(a.text, a.text)))
    for axis in plot.figure.select_xaxes(lambda axis: axis.ticktext is not None):
        axis.ticktext = [NAMES.get(text, text) for text in axis.ticktext]
    config = {"displaylogo": False, "responsive": True}
    return {
        "title": plot.title,
        "caption": plot.caption,
        "html": plot.figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"plot-{plot.name}", config=config
        ),
    }


def _leaderboard(run: Run) -> list[dict[str, Any]]:
    """The first rows of the ranking, and the best trial without a regularizer."""
    from raysae.analysis.describe import describe

    if not run.runs.empty:
        return []
    ranked = run.scored.sort_values(["tokens", "score"], ascending=False, kind="stable")
    shown = ranked.head(LEADERBOARD_ROWS)
    baseline = ranked[ranked["regularizer"] == "none"].head(1)
    shown = pd.concat([shown, baseline[~baseline["trial"].isin(shown["trial"])]])
    rows: list[dict[str, Any]] = []
    for rank, (_, row) in enumerate(shown.iterrows(), 1):
        words = describe(run.specs[row["trial"]])
        rows.append(
            {str(name): value for name, value in row.items()}
            | {"rank": rank, "words": words, "baseline": row["regularizer"] == "none"}
        )
    return rows


def _study(run: Run) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for _, row in run.runs.iterrows()]


def _failures(run: Run) -> list[dict[str, Any]]:
    """Causes, the most frequent first: of failed trials, and of scores that are 0."""
    failed = run.trials[run.trials["state"] == "failed"].assign(
        what="failed", why=lambda t: t.error
    )
    zero = run.trials[(run.trials["state"] != "failed") & (run.trials["score"] == 0)]
    zero = zero.assign(what=zero["status"], why=zero["cause"])
    rows: list[dict[str, Any]] = [
        {"what": what, "why": why, "count": len(group), "trials": list(group["trial"])[:12]}
        for (what, why), group in pd.concat([failed, zero]).groupby(["what", "why"], sort=False)
    ]
    return sorted(rows, key=lambda row: -row["count"])[:FAILURE_ROWS]


def _environment(run: Run) -> list[tuple[str, str]]:
    about = run.about
    rows = [(name, str(about[key])) for key, name in (
        ("started", "started"), ("git_commit", "commit"), ("python", "Python"),
        ("platform", "platform"), ("products", "products made by"),
        ("layers", "evaluator's layers"), ("seed", "seed of the search"),
        ("world_fingerprint", "world's fingerprint"),
    ) if key in about]  # fmt: skip
    for key, name in (("world", "world"), ("hook", "hook point")):
        if key in run.config:
            rows.append((name, label_of(run.config[key])))
    if isinstance(about.get("plan"), dict):
        rows.append(("plan", ", ".join(f"{k} {v}" for k, v in about["plan"].items())))
    if isinstance(about.get("versions"), dict):
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())))
    return rows


def _config(run: Run) -> str:
    path = run.folder / "config.yaml"
    return path.read_text(encoding="utf-8") if run.config else ""


def _shown(folder: Path) -> str:
    """As a user would type it: relative where it lies below the current folder."""
    absolute = folder.resolve()
    here = Path.cwd()
    return os.path.relpath(absolute, here) if absolute.is_relative_to(here) else str(absolute)


def _plus_minus(value: Any, digits: int = 3) -> str:
    """A spread behind a mean; empty for what has none."""
    return "" if pd.isna(value) else f" ± {value:.{digits}f}"


def _asked(value: Any) -> str:
    """A score's cell; a dash for one on questions that were not asked."""
    return NOT_ASKED if pd.isna(value) else _number(value)


def _number(value: Any, digits: int = 3) -> str:
    """A table's cell; empty for what is not there."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:.{digits}f}"
