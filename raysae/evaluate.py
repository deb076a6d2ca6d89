"""`raysae evaluate`: the unlearning score of any SAELens SAE on disk or on the hub, explained."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from raysae.config import world_of
from raysae.errors import UserError
from raysae.imports import imports_without_gc
from raysae.pool.folder import TRIAL_FILE
from raysae.worlds.world import SAEBENCH, World, check_hook, load_world, score_name, unknown_name

SHOWN = 3
"""Folders that are named where one was meant."""


def evaluate(
    source: str,
    *,
    world: str,
    hook: str | None,
    evaluator: str,
    split_seed: int,
    sparse_probing: bool,
    out: Path | None,
    console: Console,
) -> None:
    """Score one SAE, print why it scores so, and write SAEBench's result file if asked to.

    Args:
        source: folder of a SAELens SAE, or `release:id` of one on the hub.
        world: a name, or a file that describes one.
        hook: hook point; None for the one in the SAE's metadata, or else the world's.
        evaluator: "cached" or "saebench".
        split_seed: of the questions' halves.
        sparse_probing: whether to run SAEBench's sparse probing as well.
        out: SAEBench's result JSON; None writes nothing.
        console: to print to.

    Raises:
        UserError: an unknown world or hook, no SAE there, or one made for something else.
    """
    if evaluator not in ("cached", "saebench"):
        raise UserError(
            f"--evaluator: {unknown_name('evaluator', evaluator, ('cached', 'saebench'))}"
        )
    loaded = load_world(world_of(world))
    if hook is not None:
        _check_hook(loaded, hook, "--hook")
    _check_source(source)
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("loading torch and SAELens")
        scored = _score(
            source,
            loaded,
            hook,
            evaluator,
            sparse_probing,
            lambda line: bar.update(task, description=line),
        )
    from raysae.unlearning import halve

    result = scored.result
    halves = halve(result, split_seed)
    if scored.folded is not None:
        console.print(f"note: {scored.folded}", highlight=False, soft_wrap=True)
    console.print(f"at {scored.hook} of {loaded.name}", highlight=False, soft_wrap=True)
    _print(console, result, halves, score_name(loaded.permutations))
    if scored.probes:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scored.probes.items())
        console.print(f"sparse probing, test accuracy: {shown}", highlight=False, soft_wrap=True)
    if out is not None:
        output = result.to_saebench_output(scored.config, scored.cfg_dict, sae_release=source)
        out.parent.mkdir(parents=True, exist_ok=True)
        assert output.eval_result_unstructured is not None
        output.eval_result_unstructured["score_name"] = score_name(loaded.permutations)
        output.to_json_file(str(out), indent=1)
        console.print(f"SAEBench's result: {out}", highlight=False, soft_wrap=True)


def _check_source(source: str) -> None:
    """Before anything is imported: is there a SAELens SAE at that path?"""
    if ":" in source and not Path(source).exists():
        return
    folder = Path(source)
    if not (folder / "cfg.json").is_file():
        below = sorted(str(path.parent) for path in folder.glob("**/cfg.json"))
        hint = ""
        if below:
            more = f" or another of {len(below)} below it" if len(below) > SHOWN else ""
            hint = f"; did you mean {', '.join(below[:SHOWN])}{more}?"
        raise UserError(f"{source}: no SAELens SAE there (a folder with cfg.json){hint}")


def _check_hook(world: World, hook: str, where: str) -> str:
    try:
        check_hook(world, hook)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return hook


@dataclass(frozen=True)
class _Scored:
    """What came of one SAE."""

    result: Any
    hook: str
    config: Any
    cfg_dict: dict[str, Any]
    """The SAE's, as SAEBench writes it."""
    probes: dict[str, float]
    folded: str | None
    """What was done to its decoder, in words."""


def _score(
    source: str, world: World, hook: str | None, evaluator: str, sparse_probing: bool, say: Any
) -> _Scored:
    with imports_without_gc():
        import torch
        from sae_lens import SAE

        from raysae.sparse_probing import SparseProbing
        from raysae.unlearning import (
            CachedEvaluator,
            SAEBenchEvaluator,
            ask_all,
            build_cache,
            check_sae,
            default_eval_config,
            sae_cfg_dict,
        )
        from raysae.unlearning.folding import fold_decoder_norms
        from raysae.worlds.model import load_model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    release, _, sae_id = source.partition(":")
    try:
        if Path(source).exists():
            sae: Any = SAE.load_from_disk(source, device=device)
        else:
            sae = SAE.from_pretrained(release, sae_id, device=device)
    except Exception as error:  # SAELens raises many types; whatever it is, it is not an SAE
        raise UserError(f"{source}: cannot be loaded by SAELens: {error}") from None
    config = default_eval_config(world)
    if hook is None:
        own = getattr(getattr(sae.cfg, "metadata", None), "hook_name", None)
        where = f"{source}, made for hook_name {own!r} (--hook names another)"
        hook = _check_hook(world, own, where) if own else world.default_hook_name
    try:
        check_sae(sae, world, hook)
        folded = fold_decoder_norms(sae)
        model = load_model(world, device=device)
        if world.known_questions is None:
            answers = ask_all(world, model, config, progress=say)
            weakness = answers.weakness(world)
            if weakness:
                raise UserError(weakness)
            known = {name: tuple(ids.tolist()) for name, ids in answers.ids().items()}
            world = replace(world, known_questions=known)
        if evaluator == "cached":
            cache = build_cache(world, model, hook, config, progress=say)
            say("scoring")
            scored = CachedEvaluator(world, model, cache, config).evaluate(
                sae, training_steps=_training_steps(Path(source))
            )
        else:
            say("scoring with SAEBench's own loop, which takes minutes")
            with tempfile.TemporaryDirectory() as folder:
                scored = SAEBenchEvaluator(world, model, hook, config, Path(folder)).evaluate(
                    sae, training_steps=_training_steps(Path(source))
                )
        probes: dict[str, float] = {}
        if sparse_probing:
            say("sparse probing")
            with tempfile.TemporaryDirectory() as folder:
                probed = model
                if world.score_model_path is not None:
                    probed = load_model(world, device=device, trained_on=True)
                probes = SparseProbing(world, probed, hook, Path(folder)).evaluate(sae)
        return _Scored(scored, hook, config, sae_cfg_dict(sae, world, hook), probes, folded)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _training_steps(source: Path) -> int:
    """Steps that a trial's file beside the SAE states; 1 for an SAE that somebody else trained."""
    for folder in (source, source.parent):
        if (folder / TRIAL_FILE).is_file():
            return int(json.loads((folder / TRIAL_FILE).read_text())["training_steps"])
    return 1


def _print(console: Console, result: Any, halves: Any, name: str) -> None:
    what = f"{SAEBENCH} unlearning score" if name == SAEBENCH else f"unlearning {name}"
    console.print(
        f"{what} {result.score:.4f} ({result.status}): {result.cause}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"on two halves of the questions: {halves.search.score:.4f} (searched on) and "
        f"{halves.heldout.score:.4f} (held out); frontier {result.frontier:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    found = halves.transferred
    console.print(
        f"transferred from the first to the second: {found.score:.4f} ({found.status}): "
        f"{found.cause}",
        highlight=False,
        soft_wrap=True,
    )
    if not result.interventions:
        return
    eligible = ", ".join(f"{n} below {t:g}" for t, n in result.eligible_features.items())
    console.print(f"eligible features: {eligible}", highlight=False)
    from raysae.unlearning.result import wilson_interval

    table = Table(box=None, pad_edge=False)
    columns = ("retain <", "features", "used", "clamp", "forget right", "95 %", "retain right", "")
    for name in columns:
        table.add_column(name, justify="right")
    for row in result.interventions:
        low, high = wilson_interval(row.forget_correct, row.forget_total)
        table.add_row(
            f"{row.retain_threshold:g}",
            f"{row.n_features}",
            f"{row.n_features_used}",
            f"-{row.multiplier}",
            f"{row.forget_correct}/{row.forget_total}",
            f"{low:.3f}-{high:.3f}",
            f"{row.retain_correct}/{row.retain_total}",
            ("passes" if row.passes_gate else "fails the gate")
            + (", the score" if row == result.best else ""),
        )
    console.print(table)
