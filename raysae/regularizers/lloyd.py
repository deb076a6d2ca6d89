"""k-means from centroids that are there, on whatever device the points are on.

scikit-learn's, which has no GPU, takes over a second for the features of a large SAE, in which a
GPU takes hundreds of training steps. This is the same iteration, for the one case that comes again
and again: starting from the centroids of before.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lloyd(
    points: Tensor, centroids: Tensor, iterations: int = 20, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor] | None:
    """Labels (n,) int64 and centroids (k, d), as `sklearn.cluster.KMeans` finds them.

    Source: S. P. Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information
    Theory 28, 1982; it stops as scikit-learn's does.

    Args:
        points: (n, d).
        centroids: (k, d) to start from.
        iterations: at most.
        tolerance: stop when the centroids' squared moves add up to less than this share of the
            points' mean variance.

    Returns:
        None where a centroid loses its last point: scikit-learn gives it another one.
    """
    limit = tolerance * points.var(0, correction=0).mean()
    labels = None
    for _ in range(iterations):
        found = _nearest(points, centroids)
        counts = torch.bincount(found, minlength=len(centroids))
        if not counts.all():
            return None
        sums = torch.zeros_like(centroids).index_add_(0, found, points)
        before, centroids = centroids, sums / counts[:, None]
        if labels is not None and torch.equal(found, labels):
            return found, centroids
        labels = found
        if (centroids - before).pow(2).sum() <= limit:
            break
    return _nearest(points, centroids), centroids


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    # ‖x − c‖² without ‖x‖², which is the same for all centroids.
    return torch.addmm(centroids.pow(2).sum(1), points, centroids.T, alpha=-2).argmin(1)
