"""fastgpt2: an exact GPT-2 trainer. `train(TrainConfig(...))` is the whole programme."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.config import ConfigError, ModelConfig, TrainConfig
    from fastgpt2.model import GPT
    from fastgpt2.ops import Ops
    from fastgpt2.pretrained import load
    from fastgpt2.reporter import Reporter, TrainResult
    from fastgpt2.reporters.display import TrainDisplay
    from fastgpt2.training import train

# cuBLAS is deterministic only with this workspace, and PyTorch looks once in a process: at the first product on a GPU,
# which may come long before a run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "ConfigError",
    "ModelConfig",
    "Ops",
    "Reporter",
    "TrainConfig",
    "TrainDisplay",
    "TrainResult",
    "load",
    "train",
]

_HOME = {
    "ConfigError": "fastgpt2.config",
    "GPT": "fastgpt2.model",
    "ModelConfig": "fastgpt2.config",
    "Ops": "fastgpt2.ops",
    "Reporter": "fastgpt2.reporter",
    "TrainConfig": "fastgpt2.config",
    "TrainDisplay": "fastgpt2.reporters.display",
    "TrainResult": "fastgpt2.reporter",
    "load": "fastgpt2.pretrained",
    "train": "fastgpt2.training",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import fastgpt2` costs nothing."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fastgpt2' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
