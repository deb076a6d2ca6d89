"""What does not fit together in a space file, each said at the line and path of its field."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysae.config import load_config
from raysae.errors import UserError

SMALL = """
sae:
  architecture: batchtopk
  d_sae: 64
  k: 4
training: {tokens: 1000, batch_size: 10}
objective:
  baseline: none
space:
  alpha: {float: [0.1, 1.0]}
  alpha_schedule:
    constant:
    dynamic:
      every: 20
  regularizer:
    none:
    grouped:
      group_update_period: {int: [10, 20]}
      n_groups: [4, 8]
    gradient_disentangled:
      observe_every: 8
  sae:
    d_sae: 64
"""


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        (
            "group_update_period: {int: [10, 20]}",
            "group_update_period: {int: [10, 101]}",
            "space.regularizer.grouped.group_update_period: group_update_period 101 is longer than "
            "the run (100 steps)",
        ),
        (
            "n_groups: [4, 8]",
            "n_groups: [4, 65, 8]",
            "space.regularizer.grouped.n_groups: n_groups 65 is larger than d_sae 64",
        ),
        (
            "n_groups: [4, 8]",
            "n_group: [4, 8]",
            "space.regularizer.grouped.n_group: 'grouped' has no parameter 'n_group'; valid: ema, ",
        ),
        (
            "n_groups: [4, 8]",
            "n_groups: {int: [1, 8]}",
            "space.regularizer.grouped.n_groups: Input should be greater than or equal to 2, got 1",
        ),
        ("grouped:", "groupd:", "space.regularizer.groupd: unknown regularizer 'groupd'; valid: "),
        (
            "observe_every: 8",
            "observe_every: [8, 200]",
            "space.regularizer.gradient_disentangled.observe_every: observe_every 200 is longer "
            "than the run (100 steps)",
        ),
        (
            "every: 20",
            "every: {int: [20, 100]}",
            "space.alpha_schedule.dynamic.every: every 100 is not below the run's 100 steps",
        ),
        (
            "every: 20",
            "min_factor: 20",
            "space.alpha_schedule.dynamic.min_factor: min_factor 20 is above max_factor 10",
        ),
        ("constant:", "constan:", "space.alpha_schedule.constan: unknown α schedule 'constan'; "),
        (
            "  sae:\n    d_sae: 64",
            "  sae:\n    architecture: [topk, foo]",
            "space.sae.architecture: Input should be 'standard', 'gated', ",
        ),
        (
            "  sae:\n    d_sae: 64",
            "  sae:\n    architecture: [batchtopk, matryoshka_batchtopk]",
            "space.regularizer.gradient_disentangled: gradient_disentangled cannot work on "
            "matryoshka_batchtopk",
        ),
        ("  k: 4", "  k: 65", "sae.k: k 65 is larger than d_sae 64"),
        (
            "  sae:\n    d_sae: 64",
            "  sae:\n    d_sae: [64, 3]",
            "sae.k: k 4 is larger than d_sae 3",
        ),
        (
            "  sae:\n    d_sae: 64",
            "  sae:\n    l1_coefficient: 1",
            "space.sae.l1_coefficient: architecture 'batchtopk' has no 'l1_coefficient': "
            "it has 'k'",
        ),
        (
            "  architecture: batchtopk",
            "  architecture: gated",
            "sae.architecture: architecture 'gated' needs 'l1_coefficient'",
        ),
        ("  baseline: none", "  baseline: non", "objective.baseline: 'non' is not in space.regu"),
        (
            "  alpha: {float: [0.1, 1.0]}",
            "  alpha: {float: [0.1, .inf]}",
            "space.alpha.float: Input should be a finite number, got inf",
        ),
    ],
)
def test_what_does_not_fit_together_is_answered_with_line_and_path(
    line: str, instead: str, message: str, tmp_path: Path
):
    text = SMALL.replace(line, instead)
    assert text != SMALL
    rows, number = text.splitlines(), -1
    for depth, key in enumerate(message.split(":")[0].removesuffix(".float").split(".")):
        start = "  " * depth + key + ":"
        number = next(i for i in range(number + 1, len(rows)) if rows[i].startswith(start))
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    (said,) = str(caught.value).splitlines()
    assert said.startswith(f"{file}:{number + 1}: {message}")


def test_a_small_space_without_mistakes_is_read(tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL)
    assert load_config(tmp_path / "small.yaml").training.steps == 100
