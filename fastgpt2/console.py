"""How every command prints and ends: output that can't fail a run, one clear line for an error, and a status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO, cast

from fastgpt2.config import ConfigError
from fastgpt2.device import is_out_of_memory


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Call main and exit: with its result (None is 0), 2 on a ConfigError (one line), 130 on Ctrl-C, 1 where what it
    printed could not be written (one line, none where the reader of a pipe has gone away)."""
    _open_standard_streams()
    try:
        status = main() or 0
        if problem := discard_unwritten(sys.stdout):
            raise problem
    except ConfigError as error:
        _say(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        status = 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _say("error: out of memory: ask for less at a time, by --batch-size where the command has it")
        status = 1
    except BrokenPipeError:
        status = 1
    except OSError as error:
        if error.filename is not None:  # not of a stream that is open
            raise
        _say(f"error: {error.strerror or error}")
        status = 1
    finally:
        # Else the interpreter fails once more at its end, with a status of its own.
        discard_unwritten(sys.stdout)
        discard_unwritten(sys.stderr)
    sys.exit(status)


def unfailing(stream: TextIO | None) -> TextIO:
    """A stream that drops what can't be written (a pipe without a reader, a full disk, a terminal that is gone) and
    escapes what its encoding doesn't have."""
    return cast(TextIO, _Unfailing(stream))


class _Unfailing:
    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
                self._stream.write(printable(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("the stream is closed")
        return self._stream.fileno()


def printable(text: str, encoding: str = "utf-8") -> str:
    """Text that an encoding has, with escapes for the rest, such as the bytes of a path that is not UTF-8."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def discard_unwritten(stream: TextIO | None) -> OSError | ValueError | None:
    """Write what a stream holds back. What can't be written is thrown away, and the error returned."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, cast(TextIO, stream).fileno())
            os.close(nowhere)
        return error
    return None


def _say(line: str) -> None:
    print(line, file=unfailing(sys.stderr))


def _open_standard_streams() -> None:
    """Open those that are closed on /dev/null: the next file to be opened would get their number, and with it all that
    is printed by number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
