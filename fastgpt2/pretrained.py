"""Load a trained model from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastgpt2.checkpoint import MODEL, find, load_model
from fastgpt2.config import ConfigError, ModelConfig
from fastgpt2.model import GPT
from fastgpt2.ops import Site, make_ops
from fastgpt2.slots import SLOTS, is_outside
from fastgpt2.tensors import check_tensors


def load_run(source: Path, device: torch.device, step: int | None = None) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint, in evaluation mode, and the checkpoint's state.json.

    The weights keep the precision that they were saved in, float32 unless the run was in float64. The ops are what
    `auto` chooses on the device in that precision, so that a loss never holds whole logits; one from outside
    ("module:function") is imported again.

    Args:
        source: a run's --out folder, whose newest checkpoint is taken, or the folder of a checkpoint.
        step: of a run's folder, take the checkpoint of this step.

    Raises:
        ConfigError: no such checkpoint, one that can't be read or doesn't hold the model that its state.json describes,
            or a run with an operation that this version doesn't know or can't import.
    """
    checkpoint = find(source, step)
    tensors, shape, state = load_model(checkpoint, device)
    check_operations(source, state["config"])
    dtype = next((tensor.dtype for tensor in tensors.values()), torch.float32)
    if dtype not in (torch.float32, torch.float64) or any(tensor.dtype != dtype for tensor in tensors.values()):
        raise ConfigError(f"the weights of {source} must all be float32 or all float64")
    asked = {slot: state["config"].get(slot, "auto") for slot in SLOTS}
    outside = {slot: name for slot, name in asked.items() if is_outside(name)}
    site = Site(device=device, dtype=dtype, head_dim=shape.head_dim, n_embd=shape.n_embd)
    try:
        ops, _ = make_ops(outside, site)
    except ConfigError as error:
        raise ConfigError(f"{source} was trained with {error}") from None
    # Nothing is drawn, and nothing held twice.
    with torch.device("meta"), _Undrawn():
        model = GPT(shape, ops)
    check_tensors(checkpoint / MODEL, {name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    model.load_state_dict(tensors, assign=True)
    return model.eval(), state


class _Undrawn(TorchFunctionMode):
    """Skip torch.nn.init: the meta device has nothing to fill, and torch would import the compiler for it."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return keywords.get("tensor", *arguments[:1])
        return function(*arguments, **keywords)


def check_operations(source: Path, config: Mapping[str, Any]) -> None:
    """Check that this version knows every operation that a run was trained with.

    All implementations in a table compute the same function, so any of them may evaluate any run. An unknown one may
    have computed another function, and must not be replaced silently.

    Raises:
        ConfigError: it doesn't.
    """
    for slot, table in SLOTS.items():
        name = config.get(slot, "auto")
        if name not in ("auto", *table) and not is_outside(name):
            raise ConfigError(
                f"{source} was trained with --{slot} {name}, which this version doesn't have: "
                f"evaluated with another, it may be another model (there are {', '.join(table)})"
            )


def check_vocabulary(what: str, vocab_size: int, model: ModelConfig) -> None:
    """Check that a vocabulary fits the model: the sizes are equal, or the model's is the other one padded.

    Args:
        what: whose the vocabulary is, as the message begins.

    Raises:
        ConfigError: they can't: the ids would mean other text.
    """
    padded = ModelConfig(vocab_size=vocab_size).padded_vocab_size
    if not vocab_size <= model.vocab_size <= padded:
        raise ConfigError(
            f"{what} has {vocab_size:,} tokens, the model {model.vocab_size:,}: it was trained with another vocabulary"
        )
