"""Turn text files into a folder of token shards to train on.

    DIR/train_000000.bin ...   tokens, at most 100M a shard (the format is in fastgpt2.data)
    DIR/val_000000.bin         other documents than the training ones
    DIR/meta.json              tokenizer, counts, checksums, unigram entropies, what was read
    DIR/vocab.bpe, encoder.json   GPT-2's tokenizer, so that the folder needs nothing else
    DIR/.lock                  held while shards are made: a second prepare is refused

A file is one document, or with --document-separator several; the end-of-text token follows each.
The same files give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastgpt2.config import ConfigError
from fastgpt2.console import printable
from fastgpt2.durable import InUseError, locked, sync
from fastgpt2.fields import Name
from fastgpt2.shards import META_NAME, count_tokens, split_of, unigram_entropy, write_shard
from fastgpt2.sources import ASIDE, Document, Found, assign, find, texts
from fastgpt2.tokenizer import BPE_FILES, END_OF_TEXT, ByteTokenizer, Gpt2Tokenizer, Tokenizer, copy_bpe_files

SHARD_TOKENS = 100_000_000
UNFINISHED = {
    "vocab_size": 1,
    "shards": {f"{split}_unfinished.bin": {"tokens": 1, "sha256": "0" * 64} for split in ("train", "val")},
}
"""meta.json while shards are moved into place. It lists shards that never exist, so every reader refuses the folder,
which may hold both old and new shards."""
SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text files into token shards for training."""

    sources: tuple[Path, ...]
    """Text files, and folders whose text files are taken (hidden ones, site-packages, __pycache__,
    node_modules, tables, archives and what prepare wrote are not)."""
    out: Path
    """Folder for the shards; created if it doesn't exist."""
    tokenizer: Literal["gpt2", "byte"] = "gpt2"
    """gpt2: byte-pair encoding, vocabulary 50257. byte: vocabulary 257, for small models (default: gpt2)."""
    bpe: Path | None = None
    """Folder with vocab.bpe and encoder.json, GPT-2's or of other merges (default: tiktoken's, which needs the
    network once)."""
    val_fraction: float = 0.02
    """Fraction of the text kept for validation: whole documents, chosen by a hash of their contents."""
    ext: tuple[Name, ...] = ()
    """From folders, take only files with these endings, such as .py .txt (default: all text files)."""
    document_separator: Name | None = None
    """Text that separates documents in a file, such as <|endoftext|> (default: a file is a document). It is dropped,
    with a newline right before or after it."""
    overwrite: bool = False
    """Replace the shards already in --out."""


def prepare(config: PrepareConfig, console: Console | None = None) -> dict[str, Any]:
    """Write the shards and return the contents of meta.json.

    Raises:
        ConfigError: a value out of range, a source that doesn't exist, nothing to read, an --out that can't
            be written, is in use or already holds shards, or a tokenizer that can't be had.
    """
    console = console or Console(stderr=True)
    config = _expanded(config)
    _check(config)
    try:
        _make_folder(config.out)
        with locked(config.out) as alone:
            if not alone:
                _warn(console, f"{config.out} is on a file system without locks: start no second prepare into it")
            _check_unused(config)
            return fill(config, console)
    except InUseError:
        raise ConfigError(f"--out {config.out} is in use by another process: wait for it or give another") from None
    except OSError as error:
        raise ConfigError(f"can't write {error.filename or config.out}: {error.strerror or error}") from None


def fill(config: PrepareConfig, console: Console) -> dict[str, Any]:
    """Write the shards to --out, which is locked, in place of those that it holds. Returns the contents of meta.json.

    Raises:
        ConfigError: see prepare.
        OSError: --out can't be written.
    """
    aside = config.out / ASIDE
    shutil.rmtree(aside, ignore_errors=True)  # of a prepare that was killed
    aside.mkdir()
    try:
        # First, since this is most likely to fail.
        tokenizer = _tokenizer(config, aside, console)
        with _progress(console) as progress:
            found = find(config.sources, config.out, config.ext, config.document_separator, progress)
            parts = assign(found, config.val_fraction)
            shards, counts = _write(parts, tokenizer, aside, progress)
        meta = _describe(config, tokenizer, found, parts, shards, counts)
        (aside / META_NAME).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _publish(aside, config.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if found.unreadable:
        _warn(console, f"unreadable, so left out: {found.unreadable}")
    if found.copied:
        _warn(console, f"{found.copied} left out: the end of the one that is kept was cut off for validation")
    if found.written:
        _warn(console, f"left out {found.written:,} files that prepare writes, as those in {config.out}")
    if found.marks:
        _warn(
            console,
            f"{END_OF_TEXT} stands {found.marks:,} times in the text and was taken as text; to end a document at each: "
            f"--document-separator '{END_OF_TEXT}'",
        )
    return meta


def _warn(console: Console, text: str) -> None:
    with contextlib.suppress(OSError, SystemExit):  # a failed print must not stop the run; rich exits on a closed pipe
        # soft_wrap: don't break paths
        console.print(f"[yellow]warning:[/] {escape(printable(text))}", soft_wrap=True, highlight=False)


def _expanded(config: PrepareConfig) -> PrepareConfig:
    """Expand ~ in the paths, in case the shell did not."""

    def expanded(path: Path) -> Path:
        return Path(os.path.expanduser(path))  # Path.expanduser raises if there is no such user

    bpe = None if config.bpe is None else expanded(config.bpe)
    return replace(config, sources=tuple(map(expanded, config.sources)), out=expanded(config.out), bpe=bpe)


def _check(config: PrepareConfig) -> None:
    if not config.sources:
        raise ConfigError("give at least one text file or folder to read")
    for source in config.sources:
        try:
            source.stat()
        except FileNotFoundError:
            raise ConfigError(f"no such file or folder: {source}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't read {source}: {getattr(error, 'strerror', None) or error}") from None
    if not 0.0 < config.val_fraction <= 0.5:
        raise ConfigError(f"--val-fraction must be over 0 and at most 0.5, got {config.val_fraction}")
    for ending in config.ext:
        if not ending.strip(".") or set(ending) & set("*?/"):
            raise ConfigError(f"--ext takes endings such as .txt, got {ending!r}")
    separator = config.document_separator
    if separator == "":
        raise ConfigError("--document-separator is empty: give the text between documents, or leave it out")
    if separator and separator != separator.encode(errors="replace").decode():
        raise ConfigError(f"--document-separator must be UTF-8, got {separator!r}")
    if config.bpe is not None and config.tokenizer != "gpt2":
        raise ConfigError(f"--bpe holds GPT-2's tokenizer: it has no use with --tokenizer {config.tokenizer}")


def _make_folder(out: Path) -> None:
    """Create --out if it doesn't exist; it is on the disk before this returns.

    Raises:
        ConfigError: it can't be created.
    """
    if os.path.lexists(out) and not os.path.isdir(out):
        kind = "a file" if os.path.exists(out) else "a link to nothing"
        raise ConfigError(f"--out {out} is {kind}: give a folder")
    try:
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync(folder.parent)
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't write --out {out}: {getattr(error, 'strerror', None) or error}") from None


def _check_unused(config: PrepareConfig) -> None:
    """Raise ConfigError if --out holds shards and --overwrite is not given."""
    held = _shard_files(config.out)
    if config.overwrite or not held or _is_unfinished(config.out):
        return
    raise ConfigError(
        f"--out {config.out} already holds {held[0].name}: give --overwrite to replace it, or another folder"
    )


def _is_unfinished(out: Path) -> bool:
    """Whether a prepare was interrupted while moving its shards into place."""
    try:
        return (out / META_NAME).read_text(encoding="utf-8") == json.dumps(UNFINISHED)
    except (OSError, ValueError):
        return False


def _tokenizer(config: PrepareConfig, aside: Path, console: Console) -> Tokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    for name in copy_bpe_files(config.bpe, aside):
        _warn(console, f"{config.bpe}/{name} is not GPT-2's published one")
    for name in BPE_FILES:
        held = config.out / name
        if held.exists() and not config.overwrite and held.read_bytes() != (aside / name).read_bytes():
            raise ConfigError(f"--out {config.out} already holds another {name}: give --overwrite, or another folder")
    return Gpt2Tokenizer(aside, threads=os.cpu_count() or 1)


class _ShardWriter:
    """Collects the tokens of a split and writes a shard whenever one is full."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        self.folder, self.split = folder, split
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.shards: dict[str, dict[str, Any]] = {}
        self._arrays: list[np.ndarray] = []
        self._held = 0

    def add(self, tokens: np.ndarray) -> None:
        while self._held + len(tokens) >= SHARD_TOKENS:
            room = SHARD_TOKENS - self._held
            self._arrays.append(tokens[:room])
            self.flush()
            tokens = tokens[room:]
        self._arrays.append(tokens)
        self._held += len(tokens)

    def flush(self) -> None:
        tokens = np.concatenate([np.zeros(0, np.uint16), *self._arrays])
        self._arrays, self._held = [], 0
        if len(tokens) == 0:
            return
        path = self.folder / f"{self.split}_{len(self.shards):06d}.bin"
        write_shard(path, tokens)
        self.counts += count_tokens(tokens, len(self.counts))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards[path.name] = {"tokens": len(tokens), "sha256": sha256}


def _write(
    parts: dict[str, list[Document]], tokenizer: Tokenizer, folder: Path, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Tokenize every document into shards: the shards by name, and each split's token counts."""
    task = progress.add_task("tokenizing", total=sum(map(len, parts.values())))
    end = np.array([tokenizer.end_of_text], dtype=np.uint16)
    shards: dict[str, dict[str, Any]] = {}
    counts = {}
    for split, documents in parts.items():
        writer = _ShardWriter(folder, split, tokenizer.vocab_size)
        for text in texts(documents):
            writer.add(tokenizer.encode(text))
            writer.add(end)
            progress.advance(task)
        writer.flush()
        shards |= writer.shards
        counts[split] = writer.counts
    return shards, counts


def _describe(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    found: Found,
    parts: dict[str, list[Document]],
    shards: dict[str, dict[str, Any]],
    counts: dict[str, np.ndarray],
) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "documents": {split: len(documents) for split, documents in parts.items()},
        "tokens": {split: int(c.sum()) for split, c in counts.items()},
        "unigram_nats_per_token": {
            "val_under_train": unigram_entropy(counts["val"], counts["train"]),
            "val": unigram_entropy(counts["val"]),
        },
        "shards": shards,
        "source": {
            "names": [source.name or str(source) for source in config.sources],
            "files": found.files,
            "bytes": sum(document.size for document in found.documents),
            "ext": list(config.ext),
            "document_separator": config.document_separator,
            "val_fraction": config.val_fraction,
            "skipped": dict(sorted(found.skipped.items())),
        },
    }


def _shard_files(out: Path) -> list[Path]:
    """meta.json and everything in a folder that `fastgpt2.data` would take for a shard."""
    paths = [*out.glob(META_NAME), *(path for path in sorted(out.glob("*.bin")) if split_of(path.name))]
    return [path for path in paths if not path.is_dir()]


def _publish(aside: Path, out: Path) -> None:
    """Move the finished files into place and the replaced ones away.

    If interrupted, even by a power cut, the folder holds the old shards, the new ones, or UNFINISHED.
    """
    finished = [path for path in aside.iterdir() if path.name != META_NAME]
    unfinished = aside / "unfinished"
    unfinished.write_text(json.dumps(UNFINISHED), encoding="utf-8")
    for path in (*finished, aside / META_NAME, unfinished):
        sync(path)
        if (out / path.name).is_dir():
            raise ConfigError(f"--out {out} has a folder {path.name}, where a file is to be: give another")
    with _signals_held():
        os.replace(unfinished, out / META_NAME)
        sync(out)
        for old in _shard_files(out):
            if old.name != META_NAME:
                old.unlink()
        for path in finished:
            os.replace(path, out / path.name)
        sync(out)
        os.replace(aside / META_NAME, out / META_NAME)
        sync(out)


@contextlib.contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGNALS inside the block, except ignored ones (nohup)."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if old is not None and old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Defer signals to the end of the block."""
    held: list[int] = []
    with on_signals(lambda number, frame: held.append(number)):
        yield
    if held:
        signal.raise_signal(held[0])


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
