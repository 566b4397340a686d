"""What `prepare` reads: text files under the sources, and the documents in them.

A file is a document, or with a separator what stands between two of them. A file is held in memory whole, one at a
time. Whatever is left out is counted by its reason.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from fastgpt2.config import ConfigError
from fastgpt2.data import META_NAME
from fastgpt2.durable import LOCK_NAME
from fastgpt2.tokenizer import BPE_FILES, END_OF_TEXT

ASIDE = ".preparing"
"""The folder in --out that everything is written to first."""
SKIPPED_FOLDERS = ("__pycache__", "node_modules", "site-packages")
SNIFFED_BYTES = 1 << 13
LARGEST_META_BYTES = 1 << 24
"""Of 100,000 shards, more than anybody has."""

_UNPACK = "unpack it first"
_COLUMN = "write its column of text to .txt files first"
_ROWS = "extract the texts to a .txt file first, with a mark between them for --document-separator"
_NO_TEXT = "it holds no text"
NOT_TEXT = {
    **dict.fromkeys((".jsonl", ".ndjson"), _ROWS),
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow", ".feather"), _COLUMN),
    **dict.fromkeys((".gz", ".tgz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".tar"), _UNPACK),
    **dict.fromkeys((".npy", ".npz", ".pkl", ".pickle", ".bin", ".pt", ".safetensors"), _NO_TEXT),
    ".pdf": "convert it to .txt first",
}
"""Endings of files whose bytes are not prose, and what to do with one. --ext takes them as they stand."""
MAGIC = (
    (b"\x1f\x8b", ".gz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"\xfd7zXZ\0", ".xz"),
    (b"BZh", ".bz2"),
    (b"\x04\x22\x4d\x18", ".lz4"),
    (b"PK\x03\x04", ".zip"),
    (b"7z\xbc\xaf", ".7z"),
    (b"PAR1", ".parquet"),
    (b"ARROW1", ".arrow"),
    (b"\x93NUMPY", ".npy"),
    (b"%PDF", ".pdf"),
)
"""First bytes of such files under other names; asked only of what is not UTF-8, so that no text is mistaken."""

_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
_NEWLINE = re.compile(rb"\r?\n")
_OURS = re.compile("|".join([*map(re.escape, (LOCK_NAME, META_NAME, *BPE_FILES)), r"(train|val)_\d{6}\.bin"]))
_ITS_OWN = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
"""Errors of one file or folder, which is left out. Any other (a bad disk, a lost network) stops prepare, since the same
sources would give other shards the next time."""


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes [begin, end) of a text file."""

    path: Path
    file_digest: bytes
    """Of the whole file: tells a file that changed after it was found."""
    digest: bytes
    """Of these bytes: what decides the split, so that copies never lie on both sides."""
    begin: int
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.begin


@dataclass
class Found:
    """The documents under the sources, and what was left out."""

    documents: list[Document] = field(default_factory=list)
    files: int = 0
    """Files that the documents are in."""
    skipped: Counter[str] = field(default_factory=Counter)
    """How many files and folders were left out for which reason."""
    unreadable: str = ""
    """The first file or folder that could not be read, and why."""
    written: int = 0
    """Files left out because prepare writes them."""
    marks: int = 0
    """How often the text of the end-of-text mark stands in the documents."""


def find(
    sources: Sequence[Path],
    out: Path,
    ext: Sequence[str] = (),
    separator: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Read every file under the sources once, sorted, and keep those that are UTF-8 text and not empty.

    Args:
        sources: files and folders.
        out: prepare's --out: what prepare writes there is not read.
        ext: take only files with these endings from folders; empty takes all that are text.
        separator: text between documents; None makes a document of each file.

    Raises:
        ConfigError: a source can't be read or is of a format that is no text, a disk fails, nothing is left (the
            message counts what was skipped), or the separator is in none of the files.
    """
    found, seen = Found(), set()
    endings = tuple(e if e.startswith(".") else f".{e}" for e in ext)
    try:
        paths = list(_walk(sources, out, endings, found))
    except RecursionError:  # os.walk's, before Python 3.12
        raise ConfigError(f"the folders under {_some(sources)} are nested too deeply to be walked") from None
    task = progress.add_task("reading", total=len(paths)) if progress else None
    named = set(sources)
    separators = 0
    for path in paths:
        if progress and task is not None:
            progress.advance(task)
        real = os.path.realpath(path)
        if real in seen:
            found.skipped["read already"] += 1
            continue
        seen.add(real)
        try:
            contents = _read_text(path, endings)
        except OSError as error:
            contents = _pass_by(path, error, path in named, found)
        if isinstance(contents, str):
            if path in named and contents in NOT_TEXT:
                raise ConfigError(_refusal(path, contents))
            found.skipped[contents] += 1
            continue
        documents = list(_documents(path, contents, separator))
        found.files += bool(documents)
        found.documents += documents
        found.marks += sum(contents.count(END_OF_TEXT.encode(), d.begin, d.end) for d in documents)
        separators += contents.count(separator.encode()) if separator else 0
    if not found.documents:
        raise ConfigError(_nothing(sources, ext, found))
    if separator and not separators:
        raise ConfigError(f"--document-separator {separator!r} is in none of the {found.files:,} files")
    return found


def texts(documents: Sequence[Document]) -> Iterator[str]:
    """The documents' characters, in order. A file is read once for all of its documents that follow one another.

    Raises:
        ConfigError: a file is not as it was when it was found.
    """
    for path, group in itertools.groupby(documents, key=lambda document: document.path):
        try:
            contents = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"can't read {path} any more: {error.strerror or error}") from None
        digest = _digest(contents)
        for document in group:
            if document.file_digest != digest:
                raise ConfigError(f"{path} changed while it was read: prepare again when nothing writes to it")
            yield contents[document.begin : document.end].decode()


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
    (text,) = texts([document])
    # At least a character on either side; at a line's beginning where the tail has one.
    at = min(max(round(len(text) * (1 - tail_bytes / document.size)), 1), max(len(text) - 1, 1))
    line = text.find("\n", at - 1) + 1
    at = line if 0 < line < len(text) else at
    middle = document.begin + len(text[:at].encode())
    return dataclasses.replace(document, end=middle), dataclasses.replace(document, begin=middle)


def _documents(path: Path, contents: bytes, separator: str | None) -> Iterator[Document]:
    """The documents of a file. A mark takes the newline on either side of it along; what is blank is no document."""
    whole = _digest(contents)
    marks = [] if separator is None else [m.span() for m in re.finditer(re.escape(separator.encode()), contents)]
    begins = [0, *(end for _, end in marks)]
    ends = [*(begin for begin, _ in marks), len(contents)]
    for begin, end in zip(begins, ends, strict=True):
        if begin > 0 and (newline := _NEWLINE.match(contents, begin, end)):
            begin = newline.end()
        if end < len(contents) and contents.endswith(b"\n", begin, end):
            end -= 2 if contents.endswith(b"\r\n", begin, end) else 1
        part = contents[begin:end]
        if part and not part.isspace():
            yield Document(path, whole, whole if len(part) == len(contents) else _digest(part), begin, end)


def _walk(sources: Sequence[Path], out: Path, endings: tuple[str, ...], found: Found) -> Iterator[Path]:
    """The files to look at, sorted within each source."""

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        found.skipped[_pass_by(path, error, path in sources, found)] += 1

    for source in sources:
        if not source.is_dir():
            yield source
            continue
        for folder, folders, files in os.walk(source, onerror=unreadable):
            here = Path(folder)
            written = _written(here, out)
            # Changed in place, which os.walk heeds.
            folders[:] = sorted(name for name in folders if name != ASIDE and not _skip_folder(here / name, found))
            for name in sorted(files):
                if written and written.fullmatch(name):
                    found.written += name != LOCK_NAME
                elif name[0] == ".":
                    found.skipped["hidden"] += 1
                elif endings and not name.endswith(endings):
                    found.skipped["with another ending"] += 1
                else:
                    yield here / name


def _skip_folder(path: Path, found: Found) -> bool:
    reason = None
    if path.name[0] == ".":
        reason = "hidden"
    elif path.name in SKIPPED_FOLDERS:
        reason = "folders of packages and caches"
    elif path.is_symlink():  # os.walk doesn't follow it: that could go round for ever
        reason = "links to folders"
    if reason:
        found.skipped[reason] += 1
    return reason is not None


def _written(folder: Path, out: Path) -> re.Pattern[str] | None:
    """The names in a folder that prepare writes, or wrote: they are not text to train on."""
    path = folder / META_NAME
    try:
        if out.exists() and folder.samefile(out):
            return _OURS
        if not path.is_file() or path.stat().st_size > LARGEST_META_BYTES:
            return None
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return _OURS if isinstance(meta, dict) and {"tokenizer", "vocab_size", "shards"} <= meta.keys() else None


def _read_text(path: Path, endings: tuple[str, ...]) -> bytes | str:
    """The bytes of a text file, or why it is none: a reason, or for a format of NOT_TEXT its ending.

    Raises:
        OSError: it can't be read.
    """
    status = path.stat()
    # A pipe or a device would block, or never end.
    if not stat.S_ISREG(status.st_mode):
        return "not regular files"
    ending = path.suffix.lower()
    if ending in NOT_TEXT and not path.name.endswith(endings):
        return ending
    if status.st_size == 0:  # also what /proc makes up, which changes from one reading to the next
        return "empty"
    with path.open("rb") as file:
        head = file.read(SNIFFED_BYTES)
        if b"\0" in head:
            return _binary(head, "binary")
        file.seek(0)
        contents = file.read()
    try:
        contents.decode()
    except UnicodeDecodeError:
        return _binary(head, "not UTF-8")
    return "empty" if contents.isspace() else contents


def _binary(head: bytes, reason: str) -> str:
    if head.startswith(_BYTE_ORDER_MARKS):
        return "UTF-16"
    return next((ending for magic, ending in MAGIC if head.startswith(magic)), reason)


def _pass_by(path: Path, error: OSError, named: bool, found: Found) -> str:
    """Why a file or folder that can't be read is left out.

    Raises:
        ConfigError: it was given by name, or the error is none of its own.
    """
    if named or error.errno not in _ITS_OWN:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from None
    if path.is_symlink():
        return "links to nothing"
    found.unreadable = found.unreadable or f"{path}: {error.strerror}"
    return "unreadable"


def _refusal(path: Path, ending: str) -> str:
    name = "" if path.suffix.lower() == ending else f" (a {ending} file by its first bytes)"
    hint = NOT_TEXT[ending]
    as_text = f" (--ext {ending} takes it as it stands)" if hint in (_ROWS, _COLUMN) else ""
    return f"can't take {path}{name} as text: reading {ending} comes later; {hint}{as_text}"


def _nothing(sources: Sequence[Path], ext: Sequence[str], found: Found) -> str:
    only = f" with --ext {' '.join(ext)}" if ext else ""
    return f"nothing to read in {_some(sources)}{only}: {skipped_text(found.skipped) or 'no files'}"


def _some(sources: Sequence[Path]) -> str:
    return " ".join(map(str, sources[:3])) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")


def skipped_text(skipped: Mapping[str, int]) -> str:
    """How many were left out for which reason, in one line; empty where nothing was."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(skipped.items()))


def _digest(contents: bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=16).digest()
