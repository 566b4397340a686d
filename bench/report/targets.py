"""What the project wants to reach on one H100 SXM, and how far a record is from it.

GPT-2 124M, bfloat16, T = 1024 where nothing else is said; operations of 65,536 tokens. Ratios are of candidates that
were timed in turn, the median over the rounds; an attention's is over the fastest of SDPA's flash and cuDNN kernels and
FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.report import auto
from bench.report.results import Record, Result, pick, ratio

HEADS, HEAD_SIZE, CHANNELS, TOKENS = 12, 64, 768, 65536
KERNELS = ("sdpa-flash", "sdpa-flash-apart", "sdpa-cudnn", "sdpa-cudnn-apart", "flex")
"""PyTorch's attentions, also those that do without the copy that packs the gradient."""
PLAIN = ("plain", "plain-flash", "plain-cudnn", "plain-efficient")
"""The plain PyTorch GPT-2, with each of SDPA's kernels."""
TRANSFORMERS = ("transformers",)


class Found(NamedTuple):
    """What was measured: its value, in words, and of whom."""

    value: float
    words: str
    of: str
    excuse: str = ""
    """Why the target need not be reached."""


@dataclass(frozen=True)
class Target:
    """One number to reach.

    Args:
        what: the row's name.
        bound: that the value is to reach, or not to pass where `at_most` is set.
        find: the value in a record; None where it was not measured.
    """

    what: str
    bound: float
    find: Callable[[Record], Found | None]
    at_most: bool = False

    def row(self, record: Record) -> dict[str, str]:
        """A line of the table."""
        bound = f"{self.bound:,.0f}" if self.bound > 100 else f"{self.bound:.2f}"
        found, asked = self.find(record), f"{'<=' if self.at_most else '>='} {bound}"
        if found is None:
            return {"<target": self.what, ">asked": asked, ">measured": "", "<reached": "not measured", "<of": ""}
        reached = found.value <= self.bound if self.at_most else found.value >= self.bound
        verdict = "yes" if reached else f"no, but {found.excuse}" if found.excuse else "no"
        return {"<target": self.what, ">asked": asked, ">measured": found.words, "<reached": verdict, "<of": found.of}


def rows(record: Record) -> list[dict[str, str]]:
    """Every target's line, in the form of bench.report.results.align; nothing where none was measured."""
    found = [target.row(record) for target in TARGETS]
    return found if any(row[">measured"] for row in found) else []


# --------------------------------------------------------------------------------------------- what is compared


def _faster(mine: Result | None, theirs: Result | None) -> Found | None:
    """How many times as fast."""
    if mine is None or theirs is None:
        return None
    found = ratio(mine, theirs)
    return Found(found.median, str(found), f"{_name(mine)} over {theirs['backend']}")


def _share(mine: Result | None, theirs: Result | None) -> Found | None:
    """How much of the memory."""
    if mine is None or theirs is None or not (mine["peak_memory_bytes"] and theirs["peak_memory_bytes"]):
        return None
    value = mine["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    return Found(value, f"{value:.2f}", f"{_name(mine)} over {theirs['backend']}")


def _name(result: Result) -> str:
    size = f" at B={result['shape']['B']}" if "model" in result["shape"] else ""
    return f"{result['backend']}{size}"


def _beside(mine: Result | None, results: Iterable[Result], names: Sequence[str]) -> Result | None:
    """The fastest of these that was timed in turn with a result."""
    found = [r for r in results if mine is not None and r["contest"] == mine["contest"] and r["backend"] in names]
    return min(found, key=lambda result: result["ms_median"], default=None)


# -------------------------------------------------------------------------------------------------- operations


def _attention(record: Record, direction: str, T: int) -> tuple[Result | None, list[Result]]:
    shape = {"B": TOKENS // T, "T": T, "H": HEADS, "D": HEAD_SIZE}
    found = [r for r in pick(record, f"attention {direction}") if r["shape"] == shape and r["dtype"] == "bfloat16"]
    return next((r for r in found if r["backend"] == "triton"), None), found


def _attention_speed(direction: str) -> Callable[[Record], Found | None]:
    def find(record: Record) -> Found | None:
        mine, _ = _attention(record, direction, 1024)
        return Found(mine["tflops"], f"{mine['tflops']:.0f}", mine["backend"]) if mine is not None else None

    return find


def _attention_ratio(direction: str, T: int) -> Callable[[Record], Found | None]:
    def find(record: Record) -> Found | None:
        mine, results = _attention(record, direction, T)
        return _faster(mine, _beside(mine, results, KERNELS))

    return find


def _named(record: Record, op: str, shape: dict[str, int], *names: str) -> list[Result | None]:
    found = [r for r in pick(record, op) if r["shape"].items() >= shape.items() and r["dtype"] == "bfloat16"]
    return [next((r for r in found if r["backend"] == name), None) for name in names]


def _loss(record: Record, *names: str) -> list[Result | None]:
    return _named(record, "linear_cross_entropy training", {"N": TOKENS, "C": CHANNELS}, *names)


def _loss_time(record: Record) -> Found | None:
    mine, floor = _loss(record, "triton", "matmuls-alone")
    found = _faster(floor, mine)
    return found and found._replace(of="triton over matmuls-alone, in time")


def _loss_memory(record: Record) -> Found | None:
    return _share(*_loss(record, "triton", "torch"))


def _gelu_mlp(record: Record) -> Found | None:
    shape = {"B": TOKENS // 1024, "T": 1024, "C": CHANNELS}
    found = _faster(*_named(record, "mlp forward+backward", shape, "triton", "torch-compiled"))
    chosen, _ = auto.best("mlp", auto.ablations(record))
    return found and found._replace(excuse="" if chosen[:1] == ["triton"] else "auto doesn't use it")


# -------------------------------------------------------------------------------------------------- whole steps


def _steps(record: Record, *, compiled: bool) -> list[Result]:
    found = [r for r in pick(record, "training step") if r["compiled"] is compiled and r["dtype"] == "bfloat16"]
    return [r for r in found if (r["shape"]["model"], r["shape"]["T"]) == ("gpt2", 1024)]


def _best_step(record: Record, peers: Sequence[str], B: int | None = None) -> tuple[Result | None, list[Result]]:
    """The most tokens a second of a step with our attention that stands beside one of these peers, and all steps."""
    steps = _steps(record, compiled=True)
    ours = [r for r in steps if r["role"] == "ours" and r["slots"]["attn"] == "triton"]
    ours = [r for r in ours if B in (None, r["shape"]["B"]) and _beside(r, steps, peers)]
    return max(ours, key=lambda r: r["tokens_per_s"], default=None), steps


def _step_speed(record: Record) -> Found | None:
    mine, _ = _best_step(record, PLAIN + TRANSFORMERS)
    return Found(mine["tokens_per_s"], f"{mine['tokens_per_s']:,.0f}", _name(mine)) if mine is not None else None


def _step_ratio(peers: Sequence[str]) -> Callable[[Record], Found | None]:
    def find(record: Record) -> Found | None:
        mine, steps = _best_step(record, peers)
        return _faster(mine, _beside(mine, steps, peers))

    return find


def _step_memory(record: Record) -> Found | None:
    mine, steps = _best_step(record, TRANSFORMERS, B=TOKENS // 1024)
    return _share(mine, _beside(mine, steps, TRANSFORMERS))


def _graph_ratio(B: int, *, compiled: bool) -> Callable[[Record], Found | None]:
    def find(record: Record) -> Found | None:
        steps = [r for r in _steps(record, compiled=compiled) if r["shape"]["B"] == B]
        graph = next((r for r in steps if r["backend"] == "ours-auto-graph"), None)
        return _faster(graph, _beside(graph, steps, ("ours-auto",)))

    return find


TARGETS = [
    Target("step, compiled, our attention, best B: tokens/s", 600_000, _step_speed),
    Target("step over plain PyTorch, compiled", 1.25, _step_ratio(PLAIN)),
    Target("step over transformers, compiled", 1.5, _step_ratio(TRANSFORMERS)),
    Target("attention forward, T = 1024: TFLOP/s", 330, _attention_speed("forward")),
    Target("attention forward, T = 1024", 1.10, _attention_ratio("forward", 1024)),
    Target("attention backward, T = 1024: TFLOP/s", 260, _attention_speed("backward")),
    Target("attention backward, T = 1024", 1.15, _attention_ratio("backward", 1024)),
    *(
        Target(f"attention {direction}, T = {T}", 1.0, _attention_ratio(direction, T))
        for T in (2048, 4096, 8192)
        for direction in ("forward", "backward")
    ),
    Target("linear cross-entropy over its matmuls: time", 1.25, _loss_time, at_most=True),
    Target("linear cross-entropy over the plain loss: memory", 0.25, _loss_memory, at_most=True),
    Target("gelu_mlp forward + backward over torch.compile's", 1.10, _gelu_mlp),
    Target("CUDA graph, B = 1, over eager", 1.5, _graph_ratio(1, compiled=False)),
    *(Target(f"CUDA graph, B = {B}, over compiled", 1.0, _graph_ratio(B, compiled=True)) for B in (1, 4)),
    Target("step of 65,536 tokens over transformers, compiled: memory", 0.6, _step_memory, at_most=True),
]
