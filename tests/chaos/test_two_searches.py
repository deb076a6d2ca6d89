"""Two searches at the same time on one machine, with one cache, are as if each had been alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from victims import Search, differences, results

from raysae.store.cache import MANIFEST

pytestmark = [pytest.mark.search, pytest.mark.slow]
OPTIONS = ["--smoke", "--set", "resources.workers=1"]
"""One worker, so that the sampler hears of results in the same order."""


def begin(out: Path, cache: Path) -> Search:
    return Search(out, *OPTIONS, "--out", str(out), RAYSAE_CACHE=str(cache))


def test_both_end_with_the_trials_that_each_has_alone(tmp_path: Path):
    alone = begin(tmp_path / "alone", tmp_path / "its-cache")
    assert alone.wait(400) == 0, alone.tail()
    wanted = results(alone.out)
    assert [trial["state"] for trial in wanted] == ["finished"] * 3

    # Both find the cache empty, harvest, and write the same entries.
    cache = tmp_path / "shared-cache"
    searches = [begin(tmp_path / name, cache) for name in ("one", "other")]
    try:
        for search in searches:
            assert search.wait(600) == 0, search.tail()
    finally:
        for search in searches:
            if not search.ended:
                search.kill()
    for search in searches:
        assert differences(wanted, results(search.out)) == []
    manifests = {
        kind: len([*cache.glob(f"{kind}/*/{MANIFEST}")]) for kind in ("activations", "evaluation")
    }
    assert manifests == {"activations": 1, "evaluation": 1}
    assert not [path for path in cache.rglob("*") if path.name.startswith(".")]  # half-written
