"""What `prepare` reads: text files under the sources, and the documents in them.

A file is one document, or with a separator, several. Files are read whole, one at a time. Everything skipped is counted
by reason.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import os
import re
import stat
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from fastgpt2.config import ConfigError
from fastgpt2.durable import LOCK_NAME, read_json
from fastgpt2.shards import META_NAME
from fastgpt2.tokenizer import BPE_FILES, END_OF_TEXT

ASIDE = ".preparing"
"""The folder in --out to which everything is written first."""
SKIPPED_FOLDERS = ("__pycache__", "node_modules", "site-packages")
SNIFFED_BYTES = 1 << 13
"""Enough for 100,000 shards, more than anyone has."""

_UNPACK = "unpack it first"
_COLUMN = "write its column of text to .txt files first"
_ROWS = "extract the texts to a .txt file first, with a mark between them for --document-separator"
_EXPORT = "export it as text first"
_NO_TEXT = "it holds no text"
_LINES = (".jsonl", ".jsonlines", ".ndjson")
_TABLES = (".csv", ".tsv")
_ARCHIVES = (".gz", ".tgz", ".zst", ".xz", ".lzma", ".bz2", ".lz4", ".z", ".br", ".zip", ".7z", ".rar", ".tar")
NOT_TEXT = {
    **dict.fromkeys(_LINES, _ROWS),
    **dict.fromkeys(_TABLES, _COLUMN),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc", ".avro", ".sqlite", ".sqlite3", ".db"), _COLUMN),
    **dict.fromkeys(_ARCHIVES, _UNPACK),
    **dict.fromkeys((".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".odt", ".ods", ".epub"), _EXPORT),
    **dict.fromkeys((".npy", ".npz", ".pkl", ".pickle", ".bin", ".pt", ".safetensors"), _NO_TEXT),
    ".pdf": "convert it to .txt first",
}
"""Endings of files whose bytes are not prose, in lower case, and what to do with one. --ext takes them as they stand
where they are text."""
_ENCODED = {name: f"{name}: convert it to UTF-8 (iconv -f {name} -t UTF-8)" for name in ("UTF-16", "UTF-32")}
MAGIC = (
    (b"\x1f\x8b", ".gz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"\xfd7zXZ\0", ".xz"),
    (b"\x5d\0\0", ".lzma"),
    (b"BZh", ".bz2"),
    (b"\x04\x22\x4d\x18", ".lz4"),
    (b"\x1f\x9d", ".z"),
    (b"PK\x03\x04", ".zip"),
    (b"7z\xbc\xaf", ".7z"),
    (b"PAR1", ".parquet"),
    (b"ARROW1", ".arrow"),
    (b"ORC", ".orc"),
    (b"Obj\x01", ".avro"),
    (b"SQLite format 3\0", ".sqlite"),
    (b"\xd0\xcf\x11\xe0", ".doc"),
    (b"\x93NUMPY", ".npy"),
    (b"%PDF", ".pdf"),
)
"""First bytes of such files under other names; checked only if a file is not UTF-8, so text is never mistaken."""

_BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),  # before UTF-16, whose mark is its beginning
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_COPIES = "copies of the document cut for validation"
_JSON = (b"{", b"[", b'"')
"""What JSON starts with, except a lone number."""
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
    """Hash of the whole file, to detect a change after it was found."""
    digest: bytes
    """Hash of these bytes. It decides the split, so copies are always on the same side."""
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
    """Number of files, folders and copies skipped, by reason."""
    copied: str = ""
    """The document whose copies were left out, and how many."""
    unreadable: str = ""
    """The first file or folder that could not be read, and why."""
    written: int = 0
    """Files skipped because prepare writes them."""
    marks: int = 0
    """Occurrences of the end-of-text mark's text in the documents."""


def find(
    sources: Sequence[Path],
    out: Path,
    ext: Sequence[str] = (),
    separator: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Read every file under the sources once, sorted, and keep the non-empty UTF-8 text files.

    Args:
        sources: files and folders.
        out: prepare's --out: what prepare writes there is not read.
        ext: from folders, take only files with these endings; empty takes all text files.
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
    named = {os.path.realpath(source) for source in sources}
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
            contents = _pass_by(path, error, real in named, found)
        if real in named:
            _refuse_format(path, contents, endings)
        if isinstance(contents, str):
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
    """The documents' characters, in order. A file is read once for all its consecutive documents.

    Raises:
        ConfigError: a file changed after it was found.
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


def assign(found: Found, val_fraction: float) -> dict[str, list[Document]]:
    """Divide the documents: {"train": [...], "val": [...]}, in the order given, none on both sides.

    Validation takes documents in the order of their contents' hash, each that still fits, until it has
    val_fraction of the bytes. Where the documents are too few or too large for that, the end of the largest
    is cut off for it, at a line's beginning, and copies of that one are left out, which `found` counts.
    """
    documents = found.documents
    budget = val_fraction * _bytes(documents)
    chosen, taken = _choose(documents, budget)
    parts: dict[str, list[Document]] = {"train": [], "val": []}
    if taken < budget / 2:
        largest = max((d for d in documents if d.digest not in chosen), key=lambda d: d.size)
        # Its copies would leak validation text into training.
        documents = [d for d in documents if d.digest != largest.digest or d is largest]
        if copies := len(found.documents) - len(documents):
            found.skipped[_COPIES] += copies
            found.copied = f"{copies:,} {'copy' if copies == 1 else 'copies'} of {_name(largest)}"
            # Start again: without the copies there is less text to divide.
            budget = val_fraction * _bytes(documents)
            chosen, taken = _choose([d for d in documents if d is not largest], budget)
        head, tail = _cut(largest, budget - taken)
        documents = [head if d is largest else d for d in documents]
        parts["val"].append(tail)
    for document in documents:
        parts["val" if document.digest in chosen else "train"].append(document)
    return parts


def _choose(documents: Sequence[Document], budget: float) -> tuple[set[bytes], int]:
    """The digests of whole documents that fit into a budget of bytes, and how many bytes they take."""
    chosen: set[bytes] = set()
    taken, copies = 0, Counter(document.digest for document in documents)
    for document in sorted(documents, key=lambda d: d.digest):
        size = document.size * copies[document.digest]
        if document.digest not in chosen and taken + size <= budget:
            chosen.add(document.digest)
            taken += size
    return chosen, taken


def _bytes(documents: Sequence[Document]) -> int:
    return sum(document.size for document in documents)


def _name(document: Document) -> str:
    whole = document.digest == document.file_digest
    return str(document.path) if whole else f"a document in {document.path}"


def _cut(document: Document, tail_bytes: float) -> tuple[Document, Document]:
    (text,) = texts([document])
    # Keep at least a character on each side; cut at the start of a line if the tail has one.
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
            # os.walk follows changes made in place.
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
    """Names in a folder that prepare writes or wrote, which are not training text."""
    path = folder / META_NAME
    try:
        if out.exists() and folder.samefile(out):
            return _OURS
        meta = read_json(path)
    except (OSError, ConfigError):
        return None
    return _OURS if {"tokenizer", "vocab_size", "shards"} <= meta.keys() else None


def _read_text(path: Path, endings: tuple[str, ...]) -> bytes | str:
    """The bytes of a text file, or why it is none: a reason, or for a format of NOT_TEXT its ending.

    Raises:
        OSError: it can't be read.
    """
    status = path.stat()
    # A pipe or a device would block or never end.
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
    return next((kind for magic, kind in (*_BYTE_ORDER_MARKS, *MAGIC) if head.startswith(magic)), reason)


def _pass_by(path: Path, error: OSError, named: bool, found: Found) -> str:
    """Why an unreadable file or folder is skipped.

    Raises:
        ConfigError: it was given by name, or the error is none of its own.
    """
    if named or error.errno not in _ITS_OWN:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from None
    if path.is_symlink():
        return "links to nothing"
    found.unreadable = found.unreadable or f"{path}: {error.strerror}"
    return "unreadable"


def _refuse_format(path: Path, contents: bytes | str, endings: tuple[str, ...]) -> None:
    """Raise ConfigError where a file that was given by name has its text inside a format."""
    kind = contents if isinstance(contents, str) else ""
    # In a folder it is text, as package.json is among code.
    if path.suffix.lower() == ".json" and not path.name.endswith(endings) and isinstance(contents, bytes):
        kind = ".json" if contents[:SNIFFED_BYTES].removeprefix(BOM_UTF8).lstrip().startswith(_JSON) else ""
    if advice := _advice(kind):
        name = f" (a {kind} file by its first bytes)" if kind in NOT_TEXT and path.suffix.lower() != kind else ""
        raise ConfigError(f"can't take {path}{name} as text: {advice}")


def _advice(kind: str) -> str:
    """What to do with files of a kind; empty where that is no format."""
    if kind in _ENCODED:
        return _ENCODED[kind]
    hint = _ROWS if kind == ".json" else NOT_TEXT.get(kind)
    if hint is None:
        return ""
    as_text = (
        f" (python -m fastgpt2.prepare --ext {kind} takes it as it stands)"
        if kind in (".json", *_LINES, *_TABLES)
        else ""
    )
    return f"reading {kind} comes later; {hint}{as_text}"


def _nothing(sources: Sequence[Path], ext: Sequence[str], found: Found) -> str:
    if len(found.skipped) == 1 and len(sources) == 1 and not sources[0].is_dir():
        (reason,) = found.skipped
        return f"can't take {sources[0]} as text: it is {reason.replace('regular files', 'a regular file')}"
    only = f" with --ext {' '.join(ext)}" if ext else ""
    advice = [text for kind in sorted(found.skipped) if (text := _advice(kind))]
    return f"nothing to read in {_some(sources)}{only}: " + "; ".join([_counts(found.skipped) or "no files", *advice])


def _some(sources: Sequence[Path]) -> str:
    return " ".join(map(str, sources[:3])) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")


def skipped_text(skipped: Mapping[str, int]) -> str:
    """The skip counts by reason in one line; empty if nothing was skipped."""
    not_yet = {kind: n for kind, n in skipped.items() if NOT_TEXT.get(kind, _NO_TEXT) != _NO_TEXT}
    encoded = {_ENCODED[kind]: n for kind, n in skipped.items() if kind in _ENCODED}
    others = {reason: n for reason, n in skipped.items() if reason not in {**not_yet, **_ENCODED}}
    parts = [_counts(others), f"not read yet: {_counts(not_yet)} (extract the text first)" if not_yet else ""]
    return "; ".join(filter(None, [*parts, _counts(encoded)]))


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items()))


def _digest(contents: bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=16).digest()
