"""Plotting a run leaves a notebook's matplotlib backend and current figure alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot

from fastgpt2 import TrainConfig, train
from fastgpt2.reporters.display import plot_losses


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    before = matplotlib.get_backend(auto_select=False)
    matplotlib.use("svg")
    mine = pyplot.figure()
    try:
        result = train(TrainConfig(model="tiny", steps=2, save_every=0, out=tmp_path / "run", device="cpu"))
        assert plot_losses(tmp_path / "run", result).read_bytes().startswith(b"\x89PNG")
        assert matplotlib.get_backend() == "svg"
        assert pyplot.gcf() is mine and len(pyplot.get_fignums()) == 1
    finally:
        pyplot.close(mine)
        matplotlib.use(before or "agg")
