"""Space files: what a good one becomes, and what every kind of bad one is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from raysae.config import (
    RunConfig,
    SchedulerConfig,
    find_space,
    load_config,
    parse_override,
    rungs,
)
from raysae.errors import UserError
from raysae.regularizers import REGISTRY
from raysae.training.spec import TrainingSpec, TrialSpec, config_hash

ORTH = Path(__file__).parent.parent / "search_spaces" / "orth.yaml"


@pytest.fixture
def complain(tmp_path: Path) -> Callable[..., str]:
    """The one message that a space file (default: orth.yaml) with overrides ends in."""

    def message(overrides: dict[str, Any] | None = None, text: str | None = None) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(ORTH.read_text() if text is None else text)
        with pytest.raises(UserError) as caught:
            load_config(path, overrides)
        assert str(path) in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "")

    return message


def line_of(key: str) -> int:
    lines = ORTH.read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:"))


def sampled(config: RunConfig, n: int = 40) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [config.space.sample(study.ask()) for _ in range(n)]


# --- Good input -----------------------------------------------------------------------------------


def test_the_default_space_has_enough_trials_and_every_method():
    config = load_config(ORTH)
    assert config.search.num_samples >= 24
    assert config.objective.baseline == "none"
    assert config.space.regularizer.keys() == REGISTRY.keys()
    assert (config.world, config.objective.metric) == ("embedded", "unlearning_score")
    assert config.training.steps == 256


def test_every_sample_of_the_default_space_is_a_trial():
    config = load_config(ORTH)
    for number, values in enumerate(sampled(config, 200)):
        spec = config.trial_spec(number, values)
        assert spec.regularizer.name == values["regularizer"]["name"]
        assert spec.sae.k == values["sae"]["k"]
        assert spec.alpha == values["alpha"]


def test_a_trial_spec_follows_from_number_seed_and_sample_alone():
    first, second = load_config(ORTH), load_config(ORTH)
    values = sampled(first, 1)[0]
    assert first.trial_spec(7, values) == second.trial_spec(7, values)


def test_trials_and_searches_have_seeds_of_their_own():
    values = sampled(load_config(ORTH), 1)[0]
    searches = [load_config(ORTH, {"search.seed": seed}) for seed in range(3)]
    seeds = {search.trial_spec(n, values).seed for search in searches for n in range(100)}
    assert len(seeds) == 300


def test_a_trial_spec_survives_the_way_through_plain_data():
    config = load_config(ORTH)
    for values in sampled(config):
        spec = config.trial_spec(3, values)
        data = yaml.safe_load(yaml.safe_dump(spec.to_dict()))  # nothing but plain types
        again = TrialSpec(**data)
        assert again == spec
        assert type(again.regularizer) is type(spec.regularizer)
        assert again.to_dict() == spec.to_dict()


def test_the_hash_is_that_of_everything_but_the_names(make_spec):
    spec = make_spec(number=1)
    same = config_hash(make_spec(number=2, run="trial 1", stage="confirmation").to_dict())
    assert config_hash(spec.to_dict()) == same
    others = [make_spec(seed=4), make_spec(alpha=2.0), make_spec(d_sae=33), make_spec(lr=0.5)]
    assert len({same, *(config_hash(other.to_dict()) for other in others)}) == 5


def test_a_searched_value_takes_the_place_of_the_default():
    config = load_config(ORTH, {"sae.k": 5, "space.training": {"lr": {"float": [0.01, 0.02]}}})
    for values in sampled(config):
        spec = config.trial_spec(0, values)
        assert spec.sae.k == values["sae"]["k"] != None  # noqa: E711
        assert 0.01 <= spec.training.lr <= 0.02
        assert spec.training.batch_size == config.training.batch_size


def test_overrides_reach_any_depth_and_take_the_place_of_what_the_file_says():
    config = load_config(
        ORTH,
        {
            "search.seed": 9,
            "resources.workers": 3,
            "space.regularizer.grouped.n_groups": 2,
            "search.scheduler.name": "none",
        },
    )
    assert (config.search.seed, config.resources.workers) == (9, 3)
    assert config.search.num_samples == 24
    assert config.rungs == (config.training.tokens,)


def test_override_values_are_read_as_yaml():
    assert parse_override("training.tokens=500_000") == ("training.tokens", 500_000)
    assert parse_override(" a.b =[1, x]") == ("a.b", [1, "x"])
    assert parse_override("hook=blocks.2.hook_resid_post")[1] == "blocks.2.hook_resid_post"
    assert parse_override("space.alpha={float: [0, 1]}")[1] == {"float": [0, 1]}
    assert parse_override("a=b=c") == ("a", "b=c")


@pytest.mark.parametrize("name", ["orth", "orth.yaml", str(ORTH)])
def test_a_space_is_found_by_path_or_bare_name(name: str):
    assert find_space(name) == ORTH.resolve()


@pytest.mark.parametrize(
    ("grace", "factor", "steps"),
    [
        (1 / 3, 3, [100, 300]),
        (1 / 9, 3, [33, 100, 300]),
        (0.3333, 3, [100, 300]),
        (0.1, 4, [30, 120, 300]),
        (0.3, 3, [90, 270, 300]),
        (1.0, 3, [300]),
    ],
)
def test_rungs_grow_by_the_reduction_factor_up_to_the_end(
    grace: float, factor: int, steps: list[int]
):
    training = TrainingSpec(tokens=3000, batch_size=10)
    scheduler = SchedulerConfig(grace_fraction=grace, reduction_factor=factor)
    assert rungs(training, scheduler) == tuple(step * 10 for step in steps)


@pytest.mark.parametrize("steps", range(200, 230))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_rung_is_the_end_but_for_rounding(steps: int, depth: int):
    """A trial that is stopped a step before its end was trained for nothing."""
    training = TrainingSpec(tokens=steps, batch_size=1)
    found = rungs(training, SchedulerConfig(grace_fraction=3.0**-depth))
    assert len(found) == depth + 1


def test_tokens_that_are_no_whole_batch_are_not_trained_on():
    training = TrainingSpec(tokens=3009, batch_size=10)
    assert training.steps == 300
    assert rungs(training, SchedulerConfig(name="none")) == (3000,)


# --- Bad input: each message names file, line, field, value and choices ---------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"world": "embeded"}, ["world:", "'embeded'", "valid: embedded", "mean 'embedded'?"]),
        ({"sae.architecture": "topkk"}, ["sae.architecture:", "'topkk'", "'standard', 'gated', "]),
        ({"sae.architecture": "topkk"}, ["'topk', 'batchtopk' or 'matryoshka_batchtopk'"]),
        ({"training.tokens": "many"}, ["training.tokens:", "valid integer", "'many'"]),
        ({"training.tokens": -5}, ["training.tokens:", "greater than or equal to 1", "-5"]),
        (
            {"training.tokens": 100},
            ["training.tokens: ", "tokens 100", "batch_size 1024", "0 steps"],
        ),
        ({"training.lr": float("inf")}, ["training.lr:", "finite number, got inf"]),
        ({"space.training.lr": [0.1, float("nan")]}, ["space.training.lr:", "got nan"]),
        ({"training.lr": 0}, ["training.lr:", "greater than 0", "got 0"]),
        ({"search.num_samples": 0}, ["search.num_samples:", "greater than or equal to 1", "got 0"]),
        ({"search.sampler": "gird"}, ["search.sampler:", "'tpe', 'random' or 'grid'", "'gird'"]),
        ({"search.scheduler.name": "pbt"}, ["search.scheduler.name:", "'asha' or 'none'", "'pbt'"]),
        ({"objective.evaluator": "fast"}, ["objective.evaluator:", "'cached' or 'saebench'"]),
        ({"objective.baseline": "non"}, ["objective.baseline: ", "'non'", "mean 'none'?"]),
        ({"objective.split_seed": -1}, ["objective.split_seed:", "greater than or equal to 0"]),
        ({"objective.frontier_weight": -1}, ["objective.frontier_weight:", "got -1"]),
        ({"search.seeds": 0}, ["search.seeds:", "greater than or equal to 1", "got 0"]),
        ({"confirm.top": -1}, ["confirm.top:", "greater than or equal to 0", "got -1"]),
        ({"confirm.seeds": 1}, ["confirm.seeds:", "greater than or equal to 2", "got 1"]),
        ({"resources.workers": 0}, ["resources.workers:", "greater than or equal to 1", "got 0"]),
        ({"resources.trials_per_pack": 0}, ["resources.trials_per_pack:", "auto", "got 0"]),
        ({"resources.trials_per_pack": "all"}, ["resources.trials_per_pack:", "got 'all'"]),
        (
            {"resources.trials_per_pack": 2, "resources.workers_per_trial": 2},
            ["resources.trials_per_pack:", "2 trials", "data-parallel", "workers_per_trial to 1"],
        ),
        ({"sae": None}, ["sae:", "got None"]),
        ({"space.alpha": {"float": [3, 1]}}, ["space.alpha:", "low 3 is not below high 1"]),
        ({"space.alpha": {"float": [0, 1], "log": True}}, ["space.alpha:", "above 0, got low 0"]),
        ({"space.alpha": -1}, ["space.alpha:", "≥ 0, got -1"]),
        ({"space.regularizer": ["none"]}, ["space.regularizer:", "dictionary", "['none']"]),
        ({"space.regularizer.groupd": None}, ["'groupd'", "valid: adaptive", "mean 'grouped'?"]),
        (
            {"space.regularizer.grouped.group_update_period": 0},
            ["grouped.group_update_period:", "greater than or equal to 1, got 0"],
        ),
        (
            {"space.regularizer.grouped.group_update_period": {"int": [20, 5000]}},
            [
                "regularizer.grouped.group_update_period:",
                "group_update_period 5000",
                "longer than the run",
                "256 steps",
            ],
        ),
        (
            {"space.regularizer.grouped.n_groups": 513},
            ["regularizer.grouped.n_groups:", "n_groups 513", "d_sae 512"],
        ),
        ({"space.sae.k": {"int": [3, 600]}}, ["space.sae.k:", "k 600", "d_sae 512"]),
        (
            {"space.regularizer.grouped": {"n_groups": 513}},
            ["space.regularizer.grouped.n_groups: ", "n_groups 513", "d_sae 512"],
        ),
        (
            {"space.alpha_schedule": {"dynamic": {"every": {"int": [20, 256]}}}},
            ["space.alpha_schedule.dynamic.every: ", "every 256", "256 steps"],
        ),
        ({"space.sae.k": 3.5}, ["space.sae.k:", "k 3.5", "whole", "'topk'"]),
        ({"sae.l1_coefficient": 5}, ["sae.l1_coefficient: ", "'topk' has no", "it has 'k'"]),
        (
            {"sae.architecture": "standard"},
            ["sae.architecture: ", "'standard' needs 'l1_coefficient'"],
        ),
        (
            {"space.sae.dsae": 3},
            ["space.sae.dsae: ", "'dsae'", "valid: architecture,", "mean 'd_sae'?"],
        ),
        ({"space.training.lrr": 3}, ["space.training.lrr: ", "'lrr'", "mean 'lr'?"]),
        (
            {"training.tokns": 3},
            ["training.tokns:", "key 'tokns'", "valid:", "mean 'tokens'?"],
        ),
        (
            {"searhc": 3},
            ["key 'searhc'", "valid: confirm, ", "mean 'search'?"],
        ),
        ({"search.scheduler.grace": 3}, ["unknown key 'grace'", "mean 'grace_fraction'?"]),
        ({"resources.gpus_per_worker": 0.5}, ["unknown key 'gpus_per_worker'", "use_gpu"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_answered_with_field_value_and_choices(
    overrides: dict, parts: list[str], complain
):
    message = complain(overrides)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokens", "many"), ("num_samples", "0"), ("alpha", "-1"), ("architecture", "x")],
)
def test_a_bad_value_is_answered_with_its_line(key: str, value: str, complain):
    text = re.sub(rf"(?m)^( +{key}:).*$", rf"\1 {value}", ORTH.read_text())
    assert f"mine.yaml:{line_of(key)}: " in complain(text=text)


def test_a_bad_value_of_the_command_line_is_not_blamed_on_a_line_of_the_file(complain):
    message = complain({"search.num_samples": 0})
    assert message.startswith("/mine.yaml, set on the command line: search.num_samples: ")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("sae:\n  d_sae: 64\n  k: [1, 2\nsearch: {}\n", "mine.yaml:4:7: not valid YAML"),
        ("space:\n\tregularizer:\n", "mine.yaml:2:1: not valid YAML"),
        ("space: {a: b: c}\n", "mine.yaml:1:"),
        ("space: !!python/object:os.system {}\n", "mine.yaml:1:"),
        ("", "is empty"),
        ("- a\n", "a mapping with a 'space' section; this is list"),
        ("world: embedded\n", "needs either a 'space' to search or the 'runs' of a study"),
        ("space: 3\n", "mine.yaml:1: space: "),
        ("space: {}\n", "space.regularizer: is missing"),
    ],
)
def test_a_broken_file_is_answered_with_its_line_or_what_is_missing(text: str, part: str, complain):
    assert part in complain(text=text)


def test_several_mistakes_are_all_named(complain):
    message = complain({"training.tokens": -5, "search.num_samples": 0, "searhc": 1})
    assert "training.tokens" in message
    assert "search.num_samples" in message
    assert "searhc" in message
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "key"), [("777: 2\nspace: {}\n", "777"), ("on: 2\nspace: {}\n", "True")]
)
def test_a_key_that_yaml_does_not_read_as_a_word_is_an_unknown_key(text: str, key: str, complain):
    message = complain(text=text)
    assert "key" in message
    assert key in message


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"float": [0.1, float("inf")]}),
        pytest.param(float("inf")),
        float("nan"),
    ],
)
def test_alpha_must_be_finite(value: Any, complain):
    assert "alpha" in complain({"space.alpha": value})


def test_an_empty_value_is_one_mistake(complain):
    message = complain({"space.alpha": None})
    assert "space.alpha" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["orht", "/no/such/folder/orht.yaml"])
def test_an_unknown_space_is_answered_with_those_that_exist(name: str):
    with pytest.raises(UserError) as caught:
        find_space(name)
    assert name in str(caught.value)
    files = sorted(path.name for path in ORTH.parent.glob("*.yaml"))
    assert f"valid: {', '.join(files)}" in str(caught.value)


def test_a_misspelt_space_is_answered_with_the_nearest_one():
    with pytest.raises(UserError, match=r"Did you mean 'orth.yaml'\?"):
        find_space("orht.yaml")


def test_a_file_that_cannot_be_read_is_answered_with_the_reason(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.yaml: No such file"):
        load_config(tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes("world: \xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: not a UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize("text", ["training.tokens", "=5", " = 5", ""])
def test_an_override_without_key_and_value_is_answered_with_an_example(text: str):
    with pytest.raises(UserError, match=r"must be key=value, e\.g\. --set training\.tokens="):
        parse_override(text)


def test_an_override_that_is_no_yaml_is_refused():
    with pytest.raises(UserError, match=r"--set a=\[1: the value is not valid YAML"):
        parse_override("a=[1")


def test_an_override_inside_a_plain_value_is_refused():
    with pytest.raises(UserError, match=r"--set world\.name: world has no fields"):
        load_config(ORTH, {"world.name": 1})


# --- What could not be a trial is found out before the first one ----------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"space.regularizer.grouped.group_update_period": [20, 5000, 50]}, "5000"),
        ({"space.regularizer.grouped.n_groups": [4, 5000, 16]}, "n_groups 5000"),
        ({"space.sae.k": [4, 600, 16]}, "k 600"),
        ({"space.training.batch_size": [512, 10_000_000, 1024]}, "10000000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_choice_of_a_list_is_checked_not_only_the_outer_ones(
    overrides: dict, message: str, complain
):
    assert message in complain(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"space.sae": {"d_sae": [64, 512], "k": {"int": [16, 128]}}}, "k 128"),
        (
            {
                "space.training": {"tokens": {"int": [524_288, 1_572_864]}},
                "space.regularizer.grouped.group_update_period": {"int": [20, 1000]},
            },
            "group_update_period 1000",
        ),
    ],
    ids=["k-above-smallest-d_sae", "period-above-shortest-run"],
)
def test_corners_that_mix_low_and_high_ends_are_checked(overrides: dict, message: str, complain):
    assert message in complain(overrides)


def test_a_range_of_fractions_is_refused_where_whole_numbers_are_needed(complain):
    assert "whole" in complain({"space.sae.k": {"float": [3, 16]}})
