"""How every command prints and ends: output that can't fail a run, one clear line for an error, and a status."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO, cast

from fastgpt2.config import ConfigError
from fastgpt2.device import is_out_of_memory
from fastgpt2.signals import can_write

STALLED_S = 1.0
"""How long to wait for a reader that has stopped reading before output is dropped."""
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: f"\\u{code:04x}" for code in (*_CONTROLS, *_BIDIRECTIONAL)} | {
    code: chr(code).encode("unicode_escape").decode() for code in range(0x20)
}


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Call main and exit: with its result (None is 0), 2 on a ConfigError (one line), 130 on Ctrl-C, 1 where what it
    printed could not be written (one line, none where the reader of a pipe has gone away)."""
    _open_standard_streams()
    try:
        status = main() or 0
        if problem := discard_unwritten(sys.stdout):
            raise problem
    except ConfigError as error:
        _say(f"error: {printable(error)}")
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
        # Otherwise the interpreter fails again at exit, with its own status.
        discard_unwritten(sys.stdout)
        discard_unwritten(sys.stderr)
    sys.exit(status)


def unfailing(stream: TextIO | None) -> TextIO:
    """Wrap a stream so that writing never fails: it drops what can't be written (a pipe whose reader is gone or has
    stopped, a full disk, a terminal that is gone or stopped) and escapes what its encoding lacks."""
    return cast(TextIO, _Unfailing(stream))


class _Unfailing:
    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self._stalled = stream, False
        self._descriptor = _descriptor(stream)
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            if self._descriptor is not None:
                self._write_bytes(text.encode(self.encoding, "backslashreplace"))
            elif self._stream is not None:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def _write_bytes(self, data: bytes) -> None:
        """Write in parts that a pipe takes whole or not at all. Wait once for a reader that has stopped reading."""
        assert self._stream is not None and self._descriptor is not None
        self._stream.flush()
        for begin in range(0, len(data), select.PIPE_BUF):
            self._stalled = not can_write(self._descriptor, 0.0 if self._stalled else STALLED_S)
            if self._stalled:
                break
            os.write(self._descriptor, data[begin : begin + select.PIPE_BUF])

    def flush(self) -> None:
        if self._stream is not None and self._descriptor is None:
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


def _descriptor(stream: TextIO | None) -> int | None:
    """The stream's file descriptor, or None if it has none, as in a notebook or a test."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream.fileno() if stream is not None else None
    return None


def printable(text: object) -> str:
    """A user's text, such as a path, made safe for a line of output: escapes control characters, line ends, characters
    that change the direction of text, and the bytes of a path that is not UTF-8."""
    return str(text).translate(_ESCAPES).encode(errors="backslashreplace").decode()


def shell_word(path: object) -> str:
    """A path quoted for a shell; one with control characters in the form that bash and zsh read."""
    text = str(path)
    if printable(text) == text:
        return shlex.quote(text)
    return "$'" + printable(text.replace("\\", r"\\").replace("'", r"\'")) + "'"


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
