"""Token sources: dummy tokens and token shards behind one call, `tokens(step)`.

A batch is a pure function of (seed, step, rank, world) and of the samples taken before: a resumed run calls `begin_at`
with the step and samples of its checkpoint. The order doesn't depend on interruptions or earlier batch sizes.

`fastgpt2.shards` reads the folder of shards.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

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
    "open_data",
    "open_shard",
    "open_split",
    "read_meta",
    "split",
    "unigram_entropy",
    "write_shard",
    "write_shards",
]

DUMMY_EVAL_BATCH = 8


class TokenSource(Protocol):
    """What the trainer and the evaluation read from."""

    batches: int
    """Number of batches, if a number of sequences was asked for; 0 if endless."""
    fingerprint: str
    """Identifies the data's contents; "" if nothing does."""
    notes: list[str]
    """Notes for the user about the data."""

    def tokens(self, step: int) -> Tensor:
        """The batch of a step counted from 0: int64, CPU, (grad_accum, batch_size, block_size + 1).

        Raises:
            DataError: the data has become unreadable or is damaged.
        """
        ...

    def begin_at(self, step: int, samples: int) -> None:
        """Start at `step` after `samples` sequences over all ranks, whatever the batch sizes were."""
        ...

    def check(self) -> None:
        """Wait until all the data has been verified.

        Raises:
            DataError: it is damaged or has changed.
        """
        ...


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (..., T) each, from (..., T + 1): a position's target is the token after it."""
    return tokens[..., :-1], tokens[..., 1:]


class DummyTokens:
    """Uniform random tokens, new in every step (`fixed`: those of step 0 in every step, a batch to memorise).

    Args:
        vocab_size: tokens are in [0, vocab_size).
        batch_size, block_size, grad_accum: the shape, see TokenSource.tokens.
        seed, rank, stream: with the step, the key of a batch. Torch's global generator is left alone.
        sequences: as many alone, and the same ones whatever batch_size; 0: no end.
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
        sequences: int = 0,
    ) -> None:
        self.vocab_size = vocab_size
        if sequences:
            batch_size = _largest_divisor(sequences, DUMMY_EVAL_BATCH)
        self.batches = sequences // batch_size
        self.shape = (grad_accum, batch_size, block_size + 1)
        self.seed, self.rank, self.fixed, self.stream = seed, rank, fixed, stream
        self.fingerprint = ""
        self.notes: list[str] = []

    def tokens(self, step: int) -> Tensor:
        """See TokenSource.tokens."""
        # The CPU generator uses 32 of the 64 bits: two of 100,000 steps may draw the same noise, harmlessly.
        key = _key(self.stream, self.seed, 0 if self.fixed else step, self.rank, size=8)
        return torch.randint(self.vocab_size, self.shape, generator=torch.Generator().manual_seed(key))

    def begin_at(self, step: int, samples: int) -> None:
        """Do nothing: each step's tokens are independent noise."""

    def check(self) -> None:
        """Do nothing."""


class ShardTokens:
    """Windows of a folder's shards, drawn without replacement.

    An epoch cuts every shard, from a fresh random offset, into windows of block_size tokens (each read with
    the one token after it, its last target) and permutes the windows of all shards. Ranks take disjoint
    windows. No window spans two shards; what is left at the ends of one, under two windows, varies by epoch.

    Args:
        data: the folder that holds the shards, or text that is prepared on first use, as --data names it.
        split: "train" or "val": which shards.
        batch_size, block_size, grad_accum: the shape, see TokenSource.tokens.
        seed: decides the order.
        rank, world: this process and how many there are.
        sequences: use only this many windows of the first epoch, or all if it has fewer, in `batches` of one
            size of at most batch_size; 0 is endless.

    Raises:
        ConfigError: no such folder or shard, a shard that is empty, truncated, of another format, not the one
            that meta.json lists or with a token outside the vocabulary (every token is looked at; where the
            shards are large, beside the run: see check), or no shard of block_size + 1 tokens.
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
        self.block_size, self.grad_accum = block_size, grad_accum
        self.seed, self.rank, self.world = seed, rank, world
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
        self.batch_size = _largest_divisor(sequences, batch_size) if sequences else batch_size
        self.batches = sequences // self.batch_size
        self._step, self._samples = 0, 0
        self._epochs: dict[int, _Epoch] = {}
        self.fingerprint = _fingerprint(shards)
        self._verification = Verification(shards, self.vocab_size)
        if not self._verification.at_once:
            self.notes.append(
                f"the {split} split, {self._verification.size_bytes / 1e9:.1f} GB, is verified while the run goes on: "
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
        self._step, self._samples = step, samples

    def check(self) -> None:
        """See TokenSource.check. Shards of up to 256 MiB together were verified before the first step."""
        self._verification.finish()

    def tokens(self, step: int) -> Tensor:
        """See TokenSource.tokens."""
        self._verification.check()
        begin = self._samples + (step - self._step) * self.grad_accum * self.world * self.batch_size
        # Python integers don't overflow.
        first, place = divmod(begin, self.windows)
        epochs, places = np.divmod(place + self._own, self.windows)
        found = [
            self._find(self._epoch(first + number), places[epochs == number])
            for number in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        shards, starts = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
        return torch.from_numpy(self._read(shards, starts)).view(self.grad_accum, self.batch_size, -1)

    def sweep(self) -> Iterator[Tensor]:
        """The split's windows once and in order, from each shard's first token: int64 (batch_size, T + 1).

        The last batch may be smaller. Less than block_size tokens at the end of a shard are left out.
        """
        counts = [(len(shard) - 1) // self.block_size for shard in self.shards]
        shards = np.repeat(np.arange(len(counts)), counts)
        starts = np.concatenate([np.arange(count) * self.block_size for count in counts])
        for begin in range(0, len(starts), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            self._verification.check()
            yield torch.from_numpy(self._read(shards[part], starts[part]))

    def count_tokens(self) -> np.ndarray:
        """Count each id in the shards that are long enough: int64 (vocab_size,)."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for shard in self.shards:
            counts += count_tokens(shard.tokens(), self.vocab_size)
        return counts

    @functools.cached_property
    def _own(self) -> np.ndarray:
        """Positions of this rank's samples among all ranks' samples of a step; sweep() takes any batch_size."""
        micro = np.arange(self.grad_accum)[:, None] * self.world + self.rank
        return (micro * self.batch_size + np.arange(self.batch_size)).ravel()

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
        return DummyTokens(vocab_size, batch_size, block_size, grad_accum, seed, rank, fixed, split, sequences)
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


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


def _key(*parts: object, size: int) -> int:
    """An integer of `size` bytes that depends on every part; similar parts give unrelated integers."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=size).digest()
    return int.from_bytes(digest, "little")
