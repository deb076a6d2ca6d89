"""A trial is a value: everything that decides its numbers, and nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from raysae.errors import FieldError
from raysae.regularizers import REGISTRY, Regularizer
from raysae.training.mixture import forget_rows
from raysae.training.schedules import SCHEDULES, AlphaSchedule, Constant

Architecture = Literal["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"]
SPARSITY_FIELD: dict[str, str] = {
    "standard": "l1_coefficient",
    "gated": "l1_coefficient",
    "jumprelu": "l0_coefficient",
    "topk": "k",
    "batchtopk": "k",
    "matryoshka_batchtopk": "k",
}
SEED_STRIDE = 1_000_000_007
"""Between the seeds of a trial's SAEs: above any distance of two trials' own."""
SPARSITY_FIELDS = tuple(dict.fromkeys(SPARSITY_FIELD.values()))


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SAEFields(_Frozen):
    """The fields of an SAE; those that are not searched may stand in a space file's `sae`."""

    architecture: Architecture = Field("topk", description="a SAELens training SAE")
    d_sae: int = Field(512, ge=2, description="number of features")
    k: float | None = Field(
        None, gt=0, description="active features a token (topk, batchtopk, matryoshka_batchtopk)"
    )
    l1_coefficient: float | None = Field(
        None, ge=0, description="weight of the L1 term (standard, gated)"
    )
    l0_coefficient: float | None = Field(None, ge=0, description="weight of the L0 term (jumprelu)")
    matryoshka_widths: tuple[int, ...] | None = Field(
        None,
        description="nested widths, ascending, the last d_sae (matryoshka_batchtopk); "
        "default: an eighth, a quarter, a half and all of d_sae",
    )


class SAESpec(SAEFields):
    """Which SAELens training SAE, with exactly the sparsity parameter its architecture has."""

    @property
    def sparsity(self) -> str:
        """Name of the field that decides the sparsity: k, l1_coefficient or l0_coefficient."""
        return SPARSITY_FIELD[self.architecture]

    @model_validator(mode="after")
    def _sparsity_fits(self) -> SAESpec:
        wanted = self.sparsity
        if getattr(self, wanted) is None:
            raise FieldError("architecture", f"architecture {self.architecture!r} needs {wanted!r}")
        for other in SPARSITY_FIELDS:
            if other != wanted and getattr(self, other) is not None:
                raise FieldError(
                    other, f"architecture {self.architecture!r} has no {other!r}: it has {wanted!r}"
                )
        widths = self.matryoshka_widths
        if widths is not None:
            if self.architecture != "matryoshka_batchtopk":
                raise FieldError(
                    "matryoshka_widths",
                    f"architecture {self.architecture!r} has no 'matryoshka_widths': "
                    "matryoshka_batchtopk has",
                )
            if list(widths) != sorted(set(widths)) or widths[:1] < (1,) or widths[-1] != self.d_sae:
                raise FieldError(
                    "matryoshka_widths",
                    f"matryoshka_widths {list(widths)} must be ascending from at least 1 and end "
                    f"with d_sae {self.d_sae}",
                )
        if self.k is not None and self.k > self.d_sae:
            raise FieldError("k", f"k {self.k:g} is larger than d_sae {self.d_sae}")
        if self.architecture == "topk" and self.k is not None and self.k != int(self.k):
            raise FieldError("k", f"k {self.k} must be whole for architecture 'topk'")
        return self


class TrainingSpec(_Frozen):
    """How long and how fast; one token is one row of the activation store."""

    tokens: int = Field(2_048_000, ge=1, description="activation rows seen in training")
    batch_size: int = Field(1024, ge=1, description="rows a step, over all workers of the trial")
    forget_share: float | None = Field(
        None, gt=0, lt=1, description="of the rows of every batch; null: as in the corpora"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of Adam")
    lr_warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    lr_decay: float = Field(0.3, ge=0, lt=1, description="share of the steps, linear to 0")
    adam_betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = Field(1.0, gt=0, description="global norm")
    dead_after: int = Field(200, ge=1, description="steps without firing after which one is dead")
    autocast: Literal["auto", "off", "bfloat16"] = Field(
        "auto",
        description="of the SAE's own products; auto: bfloat16 on a GPU, off on a CPU; weights, "
        "losses and penalties stay float32",
    )
    tf32: bool = Field(
        True,
        description="what a training step multiplies in float32, on a GPU in TF32; scoring and "
        "conditioning never are",
    )
    step: Literal["packed", "saelens"] = Field(
        "packed", description="packed: SAELens' step for several SAEs at once; saelens: its own"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSpec:
        if self.tokens < self.batch_size:
            raise FieldError(
                "tokens",
                f"tokens {self.tokens} is below batch_size {self.batch_size}: "
                "the SAE would train for 0 steps",
            )
        if self.forget_share is not None:
            try:
                forget_rows(self.forget_share, self.batch_size)
            except ValueError as error:
                raise FieldError("forget_share", str(error)) from None
        if self.lr_warmup + self.lr_decay > 1:
            raise FieldError(
                "lr_decay",
                f"lr_warmup {self.lr_warmup:g} + lr_decay {self.lr_decay:g} is above 1, the whole "
                "run",
            )
        return self

    @property
    def steps(self) -> int:
        """Number of optimiser steps, at least 1."""
        return self.tokens // self.batch_size


class TrialSpec(_Frozen):
    """One trial: SAE, training, penalty, seed, and the tokens at which it is scored."""

    number: int = Field(ge=0)
    seed: int = Field(ge=0, description="of weights and batches, of the first SAE")
    seeds: int = Field(1, ge=1, description="SAEs that differ in their seed alone")
    batch_seed: int | None = Field(None, ge=0, description="of the batches, where it is another")
    run: str = Field("", description="name of the run or candidate that the trial is a seed of")
    stage: Literal["search", "confirmation"] = "search"
    sae: SAESpec
    training: TrainingSpec
    regularizer: SerializeAsAny[Regularizer]
    alpha: float = Field(0.0, ge=0)
    alpha_schedule: SerializeAsAny[AlphaSchedule] = Constant()
    rungs: tuple[int, ...] = Field(description="tokens at which the SAE is scored, ascending")

    @field_validator("regularizer", mode="before")
    @classmethod
    def _named_regularizer(cls, value: Any) -> Any:
        return _by_name(value, REGISTRY)

    @field_validator("alpha_schedule", mode="before")
    @classmethod
    def _named_schedule(cls, value: Any) -> Any:
        return _by_name(value, SCHEDULES)

    @model_validator(mode="after")
    def _consistent(self) -> TrialSpec:
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs must be ascending and not empty, got {self.rungs}")
        if self.rungs[-1] != self.training.steps * self.training.batch_size:
            raise ValueError(
                f"the last rung {self.rungs[-1]} is not the end of training "
                f"({self.training.steps * self.training.batch_size} tokens)"
            )
        return self

    @property
    def batches(self) -> int:
        """Seed of the batches."""
        return self.seed if self.batch_seed is None else self.batch_seed

    def members(self) -> list[TrialSpec]:
        """The trial's SAEs one by one: each trained alone gives what it gives in the trial."""
        return [
            self.model_copy(update={"seeds": 1, "seed": self.seed + i * SEED_STRIDE})
            for i in range(self.seeds)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `TrialSpec(**data)` makes an equal spec."""
        data = self.model_dump(mode="json")
        for field in ("regularizer", "alpha_schedule"):
            data[field] = {"name": getattr(self, field).name, **data[field]}
        return data


def config_hash(spec: dict[str, Any]) -> str:
    """12 hex digits over what decides the numbers of a `TrialSpec.to_dict()`: all but its names."""
    data = {key: value for key, value in spec.items() if key not in ("number", "run", "stage")}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _by_name(value: Any, registry: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    name = fields.pop("name")
    if name not in registry:
        raise ValueError(f"unknown {name!r}; valid: {', '.join(sorted(registry))}")
    return registry[name](**fields)
