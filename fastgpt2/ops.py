"""The seam: the functions that compute the slots of a model.

Modules own parameters, ops own compute. An `Ops` is handed to the model's constructor; the state_dict is the same
whatever it holds, so "the backends agree" means: same weights, other ops, same loss. What there is to choose from is in
fastgpt2.slots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.backends.attention import sdpa_attention
from fastgpt2.backends.loss import torch_loss
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.backends.norm import torch_norm
from fastgpt2.fields import ConfigError, nearest
from fastgpt2.outside import import_name, load
from fastgpt2.slots import AUTO, SLOTS, Implementation, implementation, is_outside

MEASURED = Path(__file__).with_name("auto.json")

AttentionOp = Callable[..., Tensor]
MlpOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
NormOp = Callable[..., tuple[Tensor, Tensor | None]]
LossOp = Callable[..., Tensor]


@dataclass(frozen=True)
class Ops:
    """One implementation a slot. The shapes are in the plain forms, fastgpt2.backends.

    bias_gradients: slots that also return the gradient of the bias that the product before them added; see
        fastgpt2.slots.Implementation.
    """

    attn: AttentionOp = sdpa_attention
    mlp: MlpOp = torch_mlp
    norm: NormOp = torch_norm
    loss: LossOp = torch_loss
    bias_gradients: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"Ops({', '.join(f'{slot}={_call(getattr(self, slot))}' for slot in SLOTS)})"


@dataclass(frozen=True)
class Site:
    """Where ops are to run, and with what: all that decides whether an implementation can.

    Args:
        dtype: what the matmuls compute in, which is autocast's where that is on.
        tf32: float32 products on the matrix units in TF32 (10 bits of mantissa) rather than exactly.
        stream_gradient: the dtype of the residual stream's gradient; None: the stream's.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    n_embd: int = 768
    dropout: float = 0.0
    tf32: bool = False
    stream_gradient: torch.dtype | None = None

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


def make_ops(
    choices: Mapping[str, str | Callable[..., Any]] | None = None, site: Site | None = None
) -> tuple[Ops, dict[str, str]]:
    """The ops asked for, and what each choice became: {"attn": "sdpa", "mlp": "torch", ...}.

    Args:
        choices: by slot, a name in its table, "module:function", a function, or "auto", which is what slots left out
            are.
        site: where they are to run; GPT-2 124M in float32 on a CPU where left out.

    Raises:
        ConfigError: an implementation named doesn't exist or can't run here; the message says why and what would.
    """
    site = site or Site()
    chosen: dict[str, str] = {}
    functions: dict[str, Callable[..., Any]] = {}
    bias_gradients = set()
    for slot in SLOTS:
        choice = (choices or {}).get(slot, "auto")
        if callable(choice):
            chosen[slot], functions[slot] = name_of(slot, choice), choice
        else:
            chosen[slot] = _auto(slot, site) if choice == "auto" else choice
            functions[slot] = _load(slot, chosen[slot], site)
            if implementation(slot, chosen[slot]).bias_gradient:
                bias_gradients.add(slot)
    return Ops(**functions, bias_gradients=frozenset(bias_gradients)), chosen


def as_choices(ops: Ops | Mapping[str, Callable[..., Any]] | None) -> dict[str, Callable[..., Any]]:
    """The functions given for slots, by slot.

    Raises:
        ConfigError: no such slot, or what is given for it is no function.
    """
    given = {slot: getattr(ops, slot) for slot in SLOTS} if isinstance(ops, Ops) else dict(ops or {})
    for slot, function in given.items():
        if slot not in SLOTS:
            raise ConfigError(f"ops has no slot {slot!r}: there are {', '.join(SLOTS)}{nearest(slot, SLOTS)}")
        if not callable(function):
            by_name = f"; a name is given as TrainConfig({slot}={function!r})" * isinstance(function, str)
            raise ConfigError(f"ops[{slot!r}] must be a function, got {type(function).__name__}{by_name}")
    return given


def name_of(slot: str, function: Callable[..., Any]) -> str:
    """What a run is saved with for a function given in Python: its name in the table, else "module:function"."""
    name = import_name(function)
    return next((n for n, known in SLOTS[slot].items() if known.function == name and not known.options), name)


def _call(function: Callable[..., Any]) -> str:
    """A function's name, with the keyword arguments that a partial gives it."""
    if not isinstance(function, partial):
        return getattr(function, "__name__", type(function).__name__)
    options = ", ".join(f"{name}={value!r}" for name, value in function.keywords.items())
    return _call(function.func) + (f"({options})" if options else "")


def why_not(slot: str, known: Implementation, site: Site) -> str | None:
    """Why an implementation can't run there, in a line that says what would work; None where it can."""
    if site.device.type == "mps" and not known.mps:
        reason = "it is not supported with --device mps"
    elif known.package and not _installed(known.package):
        reason = f"the {known.package} package is not installed (pip has it for Linux)"
    elif known.why_not:
        reason = load(known.why_not, f"--{slot}")(*(getattr(site, name) for name in known.asks))
    else:
        reason = None
    return reason and f"{reason}; use --{slot} {AUTO[slot][-1]}"


def _load(slot: str, name: str, site: Site) -> Callable[..., Any]:
    if is_outside(name):
        return load(name, f"--{slot}")
    if name not in SLOTS[slot]:
        raise ConfigError(f"no --{slot} {name!r}: there are auto, {', '.join(SLOTS[slot])} and module:function")
    known = SLOTS[slot][name]
    if reason := why_not(slot, known, site):
        raise ConfigError(f"--{slot} {name} can't run here: {reason}")
    options = {**known.options, **({"allow_tf32": site.tf32} if known.tf32 else {})}
    if known.stream_gradient and site.stream_gradient:
        options["stream_gradient"] = site.stream_gradient
    return partial(load(known.function, f"--{slot}"), **options)


def _auto(slot: str, site: Site) -> str:
    """What `auto` is: what was measured to be faster on this GPU in this precision, then AUTO; the first that can run
    without being interpreted."""
    faster = ablation(site.device, site.precision).get("slots", {})
    for name in (*faster.get(slot, ()), *AUTO[slot]):
        known = SLOTS[slot][name]
        if not (known.interpreted and site.device.type == "cpu") and not why_not(slot, known, site):
            return name
    raise AssertionError(f"the last of AUTO[{slot!r}] runs everywhere")


def ablation(device: torch.device, precision: str) -> dict[str, Any]:
    """auto.json's entry for this GPU in this precision; empty where nobody has measured it."""
    # A GPU that isn't there (its ops can be made and inspected) has no name.
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else None
    return _measured().get(name, {}).get(precision, {})


@cache
def _measured() -> dict[str | None, dict[str, Any]]:
    """auto.json's devices, which `python -m bench.report` writes from what bench/results holds."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))["devices"]


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # imported as None, which stands for a module that isn't there
        return False
