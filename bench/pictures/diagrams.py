"""The pictures without axes: the four slots, as fastgpt2/slots.py lists them, and the live terminal."""

from __future__ import annotations

from bench.pictures import style
from bench.pictures.style import BLUE, FAINT, GREEN, INK, PURPLE, RED, Svg
from fastgpt2.slots import SLOTS

COLOURS = dict(zip(SLOTS, (BLUE, RED, GREEN, PURPLE), strict=True))
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
    colour = COLOURS.get(slot, FAINT)
    svg.box(56, y, 150, 30, fill="white", stroke=colour, stroke_width=1.5)
    svg.text(131, y + 20, words, text_anchor="middle")
    if not last:
        svg.add("path", d=f"M131 {y + 30}V{y + ROW - 5}m-4 -1l4 6l4 -6z", stroke=FAINT, fill=FAINT)
    if not slot:
        return
    svg.text(226, y + 20, f"--{slot}", fill=colour, font_weight="bold", font_family=style.MONOSPACE)
    x = 300.0
    for name, known in SLOTS[slot].items():
        width = 8.2 * len(name) + 20
        svg.box(x, y + 3, width, 24, fill=colour if known.ours else "white", stroke=colour)
        look = {"fill": "white" if known.ours else INK, "text_anchor": "middle", "font_family": style.MONOSPACE}
        svg.text(x + width / 2, y + 20, name, **look)
        x += width + 8
