"""What a world needs from the Hugging Face hub: found on this machine, fetched, or asked for.

Everything is fetched by Hugging Face's own library into its own cache, once. Whether the hub
answers is asked once and in seconds: without it, what is missing is named at once, and not after
the retries of every single download.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from raysae.errors import UserError, first_line
from raysae.worlds.spec import HubWorld, LocalWorld, Source

PROBE_SECONDS = 5.0
MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
DATA_FILES = ["README.md", "*.parquet", "*.json", "*.jsonl", "*.csv", "*.txt"]
COMMIT = re.compile(r"[0-9a-f]{40}")
GATED = ("google/gemma", "meta-llama/", "cais/wmdp-bio-forget-corpus")
"""Known beginnings of repositories that want their terms accepted; others are told by the hub."""


@dataclass
class Shopping:
    """Everything a world lacks, so that it is said at once."""

    missing: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    """By repository: how to get it, and the fields that want it."""

    def add(
        self, what: str, repository: str, kind: str, why: str, revision: str | None = None
    ) -> None:
        """Note a repository that could not be had."""
        dataset = " --repo-type dataset" if kind == "dataset" else ""
        dataset += "" if revision is None else f" --revision {revision}"
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
        gated = f" (gated: accept its terms at {page})" if repository.startswith(GATED) else ""
        how = f"{repository}{gated}: {why}; get it with: hf download{dataset} {repository}"
        self.missing.setdefault(repository, (how, []))[1].append(what)

    def check(self, spec: HubWorld | LocalWorld) -> None:
        """Raise UserError if anything is missing."""
        if not self.missing:
            return
        state = "answers" if hub_answers() else "cannot be reached, or HF_HUB_OFFLINE is set"
        raise UserError(
            f"world: {spec.label!r} lacks what follows (the hub {state}):\n"
            + "\n".join(f"  {', '.join(fields)}: {how}" for how, fields in self.missing.values())
            + "\nGated repositories also need a token (`hf auth login`, or HF_TOKEN). A machine "
            "without a network can be given copies: `hf download … --local-dir DIR/OWNER/NAME` "
            "elsewhere, and `folder: DIR` in the world"
        )


def model_folder(
    spec: HubWorld | LocalWorld,
    which: str,
    shopping: Shopping | None = None,
    *,
    config_only: bool = False,
) -> Path:
    """Return the folder of `spec.model` or `spec.score_model`, fetched if need be.

    Args:
        spec: the world.
        which: ``model`` or ``score_model``.
        shopping: takes down what is missing; None: it is raised as UserError.
        config_only: config.json is enough.
    """
    name = getattr(spec, which)
    if isinstance(spec, LocalWorld) or Path(name).is_dir():
        return Path(name)
    revision = spec.revision if which == "model" else spec.score_revision
    patterns = ["config.json"] if config_only else MODEL_FILES
    mine = shopping or Shopping()
    found = _fetch(spec, which, name, "model", revision, patterns, mine)
    if shopping is None:
        mine.check(spec)
    return found


def data_place(spec: HubWorld | LocalWorld, name: str, source: Source, shopping: Shopping) -> Path:
    """Return the file or folder of a source, fetched if need be; `name` is its field."""
    if source.path is not None:
        return Path(source.path)
    assert source.dataset is not None and isinstance(spec, HubWorld)
    patterns = DATA_FILES
    if source.config is not None:  # as the hub lays them out; not all the others' files as well
        patterns = ["README.md", f"{source.config}/*"]
    return _fetch(spec, name, source.dataset, "dataset", source.revision, patterns, shopping)


def commit_of(place: Path) -> str | None:
    """The commit that a folder of a repository has: by its name in Hugging Face's cache, or noted
    beside each file that `hf download --local-dir` wrote.

    None for what is neither, and for files of several commits.
    """
    if place.parent.name == "snapshots":
        return place.name
    notes = (place / ".cache" / "huggingface" / "download").rglob("*.metadata")
    commits = {note.read_text(encoding="utf-8").partition("\n")[0].strip() for note in notes}
    (commit,) = commits if len(commits) == 1 else ("",)
    return commit if COMMIT.fullmatch(commit) else None


def hub_answers() -> bool:
    """Whether the hub can be reached; False in offline mode, which a plan switches on for itself.

    Asked once a process.
    """
    import huggingface_hub.constants

    asked_to_stay = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return not (asked_to_stay or huggingface_hub.constants.HF_HUB_OFFLINE) and _probe()


@cache
def _probe() -> bool:
    import huggingface_hub.constants
    from huggingface_hub import get_session

    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the HTTP library's own types, which huggingface_hub does not re-export
        return False
    return True


def _fetch(
    spec: HubWorld,
    what: str,
    repository: str,
    kind: str,
    revision: str | None,
    patterns: list[str],
    shopping: Shopping,
) -> Path:
    """The folder of a repository; where there is none, a line of `shopping` and any path."""
    copy = None if spec.folder is None else Path(spec.folder) / repository
    if copy is not None and copy.is_dir():
        commit = commit_of(copy)
        if COMMIT.fullmatch(revision or "") and commit not in (None, revision):
            why = f"{copy} was downloaded at commit {commit}, and {revision} is asked for"
            shopping.add(what, repository, kind, why, revision)
        return copy
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        found = Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=not hub_answers(),
            )
        )
    except GatedRepoError:
        shopping.add(what, repository, kind, "access was not granted to this account")
    except RepositoryNotFoundError:
        shopping.add(what, repository, kind, "there is none of that name, or it is private")
    except Exception as error:  # network, file system and cache raise dozens of types
        here = "on this machine" if copy is None else f"in {copy}, and not in the hub's cache"
        why = f"not {here}" if not hub_answers() else first_line(error)
        shopping.add(what, repository, kind, why)
    else:
        if any(path.is_file() for path in found.rglob("*")):
            return found
        shopping.add(what, repository, kind, f"its files are not in {found}")
    return Path(repository)
