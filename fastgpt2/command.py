"""What `python -m fastgpt2.train` does: read the command line, train with a live display, report what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

import torch

from fastgpt2.arguments import naming_files, read_command_line
from fastgpt2.console import is_out_of_memory
from fastgpt2.corpus import prepare_aloud
from fastgpt2.data import DataError
from fastgpt2.durable import OutputError
from fastgpt2.final_sample import print_sample
from fastgpt2.folder import new_folder
from fastgpt2.metrics import NonFiniteLossError
from fastgpt2.reporters.display import TrainDisplay
from fastgpt2.run import refuse_several_processes
from fastgpt2.training import train


def main(arguments: list[str] | None = None) -> int:
    """Train with a live display, write the outputs, print a summary."""
    config, origins = read_command_line(sys.argv[1:] if arguments is None else arguments)
    refuse_several_processes()
    with contextlib.ExitStack() as folder, TrainDisplay() as display, naming_files(origins):
        prepare_aloud(config.data)
        if config.out is None:
            config = dataclasses.replace(config, out=folder.enter_context(new_folder(Path("runs"))))
        try:
            result = train(config, reporters=[display])
        except (NonFiniteLossError, OutputError, DataError) as error:
            display.error(str(error))
            return 1
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            kind = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
            display.error(f"out of {kind}: halve --batch-size and double --grad-accum to make the same step in less")
            return 1
        for text in result.missing:
            display.error(text)
        print_sample(result, display.console)
    if result.missing:
        return 1
    complete = result.steps_done >= result.config.steps
    return 0 if complete or display.stopped_by is None else 128 + display.stopped_by
