"""Harvest the residual stream once, by Ray tasks, into read-only chunks; or find it in the cache.

A chunk is what one task returns: a numpy array that every process of a node reads from shared
memory without a copy. Task-made objects can be rebuilt by Ray when a node is lost. What the cache
holds needs no task, no model and no torch: the driver maps the files and puts them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from raysae.store import tasks
from raysae.store.cache import Entry, FileRecord, activations_key, evaluation_key, known_key
from raysae.store.checked import has_been_checked
from raysae.store.chunks import CORPORA, Chunk, Moments, Piece, StoreDtype, add_up, pieces_of
from raysae.store.entries import (
    CannotWrite,
    PlainCache,
    list_chunks,
    load_chunk,
    load_evaluation,
    save_chunk,
    save_evaluation,
)
from raysae.store.files import CorruptFileError, cores
from raysae.store.handle import HeldChunk, StoreHandle
from raysae.store.mapped import MappedEvaluation, MappedFile
from raysae.store.places import ANYWHERE, Place
from raysae.store.tasks import WorldRef
from raysae.store.tiers import choose_tier, human, room_in_store
from raysae.worlds.world import load_world

SEQUENCES_PER_CHUNK = 512
CHUNK_BYTES = 64 << 20
"""Longer sequences make chunks of fewer of them."""


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


@dataclass(frozen=True)
class _Computing:
    """An evaluation cache on its way, as `tasks.evaluation_cache` returns it."""

    facts: ObjectRef
    result: ObjectRef
    started: float


class Harvest:
    """The stores of one world, by hook point, and what is still to be done for them.

    `lines` say what happened: where the activations came from, where they lie, what was damaged;
    `sources`, by hook point, the first of these alone.
    """

    def __init__(
        self,
        world: WorldRef,
        hook_names: Sequence[str],
        dtype: StoreDtype,
        cache: Path | None,
        places: Sequence[Place],
    ) -> None:
        self.stores: dict[str, StoreHandle] = {}
        self.lines: list[str] = []
        self.sources: dict[str, str] = {}
        self._ref, self._places = world, places
        self._world = load_world(world, checked=True)
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
        self._computing: dict[str, _Computing] = {}  # evaluation caches not in the cache
        self._devices = set[str]()  # that tasks have run on
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
        for name, computing in self._computing.items():
            lines += self._finish_evaluation(name, computing)
        return lines

    def _finish_evaluation(self, hook_name: str, computing: _Computing) -> Iterator[str]:
        facts = ray.get(computing.facts)
        _, where = self._evaluation_tier(facts["nbytes"], disk=facts["written"])
        seconds = time.perf_counter() - computing.started
        yield f"evaluation cache: {where}; computed in {seconds:.1f} s"
        if self._cache is None or facts["written"]:
            return
        entry, problem = self._evaluation_entry(self._cache, hook_name), facts["problem"]
        if not problem:
            try:
                save_evaluation(entry, ray.get(computing.result))
            except CannotWrite as error:
                problem = str(error)
        if problem:
            yield _unwritten(entry, problem)

    def fill(self) -> None:
        """Find every piece of both corpora at every hook in the cache, or have it computed."""
        started = time.perf_counter()
        listed = {name: self._listed(entry) for name, entry in self._entries.items()}
        self._pieces = next((list(files) for files in listed.values() if files), [])
        if not self._pieces:
            self._pieces = pieces_of(ray.get(self._tokenized()[0]), self._sequences_per_chunk())
        self._on_disk, where = self._choose_tier()
        with ThreadPoolExecutor(cores(), "checksum") as threads:
            found = {
                (name, piece): threads.submit(load_chunk, self._entries[name], files[piece])
                for piece in self._pieces
                for name, files in listed.items()
                if piece in files
            }
            for piece in self._pieces:
                for name in self._hook_names:
                    chunk = found.pop((name, piece), None)
                    if chunk is None or not self._load(name, piece, listed[name][piece], chunk):
                        self._made.setdefault(piece, []).append(name)
        self._compute()
        seconds = time.perf_counter() - started
        for name in self._hook_names:
            store = self.stores[name] = self._handle(name)
            made = sum(name in names for names in self._made.values())
            source = "from the cache"
            if made:
                source = f"{made} of {len(self._pieces)} chunks harvested, {self._how()}"
            self.sources[name] = source
            self.lines.append(
                f"store: {store.rows:,} rows of {self._dtype} at {name}, {human(store.nbytes)} "
                f"{where}; {source}{',' if made else ''} in {seconds:.1f} s"
            )

    def _how(self) -> str:
        return f"{len(self._places)} at a time on {' and '.join(sorted(self._devices))}"

    def _tokenized(self) -> list[ObjectRef]:
        """Of the number of sequences of each corpus, and of the tokens of each of `CORPORA`."""
        if not self._tokens:
            options = self._places[0].options() | {"num_returns": 1 + len(CORPORA)}
            task: Any = tasks.tokenize.options(**options)
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
            place = self._places[0]
            task: Any = tasks.known_questions.options(**place.options())
            facts = ray.get(task.remote(self._ref, place.device))
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
                entry = self._evaluation_entry(self._cache, name)
                try:
                    found = load_evaluation(entry)
                except CorruptFileError as error:
                    self.lines.append(f"cache: {error}; computing it again")
            ref = self._compute_evaluation(name) if found is None else self._place(entry, *found)
            self.stores[name] = store.with_evaluation_cache(ref)

    def _place(self, entry: Entry, record: FileRecord, cache: PlainCache) -> ObjectRef:
        """An evaluation cache that was found, for all workers."""
        arrays, facts = cache
        nbytes = sum(array.nbytes for array in arrays.values())
        on_disk, where = self._evaluation_tier(nbytes, disk=True)
        self.lines.append(f"evaluation cache: {where}; from the cache")
        if not on_disk:
            return ray.put(cache)
        node = ray.get_runtime_context().get_node_id()
        has_been_checked(entry.path(record), record.checksums)
        file = MappedFile(entry.path(record), node, record.checksums)
        return ray.put(MappedEvaluation(file, facts))

    def _compute_evaluation(self, hook_name: str) -> ObjectRef:
        """Where there is a place on this machine there, so that it can be written to the cache by
        its task and need not pass through the object store.
        """
        here = [place for place in self._places if _is_here(place)]
        place = here[0] if here else self._places[0]
        entry = None
        if self._cache is not None and here:
            entry = self._evaluation_entry(self._cache, hook_name)
        task: Any = tasks.evaluation_cache.options(**place.options() | {"num_returns": 2})
        room = room_in_store(_store_memory(), self._in_store())
        known = self._world.known_questions
        started = time.perf_counter()
        refs: list[ObjectRef] = task.remote(self._ref, hook_name, known, place.device, entry, room)
        facts, ref = refs
        self._computing[hook_name] = _Computing(facts, ref, started)
        return ref

    def _evaluation_tier(self, nbytes: int, *, disk: bool) -> tuple[bool, str]:
        # A node that lacks the file is sent it: it may be mapped on any number of nodes.
        return choose_tier(
            nbytes, _store_memory(), disk=disk, one_node=True, taken=self._in_store()
        )

    def _in_store(self) -> int:
        """Bytes of the object store that the chunks take."""
        if self._on_disk:
            return 0
        return sum(held.nbytes for held in self._held.values())

    def _evaluation_entry(self, cache: Path, hook_name: str) -> Entry:
        return Entry.at(cache, "evaluation", evaluation_key(self._world, hook_name))

    def _sequences_per_chunk(self) -> int:
        width = self._world.d_model * (2 if self._dtype == "bfloat16" else 4)
        return max(1, min(SEQUENCES_PER_CHUNK, CHUNK_BYTES // (width * self._world.seq_len)))

    def _choose_tier(self) -> tuple[bool, str]:
        width = self._world.d_model * (2 if self._dtype == "bfloat16" else 4)
        tokens = self._world.seq_len * sum(piece.stop - piece.start for piece in self._pieces)
        return choose_tier(
            len(self._hook_names) * tokens * width,
            _store_memory(),
            disk=self._cache is not None,
            one_node=len(_nodes()) == 1,
        )

    def _listed(self, entry: Entry) -> dict[Piece, FileRecord]:
        try:
            return list_chunks(entry)
        except CorruptFileError as error:
            self.lines.append(f"cache: {error}; harvesting again")
            return {}

    def _load(
        self, hook_name: str, piece: Piece, record: FileRecord, loaded: Future[Chunk]
    ) -> bool:
        """Hold a chunk of the cache; False, and a line, when it is damaged."""
        entry = self._entries[hook_name]
        try:
            chunk = loaded.result()
        except CorruptFileError as error:
            self.lines.append(f"cache: {error}; harvesting it again")
            return False
        acts, sha256 = chunk.activations, record.checksums["activations"]
        place: Path | ObjectRef = entry.path(record)
        if self._on_disk:
            has_been_checked(entry.path(record), {"activations": sha256})
        else:
            place = ray.put(acts)
        origin = ray.put(np.stack([chunk.tokens, chunk.positions]))
        self._held[hook_name, piece] = _Held(
            HeldChunk(place, origin, sha256),
            replace(chunk.moments, x=chunk.moments.x.copy()),  # or the file would stay mapped
            acts.nbytes,
            record,
        )
        return True

    def _compute(self) -> None:
        """Run the tasks of all pieces that the cache did not have, in their order."""
        places, pieces = self._places, list(self._made.items())
        waiting = deque(enumerate(pieces))
        running: deque[tuple[Piece, list[str], list[ObjectRef]]] = deque()
        while waiting or running:
            # The place of a piece is the one that the oldest task has just left.
            while waiting and len(running) < len(places):
                i, (piece, names) = waiting.popleft()
                place, last = places[i % len(places)], i + len(places) >= len(pieces)
                options = place.options() | {"num_returns": 1 + len(names)}
                task: Any = tasks.harvest_piece.options(**options)
                tokens = self._tokenized()[1 + CORPORA.index(piece.corpus)]
                refs = task.remote(self._ref, names, piece, self._dtype, place.device, tokens, last)
                running.append((piece, names, refs))
            piece, names, (rest, *refs) = running.popleft()
            # The chunks are looked at, too: one that found no room is an error of its own.
            described, *_ = ray.get([rest, *refs])
            device, parts = described
            self._devices.add(device)
            for name, ref, (origin, moments, sha256, nbytes) in zip(
                names, refs, parts, strict=True
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
    cache: Path | None = None,
    places: Sequence[Place] = (ANYWHERE,),
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
        cache: folder in which to look first, and to write to; None for no cache.
        places: of the tasks, one at a time in each.

    Raises:
        StoreFullError: there is no room for the activations.
        WeakModelError: the model knows too few questions.
    """
    result = Harvest(world, hook_names, dtype, cache, places)
    with _clear_when_full():
        result.find_known()
        result.fill()
        if evaluation_cache:
            result.find_evaluations()
    return result


@contextmanager
def _clear_when_full() -> Iterator[None]:
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        memory = sum(node["Resources"].get("object_store_memory", 0) for node in _nodes())
        kind = "object store" if isinstance(error, ObjectStoreFullError) else "disk it spills to"
        raise StoreFullError(
            f"the activations do not fit: Ray's object store has {human(memory)} and the {kind} is "
            "full; take fewer or shorter texts or resources.store_dtype=bfloat16, or give Ray more "
            "memory or disk"
        ) from error


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _is_here(place: Place) -> bool:
    """Whether tasks of the place surely run on this process's node."""
    if place.node is None:
        return len(_nodes()) == 1
    return place.node == str(ray.get_runtime_context().get_node_id())


def _store_memory() -> int:
    """Bytes of the object store of the node that has least."""
    return min(int(node["Resources"].get("object_store_memory", 0)) for node in _nodes())


def _unwritten(entry: Entry, error: Exception | str) -> str:
    return (
        f"cache: {entry.folder} cannot be written ({error}); this search goes on without it, and "
        "the next one harvests again"
    )
