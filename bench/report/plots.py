"""The figures of the report: what they show, as plain data, and how they are drawn.

The data is stored as JSON beside each PNG, so that a test can tell whether a figure shows what is stored; the PNG's
own bytes differ between versions of matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.report.results import Record, Result, best_peer, device_of, newest, on_gpu, pick, work

Figure = dict[str, Any]
"""{"title", "note", "panels": [{"title", "x", "y", "lines": [{"label", "role", "x", "y", "low", "high"}]}]}"""

# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, which is faint on white.
_COLOURS = {
    "ours": ("#0072B2", "#56B4E9", "#004466", "#009E73"),
    "peer": ("#D55E00", "#E69F00", "#CC79A7", "#7F3C00", "#8A5A7A", "#5F5F00"),
    "floor": ("#888888", "#AAAAAA"),
    "limit": ("#222222",),
}
_MARKERS = {"ours": "oDPX", "peer": "s^v<>*d", "floor": "12", "limit": ","}
_DASHES = {"ours": "-", "peer": "-", "floor": ":", "limit": "--"}


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """All figures by name, of what is stored."""
    found: dict[str, Figure] = {}
    for op, figure in (("attention", attention), ("training step", step)):
        for device, record in newest(filter(on_gpu, records), partial(pick, op=op)).items():
            found[f"{op.split()[-1]}-{slug(device)}"] = figure(record)
    for device in dict.fromkeys(device_of(record) for record in records):
        found[f"history-{slug(device)}"] = history([r for r in records if device_of(r) == device])
    return {name: data for name, data in found.items() if data["panels"]}


def slug(device: str) -> str:
    """A device's name in that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def line(label: str, role: str, x: Sequence[float | str], y: Sequence[float], low: Any = None, high: Any = None) -> Any:
    return {"label": label, "role": role, "x": list(x), "y": list(y), "low": low, "high": high}


def image(name: str, alt: str) -> str:
    """A figure in README.md."""
    return f"![{alt}](bench/plots/{name}.png)"


def stamp(record: Record) -> str:
    return f"{record['started'][:10]}, commit {record['commit']['id'][:12]}, torch {record['environment']['torch']}"


def attention(record: Record) -> Figure:
    """TFLOP/s against T, forward and backward, each backend, and the limit that was measured."""
    panels = []
    for direction in ("forward", "backward"):
        results = _longest_sweep(pick(record, f"attention {direction}"))
        by_backend: dict[str, list[Result]] = {}
        for result in results:
            by_backend.setdefault(result["backend"], []).append(result)
        lines = [_curve(backend, mine, "T", "flops", 1e9) for backend, mine in by_backend.items()]
        limits = {r["shape"]["T"]: r for r in results if r["limit_ms"]}
        if limits:
            names = " and ".join(sorted({r["limit"] for r in limits.values()}))
            y = [r["flops"] / r["limit_ms"] / 1e9 for r in limits.values()]
            lines.append(line(f"measured limit ({names})", "limit", list(limits), y))
        if lines:
            shape = results[0]["shape"]
            title = f"{direction}, {shape['H']} heads of {shape['D']}, {results[0]['dtype']}"
            panels.append({"title": title, "x": "T, tokens in a sequence", "y": "TFLOP/s (causal)", "lines": lines})
    note = f"{stamp(record)}; blue: ours, dotted: a part of the work alone"
    return {"title": f"Attention on {device_of(record)}", "note": note, "panels": panels}


def _longest_sweep(results: Sequence[Result]) -> list[Result]:
    """Of the attention's results those of the same tokens, heads and precision that have the most T, by T."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in sorted(results, key=lambda r: r["shape"]["T"]):
        shape = result["shape"]
        groups.setdefault((shape["B"] * shape["T"], shape["H"], shape["D"], result["dtype"]), []).append(result)
    return max(groups.values(), key=lambda group: len({r["shape"]["T"] for r in group}), default=[])


def _curve(label: str, results: Sequence[Result], size: str, what: str, scale: float) -> Any:
    """Amounts of a call (`what`) over its milliseconds, and over scale, against a size of the shape."""
    median, low, high = ([r[what] / r[ms] / scale for r in results] for ms in ("ms_median", "ms_p80", "ms_p20"))
    return line(label, results[0]["role"], [r["shape"][size] for r in results], median, low, high)


def step(record: Record, most: int = 3) -> Figure:
    """Tokens a second and peak memory against B: the fastest of ours and of the peers, compiled, GPT-2 124M."""
    results = [r for r in pick(record, "training step") if r["compiled"] and r["shape"]["model"] == "gpt2"]
    results = [r for r in results if r["dtype"] == results[0]["dtype"] and r["shape"]["T"] == results[0]["shape"]["T"]]
    if len({r["shape"]["B"] for r in results}) < 2:
        return {"panels": []}
    fastest: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: -r["tokens_per_s"]):
        fastest.setdefault(result["backend"], result)
    shown = [b for role in ("ours", "peer") for b in [b for b, r in fastest.items() if r["role"] == role][:most]]
    speed, memory = [], []
    for backend in shown:
        mine = sorted((r for r in results if r["backend"] == backend), key=lambda r: r["shape"]["B"])
        speed.append(_curve(backend, mine, "B", "tokens", 1e-3))
        held = {r["shape"]["B"]: r["peak_memory_bytes"] / 2**30 for r in mine if r["peak_memory_bytes"]}
        memory.append(line(backend, mine[0]["role"], list(held), list(held.values())))
    x = f"B, sequences of {results[0]['shape']['T']} tokens"
    title = f"GPT-2 124M, compiled, {results[0]['dtype']}, on {device_of(record)}"
    panels = [
        {"title": "speed", "x": x, "y": "tokens/s", "lines": speed},
        {"title": "peak memory", "x": x, "y": "GiB", "lines": memory},
    ]
    return {"title": title, "note": f"{stamp(record)}; blue: ours", "panels": panels}


def headline(records: Sequence[Record]) -> tuple[str, ...] | None:
    """The step that most records have, of these the largest: what a device's history is told by."""
    steps = [{work(r): r["tokens"] for r in pick(record, "training step") if r["role"] == "ours"} for record in records]
    tokens = {key: count for found in steps for key, count in found.items()}
    compiled = [key for key in tokens if key[3] == "compiled"] or list(tokens)
    return max(compiled, key=lambda key: (sum(key in s for s in steps), tokens[key]), default=None)


def fastest_of_ours(record: Record, key: tuple[str, ...] | None) -> tuple[Result, Result | None] | None:
    """The fastest of ours at a work, and the fastest peer; None where it was not measured."""
    ours = [r for r in pick(record, "training step") if r["role"] == "ours" and work(r) == key]
    if not ours:
        return None
    mine = min(ours, key=lambda r: r["ms_median"])
    return mine, best_peer(mine, pick(record, "training step"))


def history(records: Sequence[Record]) -> Figure:
    """Tokens a second of the fastest of ours and of the fastest peer, by commit; nothing before there are two."""
    key = headline(records)
    points = [(r, pair) for r in records if key is not None and (pair := fastest_of_ours(r, key)) is not None]
    if key is None or len(points) < 2:
        return {"panels": []}
    commits = [f"{record['commit']['id'][:7]}\n{record['started'][:10]}" for record, _ in points]
    lines = [line("the fastest of ours", "ours", commits, [mine["tokens_per_s"] for _, (mine, _) in points])]
    peers = [(c, peer["tokens_per_s"]) for c, (_, (_, peer)) in zip(commits, points, strict=True) if peer is not None]
    if peers:
        lines.append(line("the fastest peer", "peer", *zip(*peers, strict=True)))
    panel = {"title": " ".join(key), "x": "commit", "y": "tokens/s", "lines": lines}
    return {"title": f"History on {device_of(records[0])}", "note": "clocks differ between runs", "panels": [panel]}


def draw(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter

    panels = figure["panels"]
    canvas = Canvas(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    axes = canvas.subplots(1, len(panels), squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        numeric = not isinstance(panel["lines"][0]["x"][0], str)
        used = dict.fromkeys(_COLOURS, 0)
        for data in panel["lines"]:
            role = data["role"]
            colour, marker = (table[role][used[role] % len(table[role])] for table in (_COLOURS, _MARKERS))
            used[role] += 1
            width = 2.2 if role == "ours" else 1.4
            style = {"color": colour, "marker": marker, "linestyle": _DASHES[role], "linewidth": width}
            style["label"] = data["label"]
            if data["low"] is None:
                axis.plot(data["x"], data["y"], **style)
            else:
                below = [max(0.0, y - low) for y, low in zip(data["y"], data["low"], strict=True)]
                above = [max(0.0, high - y) for y, high in zip(data["y"], data["high"], strict=True)]
                axis.errorbar(data["x"], data["y"], yerr=[below, above], capsize=2, **style)
        if numeric:
            axis.set_xscale("log", base=2)
            ticks = sorted({x for data in panel["lines"] for x in data["x"]})
            axis.set_xticks(ticks, [f"{x:,}" for x in ticks])
            axis.minorticks_off()
        else:
            axis.margins(x=0.15)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    canvas.suptitle(figure["title"], fontweight="bold")
    canvas.supxlabel(figure["note"], fontsize=8, color="#555555")
    canvas.savefig(path, dpi=130, facecolor="white")
