"""Where a step's time goes: what each part of it must read, write and multiply, at rates that others published.

GPT-2 124M, B = 64, T = 1024, bfloat16, compiled, on one H100 SXM. Bytes and launches of PyTorch's part were counted in
the code that Inductor of torch 2.11 generates for sm_90, those of our kernels in their docstrings. A GPU's profile
(bench.kernel_profile) takes the place of the arithmetic, line by line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.record import Record, StepKernels
from bench.report.results import milliseconds, newest, pick
from bench.report.sections import Row, Sections, markdown
from fastgpt2.kernels.tools.bounds import checked_in

B, TOKENS, LAYERS, CHANNELS, HEADS, HEAD_DIM, VOCAB = 64, 65536, 12, 768, 12, 64, 50304
HIDDEN, BLOCK = 4 * CHANNELS, TOKENS // B
PARAMETERS = 124_475_904
"""With the padded vocabulary."""

# ------------------------------------------------------------------------------------------------------ rates


class Rate(NamedTuple):
    """How fast a kind of work goes, and who says so."""

    per_second: float
    source: str


TRACE, FA3 = "modded-nanogpt", "FlashAttention-3"
"""What docs/performance.md calls its two sources."""
RATES = {
    "768 to 2304": Rate(667e12, TRACE),
    "2304 to 768": Rate(750e12, TRACE),
    "768 to 3072": Rate(670e12, TRACE),
    "3072 to 768": Rate(767e12, TRACE),
    "768 to 768": Rate(628e12, TRACE),
    "weight 768 x 768": Rate(543e12, TRACE),
    "weight, larger": Rate(683e12, f"{TRACE}, of 2304 x 768"),
    "fused with GELU": Rate(575e12, "estimate: modded-nanogpt's fused product, whose epilogue is lighter, has 670"),
    "cuDNN forward": Rate(288e12, FA3),
    "cuDNN backward": Rate(224e12, "estimate from FlashAttention-3's longer sequences: 200 to 265"),
    "attention forward": Rate(291e12, f"{FA3}, of Triton's tutorial"),
    "attention backward": Rate(207e12, "estimate: FlashAttention-2 has 180, TLX 219 at D = 128"),
    "elementwise": Rate(3.04e12, TRACE),
    "rows": Rate(2.45e12, f"{TRACE}, of its norms: 2.2 to 2.7"),
    "launch": Rate(1 / 1.5e-6, "estimate: 1.5 us until the next kernel fills the device"),
}
"""FLOP/s, bytes/s or launches/s. "768 to 2304" is a product of (tokens, 768) by a weight of 2304 rows; "weight" is the
gradient of one, summed over the tokens."""

# ------------------------------------------------------------------------------------------------------ parts


class Part(NamedTuple):
    """Work of one kind.

    Args:
        amount: FLOPs, bytes or launches, each time.
        times: a step.
    """

    what: str
    amount: float
    rate: str
    times: int = LAYERS

    @property
    def ms(self) -> float:
        return 1e3 * self.times * self.amount / RATES[self.rate].per_second


Column = Literal["plain", "before", "ours"]
COLUMNS: dict[Column, str] = {"plain": "plain compiled", "before": "ours before", "ours": "ours"}
"""The peer bench.step.plain_gpt2 with cuDNN's attention; ours with all of our kernels, before and after this work."""


@dataclass(frozen=True)
class Line:
    """A part of the step.

    Args:
        pattern: what the names of its kernels contain; the first line that matches a name has it.
    """

    title: str
    pattern: str
    parts: Mapping[Column, tuple[Part, ...]]

    def ms(self, column: Column) -> float:
        return sum(part.ms for part in self.parts.get(column, ()))


def product(n: int, k: int) -> float:
    """FLOPs of (tokens, k) by (k, n)."""
    return 2.0 * TOKENS * n * k


def each(element_bytes: float, channels: int = CHANNELS) -> float:
    """Bytes of a pass that moves so many for each token and channel."""
    return element_bytes * TOKENS * channels


def _products(up: str) -> tuple[Part, ...]:
    """The products of a block; `up` is the rate of the two beside GELU."""
    C, F = CHANNELS, HIDDEN
    return (
        Part("qkv", product(3 * C, C), "768 to 2304"),
        Part("qkv, input's gradient", product(3 * C, C), "2304 to 768"),
        Part("qkv, weight's gradient", product(3 * C, C), "weight, larger"),
        Part("attention's projection, and its input's gradient", 2 * product(C, C), "768 to 768"),
        Part("attention's projection, weight's gradient", product(C, C), "weight 768 x 768"),
        Part("MLP, to 3072 channels, forward and backward", 2 * product(F, C), up),
        Part("MLP, to 768 channels, forward and backward", 2 * product(F, C), "3072 to 768"),
        Part("MLP, both weights' gradients", 2 * product(F, C), "weight, larger"),
    )


def _head(chunks: int, waves: int) -> tuple[Part, ...]:
    """The head's products. hidden's gradient has 1,536 tiles of 128x256: 12 waves of 132 multiprocessors in one piece.

    Each chunk after the first reads the weight twice more, and its gradient in float32, which it writes back.
    """
    logits, again = product(VOCAB, CHANNELS), 12.0 * VOCAB * CHANNELS
    moved = (Part("weight and its gradient again", again, "elementwise", chunks - 1),) if chunks > 1 else ()
    return (
        Part("logits", logits, "768 to 3072", 1),
        Part(f"hidden's gradient, {waves} waves", logits * waves / 12, "3072 to 768", 1),
        Part("weight's gradient", logits, "weight, larger", 1),
        *moved,
    )


def _attention(kernel: str) -> tuple[Part, ...]:
    forward = 2.0 * B * HEADS * BLOCK**2 * HEAD_DIM  # the causal half of two products
    return (
        Part("forward", forward, f"{kernel} forward"),
        Part("backward", 2.5 * forward, f"{kernel} backward"),
    )


def _norms(first: int, inner: int, last: int) -> tuple[Part, ...]:
    """Ours, bytes an element, forward and backward together."""
    return (
        Part("first norm, without a residual", each(first), "rows", 1),
        Part("inner norms", each(inner), "rows", 2 * LAYERS - 1),
        Part("last norm, and hidden's gradient times the loss's", each(last + 4), "rows", 1),
    )


def _rest(launches: int, embeddings: float) -> tuple[Part, ...]:
    return (
        Part("embeddings, forward and backward", embeddings, "elementwise", 1),
        Part("Adam: w, g, m, v read, w, m, v written", 28.0 * PARAMETERS, "elementwise", 1),
        Part("launches", launches, "launch", 1),
    )


WEIGHT_CASTS = (
    Part("blocks' weights to bfloat16, their gradients to float32", 85.0e6, "elementwise"),
    Part("embedding's weight to bfloat16", 6.0 * VOCAB * CHANNELS, "elementwise", 1),
)
HEAD_CAST = Part("embedding's gradient to float32", 6.0 * VOCAB * CHANNELS, "elementwise", 1)
DB_FC = Part("the fused product's partial sums of b_fc", 8.0 * TOKENS / 128 * HIDDEN, "elementwise")
DB_QKV = Part("attention's partial sums of dqkv, zeroed first", 12.0 * TOKENS / 128 * 3 * CHANNELS, "elementwise")
LOGITS = 2.0 * TOKENS * VOCAB
ATTENTION = "attention|flash|fmha|cudnn"
LINES = (
    Line("block products", rf"^(?!.*({ATTENTION})).*(gelu_mlp_\w+_kernel|nvjet|gemm|cutlass|cublas|splitK)", {
        "plain": _products("768 to 3072"), "before": _products("fused with GELU"), "ours": _products("fused with GELU"),
    }),
    # Its products have the names of the blocks': a profile counts them there.
    Line("head", r"(?!)", {"plain": _head(1, 12), "before": _head(7, 14), "ours": _head(4, 12)}),
    Line("cross-entropy rows", r"log_softmax|cross_entropy", {
        "plain": (Part("logits read, read again, gradient written", 3 * LOGITS, "rows", 1),),
        "before": (Part("logits read, gradient written over them", 2 * LOGITS, "rows", 1),),
        "ours": (Part("logits read, gradient written over them", 2 * LOGITS, "rows", 1),),
    }),
    Line("GELU", r"fused_gelu(_gelu_backward)?_view_\d+$", {
        "plain": (Part("forward 4 bytes, backward 6", each(10, HIDDEN), "elementwise"),),
    }),
    Line("LayerNorm, residual and its casts", r"layer_norm|fused__to_copy_view_\d+$", {
        "plain": (
                Part("forward 19.5 GB, backward 17.6", 37.1e9, "rows", 1),
                Part("residual's gradient to bfloat16", each(6), "elementwise", 2 * LAYERS),
            ),
        "before": _norms(20, 28, 22),
        "ours": _norms(20, 28, 22),
    }),
    Line("bias gradients", r"triton_(red|per)_fused_(gelu_gelu_backward_|cat_)?sum|reduce_kernel", {
        "plain": (Part("dqkv 6 bytes, dpre 8, two projections 4", each(18), "rows"),),
        "before": (Part("dqkv 6 bytes, two projections 4", each(10), "rows"), DB_FC),
        "ours": (DB_FC, DB_QKV),
    }),
    Line("attention", ATTENTION, {
        "plain": _attention("cuDNN"), "before": _attention("attention"), "ours": _attention("attention"),
    }),
    Line("packing dqkv", r"fused_cat_transpose", {
        "plain": (Part("read and written", each(12), "elementwise"),),
    }),
    Line("casts of weights and gradients", r"fused__to_copy(_t|_add|_gelu_mlp_forward)?_\d+$", {
        "plain": (*WEIGHT_CASTS, HEAD_CAST), "before": WEIGHT_CASTS, "ours": WEIGHT_CASTS,
    }),
    Line("embeddings, Adam, launches", r"", {
        "plain": _rest(667, 0.37e9), "before": _rest(606, 1.79e9), "ours": _rest(534, 1.79e9),
    }),
)  # fmt: skip
"""A kernel of a profile belongs to the first line whose pattern its name contains."""


class Choice(NamedTuple):
    """What `ours` doesn't contain and a GPU has to decide."""

    what: str
    how: str
    ms: float
    counted: str


def _faster(part: Part, rate: str) -> float:
    """What a part takes less at another rate."""
    return part.ms - part._replace(rate=rate).ms


def _hopper_less() -> float:
    """What attention in Gluon takes less, in ms, if each kernel took its least time (Triton 3.6, which torch 2.11 has).
    Its partial sums of the bias's gradient are of 64 tokens, the usual kernels' of 128."""
    least = checked_in()["sm_90"]
    passes = ("attention_forward", "attention_backward_dq", "attention_backward_dkdv")
    less = sum(least[op]["bfloat16"]["3.6"] - least[f"{op}_hopper"]["bfloat16"]["3.6"] for op in passes)
    return 1e3 * LAYERS * less - LAYERS * DB_QKV._replace(times=1).ms


CHOICES = (
    Choice(
        "GELU's products at modded-nanogpt's rate",
        "the tuner times its tile, 128x256x64",
        _faster(_products("fused with GELU")[5], "768 to 3072"),
        "the same FLOPs and bytes; no spill",
    ),
    Choice(
        "the residual stream's gradient in bfloat16",
        "`--stream bfloat16-gradient`",
        Part("", each(6), "rows", 2 * LAYERS).ms,
        "a norm moves 6 bytes less for each element; errs more",
    ),
    Choice(
        "the stream and its gradient in bfloat16",
        "`--stream bfloat16`",
        Part("", each(12), "rows", 2 * LAYERS).ms,
        "12 bytes less for each element; errs more still",
    ),
    Choice(
        "attention in Gluon",
        "`--attn triton-hopper`",
        _hopper_less(),
        "the kernels' least times by `inspect`, which none reaches; twice the rows of the bias's sums",
    ),
    Choice(
        "independent casts in one launch",
        "`ours-triton-grouped` among the benchmark's steps",
        1e3 * (534 - 425) / RATES["launch"].per_second,
        "425 launches instead of 534",
    ),
)
"""With the milliseconds less a step, by the same arithmetic."""
STREAMS = tuple(choice for choice in CHOICES if choice.how.startswith("`--stream"))
"""Of which one can be chosen."""

# ------------------------------------------------------------------------------------------------------ a profile

PROFILED: dict[Column, tuple[str, ...]] = {"plain": ("plain",), "ours": ("ours-triton-tuned", "ours-triton")}
"""The profiles of a column, the best first."""
SHAPE = {"model": "gpt2", "n_layer": LAYERS, "B": B, "T": BLOCK}


def profiles(record: Record) -> dict[Column, StepKernels]:
    """The profile of each column that has one at this size; of joined runs the newest comes first."""
    here = [found for found in record.step_kernels if found.compiled and found.shape == SHAPE]
    steps = {found.step: found for found in reversed(here)}
    return {
        column: next(steps[name] for name in names if name in steps)
        for column, names in PROFILED.items()
        if any(name in steps for name in names)
    }


def line_of(kernel: str) -> Line:
    return next(line for line in LINES if re.search(line.pattern, kernel))


def measured(found: StepKernels, record: Record) -> dict[str, float]:
    """A step's milliseconds by the titles of lines. The last has the kernels beside the longest, too, and what the step
    takes beyond its kernels, where it was timed at this size."""
    ms = dict.fromkeys((line.title for line in LINES), 0.0)
    for name, _, kernel_ms in found.kernels:
        ms[line_of(name).title] += kernel_ms
    steps = [r for r in pick(record, "training step") if r.compiled and r.shape == SHAPE and r.backend == found.step]
    whole = max([found.ms, *map(milliseconds, steps[:1])])
    ms[LINES[-1].title] += whole - sum(row[2] for row in found.kernels)
    return ms


# ------------------------------------------------------------------------------------------------------ the page


def budget_section(records: Sequence[Record]) -> str:
    """The budget: measured where there is a profile, else arithmetic."""
    record = next(reversed(newest((r for r in records if r.on_gpu), lambda r: list(profiles(r))).values()), None)
    seen = {} if record is None else {column: measured(found, record) for column, found in profiles(record).items()}
    titles = {column: f">{title}{', measured' * (column in seen)}" for column, title in COLUMNS.items()}
    totals = {c: sum(seen[c].values() if c in seen else (line.ms(c) for line in LINES)) for c in COLUMNS}
    rows: list[Row] = [{"<ms": line.title, **{titles[c]: _ms(line, c, seen) for c in COLUMNS}} for line in LINES]
    rows.append({"<ms": "**sum**", **{titles[c]: f"**{total:.1f}**" for c, total in totals.items()}})
    rows.append({"<ms": "tokens/s", **{titles[c]: f"{TOKENS / total:,.0f}k" for c, total in totals.items()}})
    where = "" if record is None else f"\n\nMeasured on {record.device}, {record.date}, commit {record.commit_id[:12]}."
    return markdown(rows) + where


def _ms(line: Line, column: Column, seen: Mapping[Column, Mapping[str, float]]) -> str:
    if column not in seen:
        return f"{line.ms(column):.1f}" if line.ms(column) else "0"
    return "with the blocks'" if line.title == "head" else f"{seen[column][line.title]:.1f}"


def parts_section(_: Sequence[Record]) -> str:
    """What each line counts: a row for each of its parts, with the columns that have it."""
    rows: list[Row] = []
    for line in LINES:
        having: dict[Part, list[str]] = {}
        for column, parts in line.parts.items():
            for part in parts:
                having.setdefault(part, []).append(COLUMNS[column])
        rows += [
            {
                "<line": line.title,
                "<part": part.what,
                "<in": "all" if len(columns) == len(COLUMNS) else ", ".join(columns),
                ">counted": _counted(part),
                "<rate": part.rate,
                ">ms": f"{part.ms:.2f}",
            }
            for part, columns in having.items()
        ]
    return markdown(rows)


def _counted(part: Part) -> str:
    times = "" if part.times == 1 else f"{part.times} x "
    if part.rate == "launch":
        return f"{part.amount:,.0f}"
    scale, unit = (1e12, "TFLOP") if RATES[part.rate].per_second > 1e14 else (1e9, "GB")
    return f"{times}{part.amount / scale:.3g} {unit}"


def rates_section(_: Sequence[Record]) -> str:
    return markdown(
        [{"<rate": name, ">a second": _rate(rate.per_second), "<source": rate.source} for name, rate in RATES.items()]
    )


def _rate(per_second: float) -> str:
    if per_second > 1e14:
        return f"{per_second / 1e12:.0f} TFLOP"
    return f"{per_second / 1e12:.2f} TB" if per_second > 1e9 else f"{per_second:,.0f}"


def choices_section(_: Sequence[Record]) -> str:
    rows: list[Row] = [
        {"<choice": c.what, "<how": c.how, "<counted": c.counted, ">ms less": f"{c.ms:.1f}"} for c in CHOICES
    ]
    full = sum(line.ms("ours") for line in LINES) - sum(c.ms for c in CHOICES if c not in STREAMS)
    sums = {"full": full, **{c.how.removeprefix("`--stream ").rstrip("`"): full - c.ms for c in STREAMS}}
    words = [f"{ms:.1f} ms with `--stream {name}` ({TOKENS / ms:,.0f}k tokens/s)" for name, ms in sums.items()]
    return f"{markdown(rows)}\n\nAll together: {', '.join(words[:-1])}, or {words[-1]}."


SECTIONS: Sections = {
    "budget": budget_section,
    "budget-choices": choices_section,
    "budget-parts": parts_section,
    "budget-rates": rates_section,
}
"""By the names of docs/performance.md's markers."""
