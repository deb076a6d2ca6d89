"""Studies: runs that a file lists, grids, and the space files that come with the package."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import pytest
import yaml

from raysae.config import SPACES_FOLDER, RunConfig, load_config
from raysae.errors import UserError
from raysae.regularizers import REGISTRY
from raysae.search.plan import describe_plan
from raysae.search.run import fetch_world, resolve
from raysae.training.spec import SPARSITY_FIELD, Architecture

FILES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
ORTH, ALPHA, SEED_RUNS = (
    next(path for path in FILES if path.stem == name) for name in ("orth", "alpha", "seed_runs")
)
STUDY = """
sae: {architecture: topk, d_sae: 64, k: 4}
training: {tokens: 1000, batch_size: 10}
search: {seeds: 3, scheduler: {name: none}}
runs:
  base: {regularizer: {name: none}}
  strong:
    regularizer: {name: grouped, group_update_period: 20, n_groups: 4}
    alpha: 2.5
    alpha_schedule: {name: cosine, end_factor: 0.1}
    sae: {k: 8}
    training: {lr: 0.01}
"""
GRID = """
sae: {architecture: topk, d_sae: 64}
training: {tokens: 1000, batch_size: 10}
search: {sampler: grid, seeds: 2}
space:
  regularizer:
    none:
    grouped: {group_update_period: [10, 20], n_groups: 4}
  alpha: [0.1, 1.0, 10.0]
  alpha_schedule:
    constant:
    cosine: {end_factor: [0.0, 0.1]}
  sae: {k: [2, 4]}
  training: {lr: [0.001]}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(text: str, **overrides: Any) -> RunConfig:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load_config(path, {k.replace("__", "."): v for k, v in overrides.items()})

    return make


@pytest.fixture
def refusal(load) -> Callable[..., str]:
    """The one line that the file ends in."""

    def message(text: str, **overrides: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(text, **overrides)
        (line,) = str(caught.value).splitlines()
        assert "mine.yaml" in line
        return line

    return message


# --- Runs that a file lists -----------------------------------------------------------------------


def test_the_trials_of_a_study_are_its_runs_seed_by_seed(load):
    config = load(STUDY)
    trials = config.fixed_trials()
    assert [t.number for t in trials] == [0, 1, 2, 3, 4, 5]
    assert [t.run for t in trials] == ["base", "strong"] * 3
    assert {t.stage for t in trials} == {"search"}
    assert (config.num_trials, config.is_search) == (6, False)


def test_a_seed_is_shared_by_all_runs_of_a_study(load):
    seeds = [t.seed for t in load(STUDY).fixed_trials()]
    assert seeds[0::2] == seeds[1::2]
    assert len(set(seeds)) == 3
    others = {t.seed for t in load(STUDY, search__seed=1).fixed_trials()}
    assert not others & set(seeds)


def test_a_run_is_trained_as_it_says_and_otherwise_as_the_study_says(load):
    base, strong = load(STUDY).fixed_trials()[:2]
    assert (base.regularizer.name, base.alpha, base.alpha_schedule.name) == ("none", 0, "constant")
    assert (base.sae.k, base.training.lr) == (4, 1e-3)
    method, schedule = strong.regularizer.model_dump(), strong.alpha_schedule.model_dump()
    assert strong.regularizer.name == "grouped"
    assert (method["group_update_period"], method["n_groups"]) == (20, 4)
    assert (strong.alpha, strong.alpha_schedule.name, schedule) == (
        2.5,
        "cosine",
        {"end_factor": 0.1},
    )
    assert (strong.sae.k, strong.sae.d_sae) == (8, 64)
    assert (strong.training.lr, strong.training.tokens) == (0.01, 1000)
    assert base.rungs == strong.rungs == (1000,)


def test_a_file_has_runs_or_a_space(refusal):
    both = STUDY + "space: {regularizer: {none: null}}\n"
    neither = STUDY[: STUDY.index("runs:")]
    for text in (both, neither):
        assert "either a 'space' to search or the 'runs' of a study" in refusal(text)


@pytest.mark.parametrize(
    ("run", "parts"),
    [
        ("{regularizer: {n_groups: 3}}", ["regularizer: needs a 'name', got ['n_groups']"]),
        ("{alpha: 1}", ["regularizer: is missing"]),
        (
            "{regularizer: {name: groupd}}",
            ["regularizer.name:", "'groupd'", "valid: adaptive_orthogonal, ", "mean 'grouped'?"],
        ),
        ("{regularizer: {name: [grouped]}}", ["regularizer.name:", "['grouped']"]),
        (
            "{regularizer: {name: grouped, n_group: 3}}",
            ["regularizer.n_group:", "'grouped' has no parameter 'n_group'", "mean 'n_groups'?"],
        ),
        ("{regularizer: {name: none, ema: 0.5}}", ["'none' has no parameter 'ema'; it has none."]),
        (
            "{regularizer: {name: grouped, n_groups: 1}}",
            ["regularizer.n_groups:", "greater than or equal to 2, got 1"],
        ),
        (
            "{regularizer: {name: grouped, group_update_period: 9, n_groups: 65}}",
            ["regularizer.n_groups:", "n_groups 65", "d_sae 64"],
        ),
        (
            "{regularizer: {name: grouped, group_update_period: 101}}",
            [
                "regularizer.group_update_period:",
                "group_update_period 101",
                "longer than the run",
                "100 steps",
            ],
        ),
        (
            "{regularizer: {name: grouped, group_update_period: 51}, training: {tokens: 500}}",
            ["regularizer.group_update_period:", "group_update_period 51", "50 steps"],
        ),
        (
            "{regularizer: {name: none}, alpha_schedule: {name: cosin}}",
            ["alpha_schedule.name:", "'cosin'", "mean 'cosine'?"],
        ),
        (
            "{regularizer: {name: none}, alpha_schedule: {name: cosine, end_fctor: 0}}",
            [
                "alpha_schedule.end_fctor:",
                "'cosine' has no parameter 'end_fctor'",
                "mean 'end_factor'?",
            ],
        ),
        (
            "{regularizer: {name: none}, sae: {architecture: topkk}}",
            ["sae.architecture:", "'standard', 'gated', ", "got 'topkk'"],
        ),
        (
            "{regularizer: {name: gradient_disentangled, observe_every: 101}}",
            ["regularizer.observe_every:", "observe_every 101", "longer than the run", "100 steps"],
        ),
        (
            "{regularizer: {name: importance}, alpha_schedule: {name: dynamic, every: 100}}",
            ["alpha_schedule.every:", "every 100", "100 steps"],
        ),
        (
            "{regularizer: {name: grouped, group_update_period: 9}, alpha: .inf}",
            ["alpha:", "finite number, got inf"],
        ),
        ("{regularizer: {name: none}, alpha: .nan}", ["alpha:", "got nan"]),
        (
            "{regularizer: {name: none}, training: {lr: .inf}}",
            ["training.lr:", "finite number, got inf"],
        ),
        ("{regularizer: {name: none}, alpha: -1}", ["alpha:", "greater than or equal to 0"]),
        ("{regularizer: {name: none}, alfa: 1}", ["unknown key 'alfa'", "mean 'alpha'?"]),
        (
            "{regularizer: {name: none}, sae: {kk: 1}}",
            ["sae.kk:", "'kk'", "d_sae, k, ", "mean 'k'?"],
        ),
        ("{regularizer: {name: none}, sae: {k: 65}}", ["sae.k:", "k 65", "d_sae 64"]),
        (
            "{regularizer: {name: none}, sae: {l1_coefficient: 1}}",
            ["sae.l1_coefficient:", "'topk' has no 'l1_coefficient'"],
        ),
        (
            "{regularizer: {name: none}, training: {lrr: 1}}",
            ["training.lrr:", "'lrr'", "mean 'lr'?"],
        ),
        (
            "{regularizer: {name: none}, training: {lr: 0}}",
            ["training.lr: ", "greater than 0, got 0"],
        ),
        (
            "{regularizer: {name: none}, training: {tokens: 5}}",
            ["training.tokens:", "tokens 5", "0 steps"],
        ),
    ],
)
def test_a_run_that_could_not_run_is_refused_with_line_run_and_field(
    run: str, parts: list[str], refusal
):
    text = STUDY + f"  third of all: {run}\n"
    message = refusal(text)
    assert f"mine.yaml:{len(text.splitlines())}: runs.third of all" in message
    assert [part for part in parts if part not in message] == []


def test_a_run_that_an_override_makes_impossible_is_refused(refusal):
    assert "runs.new.x: unknown key 'x'" in refusal(
        STUDY, runs__new={"regularizer": {"name": "none"}, "x": 1}
    )
    assert "runs.strong.regularizer.group_update_period: group_update_period 20" in refusal(
        STUDY, training__tokens=190
    )


def test_a_study_has_at_least_one_run(refusal):
    assert "runs: " in refusal("runs: {}\n")


# --- Grids ----------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_once(load):
    found = [
        (
            spec.regularizer.name,
            spec.regularizer.model_dump().get("group_update_period"),
            spec.alpha,
            spec.alpha_schedule.name,
            spec.alpha_schedule.model_dump().get("end_factor"),
            spec.sae.k,
            spec.training.lr,
        )
        for spec in load(GRID, search__seeds=1).fixed_trials()
    ]
    schedules = [("constant", None), ("cosine", 0.0), ("cosine", 0.1)]
    expected = [("none", None, 0.0, "constant", None, k, 0.001) for k in (2, 4)]
    expected += [
        ("grouped", period, alpha, *schedule, k, 0.001)
        for period, alpha, schedule, k in itertools.product(
            (10, 20), (0.1, 1.0, 10.0), schedules, (2, 4)
        )
    ]
    assert len(found) == len(expected) == 38
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_a_point_of_a_grid_is_named_by_what_differs(load):
    names = [spec.run for spec in load(GRID, search__seeds=1).fixed_trials()]
    assert len(set(names)) == len(names)
    assert names[0] == "none k=2"
    assert "grouped α=0.1 cosine group_update_period=10 end_factor=0.1 k=4" in names
    assert not [name for name in names if "lr" in name or "n_groups" in name]


def test_a_grid_is_run_with_every_seed(load):
    config = load(GRID)
    trials = config.fixed_trials()
    assert (config.num_trials, config.is_search) == (76, False)
    assert [t.number for t in trials] == list(range(76))
    first, second = trials[:38], trials[38:]
    assert [t.run for t in first] == [t.run for t in second]
    assert len({t.seed for t in first}) == len({t.seed for t in second}) == 1
    assert first[0].seed != second[0].seed


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("space__alpha", {"float": [0.1, 1]}, "alpha is a range, [0.1, 1.0]"),
        (
            "space__regularizer__grouped__group_update_period",
            {"int": [5, 10]},
            "group_update_period is a range, [5, 10]",
        ),
        ("space__alpha_schedule__cosine__end_factor", {"float": [0, 1]}, "end_factor is a range"),
        ("space__sae__k", {"int": [2, 4], "log": True}, "k is a range, [2, 4]"),
        ("space__training__lr", {"float": [0.01, 0.1], "log": True}, "lr is a range"),
    ],
)
def test_a_grid_of_a_range_is_refused_with_the_parameters_name(
    field: str, value: Any, named: str, refusal
):
    message = refusal(GRID, **{field: value})
    assert named in message
    assert "a list of values" in message


# --- Searches -------------------------------------------------------------------------------------


def test_a_search_has_the_number_of_trials_it_says_and_none_of_them_fixed():
    config = load_config(ORTH, {"search.num_samples": 31})
    assert (config.is_search, config.num_trials, config.fixed_trials()) == (True, 31, [])


def test_seeds_of_a_search_are_refused_because_a_sampler_would_ignore_them():
    with pytest.raises(UserError, match=r"search.seeds: 5 seeds belong to a grid"):
        load_config(ORTH, {"search.seeds": 5})


# --- The files that come with the package ---------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_can_be_run(path: Path):
    config = load_config(path)
    trials = config.fixed_trials()
    assert len(trials) == (0 if config.is_search else config.num_trials)
    assert config.num_trials > 0


def test_the_alpha_grid_has_the_baseline_and_every_alpha_with_three_seeds():
    trials = load_config(ALPHA).fixed_trials()
    assert len(trials) == 3 * (1 + 7)
    methods = {(t.regularizer.name, t.alpha) for t in trials}
    alphas = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
    assert methods == {("none", 0.0), *(("adaptive_orthogonal", alpha) for alpha in alphas)}
    assert len({t.seed for t in trials}) == 3


def test_the_study_holds_its_eleven_runs_and_the_fixed_orthogonal_one():
    trials = load_config(SEED_RUNS).fixed_trials()
    expected = {
        "0": ("none", 0.0, "constant"),
        "1": ("adaptive_orthogonal", 0.1, "constant"),
        "2": ("adaptive_orthogonal", 0.05, "constant"),
        "3": ("grouped", 0.1, "constant"),
        "4": ("task_masked", 0.1, "constant"),
        "5": ("adaptive_orthogonal", 0.1, "dynamic"),
        "6": ("importance", 0.1, "constant"),
        "7": ("hierarchical", 0.1, "constant"),
        "8": ("cross_task_inhibition", 0.1, "constant"),
        "9": ("gradient_disentangled", 0.1, "constant"),
        "10": ("subspace_clustered", 0.1, "constant"),
        "fixed": ("fixed_orthogonal", 0.1, "constant"),
    }
    found = {t.run.split()[0]: (t.regularizer.name, t.alpha, t.alpha_schedule.name) for t in trials}
    assert found == expected
    seeds = {t.seed for t in trials}
    assert len(seeds) >= 3
    assert len(trials) == 12 * len(seeds)


# --- Methods and architectures --------------------------------------------------------------------


def architecture_of(name: str) -> dict[str, Any]:
    return {"architecture": name, "d_sae": 64, SPARSITY_FIELD[name]: 4}


@pytest.mark.parametrize("kind", ["run", "space"])
@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_a_method_that_cannot_work_on_an_architecture_is_refused_before_the_first_trial(
    architecture: str, kind: str, load
):
    refused = {}
    for method in REGISTRY:
        content: dict[str, Any] = {
            "sae": architecture_of(architecture),
            "training": {"tokens": 3000, "batch_size": 10},
        }
        if kind == "run":
            content["runs"] = {"only": {"regularizer": {"name": method}, "alpha": 1.0}}
        else:
            content["space"] = {"regularizer": {"none": None, method: None}}
        try:
            load(yaml.safe_dump(content))
        except UserError as error:
            refused[method] = str(error)
    expected = {"gradient_disentangled"} if architecture == "matryoshka_batchtopk" else set()
    assert refused.keys() == expected
    for message in refused.values():
        assert len(message.splitlines()) == 1
        assert "gradient_disentangled cannot work on matryoshka_batchtopk" in message


@pytest.mark.parametrize("position", [0, 1])
def test_a_searched_architecture_is_refused_wherever_it_stands_in_the_list(position: int, load):
    choices = ["batchtopk"]
    choices.insert(position, "matryoshka_batchtopk")
    content = {
        "sae": {"d_sae": 64, "k": 4},
        "space": {
            "regularizer": {"none": None, "gradient_disentangled": None},
            "sae": {"architecture": choices},
        },
    }
    with pytest.raises(UserError, match="gradient_disentangled cannot work on matryoshka"):
        load(yaml.safe_dump(content))


def test_the_gemma_study_is_planned_without_its_model():
    config = resolve(load_config(SPACES_FOLDER / "seed_gemma-2-2b.yaml"))
    plan = "\n".join(describe_plan(config))
    for words in (
        "36 trials: 12 runs with 3 seeds each",
        "26 layers, d_in 2304; SAEs at blocks.19.hook_resid_post, 20 of 26 layers",
        f"{2 * 2304 * 2304 + 2304 + 2304:,} parameters",
        "10,000 steps of 4096",
        "4,608 bytes a token",
    ):
        assert words in plan


def test_a_world_that_cannot_be_fetched_is_refused_with_what_it_needs(monkeypatch):
    monkeypatch.setattr("raysae.worlds.hub.hub_answers", lambda: False)
    with pytest.raises(UserError, match=r"world: [\s\S]*google/gemma-2-2b-it[\s\S]*HF_TOKEN"):
        fetch_world(load_config(SPACES_FOLDER / "seed_gemma-2-2b.yaml"))


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        (
            "gemma-2-2b.yaml",
            [
                "gemma-2-2b: 26 layers, d_in 2304; SAEs at blocks.12.hook_resid_post, 13 of 26",
                "50,000,000 tokens a trial",
                "at most 4,000,000 tokens are harvested: 18.4 GB",
                # By hand: 12 · 5e7 · 2304 · 4096 operations; a layer of the model has 32 · 2304² a
                # token, of which 24 · 1998 · 150 pass 26 layers, 4e6 and 2 · 1024² tokens 13. To
                # score: 16 interventions, a quarter of 841 · 150 tokens in 13 layers; encoding.
                "an 80 GB card, 35 TFLOP/s: 0.04 h to train an SAE, 0.009 h to score it; once "
                "0.36 h (known questions 0.25, harvest 0.07, evaluation cache 0.04)",
                "8 cards of 80 GB, 35 TFLOP/s each: 0.04 h to train an SAE",
                # At the rung on the way half of the questions is asked.
                "in all 0.7 h with early stopping as expected, 0.8 h with every trial trained to "
                "its end: 5.4 and 6.7 GPU hours, times their price",
            ],
        ),
        (
            "pythia-70m.yaml",
            [
                "pythia-70m: 6 layers, d_in 512; SAEs at blocks.3.hook_resid_post",
                "at most 2,000,000 tokens are harvested: 4.1 GB",
                # 12 · 1e7 · 512 · 4096 operations
                "a 24 GB card, 20 TFLOP/s: 13 s to train an SAE",
            ],
        ),
    ],
)
def test_the_spaces_of_the_hub_are_planned_offline(space: str, parts: list[str], monkeypatch):
    monkeypatch.setattr("raysae.worlds.hub._probe", Mock(side_effect=AssertionError))
    on_gpus = {"resources.use_gpu": True}  # Pythia's is for any machine
    plan = "\n".join(describe_plan(resolve(load_config(SPACES_FOLDER / space, on_gpus))))
    assert [part for part in parts if part not in plan] == []


@pytest.mark.parametrize("layer", [5, 12, 19])
@pytest.mark.parametrize("width", [4096, 16384, 65536])
def test_every_variant_of_the_gemma_space_is_valid(layer: int, width: int):
    hook = f"blocks.{layer}.hook_resid_post"
    overrides = {"hook": hook, "sae.d_sae": width}
    config = resolve(load_config(SPACES_FOLDER / "gemma-2-2b.yaml", overrides))
    assert (config.hook, config.sae.d_sae) == (hook, width)
