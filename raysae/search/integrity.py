"""The store's digest: in about.json from the first session on, compared with by every later one,
and with every copy once more when the search ends."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysae.store.files import replacing

if TYPE_CHECKING:
    from raysae.store.handle import StoreHandle


def record_store(run_dir: Path, store: StoreHandle, source: str) -> str:
    """Write to about.json which activations this session trains on.

    Other ones than those that the search began with are no reason to refuse: a search is gone on
    with on another machine, whose last digits may be others. But they are said.

    Args:
        run_dir: of a search whose about.json tells of this session.
        store: that is trained on.
        source: where it came from, in words.

    Returns:
        in words, how it is not what the search began with; "" where it is.
    """
    path = run_dir / "about.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    now = {"sha256": store.digest, "rows": store.rows, "source": source}
    first = about.setdefault("store", now)
    about["sessions"][-1]["store"] = now
    with replacing(path) as draft:
        draft.write_text(json.dumps(about, indent=1), encoding="utf-8")
    if first["sha256"] == now["sha256"]:
        return ""
    return (
        "Not as when the search began, and scores may differ for it: the activations, "
        f"{_words(now)}, then {_words(first)}"
    )


def _words(store: dict[str, Any]) -> str:
    return f"store {store['sha256'][:12]} of {store['rows']:,} rows ({store['source']})"


def check_store(store: StoreHandle) -> tuple[str, str]:
    """Compare every copy of the store with what was harvested.

    Returns:
        a line for the user, and "" or, where it has changed, why its results are not to be trusted.
    """
    import ray

    from raysae.store.copies import compare_copies

    started = time.perf_counter()
    try:
        compared = compare_copies(store)
    except ray.exceptions.RayError as error:
        return f"Store {store.digest[:12]} could not be compared: {type(error).__name__}", ""
    seconds = time.perf_counter() - started
    if compared.problems:
        return "", (
            f"the store has changed since it was harvested: {'; '.join(compared.problems[:3])} "
            f"({len(compared.problems)} of {compared.copies} copies of chunks). Something wrote to "
            "it, or a memory or disk is failing; trials may have been trained on either"
        )
    words = f"{compared.copies} copies of {len(store.chunks)} chunks on {compared.nodes} node"
    return (
        f"Store unchanged: {store.digest[:12]} ({words}{'s' * (compared.nodes != 1)} compared in "
        f"{seconds:.1f} s)"
    ), ""
