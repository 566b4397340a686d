"""Token sources: dummy tokens and token shards behind one call, `tokens(step)`.

A source numbers its rows. A row is a function of the seed and its number, and `fastgpt2.batch.Rows` says which rows a
process takes at a step. A resumed run calls `begin_at` with the step and samples of its checkpoint: it takes the rows
that follow, on any number of processes.

`fastgpt2.shards` reads the folder of shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgpt2.batch import Rows, largest_divisor
from fastgpt2.config import ConfigError
from fastgpt2.corpus import DUMMY, GIVEN, is_text, shard_folder
from fastgpt2.shards import (
    GPT2_VOCAB_SIZE,
    HEADER_BYTES,
    META_NAME,
    DataError,
    Shard,
    Verification,
    count_tokens,
    find_outside,
    list_split,
    open_shard,
    open_split,
    read_meta,
    unigram_entropy,
    write_shard,
    write_shards,
)
from fastgpt2.tokenizer import ByteTokenizer

__all__ = [
    "DUMMY",
    "GIVEN",
    "GPT2_VOCAB_SIZE",
    "HEADER_BYTES",
    "META_NAME",
    "DataError",
    "DummyTokens",
    "ShardTokens",
    "TokenSource",
    "count_tokens",
    "data_end_of_text",
    "data_vocab_size",
    "key_of",
    "open_data",
    "open_shard",
    "open_split",
    "read_meta",
    "split",
    "unigram_entropy",
    "write_shard",
    "write_shards",
]


class TokenSource(Protocol):
    """What the trainer and the evaluation read from."""

    batches: int
    """Number of batches, if a number of sequences was asked for; 0 if endless."""
    fingerprint: str
    """Identifies the data's contents; "" if nothing does."""
    notes: list[str]
    """Notes for the user about the data."""

    def tokens(self, step: int) -> Tensor:
        """This process's batch of a step counted from 0: int64, CPU, (grad_accum, batch_size, block_size + 1).

        Raises:
            DataError: the data has become unreadable or is damaged. Other processes may not see that.
        """
        ...

    def begin_at(self, step: int, samples: int) -> None:
        """Start at `step` after `samples` sequences over all ranks, whatever the batch sizes were."""
        ...

    def check(self) -> None:
        """Wait until this process's part of the data has been verified.

        Raises:
            DataError: it is damaged or has changed.
        """
        ...


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (..., T) each, from (..., T + 1): a position's target is the token after it."""
    return tokens[..., :-1], tokens[..., 1:]


class DummyTokens:
    """Uniform random tokens, new in every step.

    All rows are in one stream of random words (Philox), which can be read from any place: row i is its i-th part.

    Args:
        vocab_size: tokens are in [0, vocab_size).
        batch_size, block_size, grad_accum: the shape, see TokenSource.tokens.
        seed, stream: which stream. Torch's and numpy's global generators are left alone.
        rank, world: this process and how many there are.
        fixed: take the first step's rows in every step, a batch to memorise.
        sequences: the first rows alone, in `batches` of one size of at most batch_size, the same on every rank; 0 is
            endless.
    """

    def __init__(
        self,
        vocab_size: int,
        batch_size: int,
        block_size: int,
        grad_accum: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        fixed: bool = False,
        stream: str = "train",
        sequences: int = 0,
    ) -> None:
        self.vocab_size, self.block_size = vocab_size, block_size
        self.seed, self.fixed, self.stream = seed, fixed and not sequences, stream
        self.rows, self.batches = _rows(batch_size, grad_accum, rank, world, sequences)
        self.fingerprint = ""
        self.notes: list[str] = []
        self._words = np.random.Philox(key=key_of("dummy", stream, seed, size=16))
        self._place = 0

    def tokens(self, step: int) -> Tensor:
        """See TokenSource.tokens."""
        rows, width = self.rows, self.block_size + 1
        first = 0 if self.fixed else rows.first(step)
        tokens = np.empty((rows.grad_accum, rows.batch_size, width), dtype=np.uint64)
        for micro, place in zip(tokens, rows.places[:: rows.batch_size].tolist(), strict=True):
            micro[:] = self._draw(first + place, rows.batch_size)[:, :width]
        tokens *= np.uint64(self.vocab_size)
        tokens >>= np.uint64(32)
        return torch.from_numpy(tokens.view(np.int64))

    def _draw(self, first: int, count: int) -> np.ndarray:
        """The random words of `count` rows from the row `first`: uint32 (count, T + 1 rounded up to a block)."""
        blocks = -(-(self.block_size + 1) // 8)  # Philox makes a block of eight words at a time
        if (skipped := first * blocks - self._place) != 0:
            self._words.advance(skipped % 2**256)
        self._place = (first + count) * blocks
        words = self._words.random_raw(4 * count * blocks)
        return words.astype("<u8", copy=False).view("<u4").reshape(count, -1)

    def begin_at(self, step: int, samples: int) -> None:
        """See TokenSource.begin_at."""
        self.rows.begin_at(step, samples)

    def check(self) -> None:
        """Do nothing."""


class ShardTokens:
    """Windows of a folder's shards, drawn without replacement.

    An epoch cuts every shard, from a fresh random offset, into windows of block_size tokens (each read with
    the one token after it, its last target) and permutes the windows of all shards. Row i is the i-th window in
    that order, epoch after epoch. No window spans two shards; what is left at the ends of one, under two windows,
    varies by epoch.

    Args:
        data: the folder that holds the shards, or text that is prepared on first use, as --data names it.
        split: "train" or "val": which shards.
        batch_size, block_size, grad_accum: the shape, see TokenSource.tokens.
        seed: decides the order.
        rank, world: this process and how many there are. It verifies its part of the shards.
        sequences: use only this many windows of the first epoch, or all if it has fewer, in `batches` of one
            size of at most batch_size, the same on every rank; 0 is endless.

    Raises:
        ConfigError: no such folder or shard, a shard that is empty, truncated, of another format, not the one
            that meta.json lists or with a token outside the vocabulary (every token of this process's part is
            looked at; where it is large, beside the run: see check), or no shard of block_size + 1 tokens.
    """

    def __init__(
        self,
        data: str | Path,
        split: str,
        batch_size: int,
        block_size: int,
        grad_accum: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        sequences: int = 0,
    ) -> None:
        folder = shard_folder(data)
        self.block_size, self.seed = block_size, seed
        self.meta = read_meta(folder)
        self.vocab_size: int = self.meta["vocab_size"]
        listed = self.meta.get("shards", {})
        paths, self.notes = list_split(folder, split, listed)
        shards = [Shard(path, listed.get(path.name)) for path in paths]
        self.token_count = sum(map(len, shards))
        self.shards = [shard for shard in shards if len(shard) > block_size]
        if not self.shards:
            raise ConfigError(
                f"the {split} split of {data} is too short: its longest shard has {max(map(len, shards))} "
                f"tokens, a window needs --block-size + 1 = {block_size + 1}"
            )
        sizes = np.array([len(shard) for shard in self.shards])
        # One window less than fits: the offset can then be anything below block_size, and every epoch has the same
        # number of windows, from which a step finds its epoch.
        counts = np.maximum(sizes // block_size - 1, 1)
        self._slack = np.minimum(sizes - 1 - counts * block_size, block_size - 1)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self.windows = int(self._first[-1])
        """Windows in an epoch, over all ranks."""
        self.notes += self._never_seen(split, len(shards), sizes - 1 - counts * block_size - self._slack)
        if 0 < self.windows < sequences:
            self.notes.append(f"a {split} loss takes all {self.windows:,} windows of the split, not {sequences:,}")
            sequences = self.windows
        self.rows, self.batches = _rows(batch_size, grad_accum, rank, world, sequences)
        self._epochs: dict[int, _Epoch] = {}
        self.fingerprint = _fingerprint(shards)
        self._verification = Verification(shards[rank::world], self.vocab_size)
        if not self._verification.at_once:
            self.notes.append(
                f"the {split} split, {2 * self.token_count / 1e9:.1f} GB, is verified while the run goes on: "
                f"the first {'checkpoint' if split == 'train' else 'loss over it'} waits for that"
            )

    def _never_seen(self, split: str, shards: int, tails: np.ndarray) -> Iterator[str]:
        """Notes on tokens that no epoch's windows contain; `tails` counts those at the end of each shard."""
        if short := shards - len(self.shards):
            tokens = self.token_count - sum(map(len, self.shards))
            yield (
                f"the {split} split leaves out {short:,} of its {shards:,} shards, {tokens:,} of {self.token_count:,} "
                f"tokens: they are shorter than a window, --block-size + 1 = {self.block_size + 1}"
            )
        # Validation uses part of the split or sweeps it from the first token.
        if split == "train" and (tokens := int(tails.sum())) * 100 > self.token_count:
            yield (
                f"the {split} split leaves out {tokens:,} of {self.token_count:,} tokens at the ends of its shards: "
                f"they are only a few times --block-size {self.block_size} long; longer shards lose less"
            )

    def begin_at(self, step: int, samples: int) -> None:
        """See TokenSource.begin_at."""
        self.rows.begin_at(step, samples)

    def check(self) -> None:
        """See TokenSource.check. Shards of up to 256 MiB together were verified before the first step."""
        self._verification.finish()

    def tokens(self, step: int) -> Tensor:
        """See TokenSource.tokens."""
        self._verification.check()
        rows = self.rows
        first, place = divmod(rows.first(step), self.windows)
        epochs, places = np.divmod(place + rows.places, self.windows)
        found = [
            self._find(self._epoch(first + number), places[epochs == number])
            for number in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        shards, starts = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
        return torch.from_numpy(self._read(shards, starts)).view(rows.grad_accum, rows.batch_size, -1)

    def sweep(self) -> Iterator[Tensor]:
        """The split's windows once and in order, from each shard's first token: int64 (batch_size, T + 1).

        The last batch may be smaller. Less than block_size tokens at the end of a shard are left out.
        """
        counts = [(len(shard) - 1) // self.block_size for shard in self.shards]
        shards = np.repeat(np.arange(len(counts)), counts)
        starts = np.concatenate([np.arange(count) * self.block_size for count in counts])
        for begin in range(0, len(starts), self.rows.batch_size):
            part = slice(begin, begin + self.rows.batch_size)
            self._verification.check()
            yield torch.from_numpy(self._read(shards[part], starts[part]))

    def count_tokens(self) -> np.ndarray:
        """Count each id in the shards that are long enough: int64 (vocab_size,)."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for shard in self.shards:
            counts += count_tokens(shard.tokens(), self.vocab_size)
        return counts

    def _find(self, epoch: _Epoch, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard and first token of the windows at these places in an epoch's order."""
        windows = epoch.order[places]
        shards = np.searchsorted(self._first, windows, side="right") - 1
        return shards, epoch.offsets[shards] + (windows - self._first[shards]) * self.block_size

    def _read(self, shards: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Windows, int64 (n, T + 1), by shard number and first token."""
        width, opened = self.block_size + 1, self.shards
        places = zip(shards.tolist(), starts.tolist(), strict=True)
        raw = b"".join([opened[shard].read(start, width) for shard, start in places])
        tokens = np.frombuffer(raw, dtype="<u2")
        # Verification may still be running, and a file can change after it.
        if tokens.max() >= self.vocab_size:
            for row, shard, start in zip(tokens.reshape(-1, width), shards.tolist(), starts.tolist(), strict=True):
                if outside := find_outside(row, self.vocab_size, start):
                    raise DataError(f"{opened[shard].path}: {outside}")
        return tokens.astype(np.int64).reshape(-1, width)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            # Keep two epochs, since a batch can span two; one that spans more is still right, but slow.
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            # Sort raw words: numpy guarantees a bit generator's stream across versions, but not `permutation`.
            words = np.random.Philox(key=key_of("epoch", self.seed, number, size=16))
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
    sequences: int = 0,
) -> DummyTokens | ShardTokens:
    """The token source that --data names: dummy, dummy-fixed, stdlib, a text file or a folder of token shards.

    Args:
        split: "train" or "val".
        vocab_size: the model's vocabulary; dummy tokens are drawn from it, the shards' must fit in it.
        batch_size, block_size, grad_accum, seed, rank, world, sequences: see ShardTokens.

    Raises:
        ConfigError: no such source; or see ShardTokens.
    """
    if data in DUMMY:
        fixed = data == "dummy-fixed"
        return DummyTokens(vocab_size, batch_size, block_size, grad_accum, seed, rank, world, fixed, split, sequences)
    # Use one order of val windows for all seeds, so validation losses of runs compare.
    seed = 0 if split == "val" else seed
    source = ShardTokens(data, split, batch_size, block_size, grad_accum, seed, rank, world, sequences)
    if source.vocab_size > vocab_size:
        raise ConfigError(f"the vocabulary of {data}, {source.vocab_size}, is larger than the model's, {vocab_size}")
    return source


def data_vocab_size(data: str) -> int | None:
    """The vocabulary of --data, None for dummy tokens; reads only meta.json and prepares nothing.

    Raises:
        ConfigError: no such folder, or a meta.json that can't be used.
    """
    if data in (*DUMMY, GIVEN):
        return None
    return ByteTokenizer.vocab_size if is_text(data) else read_meta(shard_folder(data))["vocab_size"]


def data_end_of_text(data: str) -> int | None:
    """The end-of-text token of --data, None if it has none or names none.

    Raises:
        ConfigError: as data_vocab_size does.
    """
    if data in (*DUMMY, GIVEN):
        return None
    return ByteTokenizer.end_of_text if is_text(data) else read_meta(shard_folder(data)).get("end_of_text")


def _fingerprint(shards: list[Shard]) -> str:
    lines = "".join(f"{shard.path.name}/{len(shard)}/{shard.identity()}\n" for shard in shards)
    return hashlib.blake2b(lines.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _rows(batch_size: int, grad_accum: int, rank: int, world: int, sequences: int) -> tuple[Rows, int]:
    """The rows that a process takes, and the number of batches if `sequences` bounds them."""
    if not sequences:
        return Rows(batch_size, grad_accum, rank, world), 0
    batch_size = largest_divisor(sequences, batch_size)
    return Rows(batch_size, grad_accum), sequences // batch_size


def key_of(*parts: object, size: int) -> int:
    """An integer of `size` bytes that depends on every part; similar parts give unrelated integers."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=size).digest()
    return int.from_bytes(digest, "little")
