"""What a setting may hold: one check of types and bounds for Python, TOML files and flags.

The annotation of a dataclass field says all of it: a type of ACCEPTS, bounds (Annotated with rules, each a function
of the value), a choice (Literal), or a union of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
"""A larger number overflows to infinity in the step."""


class ConfigError(ValueError):
    """An invalid or impossible request. The message is one line and says what would work."""


@dataclass(frozen=True)
class Range:
    """Numbers of at least `least` and below `below`."""

    least: int
    below: float = math.inf

    def __call__(self, value: float) -> float:
        """The value itself. Raises ValueError with what is expected."""
        if not self.least <= value < self.below:
            raise ValueError(
                f"at least {self.least}" if math.isinf(self.below) else f"in [{self.least}, {self.below:g})"
            )
        return value


@dataclass(frozen=True)
class Choice:
    """One of some names. Literal is shorter where they are not computed."""

    names: tuple[str, ...]

    def __call__(self, text: str) -> str:
        """The text itself. Raises ValueError with what is expected."""
        if text not in self.names:
            raise ValueError(f"one of {', '.join(self.names)}")
        return text


@dataclass(frozen=True)
class FunctionChoice(Choice):
    """One of some names, or a function as "module:function"; one that can't be imported has <> in its name."""

    def __call__(self, text: str) -> str:
        """The text itself. Raises ValueError with what is expected."""
        if text not in self.names and not re.fullmatch(r"[\w.<>]+:[\w.<>]+", text):
            raise ValueError(f"one of {', '.join(self.names)} or module:function")
        return text


def not_empty(text: str) -> str:
    """The text itself. Raises ValueError with what is expected."""
    if not text:
        raise ValueError("a string that is not empty")
    return text


def positive(number: float) -> float:
    """The number itself. Raises ValueError with what is expected."""
    if not number > 0:
        raise ValueError("above 0")
    return number


def expand_home(text: str) -> str:
    """Expand a leading ~ or ~user. Raises ValueError with what is expected."""
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError("a path (write ./~name for a name that begins with ~)") from None


def in_a_folder(path: Path) -> Path:
    """The path itself. Raises ValueError with what is expected."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError("a file in a folder that exists")
    return path


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, positive]
Fraction = Annotated[float, Range(0, 1)]
OutputFile = Annotated[Path, in_a_folder]
Name = Annotated[str, not_empty]
Place = Annotated[str, not_empty, expand_home]


def check_fields(config: Any) -> None:
    """Check every field of a frozen dataclass and convert it to a plain int, float, bool, str or Path.

    Raises:
        ConfigError: a value has the wrong type or range; the message names the flag.
    """
    for name, hint in field_hints(config.__class__).items():
        object.__setattr__(config, name, checked(flag(name), getattr(config, name), hint))


def checked(label: str, value: Any, hint: Any) -> Any:
    """Convert a value to the plain Python type of its annotation.

    Args:
        label: what the message calls it, such as --lr.

    Raises:
        ConfigError: its type or its range is wrong.
    """
    if isinstance(value, str):
        value = str.__str__(value)  # a subclass may have methods of its own
    expected: list[str] = []
    choices: list[str] = []
    for option in options(hint):
        try:
            return _accept(option, value)
        except ValueError as error:
            expected.append(str(error))
            choices += names(option)
        except Exception:  # of the value's own methods
            expected.append("a plain value")
    close = nearest(value, choices) if isinstance(value, str) else ""
    raise ConfigError(f"{label} must be {' or '.join(filter(None, expected))}, got {shown(value)}{close}")


def from_text(text: str, hint: Any) -> Any:
    """Parse a number if the annotation allows one; else return the text for `checked` to judge."""
    for option in options(hint):
        kind = get_args(option)[0] if get_origin(option) is Annotated else option
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                return text
    return text


@functools.cache
def field_hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def options(hint: Any) -> tuple[Any, ...]:
    """What an annotation allows: the members of a union, else itself."""
    return (hint,) if get_origin(hint) in (None, Annotated, Literal) else get_args(hint)


def names(option: Any) -> tuple[str, ...]:
    """The names that an annotation allows; none where it isn't a choice."""
    if get_origin(option) is Literal:
        return get_args(option)
    rules = get_args(option)[1:] if get_origin(option) is Annotated else ()
    return next((rule.names for rule in rules if isinstance(rule, Choice)), ())


def _accept(option: Any, value: Any) -> Any:
    """The plain value. Raises ValueError with what is expected."""
    if get_origin(option) is Literal:
        if isinstance(value, str) and value in get_args(option):
            return str(value)
        raise ValueError(("one of " if len(get_args(option)) > 1 else "") + ", ".join(get_args(option)))
    if get_origin(option) is Annotated:
        kind, *rules = get_args(option)
        plain = ACCEPTS[kind](value)
        for rule in rules:
            plain = rule(plain)
        return plain
    return ACCEPTS[option](value)


def _integer(value: Any) -> int:
    # numpy's integers are registered; its arrays and torch's tensors have __index__, but not always a result.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError("a whole number")
    number = _converted(int, value, "a whole number")
    if not abs(number) < 2**63:
        raise ValueError("a whole number below 2**63")
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError("a number")
    number = _converted(float, value, "a finite number")
    if not abs(number) <= FLOAT32_MAX:
        raise ValueError("a finite number")
    return number


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _string(value: Any) -> str:
    text = _converted(os.fspath, value, "a string") if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ValueError("a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("UTF-8") from None
    if "\0" in text:
        raise ValueError("a string without NUL")
    return str(text)


def _path(value: Any) -> Path:
    text = not_empty(_string(value))
    # ~ means the home folder in typed text only; a Path is taken literally.
    return Path(expand_home(text) if isinstance(value, str) else text)


def _converted(convert: Callable[[Any], T], value: Any, expected: str) -> T:
    """Convert a value. Raises ValueError with what is expected, whatever the value's own method raises."""
    try:
        return convert(value)
    except Exception:
        raise ValueError(expected) from None


def _none(value: Any) -> None:
    if value is not None:
        raise ValueError("")


ACCEPTS: dict[Any, Callable[[Any], Any]] = {
    int: _integer,
    float: _number,
    bool: _boolean,
    str: _string,
    Path: _path,
    type(None): _none,
}
"""By type: the plain value, or ValueError with what is expected."""


def flag(name: str) -> str:
    """A field's flag."""
    return f"--{name.strip('_').replace('_', '-')}"


def shown(value: Any) -> str:
    """A value for a message: one short line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in a list in a list
        text = f"a very large {type(value).__name__}"
    except Exception:  # of the value's own method
        text = f"an object of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def nearest(name: Any, known: Iterable[str]) -> str:
    """Suggest the most similar known name; empty if none is similar."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
