"""Drawing leaves a notebook's matplotlib alone: its backend, and the figure that it draws on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

from bench.report import plots
from fastgpt2 import TrainConfig, train
from fastgpt2.display import plot_losses


def a_run(folder: Path) -> Path:
    result = train(TrainConfig(model="tiny", steps=2, save_every=0, out=folder / "run", device="cpu"))
    return plot_losses(folder / "run", result)


def a_figure(folder: Path) -> Path:
    panel = {"title": "t", "x": "T", "y": "ms", "lines": [plots.line("ours", "ours", [1, 2], [3.0, 4.0])]}
    plots.draw({"title": "t", "note": "n", "panels": [panel]}, folder / "figure.png")
    return folder / "figure.png"


@pytest.mark.parametrize("draw", [a_run, a_figure])
def test_pyplot_is_left_alone(tmp_path: Path, draw: Callable[[Path], Path]) -> None:
    before = matplotlib.get_backend(auto_select=False)
    matplotlib.use("svg")
    mine = pyplot.figure()
    try:
        assert draw(tmp_path).read_bytes().startswith(b"\x89PNG")
        assert matplotlib.get_backend() == "svg"
        assert pyplot.gcf() is mine and len(pyplot.get_fignums()) == 1
    finally:
        pyplot.close(mine)
        matplotlib.use(before or "agg")
