"""The settings of a run from the command line: flags over a --config file over the run's own config.toml."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt2.config import ConfigError, TrainConfig
from fastgpt2.console import printable
from fastgpt2.fields import checked, flag
from fastgpt2.flags import given_flags, make_parser
from fastgpt2.folder import saved_for, settings_of_run
from fastgpt2.renamed import with_current_flags
from fastgpt2.toml import read_toml

ABOUT_CONFIG = (
    "TOML file of settings, named as the flags. Flags override it: --no-compile turns off what it turns on. "
    "Paths in it are relative to where you are."
)


def parse(arguments: list[str]) -> TrainConfig:
    """A configuration from command-line arguments.

    Raises:
        ConfigError: a flag or a value in a file is invalid.
    """
    return read_command_line(arguments)[0]


def read_command_line(arguments: list[str]) -> tuple[TrainConfig, dict[str, str]]:
    """A configuration from command-line arguments, and the file behind each setting that came from one.

    Later layers override earlier ones: config.toml of a resumed run, the --config file, the flags. Every value is
    checked, overridden ones too.

    Raises:
        ConfigError: a flag or a value in a file is invalid.
    """
    parser = make_parser(TrainConfig, "fastgpt2.train")
    parser.add_argument("--config", metavar="FILE", help=ABOUT_CONFIG)
    arguments, renamed = with_current_flags(arguments)
    if renamed:
        print(f"note: {', '.join(renamed)}; the next version drops the old flags", file=sys.stderr)
    flags = given_flags(parser, TrainConfig, arguments)
    layers: list[tuple[str, dict[str, Any]]] = [("", flags)]
    if "config" in flags:
        file = checked("--config", flags.pop("config"), Path)
        layers.insert(0, (str(file), read_toml(file)))
    asked = {name: value for _, layer in layers for name, value in layer.items()}
    if asked.get("resume") and "out" in asked:
        where, saved, problem = settings_of_run(asked["out"])
        layers.insert(0, (where, saved_for(asked, saved)))
        if problem:
            print(printable(problem), file=sys.stderr)
    settings, origins = _merged(layers)
    with naming_files(origins):
        return TrainConfig(**settings), origins


REPLACES = {
    "model": ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"),
    "data": ("end_of_text",),
    "grad_accum": ("global_batch",),
    "global_batch": ("grad_accum",),
    "parallel": ("shard_size",),
}
"""Settings of an earlier layer that no longer apply when a later one changes the setting at the left."""


def _merged(layers: list[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge layers, later ones over earlier ones; also the file that gave each setting."""
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for where, layer in layers:
        for name in (n for n in REPLACES if n in layer and layer[n] != settings.get(n)):
            for stale in REPLACES[name]:
                settings.pop(stale, None)
        settings |= layer
        origins |= dict.fromkeys(layer, where)
    return settings, {name: where for name, where in origins.items() if where and name in settings}


@contextlib.contextmanager
def naming_files(origins: dict[str, str]) -> Iterator[None]:
    """Add to an error the file that a setting it names came from."""
    try:
        yield
    except ConfigError as error:
        named = [name.replace("-", "_") for name in re.findall(r"--(?:no-)?([a-z][a-z0-9-]*)", str(error))]
        given = [name for name in dict.fromkeys(named) if name in origins]
        if not given:
            raise
        where = ", ".join(f"{flag(name)} is from {origins[name]}" for name in given)
        error.args = (f"{error} ({where})",)
        raise
