"""What --data names: dummy tokens, text, or a folder of token shards.

Text is Python's standard library or a file. It becomes a folder of byte tokens in the user's cache on first use. The
folder's name has a hash of the text: another text, or another Python, gets another folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import platform
import shlex
import stat
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastgpt2 import __version__
from fastgpt2.config import ConfigError
from fastgpt2.durable import InUseError, locked
from fastgpt2.shards import HEADER_BYTES, META_NAME, read_meta

if TYPE_CHECKING:
    from rich.console import Console

DUMMY = ("dummy", "dummy-fixed")
STDLIB = "stdlib"
GIVEN = "<source>"
"""What a run is saved with whose training tokens were given in Python."""
CHOICES = f"{', '.join(DUMMY)}, {STDLIB}, a text file or a folder of token shards"
WAIT_S = 0.1
"""Seconds between looks at whether another process has prepared the text."""
_NO_LIBRARY = ("__pycache__", "site-packages")


class _Text(NamedTuple):
    path: Path
    ext: tuple[str, ...]
    """The endings of the files to read, if the path is a folder."""
    key: str
    """Name of the folder in the cache."""


def is_text(data: str) -> bool:
    """Whether --data names text: Python's standard library or a file.

    Raises:
        ConfigError: the file is a token shard.
    """
    path = os.path.expanduser(data)
    if data != STDLIB and data.endswith(".bin") and os.path.isfile(path):
        folder = shlex.quote(str(Path(data).parent))
        raise ConfigError(f"--data {data} is one file of tokens; give its folder: --data {folder}")
    return data == STDLIB or os.path.isfile(path)


def shard_folder(data: str | Path, console: Console | None = None) -> Path:
    """The folder of shards that --data names. Text is prepared on first use, or again if its shards are damaged.

    Args:
        console: shows what is prepared; None shows nothing.

    Raises:
        ConfigError: no such folder or file, a file that is not text, or a cache folder that can't be written.
    """
    if is_text(str(data)):
        text = _text(str(data))
        folder = _cached(text)
        if not _is_whole(folder):
            _prepare(str(data), text, folder, console)
        return folder
    return _folder(data)


def prepare_aloud(data: str) -> None:
    """Prepare the text that --data names, if it does, and say so on stderr: for a command, before its work.

    Raises:
        ConfigError: see shard_folder.
    """
    if is_text(data):
        from rich.console import Console

        from fastgpt2.console import unfailing

        # No progress bar: a signal may end the process before the bar has shown the cursor again.
        shard_folder(data, Console(file=unfailing(sys.stderr), force_terminal=False))


def about(data: str) -> Iterator[str]:
    """Notes for the user about the text that --data names; none for other data."""
    if not is_text(data):
        return
    try:
        folder = _cached(_text(data))
        tokens = sum(read_meta(folder)["tokens"].values())
    except (ConfigError, KeyError):  # edited or deleted since the run opened it
        return
    if data == STDLIB:
        yield f"stdlib is Python {platform.python_version()}'s standard library, {tokens:,} byte tokens, in {folder}"
        if os.path.isdir(STDLIB):
            yield "for the folder stdlib that is here, give --data ./stdlib"
    else:
        yield f"{data} is read as {tokens:,} byte tokens, in {folder}"
        yield f"for GPT-2's tokens: python -m fastgpt2.prepare {shlex.quote(data)} --out DIR, then --data DIR"


def val_unigram_entropy(data: str) -> float | None:
    """Nats per token when predicting each token of the val split by its frequency, from meta.json; None if that has
    none. Prepares nothing."""
    if data in (*DUMMY, GIVEN):
        return None
    try:
        folder = _cached(_text(data)) if is_text(data) else _folder(data)
        entropy = read_meta(folder).get("unigram_nats_per_token", {}).get("val")
    except (ConfigError, AttributeError):  # gone since the run began; a meta.json by hand
        return None
    return entropy if isinstance(entropy, float) else None


def _text(data: str) -> _Text:
    if data == STDLIB:
        path = Path(sysconfig.get_path("stdlib"))
        return _Text(path, (".py",), f"stdlib-{platform.python_version()}-{_listing(path)[:16]}")
    path = Path(os.path.expanduser(data))
    try:
        status = path.stat()
        return _Text(path, (), f"text-{_sha256(path, status.st_size, status.st_mtime_ns)[:32]}")
    except OSError as error:
        raise ConfigError(f"can't read --data {data}: {error.strerror}") from None


@functools.lru_cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listing(library: Path) -> str:
    """A hash of the names, sizes and times of a library's source files."""
    digest, files = hashlib.sha256(), 0
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in _NO_LIBRARY)
        for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            with contextlib.suppress(OSError):  # a link to nothing
                status = path.stat()
                line = f"{path.relative_to(library)}/{status.st_size}/{status.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
                files += 1
    if not files:
        raise ConfigError(f"--data stdlib: this Python has no .py files in {library}; give --data a text file")
    return digest.hexdigest()


def _cached(text: _Text) -> Path:
    import platformdirs

    # Another version may prepare the same text otherwise.
    return Path(platformdirs.user_cache_dir("fastgpt2", appauthor=False)) / __version__ / text.key


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds every shard that its meta.json lists, in full length."""
    try:
        shards = read_meta(folder).get("shards", {})
        sizes = [(folder / name).stat().st_size for name in shards]
    except (ConfigError, OSError):
        return False
    return bool(sizes) and sizes == [HEADER_BYTES + 2 * listed.get("tokens", 0) for listed in shards.values()]


def _prepare(data: str, text: _Text, folder: Path, console: Console | None) -> None:
    from rich.console import Console

    from fastgpt2.console import printable
    from fastgpt2.preparation import PrepareConfig, fill
    from fastgpt2.sources import find

    console = console or Console(file=io.StringIO())
    try:
        if text.path.is_file():  # refuse a file that is not text before anything is made or said
            find([text.path], folder)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            _wait_for_lock(folder, held)
            if _is_whole(folder):  # another process has prepared it
                return
            line = printable(f"preparing {data} as byte tokens in {folder}")
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            config = PrepareConfig(sources=(text.path,), out=folder, tokenizer="byte", ext=text.ext, overwrite=True)
            fill(config, console)
            if _text(data).key != text.key:
                (folder / META_NAME).unlink()  # the name would lie
                raise ConfigError(f"{data} changed while it was read: start again when nothing writes to it")
    except ConfigError as error:
        raise ConfigError(f"--data {error}") from None
    except OSError as error:
        raise ConfigError(
            f"can't prepare --data {data} in the cache folder {folder}: {error.strerror}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def _wait_for_lock(folder: Path, held: contextlib.ExitStack) -> None:
    while True:
        try:
            held.enter_context(locked(folder))
            return
        except InUseError:
            time.sleep(WAIT_S)


def _folder(data: str | Path) -> Path:
    if not str(data):
        raise ConfigError(f"--data is empty; give {CHOICES}")
    if data == GIVEN:
        raise ConfigError(
            "the tokens were given in Python: give them again, by train(config, source=...), or give --data a folder"
        )
    try:
        folder = Path(data).expanduser()
        is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
    except FileNotFoundError:
        raise ConfigError(f"--data {data}: no such file or folder; give {CHOICES}") from None
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; the home of nobody
        raise ConfigError(f"can't read --data {data}: {getattr(error, 'strerror', None) or error}") from None
    if not is_folder:
        raise ConfigError(f"--data {data} is neither a file nor a folder; give {CHOICES}")
    return folder
