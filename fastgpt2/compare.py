"""One operation against its plain form in float64: how far off it is, and how far it may be.

The budget is relative: twice what PyTorch's own forms lose in the same precision, pooled over some seeds, and a
few units in the last place of the tensor's scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt2.attention import naive_attention, sdpa_attention
from fastgpt2.ops import torch_loss, torch_mlp, torch_norm

ALLOWED = 2.0
"""An implementation's error may be this multiple of its peers'."""
UNITS_IN_LAST_PLACE = 4

Op = Callable[..., Any]


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
    return Problem(
        "attention", shape, {"qkv": (B, T, 3, H, D)}, {"o": (B, T, H, D)}, (naive_attention, sdpa_attention)
    )


def mlp_problem(shape: tuple[int, int]) -> Problem:
    """shape: rows, C."""
    rows, C = shape
    sizes = {"x": (rows, C), "w_fc": (4 * C, C), "b_fc": (4 * C,), "w_proj": (C, 4 * C), "b_proj": (C,)}
    weights = tuple(name for name in sizes if name != "x")
    # Pre-activations of unit scale: the GELU's bend is where they are.
    scales = {"w_fc": C**-0.5, "w_proj": (4 * C) ** -0.5}
    return Problem("mlp", shape, sizes, {"y": (rows, C)}, (torch_mlp,), scales, weights)


def norm_problem(shape: tuple[int, int]) -> Problem:
    """shape: rows, C."""
    rows, C = shape
    sizes = {"x": (rows, C), "residual": (rows, C), "weight": (C,), "bias": (C,)}
    outputs = {"y": (rows, C), "sum": (rows, C)}
    return Problem("norm", shape, sizes, outputs, (torch_norm,), master=("residual", "weight", "bias"))


def loss_problem(shape: tuple[int, int, int]) -> Problem:
    """shape: rows, C, V; stored padded to a multiple of 128."""
    rows, C, V = shape
    sizes = {"hidden": (rows, C), "weight": (-(-V // 128) * 128, C)}
    return Problem(
        "loss", shape, sizes, {"loss": ()}, (torch_loss,), {"weight": 3.0 * C**-0.5}, ("weight",), ((rows,), V),
        {"vocab_size": V},
    )  # fmt: skip


def problems(device: torch.device | str) -> dict[str, Problem]:
    """One for each slot: on a GPU GPT-2's channels and vocabulary, on a CPU what the interpreter can do."""
    if torch.device(device).type == "cuda":
        rows, C, V, heads = 2000, 768, 50257, (2, 1000, 3, 64)
    else:
        rows, C, V, heads = 21, 48, 300, (2, 41, 1, 16)
    return {
        "attention": attention_problem(heads),
        "mlp": mlp_problem((rows, C)),
        "norm": norm_problem((rows, C)),
        "loss": loss_problem((rows, C, V)),
    }


def error_and_budget(
    op: Op, problem: Problem, dtype: torch.dtype, device: torch.device | str, seeds: Iterable[int] = range(5)
) -> dict[str, tuple[float, float]]:
    """The largest error of an implementation over some seeds, and its budget: {"dw_fc by norm": ...}.

    For each output and each gradient, by maximum and by norm (root mean square). The units in the last place are
    those of dtype: PyTorch itself needs them where its other form happens to be exact. 16-bit inputs are called
    under autocast, as in training.
    """
    errors: dict[str, float] = {}
    peers: dict[str, float] = {}
    scales: dict[str, float] = {}

    def keep(largest: dict[str, float], key: str, value: float) -> None:
        # max() would pass over a NaN.
        largest[key] = max(largest.get(key, 0.0), value if value == value else float("inf"))

    for seed in seeds:
        call = _draw(problem, seed, dtype, torch.device(device))
        exact = call(problem.peers[0], torch.float64)
        ours = call(op, dtype)
        theirs = [call(peer, dtype) for peer in problem.peers]
        for name, want in exact.items():
            for measure, size in MEASURES.items():
                key = f"{name} by {measure}"
                keep(scales, key, size(want))
                keep(errors, key, size(ours[name].double() - want))
                for peer in theirs:
                    keep(peers, key, size(peer[name].double() - want))
    return {key: (errors[key], ALLOWED * peers[key] + slack(scales[key], dtype)) for key in errors}


def slack(scale: float, dtype: torch.dtype) -> float:
    """UNITS_IN_LAST_PLACE units in the last place of a tensor's scale."""
    return UNITS_IN_LAST_PLACE * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale)) if scale else 0.0


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
    received = [g.to(y.dtype) for y, g in zip(outputs, upstream.values(), strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, received)
    found = {name: y.detach() for name, y in zip(problem.outputs, outputs, strict=True)}
    found |= {f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}
    if "dqkv" in found:  # each with a scale of its own
        found |= dict(zip(("dq", "dk", "dv"), found.pop("dqkv").unbind(2), strict=True))
    return found


MEASURES: dict[str, Callable[[Tensor], float]] = {
    "maximum": lambda x: x.abs().max().item(),
    "norm": lambda x: x.square().mean().sqrt().item(),
}
"""The two sizes of an error; the norm is the root mean square."""
