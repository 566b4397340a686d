"""Settings in a TOML file: a flat list of `name = value`, named as the fields of TrainConfig."""

from __future__ import annotations

import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from fastgpt2.config import FIRST_LINE, LAST_LINE, TrainConfig
from fastgpt2.fields import ConfigError, checked, field_hints, nearest, shown
from fastgpt2.renamed import RENAMED, with_current_names

MOST_BYTES, MOST_DOTS = 64 << 10, 1000
"""All settings with their help take 7 KiB. tomllib is quadratic in the dots of a key: 30 s for 32,000."""
QUOTED = re.compile(
    r"""
      "{3} (?:[^\\]|\\.)*? (?:"{3,5} | \\?\Z)  |  '{3} .*? (?:'{3,5} | \Z)  # a string of several lines
    | "    (?:[^"\\\n]|\\.)* "?                |  '    [^'\n]* '?           # a string
    | \# [^\n]*                                                             # a comment
    """,
    re.DOTALL | re.VERBOSE,
)
"""Strings and comments. An unclosed one extends to the end of the file, where tomllib fails too."""


class UnreadableError(ConfigError):
    """The file is missing, can't be read or is not TOML."""


def read_toml(path: Path, label: str | None = None) -> dict[str, Any]:
    """The settings in a file, by field name (`batch_size` and `batch-size` are the same), each checked.

    Args:
        label: what messages call the file (default: --config and its path).

    Raises:
        ConfigError: the file can't be read or parsed, a key is not a setting (the message suggests the nearest one), or
            a value has the wrong type or range.
    """
    label = label or f"--config {path}"
    return check_settings(load_toml(path, label), label)


def load_toml(path: Path, label: str) -> dict[str, Any]:
    """A file's table, unchecked.

    Raises:
        UnreadableError: the file can't be read or is not TOML.
    """
    try:
        # Check before opening: a pipe would block until someone writes, and /dev/zero never ends.
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableError(f"can't read {label}: not a file")
        if found.st_size > MOST_BYTES:
            raise UnreadableError(f"can't read {label}: {found.st_size:,} bytes are no list of settings")
        text = path.read_text(encoding="utf-8-sig")
        if (dots := QUOTED.sub("", text).count(".")) > MOST_DOTS:
            raise UnreadableError(f"can't read {label}: {dots:,} dots outside strings are no list of settings")
        if text.startswith(FIRST_LINE) and not text.endswith(f"{LAST_LINE}\n"):
            raise UnreadableError(f"{label} was cut short: its last line is missing")
        return tomllib.loads(text)
    except OSError as error:
        raise UnreadableError(f"can't read {label}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UnreadableError(f"can't read {label}: not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise UnreadableError(f"{label} is not TOML: {error}") from None
    except RecursionError:
        raise UnreadableError(f"{label} is no list of settings: nested too deeply") from None
    except UnreadableError:
        raise
    except ValueError:  # of int(), at thousands of digits
        raise UnreadableError(f"{label} is no list of settings: a number is too long") from None


def check_settings(table: dict[str, Any], label: str) -> dict[str, Any]:
    """A table's settings by field name.

    Raises:
        ConfigError: as read_toml, for what is in the table.
    """
    names: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in names:
            raise ConfigError(f"{label}: {name!r} is given twice, with _ and with -")
        names[name] = value
    hints = field_hints(TrainConfig)
    settings: dict[str, Any] = {}
    for name, value in with_current_names(names).items():
        if name not in hints:
            instead = f"; it is {RENAMED[name].name!r} now" if name in RENAMED else nearest(name, hints)
            raise ConfigError(f"{label}: unknown key {shown(name)}{instead}")
        settings[name] = checked(f"{label}: {name}", value, hints[name])
    return settings
