"""Token sources: dummy tokens and token shards behind one call, `tokens(step)`.

A batch is a pure function of (seed, step, rank, world). There is no cursor to save: resuming a run is
calling with the right step, and the order is the same whether or not the run was ever cut.

A shard is a `.bin` file in llm.c's format: 256 little-endian int32 (magic 20240520, version 1, the number of
tokens, zeros), then the tokens as little-endian uint16. A folder holds `*train*.bin`, `*val*.bin` and,
where `fastgpt2.prepare` wrote it, `meta.json`; without one the vocabulary is taken to be GPT-2's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from fastgpt2.config import ConfigError

DUMMY = ("dummy", "dummy-fixed")
GPT2_VOCAB_SIZE = 50257
META_NAME = "meta.json"

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC, VERSION = 20240520, 1
SCAN_TOKENS = 1 << 24
"""Tokens looked at together when a shard is checked: 32 MiB."""


class DataError(RuntimeError):
    """The data can't be read any more. The message is one line."""


class TokenSource(Protocol):
    """What the trainer and the evaluation read from."""

    def tokens(self, step: int) -> Tensor:
        """The batch of a step counted from 0: int64, CPU, (grad_accum, batch_size, block_size + 1)."""
        ...


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (..., T) each, from (..., T + 1): a position's target is the token after it."""
    return tokens[..., :-1], tokens[..., 1:]


class DummyTokens:
    """Uniform random tokens, new in every step (`fixed`: step 0's in every step, a batch to memorise).

    Args:
        vocab_size: tokens are in [0, vocab_size).
        batch_size, block_size, grad_accum: the shape, see TokenSource.tokens.
        seed, rank, stream: with the step, the key of a batch. Torch's global generator is left alone.
    """

    def __init__(
        self,
        vocab_size: int,
        batch_size: int,
        block_size: int,
        grad_accum: int = 1,
        seed: int = 0,
        rank: int = 0,
        fixed: bool = False,
        stream: str = "train",
    ) -> None:
        self.vocab_size = vocab_size
        self.shape = (grad_accum, batch_size, block_size + 1)
        self.seed, self.rank, self.fixed, self.stream = seed, rank, fixed, stream

    def tokens(self, step: int) -> Tensor:
        """See TokenSource.tokens."""
        # The CPU generator uses 32 of the 64 bits: two of 100,000 steps may draw the same noise, harmlessly.
        key = _key(self.stream, self.seed, 0 if self.fixed else step, self.rank, size=8)
        return torch.randint(self.vocab_size, self.shape, generator=torch.Generator().manual_seed(key))


class ShardTokens:
    """Windows of a folder's shards, without replacement: each window once before any is seen again.

    An epoch cuts every shard, from a fresh random offset, into windows of block_size tokens (each read with
    the one token after it, its last target) and permutes the windows of all shards. Ranks take disjoint
    windows. No window spans two shards; what is left at the ends of one, under two windows, varies by epoch.

    Args:
        folder: holds the shards.
        split: "train" or "val": which shards.
        batch_size, block_size, grad_accum: the shape, see TokenSource.tokens.
        seed: decides the order.
        rank, world: this process and how many there are.

    Raises:
        ConfigError: no such folder or shard, a shard that is empty, truncated, of another format or with a
            token outside the vocabulary (every token is looked at), or no shard of block_size + 1 tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        batch_size: int,
        block_size: int,
        grad_accum: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        folder = _folder(folder)
        self.batch_size, self.block_size, self.grad_accum = batch_size, block_size, grad_accum
        self.seed, self.rank, self.world = seed, rank, world
        self.meta = read_meta(folder)
        self.vocab_size: int = self.meta["vocab_size"]
        shards = open_split(folder, split, self.vocab_size, self.meta)
        self.token_count = sum(len(shard) for shard in shards)
        self.shards = [shard for shard in shards if len(shard) > block_size]
        if not self.shards:
            raise ConfigError(
                f"the {split} split of {folder} is too short: its longest shard has {max(map(len, shards))} "
                f"tokens, a window needs --block-size + 1 = {block_size + 1}"
            )
        # Row i of a view is the window that starts at token i; nothing is read until rows are taken.
        self._views = [sliding_window_view(shard, block_size + 1) for shard in self.shards]
        sizes = np.array([len(shard) for shard in self.shards])
        # One window less than fits: the offset can then be anything below block_size with the number of
        # windows, by which a step finds its epoch, the same in all.
        counts = np.maximum(sizes // block_size - 1, 1)
        self._slack = np.minimum(sizes - 1 - counts * block_size, block_size - 1)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self.windows = int(self._first[-1])
        """Windows in an epoch, over all ranks."""
        self._epochs: dict[int, _Epoch] = {}

    def tokens(self, step: int) -> Tensor:
        """See TokenSource.tokens."""
        micro = step * self.grad_accum + np.arange(self.grad_accum)[:, None]
        samples = (micro * self.world + self.rank) * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(samples.ravel(), self.windows)
        out = np.empty((samples.size, self.block_size + 1), dtype=np.int64)
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            rows = np.flatnonzero(epochs == number)
            windows = epoch.order[places[rows]]
            shards = np.searchsorted(self._first, windows, side="right") - 1
            starts = epoch.offsets[shards] + (windows - self._first[shards]) * self.block_size
            self._read(out, rows, shards, starts)
        return torch.from_numpy(out).view(self.grad_accum, self.batch_size, self.block_size + 1)

    def sweep(self) -> Iterator[Tensor]:
        """The split's windows once and in order, from each shard's first token: int64 (batch_size, T + 1).

        The last batch may be smaller. Less than block_size tokens at the end of a shard are left out.
        """
        counts = [(len(shard) - 1) // self.block_size for shard in self.shards]
        shards = np.repeat(np.arange(len(counts)), counts)
        starts = np.concatenate([np.arange(count) * self.block_size for count in counts])
        for begin in range(0, len(starts), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            out = np.empty((len(starts[part]), self.block_size + 1), dtype=np.int64)
            self._read(out, np.arange(len(out)), shards[part], starts[part])
            yield torch.from_numpy(out)

    def _read(self, out: np.ndarray, rows: np.ndarray, shards: np.ndarray, starts: np.ndarray) -> None:
        for shard in np.unique(shards):
            here = shards == shard
            out[rows[here]] = self._views[shard][starts[here]]

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            # A batch can lie in two epochs, so two are kept; one that spans more is still right, but slow.
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            # Sorting raw words: numpy keeps a bit generator's stream over versions, `permutation` it may not.
            words = np.random.Philox(key=_key("epoch", self.seed, number, size=16))
            offsets = words.random_raw(len(self._slack)) % (self._slack + 1).astype(np.uint64)
            order = np.argsort(words.random_raw(self.windows), kind="stable")
            self._epochs[number] = _Epoch(order, offsets.astype(np.int64))
        return self._epochs[number]


class _Epoch(NamedTuple):
    order: np.ndarray  # (windows,) int64: which window is the i-th of the epoch
    offsets: np.ndarray  # (shards,) int64: the first token of each shard's first window


def open_data(
    data: str,
    *,
    split: str = "train",
    vocab_size: int,
    batch_size: int,
    block_size: int,
    grad_accum: int = 1,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> DummyTokens | ShardTokens:
    """The token source that --data names: "dummy", "dummy-fixed" or a folder of token shards.

    Args:
        split: "train" or "val".
        vocab_size: the model's vocabulary; dummy tokens are drawn from it, the shards' must fit in it.
        batch_size, block_size, grad_accum, seed, rank, world: see ShardTokens.

    Raises:
        ConfigError: none of these, or see ShardTokens.
    """
    if data in DUMMY:
        fixed = data == "dummy-fixed"
        return DummyTokens(vocab_size, batch_size, block_size, grad_accum, seed, rank, fixed, stream=split)
    # One order of the val windows for all seeds, so that a validation loss compares over runs.
    seed = 0 if split == "val" else seed
    source = ShardTokens(data, split, batch_size, block_size, grad_accum, seed, rank, world)
    if source.vocab_size > vocab_size:
        raise ConfigError(f"the vocabulary of {data}, {source.vocab_size}, is larger than the model's, {vocab_size}")
    return source


def data_vocab_size(data: str) -> int | None:
    """The vocabulary of what --data names, None for dummy tokens; reads meta.json alone.

    Raises:
        ConfigError: no such folder, or a meta.json that can't be used.
    """
    return None if data in DUMMY else read_meta(_folder(data))["vocab_size"]


def data_end_of_text(data: str) -> int | None:
    """The end-of-text token of what --data names, None where it has none or doesn't say.

    Raises:
        ConfigError: as data_vocab_size does.
    """
    return None if data in DUMMY else read_meta(_folder(data)).get("end_of_text")


def read_meta(folder: Path) -> dict[str, Any]:
    """The folder's meta.json, or GPT-2's where there is none; "vocab_size" is always valid.

    Raises:
        ConfigError: not JSON, or without a vocabulary that uint16 tokens can have.
    """
    path = folder / META_NAME
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"vocab_size": GPT2_VOCAB_SIZE, "end_of_text": GPT2_VOCAB_SIZE - 1}
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    vocab_size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(vocab_size) is not int or not 1 <= vocab_size <= 1 << 16:
        raise ConfigError(f'{path} needs a "vocab_size" from 1 to 65536, got {vocab_size!r}')
    return meta


def open_split(folder: Path, split: str, vocab_size: int, meta: dict[str, Any]) -> list[np.ndarray]:
    """The shards of a split, sorted by name, each memory-mapped uint16 (tokens,) and checked.

    Raises:
        ConfigError: see ShardTokens; also a shard that meta.json lists and the folder lacks.
    """
    paths = sorted(path for path in folder.glob(f"*{split}*.bin") if path.is_file())
    listed = meta.get("shards")
    names = {name for name in listed if split in name} if isinstance(listed, dict) else set()
    missing = sorted(names - {path.name for path in paths})
    if missing:
        raise ConfigError(
            f"{folder} lacks {missing[0]}, which its {META_NAME} lists: copy it too or prepare the data again"
        )
    if not paths:
        raise ConfigError(
            f"no {split} shard in {folder}: it has no file like *{split}*.bin; "
            f"python -m fastgpt2.prepare writes such a folder"
        )
    return [open_shard(path, vocab_size) for path in paths]


def open_shard(path: Path, vocab_size: int) -> np.ndarray:
    """The tokens of a shard: memory-mapped, read-only, uint16 (tokens,). Every token is looked at once.

    Raises:
        ConfigError: see ShardTokens.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from None
    if size == 0:
        raise ConfigError(f"{path} is empty")
    if header.size and header[0] != MAGIC:
        raise ConfigError(f"{path} is no token shard: it begins with {header[0]}, not with the magic {MAGIC}")
    if size < HEADER_BYTES:
        raise ConfigError(f"{path} is truncated: {size} bytes, the header alone has {HEADER_BYTES}")
    if header[1] != VERSION:
        raise ConfigError(f"{path} is a shard of version {header[1]}: only version {VERSION}, uint16 tokens, is known")
    count = int(header[2])
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise ConfigError(f"{path} is {fault}: its header's {count} tokens need {expected} bytes, the file has {size}")
    if count == 0:
        raise ConfigError(f"{path} holds no tokens")
    # A plain array over the map: np.memmap's own indexing is slower.
    tokens = np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,)))
    _check_range(path, tokens, vocab_size)
    return tokens


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens, integers (n,) below 65536, as a shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs: int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    # In parts, since bincount makes an int64 copy of what it counts.
    for begin in range(0, len(tokens), SCAN_TOKENS):
        counts += np.bincount(tokens[begin : begin + SCAN_TOKENS], minlength=vocab_size)
    return counts


def unigram_entropy(counts: np.ndarray, model: np.ndarray | None = None) -> float:
    """Nats per token when each is predicted by its frequency alone: what a trained model must beat.

    Args:
        counts: (V,), how often each id occurs in the tokens to predict.
        model: (V,), the counts that the frequencies are taken from, plus one each so that an id that only
            `counts` has is possible; None takes `counts` themselves, as they are.
    """
    frequencies = counts / counts.sum() if model is None else (model + 1) / (model.sum() + len(model))
    seen = counts > 0
    return float(-(counts[seen] @ np.log(frequencies[seen])) / counts.sum())


def _check_range(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    if vocab_size > np.iinfo(np.uint16).max:
        return
    # An id outside the embedding would be a fault on the device, far from here and from its cause.
    for begin in range(0, len(tokens), SCAN_TOKENS):
        chunk = tokens[begin : begin + SCAN_TOKENS]
        if chunk.max() >= vocab_size:
            offset = begin + int(np.argmax(chunk >= vocab_size))
            raise ConfigError(
                f"{path}: token {offset} has id {tokens[offset]}, outside the vocabulary of {vocab_size}; "
                f'if the tokens are right, give their "vocab_size" in {META_NAME} beside them'
            )


def _folder(data: str | Path) -> Path:
    folder = Path(data).expanduser()
    choices = f"give {', '.join(DUMMY)} or a folder of token shards"
    if not folder.exists():
        raise ConfigError(f"--data {data}: no such folder; {choices}")
    if not folder.is_dir():
        raise ConfigError(f"--data {data} is not a folder; {choices}")
    return folder


def _key(*parts: object, size: int) -> int:
    """An integer of `size` bytes that depends on every part: those of neighbours are unrelated."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=size).digest()
    return int.from_bytes(digest, "little")
