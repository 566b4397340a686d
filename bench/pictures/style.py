"""The look that all pictures share: colours, fonts, and SVG files that are the same at every drawing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PAPER, INK, FAINT, GRID = "#ffffff", "#24292f", "#57606a", "#d8dee4"
"""White, as transparent pictures lose their text on dark pages; text, captions and grid."""
BLUE, RED, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#999999"
"""Okabe and Ito's colours, which colour-blind readers can tell apart; the purple is darker, to carry white text."""
SLOTS = {"attn": BLUE, "mlp": RED, "norm": GREEN, "loss": PURPLE}
MONOSPACE = "DejaVu Sans Mono, Menlo, Consolas, monospace"
SANS = "DejaVu Sans, Verdana, Arial, sans-serif"

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastgpt2",  # the same ids at every drawing
    "font.family": "DejaVu Sans",  # ships with matplotlib: the layout is the same on every machine
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@contextmanager
def plot(width: float, height: float, title: str, subtitle: str, caption: str) -> Iterator[Figure]:
    """A figure of so many inches in our style, with a title above and where its numbers come from below."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height))
        figure.text(0.02, 1 - 0.18 / height, title, fontsize=13, fontweight="bold", va="top")
        figure.text(0.02, 1 - 0.46 / height, subtitle, fontsize=10, color=FAINT, va="top")
        figure.text(0.02, 0.12 / height, caption, fontsize=7.5, color=FAINT, va="bottom")
        yield figure


def quiet(axes: Axes, *, ticks: bool = True) -> None:
    """Leave the axes without frame, and without ticks where bars carry their own numbers."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if not ticks:
        axes.set_xticks([])


def as_svg(figure: Figure) -> str:
    """A figure as SVG, without a date: the same version of matplotlib writes the same bytes."""
    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(file, format="svg", metadata={"Date": None})
    lines = file.getvalue().replace("'DejaVu Sans Mono'", MONOSPACE).replace("'DejaVu Sans'", SANS).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


class Svg:
    """An SVG that is drawn by hand: text, boxes and arrows, in pixels."""

    def __init__(self, width: int, height: int, paper: str = PAPER, family: str = SANS) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="{family}">',
            f'<rect width="{width}" height="{height}" rx="6" fill="{paper}"/>',
        ]

    def add(self, tag: str, text: str = "", **attributes: Any) -> None:
        """Add an element; `_` in a name stands for `-`."""
        named = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self._lines.append(f"<{tag}{named}>{escape(text)}</{tag}>" if text else f"<{tag}{named}/>")

    def text(self, x: float, y: float, text: str, **attributes: Any) -> None:
        """Write text from its baseline's left end; spaces are kept."""
        text = text.replace(" ", "\u00a0")
        self.add("text", text, **{"x": x, "y": y, "font_size": 13, "fill": INK, **attributes})

    def box(self, x: float, y: float, width: float, height: float, **attributes: Any) -> None:
        """Draw a rounded box."""
        self.add("rect", x=x, y=y, **{"width": width, "height": height, "rx": 5, **attributes})

    def __str__(self) -> str:
        return "\n".join([*self._lines, "</svg>", ""])
