"""What the broker knows of a trial, and how it learns it again from the journal."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

ENDED = ("finished", "stopped", "failed")


class HaltedError(Exception):
    """What happened could not be recorded: the search stops, to be resumed later."""


@dataclass
class Job:
    """One trial.

    dormant → waiting → running → finished, stopped or failed. Dormant is a trial that no client of
    this session has asked for; one whose worker died is waiting again.
    """

    number: int
    spec: dict[str, Any]
    state: str = "dormant"
    worker: int | None = None
    generation: str = ""
    """Of the worker, see `BrokerState.register`."""
    attempt: int = 0
    """Times that a worker has taken it since it last got further; those that ended for what was not
    its worker's death do not count."""
    alone: bool = False
    """Whether no other trial was in flight when it was last taken. A broker that is started again
    does not know what has been since: False then."""
    worker_died: bool = False
    """And not only was restarted, since it was last taken."""
    attempts: int = 0
    pack: int | None = None
    """The first of the trials that it was last handed out with, itself perhaps; None: never."""
    furthest: int = 0
    """Tokens."""
    proceeded: int = 0
    """Tokens of the last rung after which it may train on."""
    submitted: float = field(default_factory=time.time)
    started: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    """Last row of the training curve."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the curve, for observers: since this broker began, repeated where a worker was lost."""
    rung: dict[str, Any] = field(default_factory=dict)
    """Last scored one."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    @property
    def undecided(self) -> bool:
        """Whether a rung waits for the client's word."""
        return int(self.rung.get("tokens", 0)) > self.proceeded

    @property
    def fully_trained(self) -> bool:
        """Whether its last rung is recorded: whatever comes then, it has finished."""
        return bool(self.rung.get("last"))

    @property
    def end_is_missing(self) -> bool:
        """Whether a crash came between the record of the last rung and that of the end."""
        return self.fully_trained and self.state not in ENDED

    def can_join(self, other: Job) -> bool:
        """Whether one worker may train both together.

        One that was trained before has a checkpoint, at the position of those beside it then.
        """
        return self.pack == other.pack and _steps(self.spec) == _steps(other.spec)

    def snapshot(self) -> dict[str, Any]:
        """For observers: state, spec, last row and last rung."""
        return {
            "number": self.number,
            "state": self.state,
            "spec": self.spec,
            "error": self.error,
            "started": self.started,
            "rung": {k: self.rung.get(k) for k in ("score", "status", "tokens", "l0")},
            **self.progress,
        }


def _steps(spec: dict[str, Any]) -> tuple[Any, ...]:
    """What trials must have in common to share their steps, see `raysae.training.loop.train`."""
    sae, training = spec["sae"], spec["training"]
    widths = sae["matryoshka_widths"]
    shapes = (sae["architecture"], sae["d_sae"], widths and tuple(widths))
    how = (training["batch_size"], training["step"], training["autocast"], training["tf32"])
    return (*shapes, *how, tuple(spec["rungs"]))


def end_record(job: Job, state: str) -> dict[str, Any]:
    """The journal's record of the end of a trial."""
    return {
        "event": "end",
        "trial": job.number,
        "time": time.time(),
        "state": state,
        "spec": job.spec,
        "error": job.error,
        "attempts": job.attempts,
        "worker": job.worker,
        "submitted": job.submitted,
        "started": job.started,
        "ended": time.time(),
        "rung": job.rung,
        "curve": job.curve,
    }


def replay(records: list[dict[str, Any]], session: str) -> dict[int, Job]:
    """The trials as the journal leaves them, by number.

    Of those that have not ended, the ones that a client of this session asked for are running or
    waiting still; those of an earlier session are dormant.
    """
    jobs: dict[int, Job] = {}
    for record in records:
        event, number = record["event"], record.get("trial")
        if number is None:
            continue
        fields = {k: v for k, v in record.items() if k not in ("event", "trial", "time")}
        if event == "submit":
            job = jobs.setdefault(number, Job(number, fields["spec"], submitted=record["time"]))
            job.state = "waiting" if fields["session"] == session else "dormant"
            job.worker, job.attempt = None, 0
            continue
        job = jobs.setdefault(number, Job(number, fields.get("spec", {})))
        if event == "start":
            job.state = "running" if job.state == "waiting" else job.state
            job.worker, job.generation = fields["worker"], fields["generation"]
            job.attempt, job.attempts = fields["attempt"], job.attempts + 1
            job.pack = fields.get("pack", number)
            job.started = job.started or record["time"]
        elif event == "rung":
            job.curve = fields.pop("curve")
            job.rung = fields
            job.progress = _figures(job.rung)
        elif event == "proceed":
            job.proceeded = fields["tokens"]
        elif event == "end" and job.state not in ENDED:
            job.state, job.error, job.spec = fields["state"], fields["error"], fields["spec"]
            job.rung, job.curve = fields["rung"], fields["curve"]
            job.progress = _figures(job.rung)
    return jobs


def _figures(rung: dict[str, Any]) -> dict[str, Any]:
    """What a rung says of the training, as a row of the curve."""
    row = {key: rung[key] for key in ("step", "tokens") if key in rung}
    return {**row, **rung.get("metrics", {})}
