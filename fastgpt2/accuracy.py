"""Compare an operation with its plain form in float64: its error, and its error budget.

The budget is twice what PyTorch's own forms lose in the same precision, plus a few units in the last place of the
tensor's scale. It is pooled over several seeds, since rounding is random: over 40 seeds the largest error of a float32
sum of 50257 terms ranged from 45 to 224 units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt2.backends.attention import naive_attention, sdpa_attention
from fastgpt2.backends.loss import torch_loss
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.backends.norm import torch_norm

ALLOWED = 2.0
"""An implementation's error may be this multiple of its peers'."""
UNITS_IN_LAST_PLACE = 4
SEEDS = 5
"""Fewest that the peers are pooled over."""

Op = Callable[..., Any]
Results = Mapping[str, Tensor]
"""Outputs and gradients by name."""


def maximum(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


MEASURES = {"maximum": maximum, "norm": rms}
"""The two sizes of an error; the norm is the root mean square."""


@dataclass
class ErrorBudget:
    """How far results are off from the exact ones and how far they may be: each by maximum and by norm, over seeds.

    Each result may err twice as much as the worst of its peers did in any seed, and four units in the last place of
    its scale. A peer that isn't finite allows nothing; a result that isn't finite is over any budget.

    Args:
        unit: the dtype whose last place counts; by default that of the peers' result.
        errors, lost, floors: the largest so far of ours, of the peers' and of the units, by result and measure.
    """

    unit: torch.dtype | None = None
    errors: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)

    def allow(
        self, exact: Results, peers: Sequence[Results], terms: Mapping[str, Sequence[Tensor]] | None = None
    ) -> None:
        """Add a seed of the peers.

        Args:
            terms: the factors of one term, for results whose terms may cancel to exactly zero: where they do, the
                term has the scale.
        """
        for key, name, size in _keys(exact):
            scale = size(exact[name])
            if not scale and terms and name in terms:
                scale = math.prod(map(size, terms[name]))
            _keep_largest(self.floors, key, slack(scale, self.unit or peers[0][name].dtype))
            for peer in peers:
                error = _error(name, size, peer, exact)
                _keep_largest(self.lost, key, error if math.isfinite(error) else 0.0)

    def spend(self, exact: Results, ours: Results) -> None:
        """Add a seed of ours.

        Raises:
            ValueError: other results than the exact ones, or of another shape.
        """
        if ours.keys() != exact.keys():
            raise ValueError(f"results must be {', '.join(exact)}, got {', '.join(ours) or 'none'}")
        for key, name, size in _keys(exact):
            error = _error(name, size, ours, exact)
            _keep_largest(self.errors, key, error if math.isfinite(error) else math.inf)

    def table(self) -> dict[str, tuple[float, float]]:
        """(error, budget) of each result and measure: {"dw_fc by norm": ...}."""
        return {key: (error, ALLOWED * self.lost[key] + self.floors[key]) for key, error in self.errors.items()}

    def excess(self) -> dict[str, float]:
        """Error over budget of each result and measure: right is at most 1."""
        return {key: excess(*row) for key, row in self.table().items()}


def excess(error: float, budget: float) -> float:
    """Error over budget; where the peers are exact and nothing is allowed, any error is far over."""
    return error / max(budget, 1e-300)


def _error(name: str, size: Callable[[Tensor], float], results: Results, exact: Results) -> float:
    mine, truth = results[name], exact[name]
    if mine.shape != truth.shape:
        raise ValueError(f"{name} must be {tuple(truth.shape)}, got {tuple(mine.shape)}")
    return size(mine.double() - truth)


def pooled(
    draw: Callable[[int], Any], ours: Op, peers: Sequence[Op], exact: Op, *, seeds: Iterable[int] = range(SEEDS),
    once: bool = False, unit: torch.dtype | None = None,
    terms: Callable[[Any], Mapping[str, Sequence[Tensor]]] | None = None,
) -> ErrorBudget:  # fmt: skip
    """The budget after all have been called with what is drawn for each seed.

    Args:
        draw: inputs of a seed, the only argument of the others (see named).
        ours, peers, exact: give Results.
        once: one seed of ours against all of the peers': interpreted kernels are slow.
        unit, terms: ErrorBudget's; terms is called with the inputs.
    """
    budget = ErrorBudget(unit)
    for i, seed in enumerate(seeds):
        inputs = draw(seed)
        truth = exact(inputs)
        budget.allow(truth, [peer(inputs) for peer in peers], terms(inputs) if terms else None)
        if i == 0 or not once:
            budget.spend(truth, ours(inputs))
    return budget


def named(names: Sequence[str], function: Callable[..., Sequence[Tensor]], **options: Any) -> Op:
    """A function that pooled takes, from one of several inputs whose results are in the order of names."""
    return lambda inputs: dict(zip(names, function(*inputs, **options), strict=True))


def slack(scale: float, dtype: torch.dtype) -> float:
    """UNITS_IN_LAST_PLACE units in the last place of a tensor's scale."""
    finite = scale and math.isfinite(scale)
    return UNITS_IN_LAST_PLACE * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale)) if finite else 0.0


def _keys(results: Results) -> Iterator[tuple[str, str, Callable[[Tensor], float]]]:
    """("dw_fc by norm", "dw_fc", rms) and so on."""
    for name in results:
        for measure, size in MEASURES.items():
            yield f"{name} by {measure}", name, size


def _keep_largest(largest: dict[str, float], key: str, value: float) -> None:
    largest[key] = max(largest.get(key, 0.0), value)


@dataclass(frozen=True)
class Problem:
    """What a slot's implementations are compared on, as the model calls them.

    Args:
        slot: a key of ops.SLOTS.
        shape: what the table calls it.
        sizes: of each differentiable input, standard normal numbers times `scales`.
        outputs: their names and sizes; the gradient of each is drawn as well.
        peers: PyTorch's forms; the first, in float64, is the reference.
        master: inputs that stay float32 in mixed precision, as weights and the residual stream do.
        targets: (size, below): the last positional argument is that many integers.
        options: keyword arguments of the call.
    """

    slot: str
    shape: tuple[int, ...]
    sizes: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]
    peers: tuple[Op, ...]
    scales: dict[str, float] = field(default_factory=dict)
    master: tuple[str, ...] = ()
    targets: tuple[tuple[int, ...], int] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def attention_problem(shape: tuple[int, int, int, int]) -> Problem:
    """shape: B, T, H, D."""
    B, T, H, D = shape
    return Problem("attn", shape, {"qkv": (B, T, 3, H, D)}, {"o": (B, T, H, D)}, (naive_attention, sdpa_attention))


def mlp_problem(shape: tuple[int, int]) -> Problem:
    """shape: rows, C."""
    rows, C = shape
    sizes = {"x": (rows, C), "w_fc": (4 * C, C), "b_fc": (4 * C,), "w_proj": (C, 4 * C), "b_proj": (C,)}
    weights = tuple(name for name in sizes if name != "x")
    # Pre-activations of unit scale: the GELU's bend is where they are.
    scales = {"w_fc": C**-0.5, "w_proj": (4 * C) ** -0.5}
    return Problem("mlp", shape, sizes, {"y": (rows, C)}, (torch_mlp,), scales, weights)


def norm_problem(shape: tuple[int, int], *, last: bool = False) -> Problem:
    """shape: rows, C. last: the norm where the stream ends."""
    rows, C = shape
    sizes = {"x": (rows, C), "residual": (rows, C), "weight": (C,), "bias": (C,)}
    outputs = {"y": (rows, C)} if last else {"y": (rows, C), "sum": (rows, C)}
    master = ("residual", "weight", "bias")
    return Problem("norm", shape, sizes, outputs, (torch_norm,), master=master, options={"last": True} if last else {})


def loss_problem(shape: tuple[int, int, int]) -> Problem:
    """shape: rows, C, V; stored padded to a multiple of 128."""
    rows, C, V = shape
    sizes = {"hidden": (rows, C), "weight": (-(-V // 128) * 128, C)}
    return Problem(
        "loss", shape, sizes, {"loss": ()}, (torch_loss,), {"weight": 3.0 * C**-0.5}, ("weight",), ((rows,), V),
        {"vocab_size": V},
    )  # fmt: skip


def problems(device: torch.device | str) -> dict[str, Problem]:
    """By the form of a slot: on a GPU GPT-2's channels and vocabulary, on a CPU what the interpreter can do."""
    if torch.device(device).type == "cuda":
        rows, C, V, heads = 2000, 768, 50257, (2, 1000, 3, 64)
    else:
        rows, C, V, heads = 21, 48, 300, (2, 41, 1, 16)
    return {
        "attn": attention_problem(heads),
        "mlp": mlp_problem((rows, C)),
        "norm": norm_problem((rows, C)),
        "last norm": norm_problem((rows, C), last=True),
        "loss": loss_problem((rows, C, V)),
    }


def error_and_budget(
    op: Op,
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device | str,
    seeds: Iterable[int] = range(SEEDS),
    *,
    once: bool = False,
) -> dict[str, tuple[float, float]]:
    """The largest error of an implementation over some seeds, and its budget: {"dw_fc by norm": ...}.

    For each output and each gradient. The units in the last place are those of dtype: PyTorch itself needs them where
    its other form happens to be exact. 16-bit inputs are called under autocast, as in training. once: as of pooled.
    """

    def computed(op: Op, dtype: torch.dtype) -> Op:
        return lambda call: call(op, dtype)

    return pooled(
        lambda seed: _draw(problem, seed, dtype, torch.device(device)),
        computed(op, dtype),
        [computed(peer, dtype) for peer in problem.peers],
        computed(problem.peers[0], torch.float64),
        seeds=seeds,
        once=once,
        unit=dtype,
    ).table()


def _draw(
    problem: Problem, seed: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Op, torch.dtype], dict[str, Tensor]]:
    """A seed's inputs, as a function of (implementation, compute dtype) that gives outputs and gradients by name."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, size: tuple[int, ...]) -> Tensor:
        x = torch.randn(size, generator=generator, device=device) * problem.scales.get(name, 1.0)
        return x.to(torch.promote_types(dtype, torch.float32) if name in problem.master else dtype)

    inputs = {name: draw(name, size) for name, size in problem.sizes.items()}
    rest: list[Tensor] = []
    if problem.targets is not None:
        size, below = problem.targets
        rest = [torch.randint(below, size, generator=generator, device=device)]
    upstream = {name: draw("", size) for name, size in problem.outputs.items()}
    return partial(_results, problem, inputs, rest, upstream)


def _results(
    problem: Problem,
    inputs: dict[str, Tensor],
    rest: list[Tensor],
    upstream: dict[str, Tensor],
    op: Op,
    compute: torch.dtype,
) -> dict[str, Tensor]:
    double = compute == torch.float64
    leaves = [(x.double() if double else x).detach().requires_grad_() for x in inputs.values()]
    device = leaves[0].device.type
    with torch.autocast(device, compute if compute.itemsize == 2 else None, enabled=compute.itemsize == 2):
        outputs = op(*leaves, *rest, **problem.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = tuple(y for y in outputs if y is not None)
    received = [g.to(y.dtype) for y, g in zip(outputs, upstream.values(), strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, received)
    found = {name: y.detach() for name, y in zip(problem.outputs, outputs, strict=True)}
    found |= {f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}
    if "dqkv" in found:  # each with a scale of its own
        found |= dict(zip(("dq", "dk", "dv"), found.pop("dqkv").unbind(2), strict=True))
    return found
