"""Shared parts of all figures: distinguishable colours, panel grids, and a legend that covers nothing.

Independent of what is drawn. The state of pyplot is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hf_earlyexit.common.extras import require


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, distinguishable under colour blindness, without yellow (faint on white) and black (used for
# the static decoder). There are more markers than colours, so that pairs repeat late.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
LOOK = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def panel_grid(count: int, most_columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of `size` inches each, and its panels row by row."""
    rows = math.ceil(count / most_columns)
    columns = math.ceil(count / rows)
    with require("matplotlib", "report").rc_context(LOOK):
        figure = require("matplotlib.figure", "report").Figure(
            figsize=(columns * size[0] + 0.5, rows * size[1] + 0.9), layout="constrained", facecolor="white"
        )
        panels = figure.subplots(rows, columns, squeeze=False, **shared).ravel().tolist()
    for panel in panels[:count]:
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.set_axisbelow(True)
    for place, panel in enumerate(panels[count:], count):
        panel.set_visible(False)
        panels[place - columns].tick_params(labelbottom=True)  # the hidden panel below would have carried the labels
    return figure, panels[:count]


def shared_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Add one legend for all panels, above them, where it covers nothing."""
    labelled = [panel.get_legend_handles_labels() for panel in panels]
    entries = {label: handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)}
    figure.legend(
        entries.values(), entries, loc="outside upper center", ncols=min(4, (len(entries) + 1) // 2), edgecolor="none"
    )
