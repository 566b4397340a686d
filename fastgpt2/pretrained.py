"""Load a trained model from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastgpt2.checkpoint import find, load_model
from fastgpt2.checkpoint_files import stored
from fastgpt2.config import ConfigError, ModelConfig
from fastgpt2.device import pick_device
from fastgpt2.model import GPT
from fastgpt2.ops import Site, make_ops
from fastgpt2.slots import SLOTS, is_outside


def load(path: Path | str, *, step: int | None = None, device: str | None = None) -> GPT:
    """Load the model of a run, in evaluation mode.

    Args:
        path: a run's --out folder, or the folder of a checkpoint.
        step: the step of the checkpoint, if path is a run's folder; its newest by default.
        device: cpu, cuda, cuda:N or mps; cuda by default if there is one.

    Raises:
        ConfigError: as from load_run.
    """
    return load_run(Path(path), pick_device(device), step)[0]


def load_run(source: Path, device: torch.device, step: int | None = None) -> tuple[GPT, dict[str, Any]]:
    """Load a checkpoint's model, in evaluation mode, and its state.json.

    Weights keep their saved precision: float64 for a float64 run, otherwise float32. `auto` chooses the operations for
    the device and that precision: its losses never store all logits. An operation from outside ("module:function") is
    imported again.

    Args:
        source: a run's --out folder, or the folder of a checkpoint.
        step: the step of the checkpoint, if source is a run's folder; its newest by default.

    Raises:
        ConfigError: the checkpoint is missing, unreadable, or contradicts its state.json, or this version doesn't have
            or can't import an operation of the run.
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
    # Draw no weights, and hold none twice.
    with torch.device("meta"), _Undrawn():
        model = GPT(shape, ops)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    stored(checkpoint, "model", state).check(shapes)
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
    have computed another function and must not be replaced silently.

    Raises:
        ConfigError: it doesn't know one.
    """
    for slot, table in SLOTS.items():
        name = config.get(slot, "auto")
        if name not in ("auto", *table) and not is_outside(name):
            raise ConfigError(
                f"{source} was trained with --{slot} {name}, which this version doesn't have "
                f"(it has {', '.join(table)}): another implementation may compute another function"
            )


def check_vocabulary(what: str, vocab_size: int, model: ModelConfig) -> None:
    """Check that a vocabulary fits the model: the model's size is the same, or the same after padding.

    Args:
        what: what has the vocabulary; the message begins with it.

    Raises:
        ConfigError: it doesn't fit: ids would stand for other text.
    """
    padded = ModelConfig(vocab_size=vocab_size).padded_vocab_size
    if not vocab_size <= model.vocab_size <= padded:
        raise ConfigError(
            f"{what} has {vocab_size:,} tokens, but the model has {model.vocab_size:,}: "
            "it was trained with another vocabulary"
        )
