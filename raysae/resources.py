"""What a search uses of a machine or cluster, as in the `resources` of a space file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

MOST_TRIALS = 4
"""Trained together unless more are asked for: a sampler that learns from results wants them one
after another, and a GPU that is busy gains nothing from more."""

LEAST_STORE_MEMORY = 80 << 20
"""Ray starts with no less."""


class ResourcesConfig(BaseModel):
    """The worker pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int | None = Field(None, ge=1, description="default: one per CPU core, or per GPU")
    max_workers: int | None = Field(
        None, ge=1, description="on a cluster: as far as the pool grows where nodes join it"
    )
    workers_per_trial: int = Field(1, ge=1, description="above 1: data-parallel")
    workers_per_gpu: int = Field(
        1,
        ge=1,
        description="above 1: so many share a GPU, and one copy of the activations on it; each has "
        "a language model of its own",
    )
    trials_per_pack: int | Literal["auto"] = Field(
        "auto",
        description="trials that a worker trains together, where their shapes agree; auto: 1 on a "
        f"CPU, on a GPU as many as fit in its memory, at most {MOST_TRIALS}",
    )
    threads_per_worker: int = Field(1, ge=1)
    use_gpu: bool | Literal["auto"] = Field(
        False,
        description="auto: where this machine has a GPU, and on a cluster (--address), whose GPUs "
        "are taken",
    )
    store_dtype: Literal["float32", "bfloat16"] = "float32"
    store_memory: int | Literal["auto"] = Field(
        "auto",
        description="bytes of the object store of a Ray that is started here, which shares "
        "activations and evaluation cache between workers; auto: what they need, at least 1 GiB",
    )
    checkpoint_seconds: float = Field(
        10.0, ge=0, description="a trial in flight is saved so often, or less if that takes long"
    )
    worker_timeout: float | None = Field(
        3600.0,
        ge=60,
        description="seconds without any worker after which a search stops, to be resumed; what a "
        "cluster that grows on demand takes to grow must fit in; null: it waits for ever",
    )
    cache: str | None = Field(
        "auto",
        description="folder that keeps activations for the next search; auto: $RAYSAE_CACHE, or "
        "raysae in the user's cache folder; null: none",
    )

    @property
    def on_gpu(self) -> bool:
        """Whether workers have GPUs, once a config is resolved: `use_gpu` is decided then."""
        assert not isinstance(self.use_gpu, str), "auto is decided by `raysae.search.run.resolve`"
        return self.use_gpu

    def gpus_of(self, workers: int) -> int:
        """GPUs that so many workers are on, at least."""
        return -(-workers // self.workers_per_gpu)

    @field_validator("store_memory", mode="before")
    @classmethod
    def _auto_or_bytes(cls, value: Any) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (is_number and value >= LEAST_STORE_MEMORY):
            raise ValueError(
                f"must be auto, or a whole number of bytes of at least {LEAST_STORE_MEMORY:,}, "
                f"got {value!r}"
            )
        return value

    @field_validator("use_gpu", mode="before")
    @classmethod
    def _auto_or_truth(cls, value: Any) -> Any:
        if value != "auto" and not isinstance(value, bool):
            raise ValueError(f"must be true, false or auto, got {value!r}")
        return value

    @field_validator("trials_per_pack", mode="before")
    @classmethod
    def _auto_or_whole(cls, value: Any) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (is_number and value >= 1):
            raise ValueError(f"must be auto, or a whole number of at least 1, got {value!r}")
        return value

    @field_validator("workers_per_gpu")
    @classmethod
    def _one_of_a_trial_on_a_gpu(cls, value: int, info: ValidationInfo) -> int:
        per_trial = info.data.get("workers_per_trial", 1)
        if value > 1 and per_trial > 1:
            raise ValueError(
                f"{value} workers on a GPU, and {per_trial} of them for each trial "
                "(resources.workers_per_trial): data-parallel workers need a GPU each; set "
                "workers_per_gpu to 1 or workers_per_trial to 1"
            )
        return value

    @field_validator("trials_per_pack")
    @classmethod
    def _alone_on_several_workers(
        cls, value: int | Literal["auto"], info: ValidationInfo
    ) -> int | Literal["auto"]:
        per_trial = info.data.get("workers_per_trial", 1)
        if value != "auto" and value > 1 and per_trial > 1:
            raise ValueError(
                f"{value} trials together, and each on {per_trial} workers "
                "(resources.workers_per_trial): data-parallel trials are trained one at a time; "
                "set trials_per_pack to 1 or workers_per_trial to 1"
            )
        return value
