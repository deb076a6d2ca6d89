"""fANOVA importances of parameters, and how large chance makes them.

Functional analysis of variance of a random forest (Hutter, Hoos and Leyton-Brown, 2014): the share
of the forest's variance over the search space that a parameter's marginal has by itself. Optuna's
evaluator walks every tree in Python for every cell of a marginal, which is too slow to be done
again for shuffled scores; here the leaves' boxes are arrays. The numbers are Optuna's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

TREES, DEPTH = 16, 6
SHUFFLES = 39
"""With the measured one 40 draws, of which the two largest are 5 %."""
LEVEL = 0.05


@dataclass(frozen=True)
class Importances:
    """By parameter; they sum to 1 whatever the data."""

    measured: dict[str, float]
    by_chance: dict[str, float]
    """What chance exceeds for some parameter in 5 % of the data sets in which none matters."""

    @property
    def above(self) -> list[str]:
        """Parameters that are more important than by chance, the most important first."""
        ranked = sorted(self.measured, key=lambda name: -self.measured[name])
        return [name for name in ranked if self.measured[name] > self.by_chance[name]]


def importances(trials: list[Any], values: np.ndarray, names: list[str]) -> Importances:
    """Importances for the values, and their bar from shuffled ones.

    A permutation test of all parameters at once: a draw's statistic is its largest importance over
    the parameters, each in units of its own spread over all draws, since one with many values gets
    more by chance than one with two. The measured draw is one of them, so that where no parameter
    matters it is among the largest 5 % in 5 % of the data sets.

    Args:
        trials: Optuna's, which all have these parameters.
        values: (n,) their scores.
        names: of the parameters.
    """
    names = sorted(names)  # as Optuna: a tree that can split in two ways asks the order
    space = _Space(trials, names)
    rng = np.random.default_rng(0)
    shuffled = [space.importances(rng.permutation(values)) for _ in range(SHUFFLES)]
    draws = np.array([space.importances(values), *shuffled])
    middle, spread = draws.mean(axis=0), draws.std(axis=0)
    units = np.divide(draws - middle, spread, out=np.zeros_like(draws), where=spread > 1e-12)
    largest = np.sort(units[1:].max(axis=1))
    bar = middle + spread * largest[-int(LEVEL * (1 + SHUFFLES))]
    return Importances(
        dict(zip(names, draws[0].tolist(), strict=True)),
        dict(zip(names, bar.tolist(), strict=True)),
    )


class _Space:
    """The trials' parameters as columns, as Optuna encodes them: a column a number, on its own
    scale, and a column of 0 and 1 for every choice of a category."""

    def __init__(self, trials: list[Any], names: list[str]) -> None:
        from optuna.distributions import CategoricalDistribution

        columns: list[np.ndarray] = []
        bounds: list[tuple[float, float]] = []
        self.groups: list[list[int]] = []
        """By parameter, its columns."""
        for name in names:
            distribution = trials[0].distributions[name]
            values = [trial.params[name] for trial in trials]
            first = len(columns)
            if isinstance(distribution, CategoricalDistribution):
                columns += [np.array([v == c for v in values]) for c in distribution.choices]
                bounds += [(0.0, 1.0)] * len(distribution.choices)
            else:
                columns.append(np.array(values))
                bounds.append((distribution.low, distribution.high))
            self.groups.append(list(range(first, len(columns))))
        self.columns = np.column_stack(columns).astype(float)
        self.low, self.high = np.array(bounds, dtype=float).T

    def importances(self, values: np.ndarray) -> np.ndarray:
        """(parameters,), of sum 1; zeros where no tree has a split."""
        from sklearn.ensemble import RandomForestRegressor

        forest = RandomForestRegressor(TREES, max_depth=DEPTH, random_state=0)
        forest.fit(self.columns, values)
        shares = [self._shares(estimator.tree_) for estimator in forest.estimators_]
        found: np.ndarray = np.mean(
            [share for share in shares if share is not None] or [self._none()], axis=0
        )
        return found / (found.sum() or 1.0)

    def _none(self) -> np.ndarray:
        return np.zeros(len(self.groups))

    def _shares(self, tree: Any) -> np.ndarray | None:
        """(parameters,) of the tree's variance over the space, by each parameter alone; None where
        it is 0."""
        low, high = self._boxes(tree)
        leaves = tree.feature < 0
        low, high, predicted = low[leaves], high[leaves], tree.value[leaves, 0, 0]
        widths = (high - low) / (self.high - self.low)
        volumes = widths.prod(axis=1)
        mean = volumes @ predicted
        variance = volumes @ (predicted - mean) ** 2
        if variance <= 0:
            return None
        shares = self._none()
        for parameter, group in enumerate(self.groups):
            inside, sizes = self._cells(low, high, group)
            others = volumes / widths[:, group].prod(axis=1)
            marginal = inside @ (others * predicted) / (inside @ others)
            shares[parameter] = sizes @ (marginal - mean) ** 2 / variance
        return shares

    def _boxes(self, tree: Any) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of every node's part of the space, (nodes, columns) each."""
        low, high = (np.tile(bound, (tree.node_count, 1)) for bound in (self.low, self.high))
        nodes = np.array([0])
        while len(nodes):
            nodes = nodes[tree.feature[nodes] >= 0]
            left, right = tree.children_left[nodes], tree.children_right[nodes]
            for children in (left, right):
                low[children], high[children] = low[nodes], high[nodes]
            high[left, tree.feature[nodes]] = low[right, tree.feature[nodes]] = tree.threshold[
                nodes
            ]
            nodes = np.concatenate([left, right])
        return low, high

    def _cells(
        self, low: np.ndarray, high: np.ndarray, group: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The cells into which the leaves cut the space of these columns: which leaves lie over
        each, bool (cells, leaves), and its share of that space (cells,)."""
        inside, sizes = np.ones((1, len(low)), dtype=bool), np.ones(1)
        for column in group:
            edges = np.unique(np.concatenate([low[:, column], high[:, column]]))
            if len(edges) == 2:  # not cut
                continue
            middles = (edges[1:] + edges[:-1])[:, None] / 2
            here = (low[:, column] < middles) & (middles < high[:, column])
            inside = (inside[:, None] & here).reshape(-1, len(low))
            sizes = np.outer(sizes, np.diff(edges) / (edges[-1] - edges[0])).ravel()
        return inside, sizes
