"""`--plan`: what a search will do and need, before anything is started or fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil

from raysae.config import RunConfig
from raysae.errors import UserError
from raysae.search.cards import on_cards
from raysae.search.cluster import Gpu, NodeRoom, Plan, imagine, list_gpus, look
from raysae.search.estimate import Estimate, estimate
from raysae.search.fit import batch_misfit
from raysae.search.room import (
    describe_pack,
    logits_bytes,
    memory_of_sae,
    model_memory,
    most_seeds,
    room_on_gpu,
)
from raysae.search.sizes import CorpusSize, StoreSize, corpus_size, element_size, store_size
from raysae.store.cache import MANIFEST, Entry, activations_key, cache_folder
from raysae.store.tiers import DEVICE_SHARE, choose_tier, human, room_in_store
from raysae.worlds.presets import shape_of
from raysae.worlds.spec import HubWorld, LocalWorld
from raysae.worlds.world import World, load_world

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
PROCESS_BYTES = 900 << 20
"""Of a worker that has imported torch and what stands on it, without model and SAE."""


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    store: StoreSize | None
    """None: the corpora are not on this machine."""
    model: int
    """0 where it is not known."""
    worker: int
    """A worker in host memory, its model on a GPU or not."""
    gpu: int
    """Of a worker on its GPU, without a copy of the store."""
    asking: int | None
    """Of a GPU while the model is asked what it knows, before any training: a model beside those of
    the workers, and its logits. None: not known; 0: it is not asked."""
    run_folder: int


def describe_plan(
    config: RunConfig, address: str | None = None, run_dir: Path | None = None
) -> list[str]:
    """The plan in lines: trials, model, training, memory by tier and node, time, what is short.

    Args:
        config: as from `resolve`.
        address: Ray cluster that would be joined; None for this machine.
        run_dir: folder that would be written to; None: one in `runs`.

    Raises:
        UserError: it cannot run; the message says what to set.
    """
    not_here, world = "", _world_here(config.world)
    try:
        plan, nodes = look(config, address, world)
    except UserError as error:
        if address is not None or list_gpus() or not config.resources.on_gpu:
            raise
        not_here = str(error)  # of a machine with a GPU a plan is worth having on any other
        plan, nodes = imagine(config, world)
    size = None if world is None else corpus_size(world)
    if size is not None:
        misfit = batch_misfit(config, size.forget_rows, size.rows - size.forget_rows, "about ")
        if misfit:
            raise UserError(misfit)
    needs = _needs(config, size, world, plan)
    gpus = list_gpus()
    cores = len(os.sched_getaffinity(0))
    here = plan.workers if address is None else ceil(plan.workers / len(nodes))
    lines = [*_what(config, plan), *_corpora(size)]
    lines += _memory(config, plan, nodes, needs, gpus, here)
    if not_here:
        return [*lines, f"this machine {cores} cores, no GPU", f"not here     {not_here}"]
    found = estimate(
        config,
        shape_of(config.world),
        world,
        size,
        workers=plan.workers,
        trials_per_pack=plan.trials_per_pack,
        workers_here=here,
        cores=cores,
        harvested=world is not None and _harvested(config, world),
    )
    lines += [*_time(config, plan, found), f"this machine {cores} cores, {_names(gpus)}"]
    return lines + [
        f"short of     {line}" for line in _short(config, plan, nodes, needs, gpus, cores, run_dir)
    ]


def shortages(config: RunConfig, world: World, run_dir: Path | None = None) -> list[str]:
    """What a search of this machine's own will be short of, and the setting to change, a line each.
    Its folder is `run_dir`, or one in `runs`.

    As far as it can be said at once: without the size of the corpora.

    Raises:
        UserError: it cannot run.
    """
    plan, nodes = look(config, None, world)
    cores = len(os.sched_getaffinity(0))
    needs = _needs(config, None, world, plan)
    return list(_short(config, plan, nodes, needs, list_gpus(), cores, run_dir))


def _world_here(world: str | HubWorld | LocalWorld) -> World | None:
    """The world, where all of it is on this machine already: a plan fetches nothing."""
    before = {variable: os.environ.get(variable) for variable in OFFLINE}
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        return load_world(world)
    except (ConnectionError, FileNotFoundError, UserError):
        return None
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


def _harvested(config: RunConfig, world: World) -> bool:
    cache = cache_folder(config.resources.cache)
    assert config.hook is not None
    key = activations_key(world, config.hook, config.resources.store_dtype)
    return cache is not None and (Entry.at(cache, "activations", key).folder / MANIFEST).is_file()


def _needs(config: RunConfig, size: CorpusSize | None, world: World | None, plan: Plan) -> Needs:
    sae, seeds = memory_of_sae(config), most_seeds(config)
    model = model_memory(config, world) or 0
    training = (
        plan.trials_per_pack * seeds * sae.total + 4 * config.extremes("sae", "d_sae")[1] ** 2
    )
    return Needs(
        store=None if size is None or world is None else store_size(config, world, size),
        model=model,
        worker=PROCESS_BYTES + (0 if config.resources.on_gpu else model + training),
        gpu=model + training if config.resources.on_gpu else 0,
        asking=_asking(config, size, world, model),
        # Every trial's SAE, and checkpoints of those in flight.
        run_folder=sae.weights * seeds * (config.num_trials + config.max_confirmed + 1) + (4 << 20),
    )


def _asking(
    config: RunConfig, size: CorpusSize | None, world: World | None, model: int
) -> int | None:
    if not config.resources.on_gpu or (world is not None and world.known_questions is not None):
        return 0
    if world is None or size is None:
        return None
    workers = config.resources.workers_per_gpu
    return (workers + 1) * model + logits_bytes(world, size.longest_prompt)


def _what(config: RunConfig, plan: Plan) -> Iterator[str]:
    entry, training = shape_of(config.world), config.training
    assert config.hook is not None
    layer = int(config.hook.split(".")[1])
    confirmation = config.max_confirmation(plan.at_a_time)
    if config.is_search:
        then = f", then at most {confirmation} to confirm the best" if confirmation else ""
        yield f"search       {config.num_trials} trials chosen by {config.search.sampler}{then}"
    else:
        trials = config.fixed_trials()
        names = list(dict.fromkeys(spec.run for spec in trials))
        seeds = config.search.seeds
        yield f"search       {len(trials)} trials: {len(names)} runs with {seeds} seeds each"
        yield from (f"               {name}" for name in names)
    d_sae, tokens = config.extremes("sae", "d_sae"), config.extremes("training", "tokens")
    # Forward and backward of encoder and decoder: three times two products of tokens·d_in·d_sae.
    operations = [f"{12 * t * entry.d_model * d:.2e}" for t, d in zip(tokens, d_sae, strict=True)]
    steps = [f"{t // training.batch_size:,}" for t in tokens]
    parameters = [f"{2 * entry.d_model * d + entry.d_model + d:,}" for d in d_sae]
    yield (
        f"model        {entry.label}: {entry.n_layers} layers, d_in {entry.d_model}; SAEs at "
        f"{config.hook}, {layer + 1} of {entry.n_layers} layers are run for activations"
    )
    yield (
        f"SAE          {config.sae.architecture}, d_sae {_range(map(str, d_sae))}, "
        f"{_range(parameters)} parameters"
    )
    yield (
        f"training     {_range(f'{t:,}' for t in tokens)} tokens a trial: {_range(steps)} steps "
        f"of {training.batch_size}; {_range(operations)} operations a trial without the penalty"
    )
    yield f"scored at    {', '.join(f'{tokens:,}' for tokens in config.rungs)} tokens"
    yield from on_cards(config, entry)


def _corpora(size: CorpusSize | None) -> Iterator[str]:
    if size is None:
        yield "corpora      not on this machine: their size is not known before they are fetched"
        return
    yield f"corpora      about {size.rows:,} tokens in {size.sequences:,} sequences, both together"


def _memory(
    config: RunConfig,
    plan: Plan,
    nodes: list[NodeRoom],
    needs: Needs,
    gpus: list[Gpu],
    here: int,
) -> Iterator[str]:
    width = element_size(config.resources.store_dtype) * shape_of(config.world).d_model
    row = f"{width:,} bytes a token ({config.resources.store_dtype})"
    tiers = None if needs.store is None else _tiers(config, nodes, needs.store)
    if tiers is None:
        yield f"store        {row} of the corpora"
    else:
        cache = cache_folder(config.resources.cache)
        yield f"store        {row}; {tiers.activations}; one copy a node"
        if tiers.evaluation:
            yield f"scoring      evaluation cache {tiers.evaluation}; one copy a node"
        disk = f"{human(tiers.total)} in {cache}" if cache else "no cache"
        yield f"on disk      {disk}; about {human(needs.run_folder)} in the run folder"
    for node in nodes:
        yield (
            f"node         {node.name}: {node.cpus} CPUs and {node.gpus} GPUs for Ray, object "
            f"store {human(node.store_bytes)}{tiers or ''}"
        )
    yield (
        f"workers      {plan.workers}{_up_to(plan)}, {plan.workers_per_trial} a trial, "
        f"{config.resources.threads_per_worker} threads each; {plan.concurrent_trials} trials at a "
        f"time; about {human(needs.worker)} a worker, {human(here * needs.worker)} on a node"
    )
    free = _room(config, plan, needs, gpus, here)
    yield f"packs        {describe_pack(config, plan.trials_per_pack, free)}"
    if config.resources.on_gpu:
        resident, each = "", config.resources.workers_per_gpu
        if needs.store is not None and gpus:
            activations = needs.store.activations
            fits = activations <= DEVICE_SHARE * (gpus[0].free_bytes - each * needs.model)
            resident = (
                f", and {human(activations)} of activations{' for all of them' if each > 1 else ''}"
                if fits
                else "; activations come from host memory, a step ahead"
            )
        several = f" for each of {each} workers" if each > 1 else ""
        what = "model, SAE and batch" if needs.model else "SAE and batch, without the model"
        yield f"a GPU        about {human(needs.gpu)} of {what}{several}{resident}"
        if needs.asking is None:
            yield "asking       on a GPU too, what the model knows: without its logits until then"
        elif needs.asking:
            yield (
                f"asking       before that about {human(needs.asking)} of a GPU, while the model "
                "is asked what it knows: a model beside the workers', and its logits"
            )


@dataclass(frozen=True)
class _Tiers:
    """Where what all workers read lies on every node."""

    activations: str
    evaluation: str
    """"" where none is used."""
    in_store: int
    mapped: int

    @property
    def total(self) -> int:
        """Bytes of both tiers: as many are in the cache on disk."""
        return self.in_store + self.mapped

    def __str__(self) -> str:
        parts = [f"{human(self.in_store)} of it used"] if self.in_store else []
        parts += [f"{human(self.mapped)} mapped from disk"] if self.mapped else []
        return f", {', '.join(parts)}"


def _tiers(config: RunConfig, nodes: list[NodeRoom], size: StoreSize) -> _Tiers:
    """As the harvest will choose them."""
    room, disk = min(node.store_bytes for node in nodes), config.resources.cache is not None
    acts, evaluation = size.activations, size.evaluation
    acts_mapped, words = choose_tier(acts, room, disk=disk, one_node=len(nodes) == 1)
    in_store = 0 if acts_mapped else acts
    mapped, words_of_evaluation = choose_tier(
        evaluation, room, disk=disk, one_node=True, taken=in_store
    )
    in_store += 0 if mapped else evaluation
    return _Tiers(
        words, words_of_evaluation if evaluation else "", in_store, acts + evaluation - in_store
    )


def _room(config: RunConfig, plan: Plan, needs: Needs, gpus: list[Gpu], here: int) -> int | None:
    """Bytes of a worker for SAEs; None for one that is elsewhere."""
    if config.resources.on_gpu:
        if not gpus:
            return None
        free = min(gpu.free_bytes for gpu in gpus)
        return room_on_gpu(free, needs.model, config.resources.workers_per_gpu)
    if not plan.local:
        return None
    return max(0, psutil.virtual_memory().available // here - PROCESS_BYTES - needs.model)


def _up_to(plan: Plan) -> str:
    return f" (as nodes join: {plan.max_workers})" if plan.max_workers > plan.workers else ""


def _time(config: RunConfig, plan: Plan, found: Estimate) -> Iterator[str]:
    groups = max(1, plan.workers // plan.workers_per_trial)
    then = f"; the confirmation at most {_span(found.confirmation)} more"
    yield (
        f"time         about {_span(found.total)} (an estimate: {found.measured}): "
        f"{_span(found.start)} to start, {config.num_trials} trials on {groups} "
        f"group{'s' if groups > 1 else ''} of workers, {_span(found.training)} to train one to its "
        f"end and {_span(found.scoring)} to score it{then if found.confirmation else ''}"
    )


def _short(
    config: RunConfig,
    plan: Plan,
    nodes: list[NodeRoom],
    needs: Needs,
    gpus: list[Gpu],
    cores: int,
    run_dir: Path | None,
) -> Iterator[str]:
    """What would not fit, and the setting to change; it is not refused, because the figures are
    estimates. Disks and GPUs of a cluster are taken to be like this machine's.
    """
    cache, total = cache_folder(config.resources.cache), needs.store.total if needs.store else 0
    if cache is not None and _free(cache) < total:
        yield (
            f"disk for the cache: {human(total)} in {cache}, {human(_free(cache))} are free; "
            "set resources.cache to another folder, or to null"
        )
    folder = (run_dir or Path("runs")).absolute()
    if _free(folder) < needs.run_folder:
        yield (
            f"disk for the run folder: about {human(needs.run_folder)} in {folder}, "
            f"{human(_free(folder))} are free; set --out to another disk, "
            "or search.num_samples lower"
        )
    for node in nodes:
        yield from _short_on_node(config, plan, nodes, node, needs)
    if plan.local and plan.workers * config.resources.threads_per_worker > cores:
        yield (
            f"cores: {plan.workers} workers with {config.resources.threads_per_worker} threads on "
            f"{cores}; they share them, set resources.workers lower to have each trial sooner"
        )
    each = config.resources.workers_per_gpu
    if gpus and each * needs.gpu > min(gpu.free_bytes for gpu in gpus):
        or_workers = " or resources.workers_per_gpu" if each > 1 else ""
        yield (
            f"GPU memory: about {human(needs.gpu)} a worker; set sae.d_sae or training.batch_size"
            f"{_or_packs(plan)}{or_workers} lower"
        )
    yield from _short_for_asking(needs, gpus)


def _short_for_asking(needs: Needs, gpus: list[Gpu]) -> Iterator[str]:
    if gpus and (needs.asking or 0) > min(gpu.free_bytes for gpu in gpus):
        yield (
            f"GPU memory: about {human(needs.asking or 0)} while the model is asked what it knows; "
            "set world.llm_batch_size lower, or choose a smaller model"
        )


def _short_on_node(
    config: RunConfig, plan: Plan, nodes: list[NodeRoom], node: NodeRoom, needs: Needs
) -> Iterator[str]:
    """Memory and object store of a node, with as many workers as Ray may put there."""
    workers, where = node.most_workers(plan, config.resources), ""
    higher = "resources.store_memory"
    if not plan.local:
        where, higher = f" of {node.name}", "`ray start --object-store-memory`"
    memory = workers * needs.worker
    if node.memory_bytes is not None and memory > node.memory_bytes:
        yield (
            f"memory{where}: {workers} workers take about {human(memory)}, "
            f"{human(node.memory_bytes)} are free; set resources.workers{_or_packs(plan)} lower"
        )
    in_store = 0 if needs.store is None else _tiers(config, nodes, needs.store).in_store
    room = room_in_store(node.store_bytes)
    if in_store > room:
        yield (
            f"object store{where}: {human(in_store)}, it has room for {human(room)} and spills the "
            f"rest; set {higher} higher, or resources.store_dtype to bfloat16"
        )


def _or_packs(plan: Plan) -> str:
    return " or resources.trials_per_pack" if plan.trials_per_pack > 1 else ""


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _names(gpus: list[Gpu]) -> str:
    return ", ".join(gpu.name for gpu in gpus) or "no GPU"


def _range(ends: Iterable[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def _span(seconds: float) -> str:
    """As "8.0 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
