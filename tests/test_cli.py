"""Bad input ends at once: exit code 2, one message, no traceback, no Ray, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysae import cli
from raysae.config import RunConfig, load_config
from raysae.search import cluster, run
from raysae.worlds import load_world

ROOT = Path(__file__).parent.parent
ORTH = ROOT / "search_spaces" / "orth.yaml"


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path: Path, monkeypatch, capsys) -> Callable[..., Ended]:
    """`run_search.py` with these arguments, in this process and in an empty folder.

    Starting Ray is an error.
    """

    def no_ray(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "start", no_ray)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["run_search.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return Ended(int(caught.value.code or 0), out, err)

    return call


@pytest.fixture
def stored() -> list[str | None]:
    """Where the searches that were begun are mirrored to."""
    return []


@pytest.fixture
def searched(monkeypatch, stored) -> list[tuple[RunConfig, Path, str | None]]:
    """The searches that were begun; each succeeds at once with one good trial."""
    begun = []

    def fake(
        config: RunConfig,
        run_dir: Path,
        _: Any,
        *,
        address: str | None,
        storage: Any,
        started: float,
    ) -> Any:
        stored.append(None if storage is None else storage.address)
        assert 0 <= time.time() - started < 3600
        begun.append((config, run_dir, address))
        return run.SearchOutcome(run_dir, trials=1, failed=0, first_error="")

    monkeypatch.setattr(run, "run_search", fake)
    return begun


def assert_refused(ended: Ended, *parts: str) -> None:
    assert ended.code == 2
    assert ended.out == ""
    assert [part for part in parts if part not in ended.err] == []
    assert ended.err.startswith("error: ")
    assert len(ended.err.splitlines()) == 1
    assert not any(Path.cwd().iterdir())


# --- As a user calls it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "broken.yaml"], "broken.yaml:3:8: not valid YAML"),
        (["--set", "hook=blocks.9.hook_resid_post"], "unknown hook 'blocks.9.hook_resid_post'"),
    ],
    ids=["broken YAML", "unknown hook"],
)
def test_bad_input_ends_with_one_message_before_ray_is_imported(
    arguments: list[str], message: str, tmp_path: Path
):
    here, trap = tmp_path / "here", tmp_path / "trap"
    for folder in (here, trap):
        folder.mkdir()
    (trap / "ray.py").write_text("raise SystemExit('ray was imported')\n")
    (tmp_path / "here" / "broken.yaml").write_text("sae:\n  k: [3\n  d_sae: 5\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_search.py"), *arguments],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(trap)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in here.iterdir()] == ["broken.yaml"]


# --- In this process ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--space", "orht"], ["--space orht", "valid: alpha.yaml, "]),
        (["--space", "orht.yaml"], ["--space orht.yaml: no such file"]),
        (
            ["--set", "training.tokns=5"],
            ["set on the command line: training.tokns", "unknown key 'tokns'"],
        ),
        (
            ["--set", "training.tokens=-1"],
            ["set on the command line: training.tokens", "greater than or equal to 1", "-1"],
        ),
        (["--set", "search.num_samples=-1"], ["search.num_samples", "-1"]),
        (["--set", "training.tokens"], ["--set training.tokens: must be key=value"]),
        (["--set", "trainig.tokens=5"], ["unknown key 'trainig'", "mean 'training'?"]),
        (["--set", "world=real"], ["unknown world 'real'", "valid: embedded"]),
        (["--set", "space.alpha=-1"], ["space.alpha", "≥ 0, got -1"]),
        (["--set", "hook=blocks.9.hook_resid_post"], ["hook", "blocks.0.hook_resid_post"]),
        (["--set", "hook=resid"], ["unknown hook 'resid'", "valid"]),
        (["--set", "sae.k=3"], ["--set sae.k: is searched", "set space.sae.k instead"]),
        (["--smoke", "--set", "training.batch_size=65537"], ["32768", "65537", "0 steps"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_ends_with_one_message(arguments: list[str], parts: list[str], command):
    assert_refused(command(*arguments), *parts)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--num-samples", "-1"], "--num-samples"),
        (["--num-samples", "0"], "--num-samples"),
        (["--num-samples", "many"], "--num-samples"),
        (["--max-concurrent", "0"], "--max-concurrent"),
        (["--seed", "-1"], "--seed"),
        (["--spce", "orth.yaml"], "--spce"),
        (["orth.yaml"], "orth.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_end_with_the_options_name(arguments: list[str], part: str, command):
    ended = command(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert part in ended.err
    assert "Traceback" not in ended.err


def test_a_run_folder_with_something_in_it_is_left_alone(command, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "precious").write_text("result")
    assert_refused(command("--out", str(folder)), f"--out {folder}", "exists already")
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_a_run_folder_that_is_a_file_is_left_alone(command, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("text")
    assert_refused(command("--out", str(file)), f"--out {file}", "exists already")
    assert file.read_text() == "text"


def test_a_run_folder_below_a_file_cannot_be_written(command, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("text")
    message = [f"--out {file / 'run'}", "cannot be written", "Not a directory"]
    assert_refused(command("--out", str(file / "run")), *message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_write_permission_cannot_be_written(command, tmp_path: Path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    ended = command("--out", str(locked / "run"))
    assert_refused(ended, f"--out {locked / 'run'}", "cannot be written", "Permission denied")


def test_a_bad_config_does_not_leave_a_run_folder(command, tmp_path: Path):
    out = tmp_path / "run"
    assert_refused(command("--out", str(out), "--set", "hook=nowhere"), "nowhere")
    assert not out.exists()


def test_good_input_is_searched_in_a_new_folder(command, searched, tmp_path: Path):
    ended = command("--out", str(tmp_path / "a" / "run"), "--address", "auto")
    assert ended.code == 0
    ((config, run_dir, address),) = searched
    assert (run_dir, address) == (tmp_path / "a" / "run", "auto")
    assert run_dir.is_dir()
    assert config.hook == load_world("embedded").default_hook_name
    assert config.search.num_samples >= 24


def test_without_out_the_folder_is_named_after_the_space(command, searched):
    command()
    ((_, run_dir, _),) = searched
    assert run_dir.parent == Path.cwd() / "runs"
    assert run_dir.name.startswith("orth-")


def test_options_override_set_which_overrides_smoke_which_overrides_the_file(command, searched):
    command("--smoke")
    command("--smoke", "--set", "search.num_samples=5", "--set", "search.seed=7")
    command("--smoke", "--set", "search.num_samples=5", "--num-samples", "6", "--seed", "8")
    command("--set", "resources.workers=2", "--max-concurrent", "1")
    smoke, by_set, by_option, plain = (config for config, _, _ in searched)
    assert (smoke.search.num_samples, smoke.training.tokens) == (3, 32_768)
    assert (by_set.search.num_samples, by_set.search.seed) == (5, 7)
    assert (by_option.search.num_samples, by_option.search.seed) == (6, 8)
    assert (plain.resources.workers, plain.search.max_concurrent) == (2, 1)
    assert plain.training.tokens == 262_144


def test_a_search_in_which_every_trial_failed_ends_with_1_and_the_first_reason(
    command, monkeypatch
):
    outcome = run.SearchOutcome(Path("x"), trials=3, failed=3, first_error="ValueError: why")
    monkeypatch.setattr(run, "run_search", lambda *_, **__: outcome)
    ended = command()
    assert ended.code == 1
    assert "every trial failed" in ended.err
    assert "ValueError: why" in ended.err
    assert "Traceback" not in ended.err


def test_a_search_in_which_some_trials_failed_ends_with_0(command, monkeypatch):
    outcome = run.SearchOutcome(Path("x"), trials=3, failed=2, first_error="ValueError: why")
    monkeypatch.setattr(run, "run_search", lambda *_, **__: outcome)
    assert command().code == 0


def test_an_interrupted_search_ends_with_130(command, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_search", interrupted)
    ended = command()
    assert ended.code == 130
    assert "Traceback" not in ended.err


def test_a_cluster_that_cannot_be_used_is_the_users_to_fix(command, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise cluster.UserError("--address nowhere: no Ray cluster can be reached there")

    monkeypatch.setattr(run, "run_search", refuse)
    ended = command("--address", "nowhere")
    assert ended.code == 2
    assert ended.err.startswith("error: --address nowhere")
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:1", ("--address 127.0.0.1:1", "nothing answers", "ray start --head")),
        ("no port", ("--address no port", "HOST:PORT")),
        ("ray://127.0.0.1:1", ("--address ray://127.0.0.1:1", "HOST:PORT")),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_refused_in_seconds(command, address, parts):
    assert_refused(command("--address", address), *parts)


# --- The other commands ---------------------------------------------------------------------------

COMMANDS = ("resume", "report", "search", "plan", "status", "evaluate", "world", "push")


@pytest.fixture
def raysae(monkeypatch, capsys) -> Callable[..., Ended]:
    """`raysae` with these arguments, in this process."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["raysae", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            cli.commands()
        out, err = capsys.readouterr()
        return Ended(int(caught.value.code or 0), out, err)

    return call


def test_the_help_lists_every_command_and_the_exit_codes(raysae):
    ended = raysae("--help")
    assert ended.code == 0
    assert [name for name in COMMANDS if f" {name} " not in ended.out] == []
    assert "Exit codes: 0 done, 1 every trial failed or" in ended.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_of_itself(name: str, raysae):
    ended = raysae(name, "--help")
    assert ended.code == 0
    example = "python run_search.py" if name == "search" else f"raysae {name}"
    assert f"Example: {example}" in ended.out
    assert "Exit codes" in ended.out


def test_plan_says_what_search_plan_says(raysae, monkeypatch):
    monkeypatch.setattr("raysae.search.estimate._seconds_a_step", lambda *_: 0.01)
    options = ["--space", "seed_runs.yaml", "--set", "training.tokens=409600"]
    planned, searched = raysae("plan", *options), raysae("search", "--plan", *options)
    assert planned.code == searched.code == 0
    assert "409,600 tokens a trial" in planned.out
    plans = [ended.out.splitlines() for ended in (planned, searched)]
    # The memory that is free, and the time that steps take, are measured anew.
    measured = [line.startswith(("time ", "packs ")) for line in plans[0]]
    assert sum(measured) == 2
    for one, other, timed in zip(*plans, measured, strict=True):
        assert one == other or timed


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["plan", "--space", "orht"], "--space orht: no such file"),
        (
            ["plan", "--set", "training.batch_size=200000", "--set", "training.tokens=200000000"],
            "training.batch_size: 200,000 rows, and",
        ),
        (["search", "--out", "s3://bucket/run"], "--out s3://bucket/run: must be a folder"),
        (["plan", "--set", "resources.cache=s3://bucket"], "resources.cache s3://bucket: must be"),
        (["status", "nowhere"], "nowhere: no such folder"),
        (["world", "embeded"], "unknown world 'embeded': valid are 'embedded'"),
        (["push", "nowhere", "me/sae"], "nowhere: no best SAE there"),
        (["evaluate", "nowhere"], "nowhere: no SAELens SAE there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_message(arguments: list[str], part: str, raysae):
    ended = raysae(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {part}")
    assert len(ended.err.splitlines()) == 1


def test_a_world_is_described_with_questions_that_it_asks(raysae):
    ended = raysae("world", "embedded", "--examples", "2")
    world = load_world("embedded")
    assert ended.code == 0
    for questions in world.questions.values():
        for question in questions[:2]:
            assert question.question in ended.out
            assert f"{question.choices[question.answer]}  ← right" in ended.out
        assert questions[2].question not in ended.out
    assert ended.out.count("← right") == 2 * len(world.questions)
    assert world.fingerprint()[:16] in ended.out
    assert "4 layers, d_in 128" in ended.out
    assert "blocks.0.hook_resid_post to blocks.2.hook_resid_post" in ended.out


def test_a_world_can_be_described_without_examples(raysae):
    ended = raysae("world", "--examples", "0")
    assert ended.code == 0
    assert "right" not in ended.out.replace("answered right", "")


def test_describing_a_world_needs_neither_ray_nor_torch(tmp_path: Path):
    trap = tmp_path / "trap"
    trap.mkdir()
    for heavy in ("ray", "torch", "pandas", "transformers", "sklearn"):
        (trap / f"{heavy}.py").write_text(f"raise SystemExit('{heavy} was imported')\n")
    code = "import sys; from raysae.cli import commands; commands()"
    done = subprocess.run(
        [sys.executable, "-c", code, "world"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(trap)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- Storage --------------------------------------------------------------------------------------

NOBODY = "s3://me:secret@bucket/pre?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--storage", NOBODY], "--storage s3://bucket/pre: When listing objects under key 'pre/"),
        (["--storage", "s4://bucket/pre"], "--storage s4://bucket/pre: Unrecognized filesystem"),
        (["--storage", "file:///proc/pre"], "--storage file:///proc/pre: [Errno 2] Cannot create"),
        (["--storage", "file:///"], "needs a bucket or a folder"),
        (["--storage", "me:secret"], "storage: must be an address: s3://bucket/prefix, gs://"),
        (["--set", "storage=me:secret"], "storage: must be an address: s3://bucket/prefix, gs://"),
        (["--resume", NOBODY], "--resume s3://bucket/pre: When listing objects under key 'pre/"),
        (["--resume", "file:///nowhere/run"], "--resume file:///nowhere/run: no run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_store_that_cannot_be_used_is_bad_input(arguments: list[str], part: str, command):
    ended = command(*arguments)
    assert_refused(ended, part)
    assert "secret" not in ended.err


@pytest.mark.parametrize("how", ["--storage", "--set", "space file"])
def test_a_search_is_mirrored_under_its_own_name(
    how: str, tmp_path: Path, command, searched, stored
):
    address = f"file://{tmp_path}/runs"
    space = tmp_path / "space.yaml"
    space.write_text(ORTH.read_text() + f"storage: {address}\n" * (how == "space file"))
    options = {"--storage": [how, address], "--set": [how, f"storage={address}"]}.get(how, [])
    assert command("--space", str(space), "--out", "here", *options).code == 0
    assert stored == [f"{address}/here"]
    assert searched[0][0].storage == address


def test_secrets_of_an_address_are_in_no_config():
    config = load_config(ORTH, {"storage": "s3://me:secret@bucket/pre?region=x"})
    assert run.resolve(config).storage == "s3://bucket/pre"


# --- Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [[], ["config.yaml"], ["about.json"]])
def test_a_folder_without_a_search_cannot_be_resumed(tmp_path: Path, there: list[str], command):
    for name in there:
        (tmp_path / name).write_text("{}")
    ended = command("--resume", str(tmp_path))
    assert ended.code == 2
    assert f"--resume {tmp_path}: no search has begun there" in ended.err


@pytest.mark.parametrize(
    "option", [["--seed", "3"], ["--seed", "0"], ["--space", "alpha.yaml"], ["--smoke"]]
)
def test_a_resumed_search_keeps_its_settings(option: list[str], tmp_path: Path, command):
    ended = command("--resume", str(tmp_path), *option)
    assert ended.code == 2
    assert f"{option[0]}: a resumed search keeps its own settings" in ended.err


def test_a_world_that_has_changed_is_not_gone_on_with(tmp_path: Path, command):
    config = run.resolve(load_config(ORTH)).model_dump(mode="json", by_alias=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    about = {"world_fingerprint": "another", "sessions": [], "started": "", "versions": {}}
    (tmp_path / "about.json").write_text(json.dumps(about))
    ended = command("--resume", str(tmp_path))
    assert ended.code == 2
    assert "is not the one of that search any more" in ended.err


def test_only_a_mirror_is_resumed_in_another_folder(tmp_path: Path, command):
    ended = command("--resume", str(tmp_path), "--out", "elsewhere")
    assert ended.code == 2
    assert "--out: a resumed search keeps its run folder" in ended.err


def test_a_mirror_is_not_fetched_over_another_run(tmp_path: Path, command):
    for folder in (tmp_path / "copies" / "run", Path("runs/run")):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    ended = command("--resume", f"file://{tmp_path}/copies/run")
    assert ended.code == 2
    assert "runs/run is there already; go on with it by --resume runs/run" in ended.err
