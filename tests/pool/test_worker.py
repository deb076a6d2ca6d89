"""What a worker finds out before it takes a trial."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from raysae.pool import worker
from raysae.pool.worker import _join_group, not_shared


def test_a_run_folder_that_another_node_does_not_see_is_named(tmp_path: Path):
    assert "does not see the run folder" in not_shared(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert not_shared(tmp_path) == ""


@pytest.mark.parametrize(
    ("size", "groups"), [(4, [0, 0, 1, 1]), (5, [0, 0, 1, 1, None]), (3, [0, 0, None])]
)
def test_workers_that_fill_no_whole_group_are_left_over(
    size: int, groups: list[int | None], monkeypatch: pytest.MonkeyPatch
):
    made: list[list[int]] = []

    class Members(dist.ProcessGroup):
        def __init__(self) -> None:
            super().__init__(0, 2)

    def new_group(ranks: list[int]) -> Members:
        made.append(ranks)
        return Members()

    monkeypatch.setattr(worker.dist, "new_group", new_group)
    monkeypatch.setattr(worker, "Group", lambda members: members)
    for rank, wanted in enumerate(groups):
        made.clear()
        joined = _join_group(rank, size, 2)
        assert (None if joined is None else joined[0]) == wanted
        # Every process makes every group, or the others would wait for it.
        assert made == [[0, 1], [2, 3]][: size // 2]
