"""The model card of a search's best SAE: what it is, how it was trained, and how far to trust it.

Everything in it is read from the run folder; the front matter is the Hugging Face hub's.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import yaml

from raysae.analysis.describe import (
    TRANSFERRED,
    by_transferred,
    describe,
    difference_of,
    p_of,
    why_not_asked,
    word_of,
)
from raysae.analysis.seeds import SEARCH_HALF, asked, seed_records
from raysae.errors import UserError, first_line
from raysae.journal import ended_trials
from raysae.pool.folder import TRIAL_FILE
from raysae.run_files import read_object, read_records, require
from raysae.worlds.presets import PRESETS, label_of
from raysae.worlds.world import SAEBENCH

CARD = "README.md"
ADVICE = "a search writes it when it ends: go on with it by raysae resume"
TASK = "Unlearning (SAEBench)"
LICENSES = {"embedded": "apache-2.0"}
"""By world: of an SAE of the model that comes with the package. Others are for their users to say,
because the language model's terms may reach them."""


def write_card(run_dir: Path, *, repo_id: str = "", sae_id: str = "") -> Path:
    """Write `best/README.md` and return its path.

    Args:
        run_dir: of a search that is over, with `best/`.
        repo_id: repository on the hub from which the card says how to load it; "" for none.
        sae_id: the SAE's folder there.

    Raises:
        UserError: the folder lacks what the card says, or it cannot be read.
    """
    from huggingface_hub import ModelCard

    run = _Run(run_dir)
    card = ModelCard(f"---\n{_front_matter(run)}\n---\n\n{_text(run, repo_id, sae_id)}")
    path = run_dir / "best" / CARD
    card.save(path)
    return path


class _Run:
    """What the run folder knows of its best SAE."""

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / "best" / TRIAL_FILE
        trial = _read(path, ("spec", "training_steps"))
        self.name = run_dir.name
        self.spec: dict[str, Any] = trial["spec"]
        self.steps: int = trial["training_steps"]
        ended = {r["trial"]: r for r in ended_trials(read_records(run_dir))}
        number = self.spec["number"]
        if not ended.get(number, {}).get("rung"):
            raise UserError(
                f"{path}: is of trial {number}, which has no score in the journal; {ADVICE}"
            )
        whole = ended[number]["rung"]
        seeds = seed_records(whole)
        self.rung: dict[str, Any] = seeds[whole.get("typical_seed", 0)]
        self.stopped = asked(self.rung) == SEARCH_HALF
        """It was asked the questions of the search alone."""
        self.siblings = [record["score"] for record in seeds]
        self.searched = sum(
            r["spec"]["stage"] == "search" and r["state"] != "failed" for r in ended.values()
        )
        self.is_search = self.spec["run"] == ""
        # Of a search the confirmation, of a study the run's other seeds.
        stage, run = ("confirmation", f"trial {self.spec['number']}")
        if not self.is_search:
            stage, run = self.spec["stage"], self.spec["run"]
        self.other_seeds = [
            seed["heldout_score"]
            for r in ended.values()
            if (r["spec"]["stage"], r["spec"]["run"], r["state"]) == (stage, run, "finished")
            and r["trial"] != self.spec["number"]
            for seed in seed_records(r["rung"])
        ]
        self.config = _config(run_dir / "config.yaml")
        self.about = _read(run_dir / "about.json", ("versions",))
        self.sae = _read(run_dir / "best" / "cfg.json", ("d_in", "d_sae"))
        confirmation = run_dir / "confirmation.csv"
        rows = []
        if confirmation.is_file():
            with confirmation.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        self.verdicts = [row for row in rows if int(row["candidate"]) == self.spec["number"]]

    @property
    def on_all(self) -> str:
        """Name of the score on all questions."""
        name = str(self.about.get("score_name", SAEBENCH))
        return "SAEBench's own score" if name == SAEBENCH else f"{name}: not SAEBench's"

    def scores(self) -> list[tuple[str, str, float, tuple[float, float] | None]]:
        """(split, what, score, 95 % interval): the interval of the questions behind it."""
        halves = self.rung["halves"]
        parts = [("search", "questions that the search saw", halves["search"])]
        if not self.stopped:
            parts += [
                ("heldout", "held-out questions", halves["heldout"]),
                *self._transferred(),
                ("all", f"all questions, {self.on_all}", self.rung["result"]),
            ]
        return [(name, what, part["score"], _interval(part["best"])) for name, what, part in parts]

    def _transferred(self) -> list[tuple[str, str, dict[str, Any]]]:
        """The intervention chosen on one half, read on the other; journals did not always have its
        score."""
        found = self.rung["halves"]["transferred"] or {}
        if "score" not in found:
            return []
        what = "held-out questions, by the intervention that is best on those that the search saw"
        return [("transferred", what, found | {"best": found if found["status"] == "ok" else None})]


def _read(path: Path, fields: tuple[str, ...]) -> dict[str, Any]:
    data = read_object(path, ADVICE)
    require(data, fields, path, ADVICE if path.is_file() else f"it is missing; {ADVICE}")
    return data


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {ADVICE}") from None
    if not isinstance(config, dict) or not {"world", "hook"} <= config.keys():
        raise UserError(f"{path}: not the configuration of a search; {ADVICE}")
    return config


def _front_matter(run: _Run) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="other",
            task_name=TASK if run.on_all.startswith(SAEBENCH) else f"Unlearning, {run.on_all}",
            dataset_type=label_of(run.config["world"]),
            dataset_name=f"world {label_of(run.config['world'])}, {what}",
            dataset_split=split,  # one of a name would swallow the others
            metric_type="unlearning_score",
            metric_name="unlearning score",
            metric_value=round(score, 4),
        )
        for split, what, score, _ in run.scores()
    ]
    data = ModelCardData(
        library_name="saelens",
        license=LICENSES.get(label_of(run.config["world"])),
        tags=["sparse-autoencoder", "saelens", "unlearning", "orthogonality", "raysae"],
        base_model=_base_model(run.config["world"]),
        model_name=f"SAE {run.name}",
        eval_results=results,
    )
    return str(data.to_yaml())


def _text(run: _Run, repo_id: str, sae_id: str) -> str:
    spec, training, sae = run.spec, run.spec["training"], run.sae
    load = (
        f'sae = SAE.from_pretrained("{repo_id}", "{sae_id}")'
        if repo_id
        else 'sae = SAE.load_from_disk("best")  # this folder'
    )
    world = label_of(run.config["world"])
    method = {key: value for key, value in spec["regularizer"].items() if key != "name"}
    schedule = {key: value for key, value in spec["alpha_schedule"].items() if key != "name"}
    lines = [
        f"# SAE of {run.name}: {describe(spec)}",
        "",
        f"A sparse autoencoder of the residual stream of the world `{world}` at "
        f"`{run.config['hook']}`, trained so that what it is to forget can be switched off without "
        f"harm to the rest. {_origin(run)}",
        "",
        "```python",
        "from sae_lens import SAE",
        "",
        load,
        "```",
        "",
        "## How it was trained",
        "",
        "| | |",
        "| --- | --- |",
        f"| architecture | {spec['sae']['architecture']}, d_in {sae['d_in']}, "
        f"d_sae {sae['d_sae']} |",
        f"| sparsity | L0 {run.rung['metrics']['l0']:.4g} |",
        f"| regularizer | {spec['regularizer']['name']}{_parameters(method)} |",
        f"| α | {spec['alpha']:.6g}, {spec['alpha_schedule']['name']}{_parameters(schedule)} |",
        f"| training | {run.steps:,} steps of {training['batch_size']:,} activations, Adam, "
        f"learning rate {training['lr']:g} |",
        f"| seed | {spec['seed']} |",
        f"| made with | {_versions(run.about)} |",
        "",
        "Activations are those of the raw residual stream: scaling was folded into the weights.",
        "",
        "## How good it is",
        "",
        "| unlearning score on | score | 95 % interval |",
        "| --- | --- | --- |",
        *(
            f"| {what} | {score:.3f} | {'' if interval is None else _range(interval)} |"
            for _, what, score, interval in run.scores()
        ),
        "",
        "The score is 1 minus the lowest share of the forget questions still answered right under "
        "any of SAEBench's interventions that leave at least 99 % of the retain questions right: "
        "higher is better. The interval is Wilson's, of the questions, for the intervention that "
        "is best on them: it does not say what another seed would give.",
        "",
        _explained(run),
        "",
        f"Explained variance {run.rung['metrics']['explained_variance']:.4f}, "
        f"{run.rung['metrics']['dead_features']:.0f} dead features of {sae['d_sae']}.",
        "",
        "## Was it luck?",
        "",
        *_confirmation(run),
        "",
        "## Limits",
        "",
        *_limits(run),
    ]
    return "\n".join(lines) + "\n"


def _origin(run: _Run) -> str:
    if run.is_search:
        return (
            f"It is the best of {run.searched} trials of a search, by its score on the questions "
            f"that the search saw{_typical(run.siblings)}."
        )
    return f"It is the best of {run.searched} trials of a study (run `{run.spec['run']}`)."


def _typical(scores: list[float]) -> str:
    """Which of the trial's SAEs it is; "" where there is one."""
    if len(scores) == 1:
        return ""
    listed = ", ".join(f"{score:.3f}" for score in scores)
    return f": the one with the median score of the trial's {len(scores)} seeds ({listed})"


def _confirmation(run: _Run) -> list[str]:
    if not run.other_seeds:
        return [
            "Nobody knows: it was not trained again with other seeds. The best of many is "
            "flattered by having been picked."
        ]
    scores = ", ".join(f"{score:.3f}" for score in run.other_seeds)
    mean = sum(run.other_seeds) / len(run.other_seeds)
    lines = [
        f"The same configuration with {len(run.other_seeds)} other seeds, on held-out questions: "
        f"{scores} (mean {mean:.3f})."
    ]
    if not run.verdicts:
        return lines
    lines += [
        "",
        "Beside baselines with the same budget, sparsity and seeds:",
        "",
        "| baseline | its mean | difference [95 % interval] | t-test | ahead in | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in run.verdicts:
        lines.append(
            f"| {row['baseline']} | {float(row['baseline_heldout']):.3f} "
            f"| {difference_of(row)} | {p_of(row)} | {row['wins']} of {row['seeds']} seeds "
            f"| {word_of(row)} it |"
        )
    transferred = [
        f"- {row['baseline']}: {words}" for row in run.verdicts if (words := by_transferred(row))
    ]
    if transferred:
        lines += ["", *transferred, "", f"{TRANSFERRED.capitalize()}."]
    return [
        *lines,
        "",
        "The interval resamples few seeds: it says how much they agree. One beats another where it "
        f"is above 0 and a paired t-test over the seeds gives p < 0.05{_corrected(run.verdicts)}.",
    ]


def _corrected(verdicts: list[dict[str, str]]) -> str:
    """Tables of older versions were not corrected."""
    if not verdicts[0].get("p_holm"):
        return ""
    return ", after Holm's correction for all comparisons of the confirmation"


def _limits(run: _Run) -> list[str]:
    limits = [
        "- Switching features off hides knowledge from questions of this form; whether it is gone "
        "from the model, or can be had by other means, was not examined.",
        "- The score is a step function of a threshold: small changes of the weights can move it.",
    ]
    if run.config["world"] == "embedded":
        limits.append(
            "- The language model is a toy with invented knowledge: what holds here need not hold "
            "for a model of the world."
        )
    return limits


def _explained(run: _Run) -> str:
    """Why the score is what it is, and on which questions."""
    cause = run.rung["result"]["cause"]
    if run.stopped:
        why = why_not_asked([run.steps])
        return f"On the questions that the search saw: {cause}. Not on others: it was {why}."
    return f"On all questions: {cause}.{_transferred(run.rung['halves'])}"


def _transferred(halves: dict[str, Any]) -> str:
    """The intervention chosen on one half of the questions, read on the other."""
    counts = halves["transferred"] or {}
    if "cause" in counts:
        return f" Transferred: {counts['cause']}."
    if not counts:  # of a journal that had the counts alone
        return ""
    return (
        " The intervention chosen on the questions that the search saw leaves "
        f"{counts['forget_correct']} of {counts['forget_total']} held-out forget questions right "
        f"and {counts['retain_correct']} of {counts['retain_total']} to retain."
    )


def _base_model(world: str | dict[str, Any]) -> str | None:
    """The hub's name of the model that the SAE is trained on, where it has one."""
    if isinstance(world, str):
        return PRESETS[world].model if world in PRESETS else None
    model = str(world.get("model", ""))
    return model if world.get("kind") == "hub" and not Path(model).is_absolute() else None


def _interval(best: dict[str, Any] | None) -> tuple[float, float] | None:
    """Of a score: that of the accuracy which it is 1 minus of."""
    if best is None:
        return None
    low, high = best["forget_interval"]
    return 1 - high, 1 - low


def _range(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"[{low:.3f}, {high:.3f}]"


def _parameters(values: dict[str, Any]) -> str:
    shown = [
        f"{key} {value:.6g}" if isinstance(value, int | float) else f"{key} {value}"
        for key, value in values.items()
    ]
    return f" ({', '.join(shown)})" if shown else ""


def _versions(about: dict[str, Any]) -> str:
    names = ("raysae", "sae-lens", "sae-bench", "torch", "ray")
    return ", ".join(f"{name} {about['versions'][name]}" for name in names)
