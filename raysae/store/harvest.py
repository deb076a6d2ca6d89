"""Harvest the residual stream once, by Ray tasks, into read-only chunks; or find it in the cache.

A chunk is what one task returns: a numpy array that every process of a node reads from shared
memory without a copy. Task-made objects can be rebuilt by Ray when a node is lost. What the cache
holds needs no task, no model and no torch: the driver maps the files and puts them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from raysae.imports import imports_without_gc
from raysae.store.cache import Entry, FileRecord, activations_key, evaluation_key, known_key
from raysae.store.chunks import CORPORA, Chunk, Moments, Piece, StoreDtype, add_up, pieces_of
from raysae.store.entries import (
    CannotWrite,
    list_chunks,
    load_chunk,
    load_evaluation,
    save_chunk,
    save_evaluation,
)
from raysae.store.files import CorruptFileError, checksum
from raysae.store.handle import HeldChunk, StoreHandle
from raysae.store.tiers import choose_tier, human
from raysae.worlds.spec import HubWorld, LocalWorld
from raysae.worlds.world import World, load_world

WorldRef = str | HubWorld | LocalWorld
"""A world by name or description: every process loads it for itself."""

SEQUENCES_PER_CHUNK = 512
CHUNK_BYTES = 64 << 20
"""Longer sequences make chunks of fewer of them."""
TASK_CPUS = 0
"""Of a harvesting task. How many run at a time is said by who submits them; a task that had to wait
for a CPU could not bring back what a lost node held, as the pool holds them all.
"""


class StoreFullError(Exception):
    """The activations fit neither into shared memory nor on the disk that Ray spills to."""


class WeakModelError(Exception):
    """The model knows too few of the questions for any score to mean something."""


@dataclass
class _Held:
    """A chunk in its place, with what its store and its file in the cache need to know."""

    chunk: HeldChunk
    moments: Moments
    nbytes: int
    record: FileRecord | None  # None: not written to the cache


class Harvest:
    """The stores of one world, by hook point, and what is still to be done for them.

    `lines` say what happened: where the activations came from, where they lie, what was damaged.
    """

    def __init__(
        self,
        world: WorldRef,
        hook_names: Sequence[str],
        dtype: StoreDtype,
        cache: Path | None,
        device: str,
    ) -> None:
        self.stores: dict[str, StoreHandle] = {}
        self.lines: list[str] = []
        self._ref, self._device = world, device
        self._world = load_world(world)
        self._hook_names, self._dtype, self._cache = tuple(hook_names), dtype, cache
        self._entries = {
            name: Entry.at(cache, "activations", activations_key(self._world, name, dtype))
            for name in hook_names
            if cache is not None
        }
        self._tokens: list[ObjectRef] = []
        self._pieces: list[Piece] = []
        self._held: dict[tuple[str, Piece], _Held] = {}
        self._made: dict[Piece, list[str]] = {}  # hooks at which a piece was not in the cache
        self._computing: dict[
            str, tuple[ObjectRef, ObjectRef]
        ] = {}  # evaluation caches not in the cache
        self._on_disk = False

    def finish(self) -> list[str]:
        """Wait for what is still being computed, and write it to the cache.

        A cache that cannot be written costs the next search its head start and this one nothing.

        Returns:
            lines for the user.

        Raises:
            Exception: what the task of an evaluation cache raised.
        """
        lines: list[str] = []
        for name, entry in self._entries.items():
            if any(name in names for names in self._made.values()):
                lines.append(self._save(name, entry))
        for name, (ready, result) in self._computing.items():
            ray.get(ready)
            if self._cache is not None:
                entry = self._evaluation_entry(self._cache, name)
                try:
                    save_evaluation(entry, ray.get(result))
                except CannotWrite as error:
                    lines.append(_unwritten(entry, error))
        return lines

    def fill(self, tasks_at_a_time: int) -> None:
        """Find every piece of both corpora at every hook in the cache, or have it computed."""
        started = time.perf_counter()
        listed = {name: self._listed(entry) for name, entry in self._entries.items()}
        self._pieces = next((list(files) for files in listed.values() if files), [])
        if not self._pieces:
            self._pieces = pieces_of(ray.get(self._tokenized()[0]), self._sequences_per_chunk())
        self._on_disk, where = self._choose_tier()
        for piece in self._pieces:
            for name in self._hook_names:
                record = listed.get(name, {}).get(piece)
                if record is None or not self._load(name, piece, record):
                    self._made.setdefault(piece, []).append(name)
        self._compute(tasks_at_a_time)
        seconds = time.perf_counter() - started
        for name in self._hook_names:
            store = self.stores[name] = self._handle(name)
            made = sum(name in names for names in self._made.values())
            source = f"{made} of {len(self._pieces)} chunks harvested" if made else "from the cache"
            self.lines.append(
                f"store: {store.rows:,} rows of {self._dtype} at {name}, {human(store.nbytes)} "
                f"{where}; {source} in {seconds:.1f} s"
            )

    def _tokenized(self) -> list[ObjectRef]:
        """Of the number of sequences of each corpus, and of the tokens of each of `CORPORA`."""
        if not self._tokens:
            task: Any = _tokenize.options(num_returns=1 + len(CORPORA))
            self._tokens = task.remote(self._ref)
        return self._tokens

    def find_known(self) -> None:
        """Find which questions the model knows, in the cache or by asking it; before anything is
        trained, because a model that knows too few makes every score meaningless.

        Raises:
            WeakModelError: it does; the message says what can be done.
        """
        if self._world.known_questions is not None:
            return
        started = time.perf_counter()
        entry = None
        facts: dict[str, Any] | None = None
        if self._cache is not None:
            entry = Entry.at(self._cache, "known", known_key(self._world))
            try:
                facts = (entry.read() or (None, None))[1]
            except CorruptFileError as error:
                self.lines.append(f"cache: {error}; asking the model again")
        source = "from the cache"
        if facts is None:
            facts = ray.get(_known_questions.remote(self._ref, self._device))
            source = f"asked in {time.perf_counter() - started:.1f} s"
            if entry is not None:
                try:
                    entry.publish([], facts)
                except CannotWrite as error:
                    self.lines.append(_unwritten(entry, error))
        if facts["weakness"]:
            raise WeakModelError(facts["weakness"])
        known = {name: tuple(ids) for name, ids in facts["ids"].items()}
        n = self._world.permutations
        orders = f"{n} orders" if n > 1 else "one order"
        self._world = replace(self._world, known_questions=known)
        self.lines.append(
            f"known questions: {', '.join(f'{name} {len(ids)}' for name, ids in known.items())}; "
            f"right under {orders} of the choices, {source}"
        )

    def find_evaluations(self) -> None:
        """Find the evaluation cache of every hook, or begin to compute it."""
        for name, store in self.stores.items():
            found = None
            if self._cache is not None:
                try:
                    found = load_evaluation(self._evaluation_entry(self._cache, name))
                except CorruptFileError as error:
                    self.lines.append(f"cache: {error}; computing it again")
            if found is not None:
                ref = ray.put(found)
            else:
                task: Any = _evaluation_cache.options(num_returns=2)
                ready, ref = task.remote(self._ref, name, self._world.known_questions, self._device)
                self._computing[name] = ready, ref
            self.stores[name] = store.with_evaluation_cache(ref)

    def _evaluation_entry(self, cache: Path, hook_name: str) -> Entry:
        return Entry.at(cache, "evaluation", evaluation_key(self._world, hook_name))

    def _sequences_per_chunk(self) -> int:
        width = self._world.d_model * (2 if self._dtype == "bfloat16" else 4)
        return max(1, min(SEQUENCES_PER_CHUNK, CHUNK_BYTES // (width * self._world.seq_len)))

    def _choose_tier(self) -> tuple[bool, str]:
        width = self._world.d_model * (2 if self._dtype == "bfloat16" else 4)
        tokens = self._world.seq_len * sum(piece.stop - piece.start for piece in self._pieces)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return choose_tier(
            len(self._hook_names) * tokens * width,
            min(int(node["Resources"].get("object_store_memory", 0)) for node in nodes),
            disk=self._cache is not None,
            one_node=len(nodes) == 1,
        )

    def _listed(self, entry: Entry) -> dict[Piece, FileRecord]:
        try:
            return list_chunks(entry)
        except CorruptFileError as error:
            self.lines.append(f"cache: {error}; harvesting again")
            return {}

    def _load(self, hook_name: str, piece: Piece, record: FileRecord) -> bool:
        """Hold a chunk of the cache; False, and a line, when it is damaged."""
        entry = self._entries[hook_name]
        try:
            chunk = load_chunk(entry, record)
        except CorruptFileError as error:
            self.lines.append(f"cache: {error}; harvesting it again")
            return False
        acts = chunk.activations
        place = entry.path(record) if self._on_disk else ray.put(acts)
        origin = ray.put(np.stack([chunk.tokens, chunk.positions]))
        self._held[hook_name, piece] = _Held(
            HeldChunk(place, origin, record.checksums["activations"]),
            replace(chunk.moments, x=chunk.moments.x.copy()),  # or the file would stay mapped
            acts.nbytes,
            record,
        )
        return True

    def _compute(self, tasks_at_a_time: int) -> None:
        """Run the tasks of all pieces that the cache did not have, in their order."""
        waiting = deque(self._made.items())
        running: deque[tuple[Piece, list[str], list[ObjectRef]]] = deque()
        while waiting or running:
            while waiting and len(running) < tasks_at_a_time:
                piece, names = waiting.popleft()
                task: Any = _harvest_piece.options(num_returns=1 + len(names))
                tokens = self._tokenized()[1 + CORPORA.index(piece.corpus)]
                refs = task.remote(self._ref, names, piece, self._dtype, self._device, tokens)
                running.append((piece, names, refs))
            piece, names, (rest, *refs) = running.popleft()
            # The chunks are looked at, too: one that found no room is an error of its own.
            described, *_ = ray.get([rest, *refs])
            for name, ref, (origin, moments, sha256, nbytes) in zip(
                names, refs, described, strict=True
            ):
                held = HeldChunk(ref, ray.put(origin), sha256)
                self._held[name, piece] = _Held(held, moments, nbytes, None)
                if self._on_disk:
                    self._move_to_disk(name, piece)

    def _move_to_disk(self, hook_name: str, piece: Piece) -> None:
        """Let go of a chunk's place in the object store; it stays there if it cannot be written."""
        entry, held = self._entries[hook_name], self._held[hook_name, piece]
        try:
            record = self._write(entry, piece, held)
        except CannotWrite as error:
            self.lines.append(_unwritten(entry, error))
            return
        chunk = replace(held.chunk, place=entry.path(record))
        self._held[hook_name, piece] = replace(held, chunk=chunk, record=record)

    def _write(self, entry: Entry, piece: Piece, held: _Held) -> FileRecord:
        tokens, positions = ray.get(held.chunk.origin)
        assert not isinstance(held.chunk.place, Path), "a mapped chunk has been written"
        chunk = Chunk(ray.get(held.chunk.place), tokens, positions, held.moments)
        return save_chunk(entry, piece, chunk, self._dtype)

    def _handle(self, hook_name: str) -> StoreHandle:
        held = [self._held[hook_name, piece] for piece in self._pieces]
        corpora = [piece.corpus for piece in self._pieces]
        rows = [int(part.moments.rows) for part in held]
        return StoreHandle(
            chunks=tuple(part.chunk for part in held),
            is_forget=np.repeat([name == CORPORA[0] for name in corpora], rows),
            moments=add_up(corpora, [part.moments for part in held]),
            evaluation_cache=None,
            nbytes=sum(part.nbytes for part in held),
            known_questions=self._world.known_questions,
        )

    def _save(self, hook_name: str, entry: Entry) -> str:
        """Write the chunks that are not in the cache, and the manifest of all; a line of it."""
        started = time.perf_counter()
        records = []
        try:
            for piece in self._pieces:
                held = self._held[hook_name, piece]
                records.append(held.record or self._write(entry, piece, held))
            entry.publish(records, {})
        except CannotWrite as error:
            return _unwritten(entry, error)
        seconds = time.perf_counter() - started
        return f"cache: store of {hook_name} written to {entry.folder} in {seconds:.1f} s"


def harvest(
    world: WorldRef,
    hook_names: Sequence[str],
    dtype: StoreDtype,
    *,
    evaluation_cache: bool,
    tasks_at_a_time: int = 1,
    cache: Path | None = None,
    device: str = "cpu",
) -> Harvest:
    """Fill the stores, from the cache or by tasks, and return as soon as batches can be had.

    Which questions the model knows is found first, where the world does not say.

    The evaluation cache may still be on its way, so that training begins without it: call `finish`
    on what is returned.

    Args:
        world: as in `raysae.worlds.load_world`.
        hook_names: e.g. ["blocks.0.hook_resid_post"]; the model runs once for all of them.
        dtype: of the chunks.
        evaluation_cache: whether to compute what the cached evaluator needs, too.
        tasks_at_a_time: no more, or they would take the CPUs that the starting pool waits for.
        cache: folder in which to look first, and to write to; None for no cache.
        device: of the tasks; "cuda" is the CPU where there is no GPU.

    Raises:
        StoreFullError: there is no room for the activations.
        WeakModelError: the model knows too few questions.
    """
    result = Harvest(world, hook_names, dtype, cache, device)
    with _clear_when_full():
        result.find_known()
        result.fill(tasks_at_a_time)
        if evaluation_cache:
            result.find_evaluations()
    return result


@contextmanager
def _clear_when_full() -> Iterator[None]:
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        memory = sum(node["Resources"].get("object_store_memory", 0) for node in ray.nodes())
        kind = "object store" if isinstance(error, ObjectStoreFullError) else "disk it spills to"
        raise StoreFullError(
            f"the activations do not fit: Ray's object store has {human(memory)} and the {kind} is "
            "full; take fewer or shorter texts or resources.store_dtype=bfloat16, or give Ray more "
            "memory or disk"
        ) from error


def _unwritten(entry: Entry, error: Exception) -> str:
    return (
        f"cache: {entry.folder} cannot be written ({error}); this search goes on without it, and "
        "the next one harvests again"
    )


@lru_cache(maxsize=1)
def _model(ref: WorldRef, device: str, trained_on: bool) -> tuple[World, Any]:
    """World and one of its models, kept by the process so that its next task starts at once."""
    with imports_without_gc():
        import torch

        import raysae.store.activations  # noqa: F401
        from raysae.worlds.model import load_model

    torch.set_num_threads(1)
    world = load_world(ref)
    device = device if torch.cuda.is_available() else "cpu"
    return world, load_model(world, device=device, trained_on=trained_on)


@ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="SPREAD")
def _tokenize(ref: WorldRef) -> tuple[Any, ...]:
    """Number of sequences of each corpus, and then their tokens, which all tasks of a node share.

    The texts are read here alone, in parts; see `raysae.store.texts`.
    """
    world, model = _model(ref, "cpu", True)
    from raysae.store.activations import corpus_tokens

    tokens = corpus_tokens(world, model)
    return ({name: len(part) for name, part in tokens.items()}, *tokens.values())


@ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="SPREAD")
def _harvest_piece(
    ref: WorldRef,
    hook_names: list[str],
    piece: Piece,
    dtype: StoreDtype,
    device: str,
    tokens: np.ndarray,
) -> tuple[Any, ...]:
    """What the driver must know of each hook's chunk, and then the activations of each hook."""
    _, model = _model(ref, device, True)
    from raysae.store.activations import harvest_chunks

    part = np.array(tokens[piece.start : piece.stop])
    chunks = harvest_chunks(model, part, hook_names, dtype, first=piece.start)
    rest = [
        (
            np.stack([chunk.tokens, chunk.positions]),
            chunk.moments,
            checksum(chunk.activations),
            chunk.activations.nbytes,
        )
        for chunk in chunks
    ]
    return (rest, *(chunk.activations for chunk in chunks))


@ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="SPREAD")
def _known_questions(ref: WorldRef, device: str) -> dict[str, Any]:
    """Ids of the known questions by data set, and what to say of a model that knows too few."""
    from raysae.unlearning import ask_all, default_eval_config

    world, model = _model(ref, device, False)
    answers = ask_all(world, model, default_eval_config(world))
    ids = {name: found.tolist() for name, found in answers.ids().items()}
    return {"ids": ids, "weakness": answers.weakness(world)}


@ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="SPREAD")
def _evaluation_cache(
    ref: WorldRef, hook_name: str, known: dict[str, tuple[int, ...]] | None, device: str
) -> tuple[bool, Any]:
    """True, and what scoring needs and does not depend on the SAE, as arrays and facts."""
    from raysae.unlearning import build_cache, default_eval_config

    world, model = _model(ref, device, False)
    world = replace(world, known_questions=known)
    return True, build_cache(world, model, hook_name, default_eval_config(world)).to_plain()
