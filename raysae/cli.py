"""Words in, exit codes out: 0 done, 1 every trial failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from raysae.config import RunConfig, find_space, load_config, parse_override
from raysae.errors import UserError

SMOKE_OVERRIDES = {
    "training.tokens": 65_536,
    "training.batch_size": 128,  # 512 steps: room for every group-update period
    "search.num_samples": 3,
    "search.scheduler.name": "none",
    "confirm.top": 0,
}
"""The whole job with every real part in it, small: most of its time is start-up."""


def search(
    space: Annotated[
        str, typer.Option(help="Space file: a path, or a bare name in search_spaces/.")
    ] = "orth.yaml",
    num_samples: Annotated[int | None, typer.Option(min=1, help="Number of trials.")] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time; 1 makes a run repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the search.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; default: start Ray on this machine.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Run folder; must not exist. Default: runs/SPACE-DATE-TIME.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field, e.g. --set training.tokens=500000."),
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Three short trials: the whole job, small.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would happen, and start nothing.")
    ] = False,
) -> None:
    """Search for the regularizer that separates knowledge best.

    Example: python run_search.py --space orth.yaml --num-samples 48 --seed 1
    """
    path = find_space(space)
    overrides: dict[str, object] = dict(SMOKE_OVERRIDES) if smoke else {}
    overrides |= dict(parse_override(text) for text in set_ or [])
    flags = {
        "search.num_samples": num_samples,
        "search.max_concurrent": max_concurrent,
        "search.seed": seed,
    }
    overrides |= {key: value for key, value in flags.items() if value is not None}
    config: RunConfig = load_config(path, overrides)
    from raysae.search.cluster import check_address
    from raysae.search.run import fetch_world, make_run_dir, resolve, run_search

    config = resolve(config)
    if plan:
        from raysae.search.plan import describe_plan

        sys.stdout.write("\n".join(describe_plan(config)) + "\n")
        return
    if address is not None:
        check_address(address)
    fetch_world(config)
    # Without a terminal there is no width to fit into.
    console = Console(width=None if sys.stdout.isatty() else 180)
    outcome = run_search(
        config,
        make_run_dir(out, path.stem),
        console,
        address=address,
        started=psutil.Process().create_time(),  # imports count: their user waits for them
    )
    if outcome.failed == outcome.trials:
        raise typer.Exit(_say(f"every trial failed; the first because: {outcome.first_error}", 1))


def evaluate(
    source: Annotated[
        str, typer.Argument(help="Folder of a SAELens SAE, or RELEASE:ID of one on the hub.")
    ],
    world: Annotated[str, typer.Option(help="World to score it on.")] = "embedded",
    hook: Annotated[str | None, typer.Option(help="Hook point; default: the world's.")] = None,
    evaluator: Annotated[
        str, typer.Option(help="cached, or saebench: its own loop, the same score, slower.")
    ] = "cached",
    split_seed: Annotated[int, typer.Option(min=0, help="Seed of the questions' halves.")] = 0,
    sparse_probing: Annotated[
        bool, typer.Option("--sparse-probing", help="SAEBench's sparse probing as well.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write SAEBench's result JSON there.")] = None,
) -> None:
    """Score any SAELens SAE, and say why it scores so.

    Example: raysae evaluate runs/orth/best
    """
    from raysae.evaluate import evaluate as run

    run(
        source,
        world_name=world,
        hook=hook,
        evaluator=evaluator,
        split_seed=split_seed,
        sparse_probing=sparse_probing,
        out=out,
        console=Console(width=None if sys.stdout.isatty() else 180),
    )


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a search, finished or not.")],
) -> None:
    """Write RUN_DIR/report.html: one page that opens offline, the answer first.

    Example: raysae report runs/orth-20261122-180637
    """
    from raysae.report.build import build_report

    built = build_report(run_dir)
    for gap in built.gaps:
        sys.stdout.write(f"note: {gap}\n")
    sys.stdout.write(f"{built.path} ({built.seconds:.0f} s)\n")


def _say(message: str, code: int) -> int:
    Console(stderr=True).print(
        f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    return code


def main() -> None:
    """Entry point of `run_search.py`: the search alone."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(search)
    _run(app)


def commands() -> None:
    """Entry point of the `raysae` command."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        help="Which orthogonality regularizer makes a sparse autoencoder separate knowledge best?",
    )
    app.command()(search)
    app.command()(evaluate)
    app.command()(report)
    _run(app)


def _run(app: typer.Typer) -> None:
    try:
        app()
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))
