"""`python -m fastgpt2.prepare`: turn text files into a folder of token shards to train on.

    DIR/train_000000.bin ...   tokens, at most 100M a shard (the format is in fastgpt2.data)
    DIR/val_000000.bin         other documents than the training ones
    DIR/meta.json              tokenizer, counts, checksums, unigram entropies, what was read
    DIR/vocab.bpe, encoder.json   GPT-2's tokenizer, so that the folder needs nothing else

A file is a document; the end-of-text token follows each. The same files give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastgpt2.config import ConfigError
from fastgpt2.console import run_command
from fastgpt2.data import META_NAME, count_tokens, unigram_entropy, write_shard
from fastgpt2.durable import sync
from fastgpt2.shards import split_of
from fastgpt2.tokenizer import ByteTokenizer, Gpt2Tokenizer, Tokenizer, copy_bpe_files

SHARD_TOKENS = 100_000_000
SKIPPED_FOLDERS = ("__pycache__", "node_modules", "site-packages")
SNIFFED_BYTES = 1 << 13
SHORT_TOKENS = 1024
"""GPT-2's context: a split that doesn't fill one is worth a word."""
_ASIDE = ".preparing"


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text files into token shards for training."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, and folders whose text files are taken (hidden ones, site-packages, __pycache__ and
    node_modules are not)."""
    out: Path
    """Folder for the shards; made where it doesn't exist."""
    tokenizer: Literal["gpt2", "byte"] = "gpt2"
    """gpt2 (byte-pair encoding, vocabulary 50257) or byte (vocabulary 257, for small models)."""
    bpe: Path | None = None
    """Folder with GPT-2's vocab.bpe and encoder.json (default: tiktoken's, which needs the network once)."""
    val_fraction: float = 0.02
    """Part of the text kept for validation: whole files, chosen by a hash of their contents."""
    ext: tuple[str, ...] = ()
    """Take only files with these endings from folders, such as .py .txt (default: all that are text)."""
    overwrite: bool = False
    """Replace the shards that --out already holds."""


@dataclass(frozen=True)
class Document:
    """A text file, or the characters [begin, end) of one."""

    path: Path
    size: int
    """Bytes of the whole file."""
    digest: bytes
    """Of the contents: what decides the split, so that copies of a file never lie on both sides."""
    begin: int = 0
    end: int | None = None

    def text(self) -> str:
        """The document's characters.

        Raises:
            ConfigError: the file can't be read any more.
        """
        try:
            return self.path.read_bytes().decode()[self.begin : self.end]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path} changed while it was read: {error}") from None


@dataclass
class Found:
    """The documents under the sources, and how many files were left out for which reason."""

    documents: list[Document] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def prepare(config: PrepareConfig, console: Console | None = None) -> dict[str, Any]:
    """Write the shards; returns what meta.json says.

    Raises:
        ConfigError: a value out of range, a source that doesn't exist, nothing to read, an --out that can't
            be written or already holds shards, or a tokenizer that can't be had.
    """
    console = console or Console(stderr=True)
    _check(config)
    aside = _claim(config)
    try:
        # First, since it is what most likely fails.
        tokenizer = _tokenizer(config, aside, console)
        with _progress(console) as progress:
            found = find(config, progress)
            parts = assign(found.documents, config.val_fraction)
            shards, counts = _write(parts, tokenizer, aside, progress)
        meta = _describe(config, tokenizer, found, parts, shards, counts)
        (aside / META_NAME).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _publish(aside, config.out)
    except OSError as error:
        raise ConfigError(f"can't write {error.filename or config.out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return meta


def find(config: PrepareConfig, progress: Progress | None = None) -> Found:
    """Read every file under the sources once, sorted, and keep those that are UTF-8 text and not empty.

    Raises:
        ConfigError: a folder or file can't be read, or nothing is left; the message counts what was skipped.
    """
    found, seen = Found(), set()
    paths = list(_walk(config))
    task = progress.add_task("reading", total=len(paths)) if progress else None
    for path in paths:
        if progress and task is not None:
            progress.advance(task)
        real = path.resolve()
        if real in seen:
            continue
        seen.add(real)
        contents = _read_text(path)
        if isinstance(contents, str):
            found.skipped[contents] += 1
        else:
            digest = hashlib.blake2b(contents, digest_size=16).digest()
            found.documents.append(Document(path, len(contents), digest))
    if not found.documents:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(found.skipped.items())) or "no files"
        only = f" with --ext {' '.join(config.ext)}" if config.ext else ""
        where = " ".join(map(str, config.sources))
        raise ConfigError(f"nothing to read in {where}{only}: {reasons}")
    return found


def assign(documents: list[Document], val_fraction: float) -> dict[str, list[Document]]:
    """Divide the documents: {"train": [...], "val": [...]}, in the order given, none on both sides.

    Validation takes documents in the order of their contents' hash, each that still fits, until it has
    val_fraction of the bytes. Where the documents are too few or too large for that, the end of the largest
    is cut off for it, at a line's beginning.
    """
    budget = val_fraction * sum(document.size for document in documents)
    chosen: set[bytes] = set()
    taken, copies = 0, Counter(document.digest for document in documents)
    for document in sorted(documents, key=lambda d: d.digest):
        size = document.size * copies[document.digest]
        if document.digest not in chosen and taken + size <= budget:
            chosen.add(document.digest)
            taken += size
    parts: dict[str, list[Document]] = {"train": [], "val": []}
    if taken < budget / 2:
        largest = max((d for d in documents if d.digest not in chosen), key=lambda d: d.size)
        # Its copies would show the training what it is validated on.
        documents = [d for d in documents if d.digest != largest.digest or d is largest]
        head, tail = _cut(largest, budget - taken)
        documents = [head if d is largest else d for d in documents]
        parts["val"].append(tail)
    for document in documents:
        parts["val" if document.digest in chosen else "train"].append(document)
    return parts


def _cut(document: Document, tail_bytes: float) -> tuple[Document, Document]:
    text = document.text()
    # At least a character on either side; at a line's beginning where the tail has one.
    at = min(max(round(len(text) * (1 - tail_bytes / document.size)), 1), max(len(text) - 1, 1))
    line = text.find("\n", at - 1) + 1
    at = line if 0 < line < len(text) else at
    return dataclasses.replace(document, end=at), dataclasses.replace(document, begin=at)


def _walk(config: PrepareConfig) -> Iterator[Path]:
    """The files to look at, sorted within each source."""
    endings = tuple(e if e.startswith(".") else f".{e}" for e in config.ext)
    out = config.out.resolve()

    def stop(error: OSError) -> None:
        raise ConfigError(f"can't read {error.filename}: {error.strerror}")

    for source in config.sources:
        if not source.is_dir():
            yield source
            continue
        for folder, folders, files in os.walk(source, onerror=stop):
            here = Path(folder)
            # Changed in place, which os.walk heeds. What an earlier run wrote is not text to train on.
            folders[:] = sorted(name for name in folders if name[0] != "." and name not in SKIPPED_FOLDERS)
            if here.resolve() == out:
                continue
            for name in sorted(files):
                if name[0] != "." and (not endings or name.endswith(endings)):
                    yield here / name


def _read_text(path: Path) -> bytes | str:
    """The bytes of a text file, or why it is none."""
    # A pipe or a device would block, or never end.
    if not path.is_file():
        return "not regular files"
    try:
        with path.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
            if b"\0" in head:
                return "binary"
            contents = head + file.read()
        contents.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from None
    return "empty" if not contents.strip() else contents


def _check(config: PrepareConfig) -> None:
    # Not in __post_init__: the command line would wrap the message in a box.
    if not config.sources:
        raise ConfigError("give at least one text file or folder to read")
    for source in config.sources:
        if not source.exists():
            raise ConfigError(f"no such file or folder: {source}")
    if not 0.0 < config.val_fraction <= 0.5:
        raise ConfigError(f"--val-fraction must be over 0 and at most 0.5, got {config.val_fraction}")
    if config.bpe is not None and config.tokenizer != "gpt2":
        raise ConfigError(f"--bpe holds GPT-2's tokenizer: it has no use with --tokenizer {config.tokenizer}")


def _claim(config: PrepareConfig) -> Path:
    """Make --out and, in it, the folder that everything is written to first."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    if not config.overwrite and (held := _shard_files(out)):
        raise ConfigError(
            f"--out {out} already holds {held[0].name}: give --overwrite to replace it, or another folder"
        )
    aside = out / _ASIDE
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    except OSError as error:
        raise ConfigError(f"can't write --out {out}: {error.strerror or error}") from None
    return aside


def _tokenizer(config: PrepareConfig, aside: Path, console: Console) -> Tokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    for name in copy_bpe_files(config.bpe, aside):
        text = f"[yellow]warning:[/] {escape(str(config.bpe))}/{name} is not GPT-2's published one"
        console.print(text, soft_wrap=True)  # a path is not to be cut
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
        for document in documents:
            writer.add(tokenizer.encode(document.text()))
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
            "bytes": sum(document.size for document in found.documents),
            "ext": list(config.ext),
            "val_fraction": config.val_fraction,
            "skipped": dict(sorted(found.skipped.items())),
        },
    }


def _shard_files(out: Path) -> list[Path]:
    """meta.json and everything in a folder that `fastgpt2.data` would take for a shard."""
    return [*out.glob(META_NAME), *(path for path in sorted(out.glob("*.bin")) if split_of(path.name))]


def _publish(aside: Path, out: Path) -> None:
    """Move the finished files into place, meta.json first: it lists the shards, so that a folder that still
    lacks some is refused rather than trained on. That holds after a power cut, too."""
    finished = sorted(aside.iterdir(), key=lambda p: p.name != META_NAME)
    for path in finished:
        sync(path)
    for old in _shard_files(out):
        old.unlink()
    for path in finished:
        os.replace(path, out / path.name)
        sync(out)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


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


def main() -> None:
    """`python -m fastgpt2.prepare SOURCE ... --out DIR`: prints a summary and the next command."""
    config = tyro.cli(PrepareConfig, prog="python -m fastgpt2.prepare")
    meta = prepare(config)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    skipped = meta["source"]["skipped"]
    if skipped:
        console.print("skipped: " + ", ".join(f"{n:,} {reason}" for reason, n in skipped.items()))
    console.print(_summary(meta))
    for split, tokens in meta["tokens"].items():
        if tokens <= SHORT_TOKENS:
            console.print(f"the {split} split is short: --block-size must be below its {tokens:,} tokens")
    out = shlex.quote(str(config.out))
    console.print(f"wrote {config.out}; train on it: python -m fastgpt2.train --data {out}")


if __name__ == "__main__":
    run_command(main)
