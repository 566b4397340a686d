"""The pictures with axes: each is drawn from a stored record, whose machine, date and commit stand below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from bench.pictures import style
from bench.record import Record
from bench.report.results import newest, pick, stored
from bench.report.sections import provenance
from bench.result import Result

NAMES = {"ours-auto": "fastgpt2", "transformers": "transformers", "plain": "plain PyTorch"}


def caption(record: Record) -> str:
    """Where and when a record was measured, in a line."""
    return " ".join(provenance(record).strip("*").split())


def cpu_step() -> str:
    """Speed and memory of the training step on a CPU, ours beside the peers."""
    record = newest(stored(), lambda record: pick(record, "training step"))["cpu"]
    results = pick(record, "training step")
    columns: list[tuple[str, Callable[[Result], float], str]] = [
        ("tokens a second: more is better", lambda result: result.tokens_per_s or 0.0, ",.0f"),
        ("peak memory in GiB: less is better", lambda result: (result.peak_memory_bytes or 0) / 2**30, ".2f"),
    ]
    with style.plot(
        8.6,
        4.6,
        "A training step on a CPU: faster, in less memory",
        _shapes(results),
        caption(record),
    ) as figure:
        for i, (axes, (title, value, form)) in enumerate(zip(figure.subplots(1, 2), columns, strict=True)):
            _bars(axes, results, value, form, names=i == 0)
            axes.set_title(title, fontsize=10, loc="left")
        figure.subplots_adjust(left=0.24, right=0.95, top=0.78, bottom=0.09, wspace=0.18)
        return style.as_svg(figure)


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
        for place, (backend, name) in enumerate(NAMES.items()):
            y, ours = group * 3.7 + place, place == 0
            length = value(members[backend])
            axes.barh(y, length, height=0.86, color=style.BLUE if ours else style.GREY)
            weight = "bold" if ours else "normal"
            axes.text(length + longest / 80, y, format(length, form), va="center", fontsize=9, fontweight=weight)
            labels[y] = name
        if names:
            words = f"{dtype}\n{'compiled' if compiled else 'eager'}"
            axes.text(-0.67, group * 3.7 + 1, words, transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(list(labels), list(labels.values()) if names else [], fontsize=9)
    axes.set_xlim(0, 1.14 * longest)
    axes.invert_yaxis()
    style.quiet(axes, ticks=False)
