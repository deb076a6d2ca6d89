"""The report of a whole run: one file, the answer in it, nothing from outside."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from raysae import cli
from raysae.analysis import predictors
from raysae.analysis.describe import describe
from raysae.config import load_config
from raysae.report.build import FIGURES, REPORT_FILE, build_report
from raysae.report.run import read_run
from raysae.report.words import headline, verdict
from raysae.training.spec import config_hash

PNGS = {
    "score_against_alpha", "score_against_group_update_period", "frontier", "importances",
    "conditioning_predictors", "conditioning_scatter", "conditioning_random",
    "conditioning_training", "unlearning_score", "l2_loss", "sparsity_loss", "loss",
    "training_curves",
}  # fmt: skip


def text(folder: Path) -> str:
    """The page without its scripts and pictures."""
    page = (folder / REPORT_FILE).read_text(encoding="utf-8")
    page = re.sub(r"<script.*?</script>|data:[^\"]*", "", page, flags=re.S)
    return page.replace("&#39;", "'")


def test_the_answer_stands_first_with_its_interval_and_its_confirmation(search: Path):
    page, run = text(search), read_run(search)
    best = run.finished.iloc[0]
    assert f"trial {best['trial']}: {describe(run.specs[best['trial']])}" in page
    held_out = f"{best['heldout_score']:.3f} ± {best['heldout_score_std']:.3f}; the median seed's ["
    assert held_out in page
    assert page.index(held_out) < page.index("Leaderboard</h2>")
    for _, row in run.confirmation.iterrows():
        assert f"Trial {row['candidate']} " in page
        assert f"ahead in {row['wins']} of {row['seeds']} fresh seeds" in page


def test_the_transferred_score_is_explained_and_stands_beside_the_held_out_one(search: Path):
    page, run = text(search), read_run(search)
    best = run.finished.iloc[0]
    found = run.results[best["trial"]]["halves"]["transferred"]
    fact = f"{best['transferred_score']:.3f} ± {best['transferred_score_std']:.3f}; the median "
    if found["status"] == "ok":
        low, high = found["forget_interval"]
        fact += f"seed's [{1 - high:.3f}, {1 - low:.3f}] by the number of questions"
    else:
        fact += f"seed's is 0: {found['cause']}"
    assert fact in page
    assert "<th>transferred</th>" in page
    for _, row in run.finished.head(5).iterrows():
        assert f'title="{row["transferred_cause"]}">{row["transferred_score"]:.3f}' in page
    for _, row in run.confirmation.iterrows():
        mean = f"{row['candidate_transferred']:.3f} against {row['baseline_transferred']:.3f}"
        assert mean in page
    both = run.scored[run.scored["questions"] == "all"]
    assert (both["transferred_score"] <= both["heldout_score"]).all()
    assert (both["transferred_score"] < both["heldout_score"]).any()


def test_a_verdict_that_the_transferred_score_does_not_share_is_no_plain_answer(search: Path):
    run = read_run(search)
    held_out = {"beats": True, "worse": False, "difference": 0.1, "low": 0.05, "high": 0.2}
    other = {"transferred_beats": False, "transferred_worse": False}
    run.confirmation.loc[:, list(held_out | other)] = list((held_out | other).values())
    caution = "caution: by the transferred score it is not shown to beat it"
    assert f"{caution}." in headline(run)
    assert "Caution, by the transferred score" in verdict(run, run.confirmation.iloc[0])
    run.confirmation.loc[:, "transferred_beats"] = True
    assert "separates better" in headline(run) and "caution" not in headline(run)
    assert "By the transferred score:" in verdict(run, run.confirmation.iloc[0])


def test_everything_is_in_one_file_of_bounded_size(search: Path):
    page = (search / REPORT_FILE).read_text(encoding="utf-8")
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", markup)
    assert sources
    assert [s for s in sources if not s.startswith(("data:", "#", "trials/"))] == []
    assert all((search / s).is_dir() for s in sources if s.startswith("trials/"))
    assert page.count("plotly.js v") <= 1 < page.count("Plotly.newPlot(")
    assert (search / REPORT_FILE).stat().st_size < 6e6
    assert {path.stem for path in (search / FIGURES).glob("*.png")} == PNGS


def test_leaderboard_failures_budget_and_environment_are_there(search: Path):
    page, run = text(search), read_run(search)
    assert "Group stability: at a regrouping the new groups agree" in page
    failed = run.trials[run.trials["state"] == "failed"]
    assert len(failed)
    for error in failed["error"].unique():
        assert error in page
    for words in ("600 s", "0" * 40, "made up", "raysae 0.1.0", "SAE without a regularizer"):
        assert words in page
    shown = page.count('class="words">') - page.count('<th class="words">')
    assert shown >= 20


def test_the_answer_says_why(search: Path):
    """The importances' finding and that of the conditioning, each in a line of the first box."""
    page, run = text(search), read_run(search)
    box = re.search(r'id="answer">(.*?)</section>', page, flags=re.S).group(1)
    lines = re.findall(r"<li>(.*?)</li>", box.split("Why?")[1].split("</ul>")[0])
    assert len(lines) == 2
    assert lines[0].startswith(("What the score at step", "No parameter is shown to matter"))
    last = run.associations[run.associations["step"] == run.associations["step"].max()]
    assert ("No figure of conditioning" in lines[1]) == (not last["evidence"].any())


def test_every_mean_on_the_leaderboard_has_its_spread(search: Path):
    page, run = text(search), read_run(search)
    best = run.finished.iloc[0]
    for name in ("score", "heldout_score", "saebench_score"):
        assert f"<td>{best[name]:.3f} ± {best[f'{name}_std']:.3f}</td>" in page
    assert f"which differ by at most ± {run.scored['l0_std'].max():.2g} and" in page


def test_stopped_trials_have_a_dash_and_a_reason_instead_of_a_held_out_score(search: Path):
    page, run = text(search), read_run(search)
    stopped = run.scored[run.scored["state"] == "stopped"]
    assert len(stopped) and stopped["heldout_score"].isna().all()
    shown = page.split("Leaderboard</h2>")[1].split("</table>")[0]
    assert shown.count("<td>–</td>") % 2 == 0 < shown.count("<td>–</td>")
    steps = sorted(set(stopped["training_steps"]))
    words = " or ".join(str(step) for step in steps)
    assert len(steps) <= 2
    assert f"–: stopped at step {words}: scored on the questions searched on alone." in page


def test_early_steps_are_compared_by_the_half_that_was_asked(search: Path, monkeypatch):
    monkeypatch.setattr(predictors, "MIN_CONFIGURATIONS", 5)  # fewer reached the end than it takes
    run = read_run(search)
    outcomes = dict(zip(run.associations["step"], run.associations["outcome"], strict=True))
    first, *_, last = sorted(run.rungs["step"].unique())
    assert (outcomes[first], outcomes[last]) == ("score", "saebench_score")
    assert "by the score on the questions that the search sees:" in text(search)


def test_a_search_has_the_studys_five_figures_by_regularizer(search: Path):
    page, run = text(search), read_run(search)
    assert "Scores and losses by regularizer" in page
    done = run.scored[run.scored["state"] == "finished"]
    best = done.groupby("regularizer")["heldout_score"].mean()
    assert f"Held-out score: highest mean for {best.idxmax()}, {best.max():.3g}" in page


def test_over_training_shows_more_than_the_scored_steps(search: Path):
    run = read_run(search)
    steps = run.conditioning.loc[run.conditioning["group"] == "all", "step"]
    assert len(set(steps)) > run.rungs["step"].nunique()


def test_the_commands_train_the_best_trial_again(search: Path):
    run = read_run(search)
    best = run.finished.iloc[0]
    config = load_config(search / "reproduce.yaml")
    (spec,) = config.fixed_trials()
    assert config_hash(spec.to_dict()) == best["config_hash"]
    assert config.world == run.config["world"]
    assert config.hook == run.config["hook"]
    assert load_config(search / "config.yaml").space is not None


def test_associations_come_as_a_table(search: Path):
    table = pd.read_csv(search / "associations.csv")
    assert len(table) == len(read_run(search).associations) > 0


def test_a_study_shows_its_runs_and_its_five_figures(study: Path):
    page = text(study)
    assert "The best of 3 runs by held-out score is run" in page
    assert page.count("<img") >= 5
    names = ("unlearning_score", "l2_loss", "sparsity_loss", "loss", "training_curves")
    assert {f"{name}.png" for name in names} <= {p.name for p in (study / FIGURES).iterdir()}
    assert "Plotly" not in (study / REPORT_FILE).read_text(encoding="utf-8")
    assert "needs 12 SAEs" in page
    assert (
        "a dot a seed, the line their mean ± standard deviation. Dashed: mean of the seeds without"
        in page
    )


def test_the_command_says_where_the_report_is(
    copied, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = copied()
    monkeypatch.setattr("sys.argv", ["raysae", "report", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.commands()
    assert ended.value.code == 0
    assert str(folder / REPORT_FILE) in capsys.readouterr().out
    assert (folder / REPORT_FILE).is_file()


@pytest.mark.slow
def test_a_thousand_trials_make_a_page_of_bounded_size(tmp_path: Path):
    from synthetic_runs import write_search

    folder = write_search(tmp_path / "large", 1000, confirm=False)
    assert build_report(folder).path.stat().st_size < 10e6
