"""What the project wants to reach on one H100 SXM, and how far a record is from it.

GPT-2 124M, bfloat16, T = 1024 unless a row says otherwise; operations of 65,536 tokens. Ratios are medians over the
rounds of candidates that were timed in turn. Attention is compared with the fastest of SDPA's flash and cuDNN kernels
and FlexAttention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from bench.record import Record
from bench.report import auto
from bench.report.results import Key, key, milliseconds, ratio, timed
from bench.result import Result
from fastgpt2.slots import OURS

TOKENS = 65536
KERNELS = ("sdpa-flash", "sdpa-flash-apart", "cudnn", "sdpa-cudnn-apart", "flex")
"""PyTorch's attentions, with and without the copy that packs the gradient."""
PLAIN = ("plain", "plain-flash", "plain-cudnn", "plain-efficient")
"""The plain PyTorch GPT-2, with each of SDPA's kernels."""
TRANSFORMERS = ("transformers",)


class Found(NamedTuple):
    """A measured value, in words, and who achieved it."""

    value: float
    words: str
    of: str


@dataclass(frozen=True)
class Target:
    """One number to reach.

    Args:
        what: title of the row.
        bound: the least value that reaches the target; the greatest where `at_most`.
        op, compiled, shape: the work; the shape may have further dimensions.
        figure: what is compared: our figure alone, or our speed, time or memory over theirs.
        mine: names of our candidates; none: every step of ours with our attention.
        theirs: names of peers, the fastest of which counts; with a figure alone one must have been timed in turn.
        optional: a slot; the target need not be reached where `auto` doesn't use our kernel for it.
    """

    what: str
    bound: float
    op: str
    figure: Literal["tokens_per_s", "tflops", "speed", "time", "memory"]
    mine: tuple[str, ...] = ("triton",)
    theirs: tuple[str, ...] = ()
    shape: Mapping[str, int | str] = field(default_factory=dict)
    compiled: bool | None = None
    at_most: bool = False
    optional: str | None = None

    def find(self, record: Record) -> Found | None:
        """The value of our fastest candidate; None: not measured."""
        results = [
            r
            for r in timed(record, self.op)
            if r.dtype == "bfloat16" and r.compiled is self.compiled and r.shape.items() >= self.shape.items()
        ]
        ours = [r for r in results if (r.backend in self.mine if self.mine else _with_our_attention(r))]
        pairs = [(mine, self._peer(mine, results)) for mine in ours]
        first: dict[Key, tuple[Result, Result | None]] = {}
        for mine, peer in pairs:
            if peer is not None or not self.theirs:
                first.setdefault(key(mine), (mine, peer))
        return self._compare(*max(first.values(), key=lambda pair: _speed(pair[0]))) if first else None

    def _peer(self, mine: Result, results: Sequence[Result]) -> Result | None:
        """The fastest of `theirs` that was timed in turn with a result."""
        beside = [r for r in results if r.contest == mine.contest and r.backend in self.theirs]
        return min(beside, key=milliseconds, default=None)

    def _compare(self, mine: Result, peer: Result | None) -> Found | None:
        name = f"{mine.backend} at B={mine.shape['B']}" if "model" in mine.shape else mine.backend
        if self.figure in ("tokens_per_s", "tflops"):
            value = getattr(mine, self.figure)
            return Found(value, f"{value:,.0f}", name)
        assert peer is not None, f"{self.what}: a ratio needs a peer"
        if self.figure == "memory":
            if not (mine.peak_memory_bytes and peer.peak_memory_bytes):
                return None
            share = mine.peak_memory_bytes / peer.peak_memory_bytes
            return Found(share, f"{share:.2f}", f"{name} over {peer.backend}")
        in_time = self.figure == "time"
        found = ratio(peer, mine) if in_time else ratio(mine, peer)
        return Found(found.median, str(found), f"{name} over {peer.backend}{', in time' * in_time}")

    def row(self, record: Record) -> dict[str, str]:
        """A line of the table."""
        bound = f"{self.bound:,.0f}" if self.bound > 100 else f"{self.bound:.2f}"
        found, asked = self.find(record), f"{'<=' if self.at_most else '>='} {bound}"
        if found is None:
            return {"<target": self.what, ">asked": asked, ">measured": "", "<reached": "not measured", "<of": ""}
        reached = found.value <= self.bound if self.at_most else found.value >= self.bound
        verdict = "yes" if reached else "no, but auto doesn't use it" if self._unused(record) else "no"
        return {"<target": self.what, ">asked": asked, ">measured": found.words, "<reached": verdict, "<of": found.of}

    def _unused(self, record: Record) -> bool:
        if self.optional is None:
            return False
        chosen, _ = auto.best(self.optional, auto.ablations(record))
        return chosen[:1] != [OURS[self.optional]]


def rows(record: Record) -> list[dict[str, str]]:
    """Every target's line, in the form of bench.report.results.align; nothing where none was measured."""
    found = [target.row(record) for target in TARGETS]
    return found if any(row[">measured"] for row in found) else []


def _with_our_attention(result: Result) -> bool:
    return result.role == "ours" and (result.slots or {}).get("attn") == OURS["attn"]


def _speed(result: Result) -> float:
    """Orders steps of several batch sizes by tokens a second, results of one shape by time."""
    return (result.tokens_per_s or 1.0) / (1.0 if result.tokens_per_s else milliseconds(result))


def _step(
    what: str,
    bound: float,
    figure: Literal["tokens_per_s", "speed", "time", "memory"],
    theirs: tuple[str, ...],
    *,
    mine: tuple[str, ...] = (),
    B: int | None = None,
    compiled: bool = True,
    at_most: bool = False,
) -> Target:
    """A target of the whole step; at the best batch size where B is None."""
    shape: dict[str, int | str] = {"model": "gpt2", "T": 1024}
    if B is not None:
        shape["B"] = B
    return Target(what, bound, "training step", figure, mine, theirs, shape, compiled, at_most)


def _attention(direction: str, T: int, bound: float, *, tflops: bool = False) -> Target:
    what = f"attention {direction}, T = {T}{': TFLOP/s' * tflops}"
    shape = {"B": TOKENS // T, "T": T, "H": 12, "D": 64}
    op, figure = f"attention {direction}", "tflops" if tflops else "speed"
    return Target(what, bound, op, figure, theirs=() if tflops else KERNELS, shape=shape)  # type: ignore[arg-type]


_LOSS, _HEAD = "linear_cross_entropy training", {"N": TOKENS, "C": 768}
_GRAPH, _NO_GRAPH = ("ours-auto-graph",), ("ours-auto",)
TARGETS = [
    _step("step, compiled, our attention, best B: tokens/s", 600_000, "tokens_per_s", PLAIN + TRANSFORMERS),
    _step("step over plain PyTorch, compiled", 1.25, "speed", PLAIN),
    _step("step over transformers, compiled", 1.5, "speed", TRANSFORMERS),
    _attention("forward", 1024, 330, tflops=True),
    _attention("forward", 1024, 1.10),
    _attention("backward", 1024, 230, tflops=True),
    _attention("backward", 1024, 1.10),
    *(_attention(direction, T, 1.0) for T in (2048, 4096, 8192) for direction in ("forward", "backward")),
    Target(
        "linear cross-entropy over its matmuls: time",
        1.15,
        _LOSS,
        "time",
        theirs=("matmuls-alone",),
        shape=_HEAD,
        at_most=True,
    ),
    Target(
        "linear cross-entropy over the plain loss: memory",
        0.25,
        _LOSS,
        "memory",
        theirs=("torch",),
        shape=_HEAD,
        at_most=True,
    ),
    Target(
        "gelu_mlp forward + backward over torch.compile's",
        1.10,
        "mlp forward+backward",
        "speed",
        theirs=("torch-compiled",),
        shape={"B": TOKENS // 1024, "T": 1024, "C": 768},
        optional="mlp",
    ),
    _step("CUDA graph, B = 1, over eager", 1.5, "speed", _NO_GRAPH, mine=_GRAPH, B=1, compiled=False),
    *(_step(f"CUDA graph, B = {B}, over compiled", 1.0, "speed", _NO_GRAPH, mine=_GRAPH, B=B) for B in (1, 4, 64)),
    _step(
        "price of bitwise determinism, our kernels, B = 32: time",
        1.01,
        "time",
        ("ours-triton-any-order",),
        mine=("ours-triton",),
        B=32,
        at_most=True,
    ),
    _step(
        "step of 65,536 tokens over transformers, compiled: memory",
        0.6,
        "memory",
        TRANSFORMERS,
        B=TOKENS // 1024,
        at_most=True,
    ),
]
