"""`python -m fastgpt2.sample`: generate text from a checkpoint.

python -m fastgpt2.sample --from runs/NAME --prompt "def main("
python -m fastgpt2.sample --from runs/NAME --num-samples 3 --temperature 1
"""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch

from fastgpt2.config import ConfigError, ModelConfig
from fastgpt2.console import printable_lines, run_command
from fastgpt2.corpus import is_text
from fastgpt2.data import DUMMY, META_NAME, read_meta
from fastgpt2.device import pick_device
from fastgpt2.fields import Count, Name, Natural
from fastgpt2.flags import read_arguments
from fastgpt2.generate import Sampling, generate, stream
from fastgpt2.pretrained import check_vocabulary, load_run
from fastgpt2.tokenizer import BPE_FILES, ByteTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """Generate text from a checkpoint, in the precision of the saved weights (float32)."""

    from_: Path
    """A run's --out folder, for its newest checkpoint, or a checkpoint (OUT/checkpoints/step-00000200)."""
    step: Natural | None = None
    """Use the run's checkpoint of this step instead of the newest."""
    prompt: str = ""
    """Text to continue (default: a new document)."""
    max_new_tokens: Count = 200
    """Maximum tokens to draw; a sample ends earlier if the model ends its text."""
    sampling: Sampling = field(default_factory=Sampling)
    num_samples: Count = 1
    """Samples to draw."""
    seed: Natural = 0
    """Random seed of the first sample; each further sample uses the next seed."""
    data: Name | None = None
    """stdlib, a text file or a folder of token shards: use its tokenizer (default: what the run was trained on)."""
    tokenizer: Literal["gpt2", "byte"] | None = None
    """The tokenizer, if no data folder names one."""
    bpe: Path | None = None
    """Folder with GPT-2's vocab.bpe and encoder.json (default: the data folder)."""
    device: Name | None = None
    """cpu, cuda, cuda:N, or mps, an Apple GPU (untested) (default: cuda if there is one, else cpu)."""


def pick_tokenizer(config: SampleConfig, state: dict[str, Any], model: ModelConfig) -> Tokenizer:
    """The tokenizer of a run, from the flags or its data folder's meta.json, checked against the model's vocabulary.

    Args:
        state: the checkpoint's state.json.

    Raises:
        ConfigError: the run was trained on dummy tokens or on a vocabulary of its own, its data folder is gone, or the
            tokenizer is missing or has another vocabulary.
    """
    if config.tokenizer is not None:
        tokenizer = _load(config.tokenizer, config.bpe, None)
        # A smaller vocabulary is fine: ids beyond it are never drawn.
        if tokenizer.vocab_size > model.vocab_size:
            check_vocabulary(f"the {tokenizer.name} tokenizer", tokenizer.vocab_size, model)
        return tokenizer
    data = config.data or state["config"]["data"]
    if data in DUMMY:
        raise ConfigError(f"{config.from_} was trained on dummy tokens, which stand for no text")
    if is_text(data):
        tokenizer = _load(ByteTokenizer.name, config.bpe, None)
        if config.data or tokenizer.vocab_size > model.vocab_size:
            check_vocabulary(f"the byte tokenizer of {data}", tokenizer.vocab_size, model)
        return tokenizer
    folder = Path(os.path.expanduser(data))
    if not os.path.isdir(folder):  # Path's raises where a name is too long or a folder can't be entered
        raise ConfigError(f"{data}, which tells the tokenizer, is no file or folder here: give --data or --tokenizer")
    meta = read_meta(folder)
    if (folder / META_NAME).exists() and "tokenizer" not in meta:
        raise ConfigError(
            f"{folder / META_NAME} names no tokenizer, so that its {meta['vocab_size']:,} tokens may stand for any "
            "text: give --tokenizer if they are gpt2's or byte's"
        )
    # Shards without a meta.json are llm.c's, of GPT-2's tokens.
    tokenizer = _load(meta.get("tokenizer", "gpt2"), config.bpe, folder, meta.get("tokenizer_sha256"))
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise ConfigError(
            f"the tokens in {folder} are of {meta['vocab_size']:,}, its {tokenizer.name} tokenizer has "
            f"{tokenizer.vocab_size:,}: give --bpe the folder of vocab.bpe and encoder.json that they were made with"
        )
    # The run's own data may have a smaller vocabulary than the model: that was asked for.
    if config.data or tokenizer.vocab_size > model.vocab_size or not (folder / META_NAME).exists():
        check_vocabulary(f"the {tokenizer.name} tokenizer of {folder}", tokenizer.vocab_size, model)
    return tokenizer


def _load(name: str, bpe: Path | None, folder: Path | None, sha256: str | None = None) -> Tokenizer:
    """Load a tokenizer by name, from --bpe if given, else from the data folder."""
    if bpe is not None:
        bpe = Path(os.path.expanduser(bpe))
        if name == "byte":
            raise ConfigError("--bpe holds GPT-2's tokenizer: it has no use with the byte tokenizer")
        if not any(os.path.exists(bpe / file) for file in BPE_FILES):
            raise ConfigError(f"--bpe {bpe} has neither {' nor '.join(BPE_FILES)}")
    return load_tokenizer(name, bpe or folder, sha256=sha256)


def emit(text: str) -> None:
    """Print text immediately. On a terminal, escape the control characters that an untrained model draws.

    Raises:
        BrokenPipeError: the reader has closed the pipe.
        SystemExit: another write error, such as a full disk.
    """
    if sys.stdout.isatty():
        text = printable_lines(text)
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.exit(f"error: can't write the text: {error.strerror}")


def main() -> None:
    """`python -m fastgpt2.sample`: print each sample after its prompt, and the checkpoint on stderr."""
    config = read_arguments(SampleConfig, "fastgpt2.sample")
    model, state = load_run(config.from_, pick_device(config.device), config.step)
    tokenizer = pick_tokenizer(config, state, model.config)
    # As in training, a document starts after the end of another.
    prompt = tokenizer.encode(config.prompt).tolist() or [tokenizer.end_of_text]
    print(f"step {state['step']} of {config.from_}", file=sys.stderr)
    if len(prompt) > model.config.block_size:
        print(
            f"the prompt has {len(prompt):,} tokens: the model sees the last {model.config.block_size:,}",
            file=sys.stderr,
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that can't show a character shows another, rather than ending the run.
        sys.stdout.reconfigure(errors="replace")
    for number in range(config.num_samples):
        if config.num_samples > 1:
            emit(f"--- sample {number + 1}, seed {config.seed + number}\n")
        generator = torch.Generator().manual_seed(config.seed + number)
        limit = config.max_new_tokens
        drawn = generate(model, prompt, limit, config.sampling, generator, tokenizer.vocab_size)
        emit(config.prompt)
        for text in stream(takewhile(lambda token: token != tokenizer.end_of_text, drawn), tokenizer):
            emit(text)
        emit("\n")


if __name__ == "__main__":
    run_command(main)
