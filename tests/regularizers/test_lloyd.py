"""k-means on the device is scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from raysae.regularizers import grouping
from raysae.regularizers.lloyd import lloyd


def drawn(seed: int, n: int = 400, d: int = 12, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows about k directions, loosely, and centroids that are not theirs."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((k, d))[rng.integers(k, size=n)] + rng.standard_normal((n, d))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points, points[rng.choice(n, k, replace=False)]


@pytest.mark.parametrize("iterations", [1, 3, 20, 300])
@pytest.mark.parametrize("seed", range(5))
def test_labels_and_centroids_are_those_of_scikit_learn(seed: int, iterations: int):
    points, start = drawn(seed)
    theirs = KMeans(len(start), init=start, n_init=1, max_iter=iterations).fit(points)
    found = lloyd(torch.from_numpy(points), torch.from_numpy(start), iterations)
    assert found is not None
    labels, centroids = found
    assert np.array_equal(labels.numpy(), theirs.labels_)
    np.testing.assert_allclose(centroids.numpy(), theirs.cluster_centers_, atol=1e-12)


def test_a_centroid_without_points_is_left_to_scikit_learn():
    points, start = drawn(0)
    start[0] = 100.0
    assert lloyd(torch.from_numpy(points), torch.from_numpy(start)) is None


def test_on_a_gpu_only_what_starts_from_nothing_goes_to_the_host(monkeypatch: pytest.MonkeyPatch):
    """A tensor that says it is on a GPU stands in for one."""
    asked = []

    class OnGPU(torch.Tensor):
        is_cuda = True

    real = grouping.GroupingRegularizer._on_host

    def on_host(self, points, start):
        asked.append(bool(start.any()))
        return real(self, points.as_subclass(torch.Tensor), start)

    monkeypatch.setattr(grouping.GroupingRegularizer, "_on_host", on_host)
    profiles = grouping.cofiring_profiles
    monkeypatch.setattr(
        grouping, "cofiring_profiles", lambda cofiring: profiles(cofiring).as_subclass(OnGPU)
    )
    from raysae.regularizers import REGISTRY

    method = REGISTRY["grouped"](n_groups=4)
    state = method.init_state(8, 32, torch.device("cpu"))
    state["cofiring"].copy_(torch.rand(32, 32, generator=torch.Generator().manual_seed(0)))
    method._regroup(state)
    first = state["groups"].clone()
    method._regroup(state)
    assert asked == [False]
    assert torch.equal(state["groups"], first)  # it had converged
    assert len(first.unique()) == 4
