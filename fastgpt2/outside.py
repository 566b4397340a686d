"""Functions named "module:function": loaded by that name, and the name of one that Python was given."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from typing import Any

from fastgpt2.fields import ConfigError, nearest


def load(name: str, flag: str) -> Callable[..., Any]:
    """The function of a "module:function". As with `python -m`, modules in the current folder are found.

    Args:
        flag: what the message begins with, such as --attn.

    Raises:
        ConfigError: no such module or function, or not callable.
    """
    module, _, path = name.partition(":")
    if "<" in name:
        raise ConfigError(
            f"{flag} {name} was given in Python and can't be imported: give it again, by train(config, ops=...), or "
            "move it to the top level of a module and name it module:function"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            why = f"no module {error.name!r}; start in the folder that holds it, or install it"
        else:
            why = told(error)
        raise ConfigError(f"{flag} {name} can't be imported: {why}") from error
    try:
        function = reduce(getattr, path.split("."), found)
    except AttributeError:
        raise ConfigError(f"{flag} {name}: {module} has no {path!r}{nearest(path, vars(found))}") from None
    if not callable(function):
        raise ConfigError(f"{flag} {name} must be a function, got {type(function).__name__}")
    return function


def told(error: Exception) -> str:
    """An exception in one line, with the last place that is neither PyTorch's nor ours."""
    modules = (sys.modules.get(name) for name in ("fastgpt2", "torch", "importlib"))
    theirs = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in modules if module)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<", *theirs))]
    place = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + place


def import_name(function: Callable[..., Any]) -> str:
    """The "module:function" by which a function can be imported again; with <> in it where none can.

    A lambda, a function inside another, one of a script that is run and an object that is called have no such name.
    """
    module = getattr(function, "__module__", None) or type(function).__module__
    path = getattr(function, "__qualname__", None) or f"<{type(function).__name__}>"
    try:
        importable = module != "__main__" and reduce(getattr, path.split("."), sys.modules[module]) is function
    except (KeyError, AttributeError):
        importable = False
    name = f"{module}:{path}"
    return name if importable or "<" in name else f"<{module}>:{path}"
