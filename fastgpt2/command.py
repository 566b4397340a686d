"""What `python -m fastgpt2.train` does: read the command line, train with a live display, report what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

import torch

from fastgpt2.arguments import naming_files, read_command_line
from fastgpt2.config import ConfigError, TrainConfig
from fastgpt2.console import is_out_of_memory
from fastgpt2.corpus import prepare_aloud
from fastgpt2.data import DataError
from fastgpt2.durable import OutputError
from fastgpt2.failures import explain
from fastgpt2.final_sample import print_sample
from fastgpt2.folder import new_folder
from fastgpt2.metrics import NonFiniteLossError
from fastgpt2.parallel import Ranks, is_shared, joined
from fastgpt2.reporters.display import TrainDisplay
from fastgpt2.sharding import is_sharded
from fastgpt2.training import train


def main(arguments: list[str] | None = None) -> int:
    """Train with a live display, write the outputs, print a summary."""
    config, origins = read_command_line(sys.argv[1:] if arguments is None else arguments)
    try:
        with joined(config.device, config.timeout) as ranks:
            return _train(config, origins, ranks)
    except _FailedError as failed:
        return failed.status


class _FailedError(Exception):
    """The run has failed and the user knows why. It leaves the other processes without waiting for them."""

    def __init__(self, status: int) -> None:
        self.status = status


def _train(config: TrainConfig, origins: dict[str, str], ranks: Ranks) -> int:
    with contextlib.ExitStack() as folder, TrainDisplay() as display:
        try:
            with naming_files(origins):
                ranks.together(lambda: prepare_aloud(config.data))
                if config.out is None:
                    out = ranks.from_first(lambda: folder.enter_context(new_folder(Path("runs"))))
                    config = dataclasses.replace(config, out=out)
                result = train(config, reporters=[display])
        except Exception as error:
            _tell(error, ranks, config.out, display)
            raise _FailedError(2 if isinstance(error, ConfigError) else 1) from error
        if ranks.first:
            for text in result.missing:
                display.error(text)
            print_sample(result, display.console, sharded=is_sharded(result.config, ranks))
        if result.missing:
            return 1
        complete = result.steps_done >= result.config.steps
        return 0 if complete or display.stopped_by is None else 128 + display.stopped_by


def _tell(error: Exception, ranks: Ranks, out: Path | None, display: TrainDisplay) -> None:
    """Tell the user in one line, from one process, why the run fails. Raises an error that nobody expected."""
    text = _expected(error)
    if ranks.world == 1 and (text is None or isinstance(error, ConfigError)):
        raise error  # run_command tells of it
    if ranks.world > 1 and not (is_shared(error) or isinstance(error, NonFiniteLossError)):
        text = explain(error, ranks, out, text)
    elif not ranks.first:
        text = None
    if text is not None:
        display.error(text)


def _expected(error: Exception) -> str | None:
    """What to tell of an error whose cause is known: the data, the disk, the settings, the memory; else None."""
    if isinstance(error, (ConfigError, NonFiniteLossError, OutputError, DataError)):
        return str(error)
    if not is_out_of_memory(error):
        return None
    kind = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
    return f"out of {kind}: halve --batch-size and double --grad-accum to make the same step in less"
