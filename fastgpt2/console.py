"""How every command ends: one clear line and a status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from fastgpt2.config import ConfigError


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Call main and exit: with its result (None is 0), 2 on a ConfigError (one line), 130 on Ctrl-C, 1 where the
    reader of its output has gone."""
    try:
        result = main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has gone: what is still to be written, at the interpreter's end, has no place
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(result or 0)
