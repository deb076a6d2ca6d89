"""Words in, exit codes out, as in `EXIT_CODES`.

Nothing heavy is imported before a command needs it: `raysae status` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.console import Console

from raysae.errors import InterruptedSearchError, UserError

if TYPE_CHECKING:
    from raysae.config import RunConfig
    from raysae.search.conclude import SearchOutcome
    from raysae.storage import Location

DEFAULT_SPACE = "orth.yaml"
SMOKE_OVERRIDES = {
    "training.tokens": 32_768,
    "training.batch_size": 128,  # 256 steps: room for every group-update period
    "search.num_samples": 3,
    "search.seeds_per_trial": 1,
    "search.scheduler.name": "none",
    "confirm.top": 0,
}
"""The whole job with every real part in it, small: most of its time is start-up."""

EXIT_CODES = (
    "Exit codes: 0 done, 1 every trial failed or the search had to stop, 2 bad input (one "
    "message), 130 interrupted."
)

SpaceOption = Annotated[
    str, typer.Option(help="Space file: a path, or a bare name in search_spaces/.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field, e.g. --set training.tokens=500000."),
]
WorldOption = Annotated[
    str | None,
    typer.Option("--world", help="World: a name, or a YAML file that describes one."),
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster to join; default: start Ray on this machine.")
]
StorageOption = Annotated[
    str | None,
    typer.Option(help="Mirror the run folder below s3://BUCKET/PREFIX, gs://…, or file:///…."),
]
RunFolder = Annotated[Path, typer.Argument(help="Run folder of a search.", metavar="RUN_DIR")]


def search(
    space: SpaceOption = DEFAULT_SPACE,
    world: WorldOption = None,
    num_samples: Annotated[int | None, typer.Option(min=1, help="Number of trials.")] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time; 1 makes a run repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the search.")] = None,
    address: AddressOption = None,
    out: Annotated[
        str | None, typer.Option(help="New run folder. Default: runs/SPACE-DATE-TIME.")
    ] = None,
    storage: StorageOption = None,
    set_: SetOption = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Three short trials: the whole job, small.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would happen, and start nothing.")
    ] = False,
    resume_: Annotated[
        str | None,
        typer.Option(
            "--resume", help="Go on with an interrupted search: its run folder or mirror."
        ),
    ] = None,
) -> None:
    """Search for the regularizer that separates knowledge best.

    Example: python run_search.py --space orth.yaml --num-samples 48 --seed 1
    """
    if resume_ is not None:
        given = {
            "--space": None if space == DEFAULT_SPACE else space,
            "--num-samples": num_samples, "--max-concurrent": max_concurrent, "--seed": seed,
            "--world": world, "--set": set_ or None, "--smoke": smoke or None,
            "--plan": plan or None,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name}: a resumed search keeps its own settings; leave it out")
        resume(resume_, address, out, storage)
        return
    flags: dict[str, object] = {
        "search.num_samples": num_samples,
        "search.max_concurrent": max_concurrent,
        "search.seed": seed,
        "storage": storage,
    }
    overrides: dict[str, object] = dict(SMOKE_OVERRIDES) if smoke else {}
    path, config, storage = _configured(space, overrides, set_, flags, world, address)
    if plan:
        _print_plan(config, address, out)
        return
    from raysae.search.cluster import check_address
    from raysae.search.run import choose_run_dir, fetch_world, make_run_dir, run_search
    from raysae.storage import reserve

    if address is not None:
        check_address(address)
    fetch_world(config)
    run_dir = choose_run_dir(out, path.stem)
    location = None if storage is None else reserve("--storage", storage, run_dir.name, new=True)
    outcome = run_search(
        config,
        make_run_dir(run_dir),
        _console(),
        address=address,
        storage=location,
        started=psutil.Process().create_time(),  # imports count: their user waits for them
    )
    _exit_code(outcome)


def resume(
    run: Annotated[
        str, typer.Argument(help="Run folder of a search, or its mirror.", metavar="RUN_DIR")
    ],
    address: AddressOption = None,
    out: Annotated[
        str | None, typer.Option(help="Of a mirror: folder to fetch it to. Default: runs/NAME.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Go on with an interrupted search: nothing that has ended is trained again.

    Example: raysae resume runs/orth-20260101-120000
    """
    from raysae.search.cluster import check_address
    from raysae.search.run import load_run, run_search

    if address is not None:
        check_address(address)
    run_dir, location = _taken_up(run, out, storage)
    config = load_run(run_dir)
    outcome = run_search(
        config,
        run_dir,
        _console(),
        address=address,
        storage=location,
        started=psutil.Process().create_time(),
        resume=True,
    )
    _exit_code(outcome)


def _taken_up(run: str, out: str | None, storage: str | None) -> tuple[Path, Location | None]:
    """The run folder to go on with, fetched if it is a mirror's, and where it is mirrored."""
    from raysae.search.run import choose_run_dir, make_run_dir
    from raysae.storage import address_of, fetch, find_copy, is_address, reserve

    if is_address(run):
        mirror = find_copy(run)
        folder = Path(out or f"runs/{mirror.address.rpartition('/')[2]}")
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"--resume {mirror.address}: {folder} is there already; go on with it by --resume "
                f"{folder}, or choose another --out to fetch the mirror to"
            )
        run_dir = choose_run_dir(str(folder), "")
        if storage is not None:
            location = reserve("--storage", storage, run_dir.name)
        fetch(mirror, make_run_dir(run_dir))
        return run_dir, mirror if storage is None else location
    if out is not None:
        raise UserError("--out: a resumed search keeps its run folder; leave it out")
    run_dir = Path(run).absolute()
    if storage is not None:
        return run_dir, reserve("--storage", storage, run_dir.name)
    found = address_of(run_dir)
    return run_dir, None if found is None else reserve("--storage", found)


def _exit_code(outcome: SearchOutcome) -> None:
    if outcome.failed == outcome.trials:
        raise typer.Exit(_say(f"every trial failed; the first because: {outcome.first_error}", 1))


def plan(
    space: SpaceOption = DEFAULT_SPACE,
    world: WorldOption = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to plan for; default: this machine.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Say what a search would do and need and how long it may take, and start nothing.

    Example: raysae plan --space seed_gemma-2-2b.yaml
    """
    _print_plan(_configured(space, {}, set_, {}, world, address)[1], address)


def status(
    run_dir: RunFolder,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again every second until it is over.")
    ] = False,
) -> None:
    """Where a search stands, while it runs or afterwards, from its run folder alone.

    Example: raysae status runs/orth-20261122-180637 --watch
    """
    from raysae.search.status import show_status

    show_status(run_dir, _console(), watch=watch)


def evaluate(
    source: Annotated[
        str, typer.Argument(help="Folder of a SAELens SAE, or RELEASE:ID of one on the hub.")
    ],
    world: Annotated[
        str, typer.Option(help="World to score it on: a name, or a YAML file.")
    ] = "embedded",
    hook: Annotated[
        str | None, typer.Option(help="Hook point; default: the SAE's own, or else the world's.")
    ] = None,
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
        world=world,
        hook=hook,
        evaluator=evaluator,
        split_seed=split_seed,
        sparse_probing=sparse_probing,
        out=out,
        console=_console(),
    )


def world(
    name: Annotated[
        str, typer.Argument(help="Name of the world, or a YAML file that describes one.")
    ] = "embedded",
    examples: Annotated[
        int, typer.Option(min=0, help="Questions of each set, and texts of each corpus, to show.")
    ] = 1,
) -> None:
    """Describe a world: its model, hook points, corpora and questions, with examples.

    Example: raysae world embedded --examples 3
    """
    from raysae.worlds.describe import describe_world

    if not Path(name).is_file():
        describe_world(name, examples, _console())
        return
    from raysae.config import world_of

    describe_world(world_of(name), examples, _console())


def push(
    run_dir: RunFolder,
    repo_id: Annotated[
        str, typer.Argument(help="Repository on the hub: USER/NAME.", metavar="REPO_ID")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Of a new repository; private by default.")
    ] = False,
) -> None:
    """Push the best SAE with its model card to the Hugging Face hub.

    Needs a token: `hf auth login`, or HF_TOKEN.

    Example: raysae push runs/orth-20261122-180637 me/sae-unlearning
    """
    from raysae.push import push_best

    push_best(run_dir, repo_id, _console(), private=not public)


def report(
    run_dir: RunFolder,
) -> None:
    """Write RUN_DIR/report.html: one page that opens offline, the answer first.

    Example: raysae report runs/orth-20261122-180637
    """
    from raysae.report.build import build_report

    built = build_report(run_dir)
    for gap in built.gaps:
        sys.stdout.write(f"note: {gap}\n")
    sys.stdout.write(f"{built.path} ({built.seconds:.0f} s)\n")


def _configured(
    space: str,
    base: dict[str, object],
    set_: list[str] | None,
    flags: Mapping[str, object],
    world: str | None,
    address: str | None,
) -> tuple[Path, RunConfig, str | None]:
    """The space file, its configuration, and the address of the storage with its secrets.

    Flags override --set, which overrides `base`.
    """
    from raysae.config import find_space, load_config, parse_override, world_of
    from raysae.search.run import resolve

    path = find_space(space)
    if world is not None:
        base = base | {"world": world_of(world)}
    overrides = base | dict(parse_override(text) for text in set_ or [])
    overrides |= {key: value for key, value in flags.items() if value is not None}
    config = load_config(path, overrides)
    _check_acts(config, [parse_override(text)[0] for text in set_ or []])
    return path, resolve(config, address), config.storage


def _check_acts(config: RunConfig, set_: list[str]) -> None:
    """Refuse to set what the space searches: its values would be taken all the same."""
    for key in set_:
        section, _, field = key.partition(".")
        if section not in ("sae", "training") or config.space is None:
            continue
        if field in getattr(config.space, section):
            raise UserError(
                f"--set {key}: is searched, so that this would do nothing; set space.{key} instead"
            )


def _print_plan(config: RunConfig, address: str | None, out: str | None = None) -> None:
    from raysae.search.cluster import check_address
    from raysae.search.plan import describe_plan

    if address is not None:
        check_address(address)
    sys.stdout.write(
        "\n".join(describe_plan(config, address, None if out is None else Path(out))) + "\n"
    )


def _console() -> Console:
    """Without a terminal there is no width to fit into."""
    return Console(width=None if sys.stdout.isatty() else 220)


def _say(message: str, code: int) -> int:
    Console(stderr=True).print(
        f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    return code


def main() -> None:
    """Entry point of `run_search.py`: the search alone."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=EXIT_CODES)(search)
    _run(app)


def commands() -> None:
    """Entry point of the `raysae` command."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        help="Which orthogonality regularizer makes a sparse autoencoder separate knowledge best?",
        epilog=EXIT_CODES,
    )
    for command in (search, resume, plan, status, evaluate, report, world, push):
        app.command(epilog=EXIT_CODES)(command)
    _run(app)


def _run(app: typer.Typer) -> None:
    try:
        app()
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except InterruptedSearchError as error:
        sys.exit(_say(str(error), error.code))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))
