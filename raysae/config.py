"""The space file as typed objects: the only place that reads YAML, and where bad input ends.

Every message names the file, the line, the field, the value and what would be right.
"""

from __future__ import annotations

import itertools
from math import ceil
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raysae.errors import FieldError, UserError, nearest
from raysae.mistakes import Loc, explain, fields_of, located, mistakes_at, moved
from raysae.regularizers import REGISTRY
from raysae.resources import ResourcesConfig
from raysae.space import SearchSpace
from raysae.storage import StorageAddress
from raysae.training.schedules import SCHEDULES
from raysae.training.spec import SAEFields, SAESpec, TrainingSpec, TrialSpec
from raysae.worlds.presets import PRESETS
from raysae.worlds.spec import HubWorld, LocalWorld, WorldSpec, typed, written_out
from raysae.worlds.world import WORLDS

_WORLD: TypeAdapter[Any] = TypeAdapter(WorldSpec)
LAST_RUNG = 0.95
"""Share of a run from which on stopping a trial would save next to nothing."""
SPACES_FOLDER = Path(__file__).resolve().parent.parent / "search_spaces"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ObjectiveConfig(_Strict):
    """What a trial is scored by."""

    metric: Literal["unlearning_score"] = "unlearning_score"
    evaluator: Literal["cached", "saebench"] = Field(
        "cached", description="cached: the same numbers, faster; saebench: SAEBench's own loop"
    )
    baseline: str = Field(
        "none", description="regularizer of the first trial, shown beside the best"
    )
    split_seed: int = Field(0, ge=0, description="of the questions' halves, searched and held out")
    frontier_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the forget-retain frontier in what the sampler is told, for spaces "
        "whose scores are mostly 0",
    )


class SchedulerConfig(_Strict):
    """Early stopping by tokens: asynchronous successive halving (Li et al., 2018)."""

    name: Literal["asha", "none"] = "asha"
    grace_fraction: float = Field(
        1 / 3, gt=0, le=1, description="share of the run of the first rung"
    )
    reduction_factor: int = Field(3, ge=2, description="one in this many goes on at a rung")

    def shares(self) -> list[float]:
        """Of a run, at which trials may be stopped, ascending."""
        shares: list[float] = []
        share = self.grace_fraction if self.name == "asha" else 1.0
        # A third of a third of a third is the end but for rounding, and no rung just before it.
        while share < LAST_RUNG:
            shares.append(share)
            share *= self.reduction_factor
        return shares


class SearchConfig(_Strict):
    """How many trials, chosen how."""

    num_samples: int = Field(24, ge=1, description="trials, where a sampler chooses them")
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="grid: every combination of a space that has lists only"
    )
    seeds: int = Field(1, ge=1, description="of every point of a grid, of every run of a study")
    seeds_per_trial: int = Field(
        1, ge=1, description="SAEs a trial, trained together; the sampler gets their mean"
    )
    startup_trials: int = Field(10, ge=1, description="random trials before TPE models anything")
    seed: int = Field(0, ge=0)
    max_concurrent: int | None = Field(
        None, ge=1, description="default: as many as the pool serves"
    )
    scheduler: SchedulerConfig = SchedulerConfig()


class ConfirmConfig(_Strict):
    """After a search: the best are trained again, with fresh seeds, beside the baselines."""

    top: int = Field(2, ge=0, description="how many of the best; 0: no confirmation")
    seeds: int = Field(3, ge=2, description="fresh seeds of each")

    def seeds_per_trial(self, at_a_time: int) -> int:
        """Seeds of a trial of the confirmation, the last of a configuration perhaps fewer.

        Each configuration is as many trials as are trained at a time, so that no worker is left
        without one while the others have all of its seeds. On a CPU an SAE does not depend on who
        is trained beside it; on a GPU to rounding.
        """
        return ceil(self.seeds / at_a_time)


class RunEntry(_Strict):
    """One run of a study: set, not searched."""

    regularizer: dict[str, Any] = Field(description="name, and the method's own parameters")
    alpha: float = Field(0.0, ge=0)
    alpha_schedule: dict[str, Any] = Field({"name": "constant"})
    sae: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = Field(
        None, ge=0, description="of weights and batches, the first of them; default: search.seed's"
    )

    @field_validator("regularizer", "alpha_schedule")
    @classmethod
    def _can_be_made(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        registry: dict[str, Any] = REGISTRY if info.field_name == "regularizer" else SCHEDULES
        parameters = dict(value)
        if "name" not in parameters:
            raise ValueError(f"needs a 'name', got {sorted(value)}")
        name = parameters.pop("name")
        if not isinstance(name, str) or name not in registry:
            raise FieldError("name", f"unknown name {name!r}; {nearest(str(name), registry)}")
        _check_names(parameters, registry[name], repr(name))
        registry[name](**parameters)
        return value

    @field_validator("sae", "training")
    @classmethod
    def _has_fields(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        _check_names(value, SAESpec if info.field_name == "sae" else TrainingSpec, "it")
        return value


def _check_names(values: dict[str, Any], model: type[BaseModel], owner: str) -> None:
    for name in values:
        if name not in model.model_fields:
            options = nearest(name, model.model_fields) if model.model_fields else "it has none."
            raise FieldError(name, f"{owner} has no parameter {name!r}; {options}")


class RunConfig(_Strict):
    """A whole search, as in a space file."""

    world: str | HubWorld | LocalWorld = Field(
        "embedded", description="a name, or a description: see raysae/worlds/spec.py"
    )
    hook: str | None = Field(None, description="hook point; default: the world's")
    sae: SAEFields = SAEFields()
    training: TrainingSpec = TrainingSpec()
    objective: ObjectiveConfig = ObjectiveConfig()
    evals: tuple[Literal["unlearning", "sparse_probing"], ...] = Field(
        ("unlearning",), description="sparse_probing: SAEBench's, of every trial trained to its end"
    )
    search: SearchConfig = SearchConfig()
    confirm: ConfirmConfig = ConfirmConfig()
    resources: ResourcesConfig = ResourcesConfig()
    loggers: tuple[Literal["wandb", "mlflow", "aim"], ...] = Field(
        (), description="experiment trackers told of every trial, beside TensorBoard"
    )
    storage: StorageAddress | None = Field(None, description="the run folder is mirrored below it")
    space: SearchSpace | None = Field(None, description="what is searched")
    runs: dict[str, RunEntry] | None = Field(
        None, min_length=1, description="instead of a space: the runs of a study, by name"
    )

    @field_validator("world", mode="wrap")
    @classmethod
    def _known_world(cls, value: Any, _: Any, info: ValidationInfo) -> str | HubWorld | LocalWorld:
        if not isinstance(value, str):
            found: HubWorld | LocalWorld = _WORLD.validate_python(value, context=info.context)
            return found
        if value not in WORLDS:
            raise ValueError(f"unknown world {value!r}; {nearest(value, WORLDS)}")
        return value

    @model_validator(mode="after")
    def _corners_are_trials(self) -> RunConfig:
        """Every corner of the space must be a trial that can run: found now, not at trial 17."""
        if (self.space is None) == (self.runs is None):
            raise ValueError("needs either a 'space' to search or the 'runs' of a study")
        for name, run in (self.runs or {}).items():
            self._check_trial(run.model_dump(), ("runs", name))
        if self.space is not None:
            self._check_space(self.space)
        return self

    def _check_space(self, space: SearchSpace) -> None:
        seeds, baseline = self.search.seeds, self.objective.baseline
        if self.is_search and seeds > 1:
            problem = (
                f"{seeds} seeds belong to a grid or to the runs of a study; a sampler's best are "
                "trained again with confirm.seeds"
            )
            raise located(ValueError(problem), "search", "seeds")
        if baseline not in space.regularizer:
            problem = f"{baseline!r} is not in space.regularizer; "
            problem += nearest(baseline, space.regularizer)
            raise located(ValueError(problem), "objective", "baseline")
        for section, model in (("sae", SAESpec), ("training", TrainingSpec)):
            with mistakes_at("space", section):
                _check_names(getattr(space, section), model, "it")
        for sampled in itertools.chain(space.corners(), space.schedule_corners()):
            self._check_trial(sampled, ("space",))
        with mistakes_at("space"):
            self.fixed_trials()

    def _check_trial(self, sampled: dict[str, Any], at: Loc) -> None:
        """Whether it could run; `at` is the run, or the space, that has the values."""

        def written(loc: Loc) -> Loc:
            match loc:
                case ("sae" | "training" as section, field, *_) if field in sampled[section]:
                    return (*at, *loc)
                case ("sae" | "training", *_):
                    return loc if at == ("space",) else at  # which run it is counts most
                case ("regularizer" | "alpha_schedule" as section, *field) if at == ("space",):
                    return (*at, section, sampled[section]["name"], *field)
            return (*at, *loc)

        try:
            self.trial_spec(0, sampled)
        except ValidationError as error:
            raise moved(error, written) from None

    @property
    def rungs(self) -> tuple[int, ...]:
        """Tokens at which a trial is scored: the scheduler's rungs, then the end of training."""
        return rungs(self.training, self.search.scheduler)

    def extremes(self, section: Literal["sae", "training"], field: str) -> tuple[int, int]:
        """The smallest and the largest that any trial has of a field of whole numbers."""
        values = [getattr(getattr(self, section), field)]
        if self.space is not None:
            searched = getattr(self.space, section).get(field)
            values = values if searched is None else list(searched.extremes)
        for run in (self.runs or {}).values():
            values.append(getattr(run, section).get(field, values[0]))
        return min(values), max(values)

    @property
    def is_search(self) -> bool:
        """Whether a sampler chooses the trials, and not a list or a grid."""
        return self.space is not None and self.search.sampler != "grid"

    @property
    def num_trials(self) -> int:
        """Number of trials, those of the confirmation left out."""
        return self.search.num_samples if self.is_search else len(self.fixed_trials())

    @property
    def max_confirmed(self) -> int:
        """Configurations of the confirmation at most: each of the best, and both baselines beside
        it."""
        return 3 * self.confirm.top if self.is_search else 0

    def max_confirmation(self, at_a_time: int) -> int:
        """Trials of the confirmation at most, where so many are trained at a time."""
        each = ceil(self.confirm.seeds / self.confirm.seeds_per_trial(at_a_time))
        return self.max_confirmed * each

    def fixed_trials(self) -> list[TrialSpec]:
        """The trials of a study's runs or of a grid, seed by seed; [] where a sampler chooses them.

        A seed is shared by all runs: they start from the same weights and see the same batches.
        """
        points: list[tuple[str, dict[str, Any]]] = []
        if self.runs is not None:
            points = [(name, run.model_dump()) for name, run in self.runs.items()]
        elif self.space is not None and self.search.sampler == "grid":
            points = list(self.space.grid())
        return [
            self.trial_spec(seed * len(points) + i, point, seed=seed, run=name)
            for seed in range(self.search.seeds)
            for i, (name, point) in enumerate(points)
        ]

    def trial_spec(
        self, number: int, sampled: dict[str, Any], *, seed: int | None = None, run: str = ""
    ) -> TrialSpec:
        """The trial of that number with the sampled values filled in.

        The seed follows from the search's seed and the number (or `seed`) alone, so that a trial
        can be run again by itself.

        Raises:
            ValidationError: no trial has these values; at `sae`, `training`, `regularizer` or
                `alpha_schedule`, and the field.
        """
        own_seed = sampled.get("seed")
        with mistakes_at("sae"):
            sae = SAESpec(**(self.sae.model_dump() | sampled["sae"]))
        with mistakes_at("training"):
            training = TrainingSpec(**(self.training.model_dump() | sampled["training"]))
        spec = TrialSpec(
            number=number,
            seed=self.seed_of(number if seed is None else seed)
            if own_seed is None
            else own_seed + (seed or 0),
            seeds=self.search.seeds_per_trial,
            run=run,
            sae=sae,
            training=training,
            regularizer=sampled["regularizer"],
            alpha=sampled["alpha"],
            alpha_schedule=sampled["alpha_schedule"],
            rungs=rungs(training, self.search.scheduler),
        )
        with mistakes_at("regularizer"):
            spec.regularizer.check(sae.architecture, sae.d_sae, training.steps)
        with mistakes_at("alpha_schedule"):
            spec.alpha_schedule.check(training.steps)
        return spec

    def seed_of(self, index: int) -> int:
        """Seed of a trial's weights and batches."""
        return self.search.seed * 1_000_003 + index


def rungs(training: TrainingSpec, scheduler: SchedulerConfig) -> tuple[int, ...]:
    """Tokens at which a trial is scored, ascending; the last is the end of training."""
    total = training.steps
    steps = {total} | {max(1, round(total * share)) for share in scheduler.shares()}
    return tuple(step * training.batch_size for step in sorted(steps))


def find_space(name: str) -> Path:
    """The space file of that path or bare name (searched in `search_spaces/`).

    Raises:
        UserError: there is none; the message lists those that exist.
    """
    for candidate in (Path(name), SPACES_FOLDER / name, SPACES_FOLDER / f"{name}.yaml"):
        if candidate.is_file():
            return candidate.resolve()
    known = [path.name for path in SPACES_FOLDER.glob("*.yaml")]
    raise UserError(f"--space {name}: no such file, and none of that name in search_spaces/; "
                    f"{nearest(name, known)}")  # fmt: skip


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a space file, apply `{dotted.key: value}` overrides, validate.

    Relative paths of the file start at its folder, those of overrides at the working directory.

    Raises:
        UserError: one message that names file, line, field, value and what would be right.
    """
    data, lines = _read_yaml(path, "a space file is a mapping with a 'space' section")
    for key in data:
        if not isinstance(key, str):
            raise UserError(
                f"{path}: unknown key {key!r}; {nearest(str(key), RunConfig.model_fields)}"
            )
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    try:
        return RunConfig.model_validate(data, context={"folder": path.absolute().parent})
    except ValidationError as error:
        given = {tuple(key.split(".")): value for key, value in (overrides or {}).items()}
        overridden = {path for key, value in given.items() for path in fields_of(value, key)}
        raise UserError(explain(path, error, lines, overridden, RunConfig)) from None


def world_of(text: str) -> str | HubWorld | LocalWorld:
    """The world of `--world`: a name, or what a YAML file describes.

    Raises:
        UserError: neither, or a mistake in the file.
    """
    if text in WORLDS:
        return text
    path = Path(text)
    if not path.is_file():
        raise UserError(
            f"--world {text}: neither a YAML file nor the name of a world; {nearest(text, WORLDS)}"
        )
    data, lines = _read_yaml(path, "a world is a mapping with a 'kind'")
    try:
        found: HubWorld | LocalWorld = _WORLD.validate_python(
            data, context={"folder": path.absolute().parent}
        )
    except ValidationError as error:
        nested = {("world", *loc): line for loc, line in lines.items()}
        raise UserError(explain(path, error, nested, set(), RunConfig, ("world",))) from None
    return found


def _read_yaml(path: Path, what: str) -> tuple[dict[Any, Any], dict[tuple[str, ...], int]]:
    """A mapping, and the line of each of its fields; `what` says what it should have been."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file ({error.reason})") from None
    try:
        data = yaml.safe_load(text)
        lines = _line_numbers(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "cannot be read"
        raise UserError(f"{where}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        found = "empty" if data is None else type(data).__name__
        raise UserError(f"{path}: {what}; this is {found}")
    return data, lines


def parse_override(text: str) -> tuple[str, Any]:
    """`"training.tokens=500000"` → ("training.tokens", 500000); the value is read as YAML.

    Raises:
        UserError: no `=`, or a value that is not YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set {text}: must be key=value, e.g. --set training.tokens=500000")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not valid YAML") from None


def _override(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = data
    if parents[:1] == ["world"]:  # which may be a name, or leave its domains to SAEBench
        world = data.get("world")
        data["world"] = written_out(PRESETS.get(world, world) if isinstance(world, str) else world)
        value = typed(value)
    elif dotted == "world" and isinstance(value, dict):
        value = typed(value)
    for depth, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = {}
        if parents[0] == "world" and depth > 1 and isinstance(node[key], str):
            node[key] = {"path": node[key]}  # a file or folder, written short
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"--set {dotted}: {'.'.join(parents[: depth + 1])} has no fields")
    node[last] = value


def _line_numbers(text: str) -> dict[Loc, int]:
    """The line of each field of a YAML file."""
    lines: dict[Loc, int] = {}

    def visit(node: yaml.Node | None, path: Loc) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*path, str(key.value))] = key.start_mark.line + 1
                visit(value, (*path, str(key.value)))

    visit(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return lines
