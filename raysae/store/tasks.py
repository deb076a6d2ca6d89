"""What a harvest has computed by Ray: each function is one task, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, wraps
from threading import Timer
from typing import Any, ParamSpec, TypeVar

import numpy as np
import ray

from raysae.imports import imports_without_gc
from raysae.store.cache import Entry
from raysae.store.chunks import Piece, StoreDtype
from raysae.store.entries import CannotWrite, save_evaluation
from raysae.store.files import checksum
from raysae.store.mapped import MappedEvaluation, MappedFile
from raysae.worlds.spec import HubWorld, LocalWorld
from raysae.worlds.world import World, load_world

WorldRef = str | HubWorld | LocalWorld
"""A world by name or description: every process loads it for itself."""

P = ParamSpec("P")
R = TypeVar("R")

TASK_CPUS = 0
"""Of a harvesting task. How many run at a time is said by who submits them; a task that had to wait
for a CPU could not bring back what a lost node held, as the pool holds them all.
"""


KEPT_SECONDS = 60.0
"""For the next piece. A piece that is computed again because a node was lost is followed by none,
and Ray lets idle processes live."""


@lru_cache(maxsize=1)
def _model(ref: WorldRef, device: str, trained_on: bool) -> tuple[World, Any]:
    """World and one of its models, kept by the process so that its next task starts at once."""
    with imports_without_gc():
        import torch

        import raysae.store.activations  # noqa: F401
        from raysae.worlds.model import load_model

    torch.set_num_threads(1)
    world = load_world(ref, checked=True)
    device = device if torch.cuda.is_available() else "cpu"
    return world, load_model(world, device=device, trained_on=trained_on)


def _let_go_of_model() -> None:
    import torch

    _model.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _leaving_no_model(task: Callable[P, R]) -> Callable[P, R]:
    """The task, whose model is let go when it is through: what a worker of the pool needs of a GPU
    must not be held by a process that only waits to be of use."""

    @wraps(task)
    def whole(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return task(*args, **kwargs)
        finally:
            _let_go_of_model()

    return whole


class _Later:
    """Lets go of the model in a while, unless it is wanted again before."""

    def __init__(self) -> None:
        self._timer: Timer | None = None

    def put_off(self, seconds: float | None) -> None:
        """So many seconds from now; None: not at all."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds is not None:
            self._timer = Timer(seconds, _let_go_of_model)
            self._timer.daemon = True
            self._timer.start()


_LATER = _Later()


@ray.remote(num_cpus=TASK_CPUS)
def tokenize(ref: WorldRef) -> tuple[Any, ...]:
    """Number of sequences of each corpus, and then their tokens, which all tasks of a node share.

    The texts are read here alone, in parts; see `raysae.store.texts`.
    """
    with imports_without_gc():
        from raysae.store.activations import corpus_tokens
        from raysae.worlds.model import load_tokenizer

    world = load_world(ref, checked=True)
    tokens = corpus_tokens(world, load_tokenizer(world, trained_on=True))
    return ({name: len(part) for name, part in tokens.items()}, *tokens.values())


@ray.remote(num_cpus=TASK_CPUS)
def harvest_piece(
    ref: WorldRef,
    hook_names: list[str],
    piece: Piece,
    dtype: StoreDtype,
    device: str,
    tokens: np.ndarray,
    last: bool,
) -> tuple[Any, ...]:
    """The device that it ran on and what the driver must know of each hook's chunk, and then the
    activations of each hook.

    After the last piece of its place the model is let go: a worker that measures what is free on
    its GPU, to keep the activations there, would find it taken.
    """
    _LATER.put_off(None)
    _, model = _model(ref, device, True)
    from raysae.store.activations import harvest_chunks

    part = np.array(tokens[piece.start : piece.stop])
    chunks = harvest_chunks(model, part, hook_names, dtype, first=piece.start)
    parts = [
        (
            np.stack([chunk.tokens, chunk.positions]),
            chunk.moments,
            checksum(chunk.activations),
            chunk.activations.nbytes,
        )
        for chunk in chunks
    ]
    device = str(model.cfg.device)
    del model
    if last:
        _let_go_of_model()
    else:
        _LATER.put_off(KEPT_SECONDS)
    return ((device, parts), *(chunk.activations for chunk in chunks))


@ray.remote(num_cpus=TASK_CPUS)
@_leaving_no_model
def known_questions(ref: WorldRef, device: str) -> dict[str, Any]:
    """Ids of the known questions by data set, and what to say of a model that knows too few."""
    from raysae.unlearning import ask_all, default_eval_config

    world, model = _model(ref, device, False)
    answers = ask_all(world, model, default_eval_config(world))
    ids = {name: found.tolist() for name, found in answers.ids().items()}
    return {"ids": ids, "weakness": answers.weakness(world)}


@ray.remote(num_cpus=TASK_CPUS)
@_leaving_no_model
def evaluation_cache(
    ref: WorldRef,
    hook_name: str,
    known: dict[str, tuple[int, ...]] | None,
    device: str,
    entry: Entry | None,
    room: int,
) -> tuple[dict[str, Any], Any]:
    """What scoring needs and does not depend on the SAE: facts of it, and the thing itself.

    Larger than `room` in bytes it is written to its entry, and what is returned says where.

    Args:
        ref: the world.
        hook_name: of the SAEs.
        known: questions, by data set.
        device: of the model.
        entry: of this node's cache, to be mapped from; None: it cannot be.
        room: bytes of the object store that are left for it.
    """
    from raysae.unlearning import build_cache, default_eval_config

    world, model = _model(ref, device, False)
    world = replace(world, known_questions=known)
    cache = build_cache(world, model, hook_name, default_eval_config(world))
    plain = cache.to_plain()
    facts = {"nbytes": cache.nbytes, "written": False, "problem": ""}
    if entry is None or cache.nbytes <= room:
        return facts, plain
    try:
        record = save_evaluation(entry, plain)
    except CannotWrite as error:
        return facts | {"problem": str(error)}, plain
    node = ray.get_runtime_context().get_node_id()
    file = MappedFile(entry.path(record), node, record.checksums)
    return facts | {"written": True}, MappedEvaluation(file, plain[1])
