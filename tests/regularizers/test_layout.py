"""What follows from labels is found again when they are written to, and only then."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raysae.regularizers import layout as module
from raysae.regularizers.layout import layout, while_unchanged
from raysae.training.collective import Group


def test_it_is_found_once_until_the_labels_are_written_to():
    labels = torch.tensor([1, 0, 1, 1])
    first = layout(labels)
    assert layout(labels) is first and first.sizes == (1, 3)
    labels.copy_(torch.tensor([0, 0, 1, 2]))
    assert layout(labels).sizes == (2, 1, 1)
    labels[0] = 2
    assert layout(labels).sizes == (1, 1, 2)


def test_a_broadcast_is_a_write(tmp_path: Path):
    """Which torch.distributed does not count as one."""
    address = (tmp_path / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        labels = torch.tensor([1, 0, 1, 1])
        before = layout(labels)
        Group(dist.group.WORLD).broadcast_(labels)
        assert layout(labels) is not before
    finally:
        dist.destroy_process_group()


def test_each_function_has_its_own_and_nothing_outlives_the_labels():
    labels = torch.tensor([1, 0, 1])
    assert while_unchanged(labels, torch.sum).item() == 2
    assert while_unchanged(labels, torch.numel) == 3
    gone, kept = weakref.ref(labels), len(module._FOUND)
    del labels
    gc.collect()
    assert gone() is None and len(module._FOUND) < kept


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [2, 0, 0, 1, 2, 2], [0, 0, 0], [1, 1, 3]])
def test_the_layout_is_that_of_counting(labels: list[int]):
    """Labels may be missing."""
    found, n = layout(torch.tensor(labels)), len(labels)
    by_label = [[i for i in range(n) if labels[i] == of] for of in range(max(labels) + 1)]
    assert found.sizes == tuple(map(len, by_label))
    assert found.order.tolist() == [i for of in by_label for i in of]
    assert found.own_size.tolist() == [labels.count(of) for of in labels]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    assert found.pairs_within == sum(labels[i] == labels[j] for i, j in pairs)
    assert found.pairs_between == sum(labels[i] != labels[j] for i, j in pairs)
    places, there = found.padded
    assert places.shape == (len(by_label), max(map(len, by_label)))
    for row, of in enumerate(by_label):
        assert places[row, : len(of)].tolist() == of
        if there is not None:
            assert there[row, :, 0].tolist() == [True] * len(of) + [False] * (
                places.shape[1] - len(of)
            )
        else:
            assert len(of) == places.shape[1]
