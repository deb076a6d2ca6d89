"""The search space: typed ranges, conditional by construction, sampled define-by-run.

A parameter exists only where it does something: `group_update_period` belongs to the regularizers
that regroup, α and its schedule to those that have a penalty. What a branch does not list is never
suggested, so the sampler spends no trial on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Protocol

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    field_validator,
    model_serializer,
    model_validator,
)

from raysae.errors import FieldError, nearest
from raysae.mistakes import located, mistakes_at
from raysae.regularizers import REGISTRY
from raysae.training.schedules import SCHEDULES

Scalar = bool | int | float | str


class Suggester(Protocol):
    """The part of `optuna.Trial` that sampling needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FloatRange(_Strict):
    """`{float: [low, high], log: true}`: a real number."""

    float_: tuple[FiniteFloat, FiniteFloat] = Field(alias="float")
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        _check_range(*self.float_, self.log)
        return self

    def suggest(self, trial: Suggester, name: str) -> float:
        return trial.suggest_float(name, *self.float_, log=self.log)

    @property
    def extremes(self) -> tuple[Scalar, ...]:
        return self.float_


class IntRange(_Strict):
    """`{int: [low, high], log: true}`: a whole number, both ends included."""

    int_: tuple[int, int] = Field(alias="int")
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> IntRange:
        _check_range(*self.int_, self.log)
        return self

    def suggest(self, trial: Suggester, name: str) -> int:
        return trial.suggest_int(name, *self.int_, log=self.log)

    @property
    def extremes(self) -> tuple[Scalar, ...]:
        return self.int_


class Choice(_Strict):
    """`[a, b, c]`: one of a list."""

    choices: tuple[Scalar, ...] = Field(min_length=1)

    @model_serializer
    def _as_written(self) -> list[Scalar]:
        return list(self.choices)

    def suggest(self, trial: Suggester, name: str) -> Scalar:
        choice: Scalar = trial.suggest_categorical(name, list(self.choices))
        return choice

    @property
    def extremes(self) -> tuple[Scalar, ...]:
        return self.choices


class Fixed(_Strict):
    """A plain value: set, not searched."""

    value: Scalar

    @model_serializer
    def _as_written(self) -> Scalar:
        return self.value

    def suggest(self, trial: Suggester, name: str) -> Scalar:
        return self.value

    @property
    def extremes(self) -> tuple[Scalar, ...]:
        return (self.value,)


def _check_range(low: float, high: float, log: bool) -> None:
    if not low < high:
        raise ValueError(f"empty range: low {low:g} is not below high {high:g}")
    if log and low <= 0:
        raise ValueError(f"a log range must be above 0, got low {low:g}")


def _parse_parameter(value: Any) -> Any:
    if isinstance(value, FloatRange | IntRange | Choice | Fixed):
        return value
    if isinstance(value, list):
        if not value:
            raise ValueError("empty range: a list of choices needs at least one")
        return Choice(choices=tuple(value))
    if isinstance(value, dict) and len(value) == 1:  # as a run's config.yaml has them
        if "choices" in value:
            return _parse_parameter(value["choices"])
        if "value" in value:
            return Fixed(value=value["value"])
    if isinstance(value, dict):
        kinds: dict[str, type[FloatRange | IntRange]] = {"float": FloatRange, "int": IntRange}
        found = [kind for kind in kinds if kind in value]
        if len(found) != 1:
            raise ValueError(
                f"a range is {{float: [low, high]}} or {{int: [low, high]}}, optionally with "
                f"log: true; got keys {sorted(map(str, value))}"
            )
        return kinds[found[0]](**value)
    if value is None:
        raise ValueError("needs a value, a list of choices, or a range")
    return Fixed(value=value)


Parameter = Annotated[FloatRange | IntRange | Choice | Fixed, BeforeValidator(_parse_parameter)]
Branch = dict[str, Parameter]


class SearchSpace(_Strict):
    """What is searched; each method and each schedule is a branch with its own parameters."""

    regularizer: dict[str, Branch | None] = Field(min_length=1)
    alpha: Parameter = Fixed(value=1.0)
    alpha_schedule: dict[str, Branch | None] = Field({"constant": None}, min_length=1)
    sae: Branch = Field(default_factory=dict)
    training: Branch = Field(default_factory=dict)

    @field_validator("regularizer")
    @classmethod
    def _known_regularizers(cls, value: dict[str, Branch | None]) -> dict[str, Branch | None]:
        for name, branch in value.items():
            if name not in REGISTRY:
                raise FieldError(name, f"unknown regularizer {name!r}; {nearest(name, REGISTRY)}")
            _check_branch(name, branch or {}, REGISTRY[name], REGISTRY[name].searchable)
        return value

    @field_validator("alpha_schedule")
    @classmethod
    def _known_schedules(cls, value: dict[str, Branch | None]) -> dict[str, Branch | None]:
        for name, branch in value.items():
            if name not in SCHEDULES:
                raise FieldError(name, f"unknown α schedule {name!r}; {nearest(name, SCHEDULES)}")
            fields = frozenset(SCHEDULES[name].model_fields)
            _check_branch(name, branch or {}, SCHEDULES[name], fields)
        return value

    @field_validator("alpha")
    @classmethod
    def _alpha_not_negative(cls, value: Parameter) -> Parameter:
        for end in value.extremes:
            if isinstance(end, str) or not 0 <= end < float("inf"):
                hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(end, str) else ""
                raise ValueError(f"α must be a finite number ≥ 0, got {end!r}{hint}")
        return value

    def sample(self, trial: Suggester) -> dict[str, Any]:
        """Suggest one configuration; only parameters that act in it are suggested.

        Returns:
            {"regularizer": {"name", …}, "alpha", "alpha_schedule": {"name", …}, "sae": {…},
            "training": {…}}
        """
        method = trial.suggest_categorical("regularizer", list(self.regularizer))
        config: dict[str, Any] = {
            "regularizer": {"name": method}
            | _suggest_branch(trial, f"{method}.", self.regularizer[method]),
            "alpha": 0.0,
            "alpha_schedule": {"name": "constant"},
            "sae": _suggest_branch(trial, "sae.", self.sae),
            "training": _suggest_branch(trial, "training.", self.training),
        }
        if REGISTRY[method].uses_alpha:
            config["alpha"] = self.alpha.suggest(trial, "alpha")
            schedule = trial.suggest_categorical("alpha_schedule", list(self.alpha_schedule))
            config["alpha_schedule"] = {"name": schedule} | _suggest_branch(
                trial, f"{schedule}.", self.alpha_schedule[schedule]
            )
        return config

    def corners(self) -> Iterator[dict[str, Any]]:
        """Configurations at the ends of every range and at every choice, in all combinations of a
        method with SAE and training: if they can run, so can what lies between them.

        The middle of a real range stands for the values that are not whole.
        """
        for method, branch in self.regularizer.items():
            for fields in itertools.product(
                _corners(branch), _corners(self.sae), _corners(self.training)
            ):
                yield {
                    "regularizer": {"name": method} | fields[0],
                    "alpha": 0.0,
                    "alpha_schedule": {"name": "constant"},
                    "sae": fields[1],
                    "training": fields[2],
                }

    def schedule_corners(self) -> Iterator[dict[str, Any]]:
        """The same of the α schedules with training: they look at neither method nor SAE."""
        for schedule, branch in self.alpha_schedule.items():
            for its, training in itertools.product(_corners(branch), _corners(self.training)):
                yield {
                    "regularizer": {"name": "none"},
                    "alpha": 0.0,
                    "alpha_schedule": {"name": schedule} | its,
                    "sae": next(_corners(self.sae)),
                    "training": training,
                }

    def grid(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every combination of a space that has lists and plain values only.

        With its name: the method and the values that differ between points.

        Raises:
            ValidationError: a range has no list of values; at its field.
        """
        for method, branch in self.regularizer.items():
            penalised = REGISTRY[method].uses_alpha
            alphas = list(_points({"alpha": self.alpha}, ())) if penalised else [{"alpha": 0.0}]
            schedules = self.alpha_schedule if penalised else {"constant": None}
            for (schedule, its), alpha in itertools.product(schedules.items(), alphas):
                for fields in itertools.product(
                    _points(branch, ("regularizer", method)),
                    _points(its, ("alpha_schedule", schedule)),
                    _points(self.sae, ("sae",)),
                    _points(self.training, ("training",)),
                ):
                    varied = [method]
                    if penalised and len(self.alpha.extremes) > 1:
                        varied.append(f"α={alpha['alpha']}")
                    if penalised and len(self.alpha_schedule) > 1:
                        varied.append(schedule)
                    branches = (branch, its, self.sae, self.training)
                    for values, lists in zip(fields, branches, strict=True):
                        for name, value in values.items():
                            if len((lists or {})[name].extremes) > 1:
                                varied.append(f"{name}={value}")
                    yield (
                        " ".join(varied),
                        {
                            "regularizer": {"name": method} | fields[0],
                            "alpha": alpha["alpha"],
                            "alpha_schedule": {"name": schedule} | fields[1],
                            "sae": fields[2],
                            "training": fields[3],
                        },
                    )


def _points(branch: Branch | None, loc: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a branch of lists, which stands at `loc`."""
    branch = branch or {}
    for name, parameter in branch.items():
        if isinstance(parameter, FloatRange | IntRange):
            problem = (
                f"sampler grid: {name} is a range, {list(parameter.extremes)}; a grid needs a list "
                "of values"
            )
            raise located(ValueError(problem), *loc, name)
    values = [parameter.extremes for parameter in branch.values()]
    for combination in itertools.product(*values):
        yield dict(zip(branch, combination, strict=True))


def _corners(branch: Branch | None) -> Iterator[dict[str, Any]]:
    branch = branch or {}
    values = []
    for parameter in branch.values():
        ends = list(parameter.extremes)
        if isinstance(parameter, FloatRange):
            ends.append(sum(parameter.float_) / 2)
        values.append(ends)
    for combination in itertools.product(*values):
        yield dict(zip(branch, combination, strict=True))


def _suggest_branch(trial: Suggester, prefix: str, branch: Branch | None) -> dict[str, Any]:
    return {name: p.suggest(trial, prefix + name) for name, p in (branch or {}).items()}


def _check_branch(
    owner: str, branch: Branch, model: type[BaseModel], allowed: frozenset[str]
) -> None:
    for name in branch:
        if name not in allowed:
            options = nearest(name, allowed) if allowed else "it has none."
            problem = f"{owner!r} has no parameter {name!r}; {options}"
            raise located(ValueError(problem), owner, name)
    for values in _corners(branch):
        with mistakes_at(owner):
            model(**values)
