"""The pictures without axes: the four slots, as fastgpt2/slots.py lists them, and the live terminal."""

from __future__ import annotations

import re

from bench.pictures import style
from bench.pictures.measure import COLUMNS, FOLDER
from bench.pictures.style import FAINT, INK, Svg
from bench.record import load
from fastgpt2.slots import SLOTS

STEPS: tuple[tuple[str, str], ...] = (
    ("tokens", ""),
    ("embedding", ""),
    ("add and norm", "norm"),
    ("attention", "attn"),
    ("add and norm", "norm"),
    ("MLP", "mlp"),
    ("add and norm", "norm"),
    ("head and loss", "loss"),
)
"""What a batch passes, and the slot that computes it."""
BLOCK = slice(2, 6)
"""The steps that each of the L blocks repeats."""
ROW, TOP = 46, 84
"""Pixels from one step to the next, and above the first."""


def slots() -> str:
    """GPT-2's step as a chain of boxes, each slot with all that can compute it."""
    svg = Svg(760, TOP + ROW * len(STEPS) + 34)
    svg.text(20, 30, "Four slots: a flag chooses what computes each", font_size=17, font_weight="bold")
    svg.text(20, 54, "Filled is ours, outlined is PyTorch's. All compute the same GPT-2.", fill=FAINT)
    top, bottom = TOP + ROW * BLOCK.start - 8, TOP + ROW * BLOCK.stop - 8
    svg.box(14, top, 732, bottom - top, fill="#f6f8fa", stroke=style.GRID)
    svg.text(22, (top + bottom) / 2, "× L", fill=FAINT)
    for place, (words, slot) in enumerate(STEPS):
        _step(svg, TOP + ROW * place, words, slot, last=place + 1 == len(STEPS))
    own = "Also auto, the default, and module:function for your own."
    svg.text(226, TOP + ROW * len(STEPS) + 14, own, fill=FAINT)
    return str(svg)


def _step(svg: Svg, y: float, words: str, slot: str, *, last: bool) -> None:
    """A box, the arrow to the next one, and to its right the slot's flag and implementations."""
    colour = style.SLOTS.get(slot, FAINT)
    svg.box(56, y, 150, 30, fill="white", stroke=colour, stroke_width=1.5)
    svg.text(131, y + 20, words, text_anchor="middle")
    if not last:
        svg.add("path", d=f"M131 {y + 30}V{y + ROW - 5}m-4 -1l4 6l4 -6z", stroke=FAINT, fill=FAINT)
    if not slot:
        return
    svg.text(226, y + 20, f"--{slot}", fill=colour, font_weight="bold", font_family=style.MONOSPACE)
    x = 300.0
    for name, known in SLOTS[slot].items():
        width = 8.2 * len(name) + 14
        svg.box(x, y + 3, width, 24, fill=colour if known.ours else "white", stroke=colour)
        look = {"fill": "white" if known.ours else INK, "text_anchor": "middle", "font_family": style.MONOSPACE}
        svg.text(x + width / 2, y + 20, name, **look)
        x += width + 8


# ------------------------------------------------------------------------------------------------ terminal

CELL, LINE = 8.4, 18
"""Pixels of a character and of a line."""
DARK, LIGHT = "#161b22", "#e6edf3"
SHADES = {"default": LIGHT, "brightblack": "#8b949e", "green": "#3fb950", "brown": "#d29922", "red": "#ff7b72"}
SHADES |= {"cyan": "#39c5cf", "magenta": "#bc8cff", "blue": "#58a6ff"}
"""What the terminal's colours look like; pyte calls yellow brown. Others are hexadecimal already."""


def terminal() -> str:
    """The first run as its terminal showed it."""
    run = load(FOLDER / "first-run.json").training_runs[0]
    typed = re.findall(f".{{1,{COLUMNS}}}", f"$ {run.command}")
    lines = [*([(part, "default", True)] for part in typed), *run.screen]
    width, height = round(CELL * COLUMNS) + 32, LINE * len(lines) + 52
    svg = Svg(width, height, paper=DARK, family=style.MONOSPACE)
    svg.add("rect", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=6, fill="none", stroke="#30363d")
    for number, colour in enumerate(("#ff5f57", "#febc2e", "#28c840")):
        svg.add("circle", cx=20 + 18 * number, cy=18, r=5.5, fill=colour)
    for number, line in enumerate(lines):
        x = 16.0
        for text, colour, bold in line:
            if text.strip():
                look = {"fill": SHADES.get(colour, f"#{colour}"), "font_weight": "bold" if bold else "normal"}
                # The length keeps columns straight whatever the font.
                length = {"textLength": round(CELL * len(text), 1), "lengthAdjust": "spacingAndGlyphs"}
                svg.text(round(x, 1), 52 + LINE * number, text, font_size=14, **look, **length)
            x += CELL * len(text)
    return str(svg)
