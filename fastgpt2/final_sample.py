"""A sample of text at the end of the train command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import takewhile

import torch
from rich.console import Console
from rich.text import Text

from fastgpt2 import signals
from fastgpt2.console import printable, printable_lines, shell_word
from fastgpt2.corpus import DUMMY, GIVEN, is_text, shard_folder
from fastgpt2.data import read_meta
from fastgpt2.generate import Sampling, generate, stream
from fastgpt2.reporter import TrainResult
from fastgpt2.tokenizer import BPE_FILES, ByteTokenizer, Tokenizer, load_tokenizer

TOKENS = 200
SECONDS = 5.0
"""How long a sample may take: a large model on a CPU needs a second for a token."""


def print_sample(result: TrainResult, console: Console, *, sharded: bool = False) -> None:
    """Print a sample of a run that has made all its steps: what `python -m fastgpt2.sample --from OUT` prints.

    With a sharded model, of which this process holds a part, print that command alone.

    A signal ends the sample, not the process. A failure is a note: the run has ended well. The model's mode and the
    random generators stay as they are.
    """
    if result.steps_done < result.config.steps or not result.losses or result.missing:
        return
    stops: list[int] = []
    handlers = signals.handle(lambda number, frame: stops.append(number))
    try:
        tokenizer = local_tokenizer(result.config.data)
        if tokenizer is None:
            return
        if not sharded:
            text = "".join(stream(_tokens(result, tokenizer, stops), tokenizer))
            console.print(Text("a sample from the trained model:", "dim"))
            console.print(Text(printable_lines(text.expandtabs().strip("\n"))))
        if result.out is not None and result.config.save_every:
            what = "text from the trained model" if sharded else "more"
            more = f"{what}: python -m fastgpt2.sample --from {shell_word(result.out)} --prompt TEXT"
            console.print(Text(printable(more), "dim"))
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        console.print(Text(printable(f"no sample: {told}"), "dim"))
    finally:
        signals.put_back(handlers)


def _tokens(result: TrainResult, tokenizer: Tokenizer, stops: list[int]) -> Iterator[int]:
    """Ids of a new document, until its end, TOKENS, SECONDS or a signal."""
    model, ends = result.model, time.monotonic() + SECONDS
    dtype, device = result.config.torch_dtype, model.wte.weight.device.type
    autocast = torch.autocast(device, dtype=dtype) if dtype.itemsize == 2 else contextlib.nullcontext()
    generator = torch.Generator().manual_seed(0)
    drawn = generate(model, [tokenizer.end_of_text], TOKENS, Sampling(), generator, tokenizer.vocab_size)
    was_training = model.training
    model.eval()
    try:
        with autocast:
            for token in takewhile(lambda token: token != tokenizer.end_of_text, drawn):
                yield token
                if stops or time.monotonic() > ends:
                    break
    finally:
        model.train(was_training)


def local_tokenizer(data: str) -> Tokenizer | None:
    """The tokenizer of --data, if that is known and needs no network; else None."""
    if data in (*DUMMY, GIVEN):
        return None
    if is_text(data):
        return ByteTokenizer()
    folder = shard_folder(data)
    meta = read_meta(folder)
    name, sha256 = meta.get("tokenizer", "gpt2"), meta.get("tokenizer_sha256")
    if name != ByteTokenizer.name and not all((folder / file).exists() for file in BPE_FILES):
        return None
    tokenizer = load_tokenizer(name, folder, sha256=sha256)
    return tokenizer if tokenizer.vocab_size == meta["vocab_size"] else None
