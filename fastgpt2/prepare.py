"""`python -m fastgpt2.prepare`: turn text files into a folder of token shards to train on.

python -m fastgpt2.prepare book.txt --out data/book
python -m fastgpt2.prepare ~/code --ext .py --tokenizer byte --out data/code
"""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from fastgpt2.console import printable, run_command, shell_word
from fastgpt2.corpus import DUMMY, STDLIB
from fastgpt2.flags import read_arguments
from fastgpt2.preparation import SIGNALS, PrepareConfig, on_signals, prepare
from fastgpt2.sources import skipped_text

SHORT_TOKENS = 1024
"""GPT-2's context: a shorter split gets a note."""


def _summary(meta: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_row("", "train", "val")
    for name in ("documents", "tokens"):
        table.add_row(name, *(f"{meta[name][split]:,}" for split in ("train", "val")))
    entropies = meta["unigram_nats_per_token"]
    table.add_row("unigram nats/token, val under train", "", f"{entropies['val_under_train']:.4f}")
    table.add_row("unigram nats/token, val's own", "", f"{entropies['val']:.4f}")
    table.add_row("vocabulary", meta["tokenizer"], f"{meta['vocab_size']:,}")
    return table


class _Stopped(BaseException):
    """A signal arrived. Not an Exception, so no handler mistakes it for an error."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for later in SIGNALS:  # a second signal must not interrupt the cleanup
        signal.signal(later, signal.SIG_IGN)
    raise _Stopped(number)


def _run() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names the terminal can't show
    config = read_arguments(PrepareConfig, "fastgpt2.prepare")
    meta = prepare(config)
    try:
        _print(meta, config)
    except (OSError, SystemExit):  # rich exits on a closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"can't print the summary; {printable(config.out)} is complete", file=sys.stderr)


def _print(meta: dict[str, Any], config: PrepareConfig) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if skipped := skipped_text(meta["source"]["skipped"]):
        console.print(f"skipped: {skipped}")
    console.print(_summary(meta))
    for split, tokens in meta["tokens"].items():
        if tokens <= SHORT_TOKENS:
            console.print(f"the {split} split is short: --block-size must be below its {tokens:,} tokens")
    # --data takes these names for something else.
    out = f"./{config.out}" if str(config.out) in (*DUMMY, STDLIB) else shell_word(config.out)
    console.print(f"wrote {printable(config.out)}; train on it: python -m fastgpt2.train --data {out}")


def main() -> int:
    """`python -m fastgpt2.prepare SOURCE ... --out DIR`: print a summary and the next command.

    Returns:
        0, or 128 and the number of the signal that stopped it.
    """
    try:
        with on_signals(_stop):
            _run()
    except _Stopped as stopped:
        (number,) = stopped.args
        print(f"stopped by {signal.Signals(number).name}: nothing is half written, start again", file=sys.stderr)
        return 128 + number
    return 0


if __name__ == "__main__":
    run_command(main)
