"""The pictures with axes: each is drawn from a stored record, whose machine, date and commit stand below it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from bench.pictures import style
from bench.pictures.measure import FOLDER
from bench.record import Record, TrainingRun, Trajectory, load
from bench.report.results import newest, pick, stored
from bench.report.sections import provenance
from bench.result import Result
from fastgpt2.console import printable

NAMES = {"ours-auto": "fastgpt2", "transformers": "transformers", "plain": "plain PyTorch", "nanogpt": "nanoGPT-like"}
SAMPLE_COLUMNS, SAMPLE_LINES = 50, 17
"""What fits beside a curve."""


def caption(record: Record) -> str:
    """Where and when a record was measured, in a line."""
    return " ".join(provenance(record).strip("*").split())


def cpu_step() -> str:
    """Speed and memory of the training step on a CPU, ours beside the peers."""
    record = newest(stored(), lambda record: pick(record, "training step"))["cpu"]
    every = pick(record, "training step")
    results = largest_model(every)
    columns: list[tuple[str, Callable[[Result], float], str]] = [
        ("tokens a second: more is better", lambda result: result.tokens_per_s or 0.0, ",.0f"),
        ("peak memory in GiB: less is better", lambda result: (result.peak_memory_bytes or 0) / 2**30, ".2f"),
    ]
    with style.plot(
        8.6,
        4.6,
        "A training step on a CPU beside its peers",
        _shapes(results),
        caption(record),
    ) as figure:
        for i, (axes, (title, value, form)) in enumerate(zip(figure.subplots(1, 2), columns, strict=True)):
            _bars(axes, results, value, form, names=i == 0)
            axes.set_title(title, fontsize=10, loc="left")
        figure.subplots_adjust(left=0.24, right=0.95, top=0.78, bottom=0.09, wspace=0.18)
        return style.as_svg(figure)


def largest_model(results: Sequence[Result]) -> list[Result]:
    """The whole steps of the model that takes the most work; `products` is only a part of one."""
    model = max(results, key=lambda result: result.flops or 0.0).shape["model"]
    return [result for result in results if result.shape["model"] == model and result.backend in NAMES]


def _shapes(results: Sequence[Result]) -> str:
    """What was trained, in words: all results have the same model, and those of a precision the same batch."""
    sizes = {result.dtype: f"{result.shape['B']} in {result.dtype}" for result in results}
    shape, batches = results[0].shape, ", ".join(sizes.values())
    return f"model {shape['model']} with {shape['n_layer']} blocks; sequences of {shape['T']} tokens, {batches}"


def _bars(axes: Axes, results: Sequence[Result], value: Callable[[Result], float], form: str, *, names: bool) -> None:
    """A group of bars for each precision, eager and compiled; every bar with its number."""
    kinds = list(dict.fromkeys((result.dtype, bool(result.compiled)) for result in results))
    longest = max(map(value, results))
    labels: dict[float, str] = {}
    for group, (dtype, compiled) in enumerate(sorted(kinds, reverse=True)):
        members = {r.backend: r for r in results if (r.dtype, bool(r.compiled)) == (dtype, compiled)}
        for place, (backend, name) in enumerate((b, n) for b, n in NAMES.items() if b in members):
            y, ours = group * (len(members) + 0.7) + place, place == 0
            length = value(members[backend])
            axes.barh(y, length, height=0.86, color=style.BLUE if ours else style.GREY)
            weight = "bold" if ours else "normal"
            axes.text(length + longest / 80, y, format(length, form), va="center", fontsize=9, fontweight=weight)
            labels[y] = name
        if names:
            words = f"{dtype}\n{'compiled' if compiled else 'eager'}"
            axes.text(-0.67, group * (len(members) + 0.7) + 1, words, transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(list(labels), list(labels.values()) if names else [], fontsize=9)
    axes.set_xlim(0, 1.14 * longest)
    axes.invert_yaxis()
    style.quiet(axes, ticks=False)


# ------------------------------------------------------------------------------------------- a training run


def first_run() -> str:
    """README's first run: how its loss falls, and what the model then writes."""
    return _run("first-run")


def ten_minutes() -> str:
    """The same model given ten minutes."""
    return _run("ten-minutes")


def _run(name: str) -> str:
    record = load(FOLDER / f"{name}.json")
    run = record.training_runs[0]
    threads = record.environment["cpu_threads"]
    where = f"{_duration(run.seconds)} on {threads} core{'s' * (threads > 1)}"
    title = f"{where}: from {run.losses[0][1]:.2f} to {run.losses[-1][1]:.2f} nats a byte"
    with style.plot(8.6, 4.6, title, run.command, caption(record)) as figure:
        _losses(figure.add_axes((0.05, 0.18, 0.48, 0.59)), run)
        _sample(figure.add_axes((0.57, 0.18, 0.41, 0.59)), run)
        return style.as_svg(figure)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _losses(axes: Axes, run: TrainingRun) -> None:
    """Both curves, and the entropy that a model without context can't go below."""
    end = run.losses[-1][0]
    axes.plot(*zip(*run.losses, strict=True), color=style.BLUE, linewidth=1.4)
    axes.plot(*zip(*run.val_losses, strict=True), "o-", color=style.RED, linewidth=1.4, markersize=4)
    axes.axhline(run.unigram, color=style.FAINT, linestyle="--", linewidth=1)
    words = f"unigram entropy {run.unigram:.2f}"
    axes.text(end, run.unigram, words, ha="right", va="bottom", fontsize=9, color=style.FAINT)
    for y, words, colour in (
        (0.95, f"training, {run.losses[-1][1]:.2f} at the end", style.BLUE),
        (0.87, f"● validation, {run.loss:.2f} on the whole split", style.RED),
    ):
        axes.text(0.98, y, words, transform=axes.transAxes, ha="right", va="top", fontsize=9, color=colour)
    axes.set(xlim=(0, 1.015 * end), xlabel="step")
    axes.set_title("loss in nats a byte", fontsize=10, loc="left")
    axes.grid(axis="y")


def _sample(axes: Axes, run: TrainingRun) -> None:
    """Text that the model wrote, as it came: cut where the panel ends."""
    pieces = (re.findall(f".{{1,{SAMPLE_COLUMNS}}}", line) or [""] for line in run.sample.expandtabs(4).splitlines())
    lines = [piece for line in pieces for piece in line][:SAMPLE_LINES]
    for number, line in enumerate(lines):
        text = printable(line).replace(" ", "\u00a0")  # SVG runs spaces together
        axes.text(0.03, 0.965 - 0.96 * number / SAMPLE_LINES, text, family="DejaVu Sans Mono", fontsize=8, va="top")
    axes.set_facecolor("#f6f8fa")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title("what it then writes after “def ”", fontsize=10, loc="left")


# --------------------------------------------------------------------------------------------- the backends


def backends() -> str:
    """How far the losses of every backend are from the reference's."""
    record = load(FOLDER / "backends.json")
    steps = len(record.trajectories[0].differences)
    precisions = list(dict.fromkeys(found.dtype for found in record.trajectories))
    with style.plot(
        8.6,
        4.8,
        "Every backend follows the float64 reference",
        f"|loss - reference| as a share of its budget, the largest so far in {steps} steps; Triton interpreted",
        caption(record),
    ) as figure:
        for i, dtype in enumerate(precisions):
            found = [trajectory for trajectory in record.trajectories if trajectory.dtype == dtype]
            _differences(figure.add_axes((0.075 + 0.48 * i, 0.16, 0.315, 0.62)), found)
        return style.as_svg(figure)


def _differences(axes: Axes, found: Sequence[Trajectory]) -> None:
    """The backends of a precision, each with its name at its end."""
    budgets = " or ".join(_short(budget) for budget in sorted({trajectory.budget for trajectory in found}))
    furthest = {t.backend: [d / t.budget for d in accumulate(map(abs, t.differences), max)] for t in found}
    low = min(line[min(9, len(line) - 1)] for line in furthest.values()) / 3
    places = _apart({name: math.log10(line[-1]) for name, line in furthest.items()}, math.log10(3 / low) / 19)
    steps = len(found[0].differences)
    axes.axhspan(low, 1, color="#eef4fa", zorder=0)
    axes.axhline(1, color=style.FAINT, linestyle="--", linewidth=1)
    axes.text(steps, 1.08, f"budget: {budgets} nats", ha="right", va="bottom", fontsize=9, color=style.FAINT)
    for trajectory in found:
        name = trajectory.backend
        slot, _, choice = name.partition(" ")
        look: dict[str, Any] = {"color": style.SLOTS.get(slot, style.INK if choice else style.GREY)}
        axes.plot(range(1, steps + 1), furthest[name], **look, linewidth=1.6)
        axes.annotate(
            name,
            (steps, furthest[name][-1]),
            (1.06 * steps, 10 ** places[name]),
            arrowprops={"arrowstyle": "-", "color": look["color"], "linewidth": 0.6, "relpos": (0.0, 0.5)},
            annotation_clip=False,
            fontsize=8.5,
            va="center",
            **look,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlim=(0, steps), xlabel="step", ylim=(low, 3))
    axes.set_title(found[0].dtype, fontsize=10, loc="left")


def _short(value: float) -> str:
    """1.2e-5 rather than 1.2e-05."""
    return f"{value:.1e}".replace("e-0", "e-")


def _apart(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Places in the same order, moved until each is a gap from the next."""
    names = sorted(places, key=lambda name: places[name])
    moved = [places[name] for name in names]
    for _ in range(100):  # each round halves what overlaps
        for i in range(len(moved) - 1):
            overlap = gap - (moved[i + 1] - moved[i])
            if overlap > 0:
                moved[i] -= overlap / 2
                moved[i + 1] += overlap / 2
    return dict(zip(names, moved, strict=True))
