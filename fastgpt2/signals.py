"""The signals by which a terminal, a scheduler or a cloud asks a process to stop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

Handler = Callable[[int, FrameType | None], None]

STOPPING = [
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if name in signal.Signals.__members__  # Windows has only the first two
]


def handle(handler: Handler | signal.Handlers) -> dict[signal.Signals, Any]:
    """Set a handler for each signal that asks to stop. Returns the previous handlers, for `put_back`.

    An ignored SIGHUP stays ignored, as nohup wants. Outside the main thread this does nothing: Python can't set
    handlers there.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [n for n in STOPPING if not (n.name == "SIGHUP" and signal.getsignal(n) is signal.SIG_IGN)]
    return {number: signal.signal(number, handler) for number in wanted}


def put_back(handlers: dict[signal.Signals, Any]) -> None:
    """Undo `handle`."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def by_default() -> Iterator[None]:
    """Let a signal that asks to stop end this process even while a C++ function waits: Python's handlers run later."""
    handlers = handle(signal.SIG_DFL)
    try:
        yield
    finally:
        put_back(handlers)


def end_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    """Handle a signal in a process with nothing to save: print one line and exit with 128 + the signal's number.

    It doesn't raise: during an import, an exception could be caught or leave a module half loaded.
    """
    say(f"stopped by {signal.Signals(number).name}: no step was being computed, so there is nothing to save")
    os._exit(128 + number)


def say(line: str) -> None:
    """Write a line to stderr from a signal handler. `print` fails there if the signal interrupted a `print`."""
    if sys.stderr is not None:  # None if closed at the start: another file may have its descriptor
        with contextlib.suppress(OSError):
            if can_write(2, 0.0):
                os.write(2, f"{line}\n".encode())


def can_write(descriptor: int, seconds: float) -> bool:
    """Whether a write would succeed within `seconds`: not to a full pipe or a terminal stopped by Ctrl-S.

    True on Windows, which can't tell.
    """
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(1e3 * seconds))
