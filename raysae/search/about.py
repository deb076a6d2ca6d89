"""What a run folder tells of its search: config.yaml and about.json, written before it begins."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from raysae import __version__, products
from raysae.config import RunConfig
from raysae.search.cluster import Plan
from raysae.search.ending import ABOUT_FILE, CONFIG_FILE
from raysae.store.files import replacing
from raysae.unlearning import compiled
from raysae.worlds.world import World, score_name

PACKAGES = (
    "ray", "torch", "transformers", "transformer-lens", "sae-lens", "sae-bench",
    "optuna", "datasets", "numpy", "pandas", "scikit-learn",
)  # fmt: skip


def write_about(config: RunConfig, run_dir: Path, world: World, started: float) -> str:
    """config.yaml and about.json; a resumed search adds itself to its `sessions`.

    Returns:
        in words, which of versions, commit, Python and what else makes numbers round as they do are
        not, in a resumed search, as it began with; "" where all are.
    """
    path = run_dir / ABOUT_FILE
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    code = {
        "versions": {"raysae": __version__} | {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        # Of this machine: what else makes results round as they do.
        "products": products.library(),
        "layers": compiled.described(),
    }
    session = {"started": started, "host": platform.node(), **code}
    resolved = config.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    # A session that is killed here must leave what the next one reads.
    with replacing(run_dir / CONFIG_FILE) as draft:
        draft.write_text(text, encoding="utf-8")
    about = {
        "sessions": [*earlier.get("sessions", []), session],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **code,
        "platform": platform.platform(),
        "world_fingerprint": world.fingerprint(),
        "world_sources": dict(world.sources),
        "score_name": score_name(world.permutations),
        "seed": config.search.seed,
    }
    # As it was at the start, whatever a later session runs on.
    _write_json(path, about | {**earlier, "sessions": about["sessions"]})
    return _changes(earlier, code)


def add_plan(run_dir: Path, plan: Plan) -> None:
    """Into about.json, as it was for the first session that had one."""
    path = run_dir / ABOUT_FILE
    _write_json(path, {"plan": vars(plan)} | json.loads(path.read_text(encoding="utf-8")))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _changes(earlier: dict[str, Any], code: dict[str, Any]) -> str:
    """What of the code is not as in an earlier about.json, which may have been written by a version
    that said less."""

    def flat(about: dict[str, Any]) -> dict[str, Any]:
        one = {name: about.get(name) for name in ("python", "git_commit", "products", "layers")}
        return {k: v for k, v in {**about.get("versions", {}), **one}.items() if v is not None}

    before, now = flat(earlier), flat(code)
    return ", ".join(
        f"{name.replace('git_commit', 'commit')} {now[name]}, then {before[name]}"
        for name in before
        if name in now and before[name] != now[name]
    )


def _git_commit() -> str | None:
    """Commit of the source tree, with "-dirty" if it has changes; None outside of git."""
    root = Path(__file__).resolve().parent.parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
