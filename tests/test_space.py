"""What a search space samples, and the ranges it refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from pydantic import ValidationError

from raysae.config import load_config
from raysae.regularizers import REGISTRY
from raysae.space import SearchSpace
from raysae.training.schedules import SCHEDULES

ORTH = Path(__file__).parent.parent / "search_spaces" / "orth.yaml"
N_SAMPLES = 400
REGROUP = {
    "adaptive_orthogonal",
    "grouped",
    "hierarchical",
    "ortsae_chunked",
    "subspace_clustered",
    "task_masked",
}
CLAMPS = ("min_factor", "max_factor")
SCHEDULE_PARAMETERS = {
    "constant": set(),
    "linear_warmup": {"warmup_fraction"},
    "linear_decay": {"end_factor"},
    "cosine": {"end_factor"},
    "dynamic": {"target"},
}


@pytest.fixture(scope="module")
def samples() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Configurations of orth.yaml, each with the parameters that Optuna was asked for."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = load_config(ORTH).space
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(N_SAMPLES)]
    return [(space.sample(trial), dict(trial.params)) for trial in trials]


def space(**kwargs: Any) -> SearchSpace:
    return SearchSpace(**({"regularizer": {"none": None, "fixed_orthogonal": None}} | kwargs))


def ask(space: SearchSpace, n: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.sample(study.ask()) for _ in range(n)]


# --- A parameter is searched only where it acts ---------------------------------------------------


def test_every_method_and_schedule_of_the_space_is_sampled(samples):
    methods = Counter(config["regularizer"]["name"] for config, _ in samples)
    schedules = Counter(
        config["alpha_schedule"]["name"]
        for config, _ in samples
        if config["regularizer"]["name"] != "none"
    )
    in_file = yaml.safe_load(ORTH.read_text())["space"]
    assert methods.keys() == in_file["regularizer"].keys()
    assert schedules.keys() == in_file["alpha_schedule"].keys()
    assert min(methods.values()) > 20
    assert min(schedules.values()) > 20


def test_no_alpha_and_no_schedule_are_searched_without_a_penalty(samples):
    for config, asked in samples:
        if not REGISTRY[config["regularizer"]["name"]].uses_alpha:
            assert config["alpha"] == 0
            assert config["alpha_schedule"] == {"name": "constant"}
            assert asked.keys() == {"regularizer", "sae.k"}
        else:
            assert config["alpha"] == asked["alpha"] > 0


def test_the_update_period_is_searched_for_methods_that_regroup_only(samples):
    for config, asked in samples:
        method = config["regularizer"]["name"]
        regroups = "group_update_period" in REGISTRY[method].searchable
        assert regroups == (method in REGROUP)
        assert ("group_update_period" in config["regularizer"]) == regroups
        assert any(name.endswith("group_update_period") for name in asked) == regroups


def test_a_methods_parameters_are_searched_with_that_method_only(samples):
    for config, asked in samples:
        others = [m for m in REGISTRY if m != config["regularizer"]["name"]]
        assert not [name for name in asked for m in others if name.startswith(f"{m}.")]


def test_a_schedules_parameters_are_searched_with_that_schedule_only(samples):
    for config, asked in samples:
        schedule = dict(config["alpha_schedule"])
        name = schedule.pop("name")
        expected = SCHEDULE_PARAMETERS[name]
        assert schedule.keys() == expected
        found = {p for p in asked for s in SCHEDULES if p.startswith(f"{s}.")}
        assert found == {f"{name}.{parameter}" for parameter in expected}


def test_samples_stay_inside_their_ranges_and_reach_both_ends(samples):
    alphas = [config["alpha"] for config, asked in samples if "alpha" in asked]
    assert 0.01 <= min(alphas) < 0.05
    assert 10 < max(alphas) <= 30
    ks = [config["sae"]["k"] for config, _ in samples]
    assert (min(ks), max(ks)) == (3, 16)
    assert all(isinstance(k, int) for k in ks)
    groups = {config["regularizer"].get("n_groups") for config, _ in samples}
    assert groups == {None, 4, 8, 16}


def test_a_sample_can_be_made_again_from_its_seed():
    orth = load_config(ORTH).space
    assert ask(orth, seed=5) == ask(orth, seed=5)
    assert ask(orth, seed=5) != ask(orth, seed=6)


def test_a_plain_value_is_set_and_not_searched():
    fixed = space(alpha=2.5, sae={"k": 8}, alpha_schedule={"cosine": {"end_factor": 0.1}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        config = fixed.sample(trial)
        assert config["sae"] == {"k": 8}
        if config["regularizer"]["name"] == "fixed_orthogonal":
            assert config["alpha"] == 2.5
            assert config["alpha_schedule"] == {"name": "cosine", "end_factor": 0.1}
        assert trial.params.keys() <= {"regularizer", "alpha_schedule"}


def test_alpha_is_one_and_constant_unless_the_space_says_otherwise():
    for config in ask(space()):
        wanted = 0.0 if config["regularizer"]["name"] == "none" else 1.0
        assert (config["alpha"], config["alpha_schedule"]) == (wanted, {"name": "constant"})


# --- Ranges that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"float": [2, 1]}, "empty range: low 2 is not below high 1"),
        ({"float": [1, 1]}, "empty range: low 1 is not below high 1"),
        ({"float": [0, 1], "log": True}, "a log range must be above 0, got low 0"),
        ({"int": [0, 8], "log": True}, "a log range must be above 0, got low 0"),
        ([], "at least one"),
        ({"flot": [1, 2]}, "{float: [low, high]}"),
        ({"float": [0, 1], "int": [0, 1]}, "{float: [low, high]}"),
        ({"float": [0, 1, 2]}, "at most 2 items"),
        ({"float": ["low", 1]}, "valid number"),
        ({"int": [0.5, 3]}, "valid integer"),
        ({"float": [0, 1], "logg": True}, "logg"),
        ({"float": [-1, 1]}, "≥ 0, got -1"),
        ([0.1, -2], "≥ 0, got -2"),
        (-3, "≥ 0, got -3"),
        ("much", "≥ 0, got 'much'"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused_with_its_value(value: Any, message: str):
    with pytest.raises(ValidationError) as caught:
        space(alpha=value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("regularizer", "message"),
    [
        ({}, "at least 1 item"),
        ({"groupd": None}, "unknown regularizer 'groupd'; valid: adaptive_orthogonal, "),
        ({"groupd": None}, "Did you mean 'grouped'?"),
        ({"none": {"group_update_period": 5}}, "'none' has no parameter 'group_update_period'"),
        ({"grouped": {"n_group": 5}}, "valid: ema, group_update_period, n_groups, scope"),
        ({"grouped": {"n_group": 5}}, "Did you mean 'n_groups'?"),
        (
            {"grouped": {"n_groups": [4, 1]}},
            "grouped.n_groups\n  Input should be greater than or equal to 2, got 1",
        ),
        ({"grouped": {"scope": ["between", "inside"]}}, "'between' or 'within'"),
        (
            {"grouped": {"group_update_period": {"int": [0, 5]}}},
            "group_update_period\n  Input should be greater than or equal to 1, got 0",
        ),
    ],
)
def test_a_branch_that_makes_no_sense_is_refused(regularizer: dict, message: str):
    with pytest.raises(ValidationError) as caught:
        space(regularizer=regularizer)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"cosin": None}, "Did you mean 'cosine'?"),
        ({"cosin": None}, "valid: constant, cosine, dynamic, linear_decay, linear_warmup"),
        ({"cosine": {"end_factr": 0.1}}, "Did you mean 'end_factor'?"),
        (
            {"cosine": {"end_factor": {"float": [0, 1.5]}}},
            "cosine.end_factor\n  Input should be less than or equal to 1, got 1.5",
        ),
        ({"constant": {"end_factor": 0.1}}, "'constant' has no parameter 'end_factor'"),
        (
            {"dynamic": {"min_factor": 20}},
            "dynamic.min_factor\n  min_factor 20 is above max_factor 10",
        ),
        (
            {"dynamic": {"min_factor": [0.1, 5], "max_factor": [1, 10]}},
            "dynamic.min_factor\n  min_factor 5 is above max_factor 1",
        ),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(schedule: dict, message: str):
    with pytest.raises(ValidationError) as caught:
        space(alpha_schedule=schedule)
    assert message in str(caught.value)


def test_parameters_of_a_branch_are_judged_together_not_one_by_one():
    """A lower clamp above the default upper one is right where the upper one is raised with it."""
    found = space(alpha_schedule={"dynamic": {"min_factor": 20, "max_factor": [30, 40]}})
    for config in ask(found):
        if config["regularizer"]["name"] != "none":
            schedule = SCHEDULES["dynamic"](**{k: config["alpha_schedule"][k] for k in CLAMPS})
            assert (schedule.min_factor, schedule.max_factor) in [(20, 30), (20, 40)]
