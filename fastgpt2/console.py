"""How every command prints and exits: output never fails a run, an error is one clear line, with an exit status."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO, cast

from fastgpt2.fields import ConfigError
from fastgpt2.signals import can_write

STALLED_S = 1.0
"""How long to wait for a reader that has stopped reading before output is dropped."""
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: f"\\u{code:04x}" for code in (*_CONTROLS, *_BIDIRECTIONAL)} | {
    code: chr(code).encode("unicode_escape").decode() for code in range(0x20)
}


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Call main and exit.

    The status is main's result (0 for None), 2 for a ConfigError, 130 for Ctrl-C, and 1 if memory ran out or output
    could not be written. Errors are one line each; Ctrl-C and a pipe whose reader has closed it print nothing.
    """
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
        _say("error: out of memory: lower --batch-size if the command has it")
        status = 1
    except BrokenPipeError:
        status = 1
    except OSError as error:
        if error.filename is not None:  # an error in opening a file, not in writing to a stream
            raise
        _say(f"error: {error.strerror or error}")
        status = 1
    finally:
        # Otherwise the interpreter would fail again at exit, with a status of its own.
        discard_unwritten(sys.stdout)
        discard_unwritten(sys.stderr)
    sys.exit(status)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory; PyTorch has no exception type for it on the CPU and on MPS."""
    torch = sys.modules.get("torch")  # not imported for this: commands that don't need it stay quick
    return isinstance(error, (MemoryError, getattr(torch, "OutOfMemoryError", MemoryError))) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("DefaultCPUAllocator", "MPS backend out of memory"))
    )


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
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            if self._descriptor is not None:
                self._write_bytes(text.encode(self.encoding, "backslashreplace"))
            elif self._stream is not None:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def _write_bytes(self, data: bytes) -> None:
        """Write in chunks that a pipe takes whole or not at all. Wait once for a reader that has stopped reading."""
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
    """The stream's file descriptor, or None if it has none, as in a notebook or a test.

    None on Windows too: a terminal there shows only what its own stream encodes.
    """
    if not hasattr(select, "poll"):
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream.fileno() if stream is not None else None
    return None


def printable(text: object) -> str:
    """Make a user's text, such as a path, safe for a line of output. Escapes control characters, line ends, characters
    that change the direction of text, and the bytes of a path that is not UTF-8."""
    return str(text).translate(_ESCAPES).encode(errors="backslashreplace").decode()


def printable_lines(text: str) -> str:
    """Make a text of many lines safe for a terminal: as printable, but line ends and tabs stay."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def shell_word(path: object) -> str:
    """Quote a path for a shell. Control characters are quoted in a form that bash and zsh read."""
    text = str(path)
    if printable(text) == text:
        return shlex.quote(text)
    return "$'" + printable(text.replace("\\", r"\\").replace("'", r"\'")) + "'"


def discard_unwritten(stream: TextIO | None) -> OSError | ValueError | None:
    """Flush a stream. If that fails, discard its buffer and return the error."""
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
    """Open closed standard streams on /dev/null. Otherwise the next file opened would take a stream's descriptor and
    receive what is written to it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
