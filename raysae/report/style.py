"""Colours, marks and names that all figures of a report share."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from raysae.analysis.plots import COLOURS

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK = COLOURS
GREY = "0.75"
DPI = 150
"""Sharp on paper across a page, at about 60 kB a figure."""

NAMES = {
    "regularizer": "regularizer",
    "alpha": "α",
    "alpha_schedule": "α schedule",
    "group_update_period": "group-update period",
    "k": "k",
    "score": "unlearning score",
}
"""Parameters as a reader knows them; others keep their own names."""

RC: Any = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


@dataclass(frozen=True)
class Plot:
    """A figure of the report, drawn: what it shows and its picture."""

    name: str
    """Of its PNG in the run's `figures/`."""
    title: str
    """What it shows, in a sentence."""
    caption: str
    image: str
    """`data:` URI."""


def draw(figure: Figure, name: str, title: str, caption: str, folder: Path) -> Plot:
    """Write the figure's PNG to the folder, and keep it for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    with rc_context(RC):
        figure.savefig(path, dpi=DPI)
    return Plot(name, title, caption, embed_png(path))


def plain(axes: Axes) -> None:
    """No box, a light grid behind the data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)


def log_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, 20, … in plain figures, for a logarithmic axis of few decades."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def embed_png(path: Path) -> str:
    """A PNG file as a `data:` URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
