"""Token shards: files that may be damaged, of another format, or changed while in use.

A shard is a `.bin` file in llm.c's format: 256 little-endian int32 (magic 20240520, version 1, the number of
tokens, zeros), then the tokens as little-endian uint16. A word in its name says which split it belongs to.
`fastgpt2.prepare` writes `meta.json` beside the shards: the vocabulary, and each shard's token count and SHA-256.

Tokens are read by position, not through a memory map: reading a map of a truncated file kills the process by SIGBUS,
where a read returns an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import shlex
import threading
import unicodedata
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt2.config import ConfigError
from fastgpt2.durable import open_regular, read_at, read_json, sync

GPT2_VOCAB_SIZE = 50257
META_NAME = "meta.json"
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
"""Words in a file's name and the split they stand for."""

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC, VERSION = 20240520, 1
FOREIGN = {
    20240801: "llm.c's shard for Llama 3, of uint32 tokens",
    20240522: "llm.c's file of multiple-choice questions",
    20240326: "llm.c's checkpoint",
    20240327: "llm.c's optimizer state",
    20240328: "llm.c's tokenizer",
}
"""Other llm.c files, by magic number."""

SCAN_TOKENS = 1 << 20
"""Tokens checked at a time when scanning a whole shard: 2 MiB, which fits a core's cache."""
AT_ONCE_BYTES = 256 << 20
"""Shards up to this size are verified before a run starts (a second if SHA-256 is slow), larger ones during it."""


class DataError(RuntimeError):
    """A running run's data has become unreadable or has changed. The message is one line."""


def split_of(name: str) -> str | None:
    """The split named by the last word of a file name that names one; None if no word does.

    Words are runs of letters: tiny_val_0.bin and train-of-thought-val.bin are "val", medieval.bin is none.
    """
    words = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", name).lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)


def read_meta(folder: Path) -> dict[str, Any]:
    """The folder's meta.json, or GPT-2's values if there is none.

    Returns:
        "vocab_size" is always valid; "end_of_text" (int), "tokenizer" (str) and "shards" (name: {"tokens": int,
        "sha256": hexadecimal}, each optional) are valid if present. Other keys are unchecked.

    Raises:
        ConfigError: not JSON, one of these is of another type or out of range, or no vocabulary.
    """
    path = folder / META_NAME
    if not os.path.lexists(path):
        return {"vocab_size": GPT2_VOCAB_SIZE, "end_of_text": GPT2_VOCAB_SIZE - 1}
    meta = read_json(path)
    vocab_size, end_of_text = meta.get("vocab_size"), meta.get("end_of_text")
    if type(vocab_size) is not int or not 1 <= vocab_size <= 1 << 16:
        raise ConfigError(f'{path} needs a "vocab_size" from 1 to 65536, got {reprlib.repr(vocab_size)}')
    if end_of_text is not None and not (type(end_of_text) is int and 0 <= end_of_text < vocab_size):
        raise ConfigError(
            f'{path}: "end_of_text" must be a token from 0 to {vocab_size - 1}, got {reprlib.repr(end_of_text)}'
        )
    if not isinstance(meta.get("tokenizer", ""), str):
        raise ConfigError(f'{path}: "tokenizer" must be a name, got {reprlib.repr(meta["tokenizer"])}')
    _check_listed(path, meta.get("shards", {}))
    return meta


def _check_listed(path: Path, shards: Any) -> None:
    if not isinstance(shards, dict):
        raise ConfigError(f'{path}: "shards" must be an object, got {reprlib.repr(shards)}')
    for name, listed in shards.items():
        where = f'{path}: "shards" has {reprlib.repr(name)}'
        if os.path.basename(name) != name or not name.isprintable():
            raise ConfigError(f"{where}, which is not the name of a file")
        if not isinstance(listed, dict):
            raise ConfigError(f"{where} with {reprlib.repr(listed)} where an object is due")
        tokens, sha256 = listed.get("tokens", 0), listed.get("sha256", "0" * 64)
        if type(tokens) is not int or tokens < 0:
            raise ConfigError(f'{where} with {reprlib.repr(tokens)} for its "tokens"')
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ConfigError(f'{where} with {reprlib.repr(sha256)} for its "sha256", which has 64 hexadecimal digits')


class Shard:
    """An open shard. It stays readable if another file takes its name.

    Args:
        path: the file.
        listed: what meta.json says of it.

    Raises:
        ConfigError: it is unreadable, empty, truncated, of another format or not as long as meta.json says.
    """

    def __init__(self, path: Path, listed: Mapping[str, Any] | None = None) -> None:
        listed = listed or {}
        try:
            self._file = open_regular(path)
            weakref.finalize(self, self._file.close).atexit = False  # a thread may still read then
            self._descriptor = self._file.fileno()
            self._header = read_at(self._descriptor, HEADER_BYTES, 0)
            self._stamp = self._now()
        except OSError as error:
            raise ConfigError(f"can't read {path}: {error.strerror}") from None
        self.path = path
        self._count = _token_count(path, self._stamp[0], self._header)
        if listed.get("tokens", self._count) != self._count:
            raise ConfigError(
                f"{path} has {self._count} tokens, {META_NAME} beside it says {listed['tokens']}: "
                f"copy the folder again or prepare the data again"
            )
        self.sha256: str | None = listed.get("sha256")

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, count: int) -> bytes:
        """The tokens [start, start + count) as little-endian uint16.

        Raises:
            DataError: the file was truncated or its disk fails.
        """
        at, size = HEADER_BYTES + 2 * start, 2 * count
        try:
            raw = read_at(self._descriptor, size, at)
            while len(raw) < size and (more := read_at(self._descriptor, size - len(raw), at + len(raw))):
                raw += more
        except OSError as error:
            raise DataError(f"can't read {self.path}: {error.strerror}") from None
        if len(raw) < size:
            raise DataError(
                f"{self.path} was cut short while it was in use: it ends before token {start + count} "
                f"of {self._count}; copy it again or prepare the data again"
            )
        return raw

    def tokens(self) -> np.ndarray:
        """All tokens: uint16 (tokens,), read-only."""
        return np.frombuffer(self.read(0, self._count), dtype="<u2")

    def verify(self, vocab_size: int) -> None:
        """Check every token, and the SHA-256 if meta.json lists one.

        Raises:
            DataError: see `read`; or the SHA-256 differs, or a token is outside the vocabulary.
        """
        stamp, digest, outside = self._now(), hashlib.sha256(self._header), None
        if self.sha256 is None and vocab_size > np.iinfo(np.uint16).max:
            return
        for begin in range(0, self._count, SCAN_TOKENS):
            raw = self.read(begin, min(SCAN_TOKENS, self._count - begin))
            if self.sha256 is not None:
                digest.update(raw)
            outside = outside or find_outside(np.frombuffer(raw, dtype="<u2"), vocab_size, begin)
        # Check the sum first: flipped bits are the likely cause of a bad token.
        if self.sha256 not in (None, digest.hexdigest()):
            raise DataError(
                f"{self.path} is damaged or changed: its SHA-256 is not the one in {META_NAME} beside it; "
                f"copy the folder again, or delete it and prepare the data again"
            )
        if outside is not None:
            raise DataError(f"{self.path}: {outside}")
        self._stamp = stamp

    def rewritten(self) -> bool:
        """Whether the file was written to since it was verified; `read` detects truncation."""
        size, time = self._now()
        return size >= self._stamp[0] and (size, time) != self._stamp

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def identity(self) -> str:
        """Identifies the contents: the SHA-256 in meta.json, or else a digest of part of them."""
        if self.sha256 is not None:
            return self.sha256
        count = min(self._count, 512)
        digest = hashlib.blake2b(self._header, digest_size=16)
        for begin in np.linspace(0, self._count - count, 8, dtype=np.int64).tolist():
            digest.update(self.read(begin, count))
        return digest.hexdigest()


def _token_count(path: Path, size: int, header: bytes) -> int:
    """Check a shard's header and return its number of tokens."""
    if size == 0:
        raise ConfigError(f"{path} is empty")
    # A file under four bytes has no magic number.
    ints = np.frombuffer(header[: len(header) // 4 * 4], dtype="<i4").tolist()
    if ints and ints[0] != MAGIC:
        raise ConfigError(f"{path} is no token shard: {_foreign(path, ints[0])}")
    if size < HEADER_BYTES or len(ints) < HEADER_INTS:
        raise ConfigError(f"{path} is truncated: {size} bytes, the header alone has {HEADER_BYTES}")
    if ints[1] != VERSION:
        raise ConfigError(f"{path} is a shard of version {ints[1]}: only version {VERSION}, uint16 tokens, is known")
    count = ints[2]
    if count < 1:
        raise ConfigError(f"{path} holds no tokens: its header says {count}")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise ConfigError(f"{path} is {fault}: its header's {count} tokens need {expected} bytes, the file has {size}")
    return count


def _foreign(path: Path, magic: int) -> str:
    """Guess what a file that isn't a shard is, and say what to do with it."""
    if magic in FOREIGN:
        return f"it is {FOREIGN[magic]}; the magic {MAGIC}, version {VERSION} is read"
    folder = f"{path.parent.absolute()}-shards"
    # JSON strings are valid Python, and their double quotes fit inside the shell's single quotes.
    source, target, split = (json.dumps(str(name)) for name in (path, folder, split_of(path.name)))
    line = (
        f"import numpy as np; from fastgpt2.data import write_shards; "
        f'write_shards({target}, {split}, np.memmap({source}, "u2", "r"))'
    )
    return (
        f"it begins with {magic}, not with the magic {MAGIC}. Raw uint16 tokens, as nanoGPT writes them, become shards "
        f'(with {{"vocab_size": N}} in {META_NAME} beside, unless it is GPT-2\'s) by: python -c {shlex.quote(line)}'
    )


def find_outside(tokens: np.ndarray, vocab_size: int, begin: int = 0) -> str | None:
    """Describe the first token outside the vocabulary, or None; tokens[0] is token number `begin`."""
    # On the device it would fault far from its cause.
    if not len(tokens) or tokens.max() < vocab_size:
        return None
    at = int(np.argmax(tokens >= vocab_size))
    return (
        f"token {begin + at} has id {tokens[at]}, outside the vocabulary of {vocab_size}; "
        f'if the tokens are right, give their "vocab_size" in {META_NAME} beside them'
    )


class Verification:
    """Verifies shards: small ones before the constructor returns, large ones in a thread during the run.

    Raises:
        ConfigError: Shard.verify found a fault in small shards.
    """

    def __init__(self, shards: Sequence[Shard], vocab_size: int) -> None:
        self._shards, self._vocab_size = shards, vocab_size
        self._failure: DataError | None = None
        self._thread = threading.Thread(target=self._run, name="verify the data", daemon=True)
        self._thread.start()
        self.at_once = 2 * sum(map(len, shards)) <= AT_ONCE_BYTES
        if self.at_once:
            self._thread.join()
            if self._failure is not None:
                raise ConfigError(str(self._failure))

    def _run(self) -> None:
        try:
            for shard in self._shards:
                shard.verify(self._vocab_size)
        except DataError as error:
            self._failure = error
        except Exception as error:  # a thread would lose it and the data would count as verified
            self._failure = DataError(f"can't verify {shard.path}: {error}")

    def check(self) -> None:
        """Raise any fault found so far.

        Raises:
            DataError: see Shard.verify.
        """
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait until all shards are verified, and verify again those written to since.

        Raises:
            DataError: see Shard.verify.
        """
        self._thread.join()
        self.check()
        for shard in self._shards:
            if shard.rewritten():
                shard.verify(self._vocab_size)


def list_split(folder: Path, split: str, listed: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """The paths of a split's shards, sorted by name, and notes on the folder's other files.

    Args:
        listed: the shards that meta.json lists, by name.

    Raises:
        ConfigError: the folder can't be read, has no such shard, or lacks one that is listed.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".bin") and name[0] != ".")
    except OSError as error:
        raise ConfigError(f"can't read {folder}: {error.strerror}") from None
    own = [name for name in names if split_of(name) == split]
    missing = sorted(name for name in listed if split_of(name) == split and name not in own)
    if missing:
        raise ConfigError(
            f"{folder} lacks {missing[0]}, which its {META_NAME} lists: copy it too or prepare the data again"
        )
    if not own:
        others = f" (it has {_first_of(names)})" if names else ""
        raise ConfigError(
            f"no {split} shard in {folder}: no .bin file has the word {split} in its name{others}; "
            f"python -m fastgpt2.prepare writes such a folder"
        )
    notes = []
    # Once for both splits.
    if split == "train" and (neither := [name for name in names if split_of(name) is None]):
        notes.append(f"not read, with neither train nor val as a word of its name: {_first_of(neither)} in {folder}")
    if not listed and split == "train":
        notes.append(f"read but not verified, since no {META_NAME} has sums: the shards in {folder}")
    if listed and (unlisted := [name for name in own if name not in listed]):
        notes.append(f"read but not verified, since {META_NAME} doesn't list it: {_first_of(unlisted)} in {folder}")
    return [folder / name for name in own], notes


def _first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def open_split(folder: Path, split: str, vocab_size: int, meta: dict[str, Any]) -> list[np.ndarray]:
    """The tokens of a split's shards, sorted by name, each uint16 (tokens,), in memory and verified.

    Raises:
        ConfigError: see Shard, Shard.verify and list_split.
    """
    listed = meta.get("shards", {})
    paths, _ = list_split(folder, split, listed)
    return [open_shard(path, vocab_size, listed.get(path.name)) for path in paths]


def open_shard(path: Path, vocab_size: int, listed: Mapping[str, Any] | None = None) -> np.ndarray:
    """The tokens of a shard, uint16 (tokens,), in memory and verified.

    Raises:
        ConfigError: see Shard and Shard.verify.
    """
    shard = Shard(path, listed)
    try:
        shard.verify(vocab_size)
        return shard.tokens()
    except DataError as error:
        raise ConfigError(str(error)) from None


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count each id: int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    # Count in parts: bincount copies its input to int64.
    for begin in range(0, len(tokens), SCAN_TOKENS):
        counts += np.bincount(tokens[begin : begin + SCAN_TOKENS], minlength=vocab_size)
    return counts


def unigram_entropy(counts: np.ndarray, model: np.ndarray | None = None) -> float:
    """Nats per token when predicting each token by its frequency alone: what a trained model must beat.

    Args:
        counts: (V,), how often each id occurs in the tokens to predict.
        model: (V,), the counts that the frequencies are taken from, plus one each so that an id that only
            `counts` has is possible; None takes `counts` themselves, as they are.
    """
    frequencies = counts / counts.sum() if model is None else (model + 1) / (model.sum() + len(model))
    seen = counts > 0
    return float(-(counts[seen] @ np.log(frequencies[seen])) / counts.sum())


def write_shard(path: Path | str, tokens: Any) -> None:
    """Write tokens, integers (n,) from 0 to 65535, as a shard, atomically.

    Raises:
        ConfigError: the tokens are not of that kind.
        OSError: it can't be written.
    """
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not 1 <= len(tokens) < 1 << 31:
        raise ConfigError(f"can't write {path}: a shard takes from 1 to 2**31 - 1 tokens, got shape {tokens.shape}")
    if tokens.dtype.kind not in "iu":
        raise ConfigError(f"can't write {path}: tokens are integers, got {tokens.dtype}")
    least, most = tokens.min(), tokens.max()
    if least < 0 or most > np.iinfo(np.uint16).max:
        worst = least if least < 0 else most
        raise ConfigError(f"can't write {path}: a token is from 0 to 65535, got {worst}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    aside = path.with_name(f".{path.name}.writing")
    try:
        with aside.open("wb") as file:
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_shards(folder: Path | str, split: str, tokens: Any, shard_tokens: int = 100_000_000) -> None:
    """Write a split's tokens, see write_shard, to a folder as shards of at most `shard_tokens`.

    Raises:
        ConfigError, OSError: see write_shard.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, begin in enumerate(range(0, len(tokens), shard_tokens)):
        write_shard(folder / f"{split}_{number:06d}.bin", tokens[begin : begin + shard_tokens])
