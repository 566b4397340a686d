"""Dataclasses as command-line flags: a field is a flag, the string below it the help.

A mistake prints one line that names the flag and exits with status 2. `given_flags` returns only the flags that were
given, to override a file or another run's settings.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from fastgpt2.fields import checked, field_hints, flag, from_text, names, nearest, options

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviations; `_` and `-` are the same in a flag."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does; the error for an unknown flag suggests the nearest one."""
        arguments = [_with_hyphens(argument) for argument in (sys.argv[1:] if args is None else args)]
        given, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("--"):
                self.error(f"unexpected argument {name!r}")
            known = re.findall(r"--[a-z][a-z0-9-]*", self.format_help())
            self.error(f"unknown flag {name!r}{nearest(name, known)}")
        return given

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"error: {message} ({self.prog} --help shows every flag)\n")


def read_arguments(kind: type[T], prog: str, arguments: Sequence[str] | None = None) -> T:
    """Make a dataclass from a command line.

    Raises:
        ConfigError: a value has the wrong type or range.
    """
    return _make(kind, given_flags(make_parser(kind, prog), kind, arguments))


def make_parser(kind: type, prog: str) -> Parser:
    """A parser with a flag for each field of a dataclass, nested dataclasses included.

    A field whose metadata has "group" starts a group of --help.
    """
    words = "".join(f" {_word(field)} ..." for field, hint, _ in _fields(kind) if _is_positional(field, hint))
    parser = Parser(
        prog=prog,
        usage=f"%(prog)s{words} [flags]",
        description=inspect.getdoc(kind),
        argument_default=argparse.SUPPRESS,
    )
    flags: argparse._ActionsContainer = parser
    for field, hint, text in _fields(kind):
        if "group" in field.metadata:
            flags = parser.add_argument_group(field.metadata["group"])
        _add(flags, field, hint, text)
    return parser


def given_flags(parser: Parser, kind: type, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The flags given on the command line, by field name; only those that are fields of `kind` are checked.

    Raises:
        ConfigError: a value has the wrong type or range.
    """
    given = vars(parser.parse_args(arguments))
    for field, hint, _ in _fields(kind):
        if field.name in given:
            label = _word(field) if _is_positional(field, hint) else flag(field.name)
            given[field.name] = _value(label, given[field.name], hint)
    return given


def _value(label: str, given: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_value(label, item, get_args(hint)[0]) for item in given)
    return checked(label, from_text(given, hint) if isinstance(given, str) else given, hint)


def _fields(kind: Any) -> Iterator[tuple[dataclasses.Field[Any], Any, str]]:
    """Field, annotation and help of each field, nested dataclasses included."""
    docs = _docstrings(kind)
    for field in dataclasses.fields(kind):
        hint = field_hints(kind)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint)
        else:
            yield field, hint, docs.get(field.name, "")


def _make(kind: Any, given: dict[str, Any]) -> Any:
    values = {}
    for name, hint in field_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            values[name] = _make(hint, given)
        elif name in given:
            values[name] = given[name]
    return kind(**values)


def _add(parser: argparse._ActionsContainer, field: dataclasses.Field[Any], hint: Any, text: str) -> None:
    required = field.default is dataclasses.MISSING
    silent = required or field.default in ("", (), None) or field.default is False
    about = (text if silent else f"{text} (default: {field.default})").replace("%", "%%")
    name: dict[str, Any] = {"dest": field.name, "help": about}
    if _is_positional(field, hint):
        parser.add_argument(field.name, nargs="+", metavar=_word(field), help=about)
    elif get_origin(hint) is tuple:
        parser.add_argument(flag(field.name), nargs="+", metavar=_metavar(get_args(hint)[0]), **name)
    elif hint is bool:
        parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **name)
    elif bool in options(hint):  # a switch that may take a word
        word = "|".join(word for option in options(hint) for word in get_args(option))
        parser.add_argument(flag(field.name), nargs="?", const=True, metavar=word, **name)
        off = flag(f"no_{field.name}")
        parser.add_argument(off, dest=field.name, action="store_false", help=argparse.SUPPRESS)
    else:
        parser.add_argument(flag(field.name), required=required, metavar=_metavar(hint), **name)


def _is_positional(field: dataclasses.Field[Any], hint: Any) -> bool:
    return get_origin(hint) is tuple and field.default is dataclasses.MISSING


def _word(field: dataclasses.Field[Any]) -> str:
    return field.name.removesuffix("s").upper()


def _metavar(hint: Any) -> str:
    """{a,b} for a choice, else the type."""
    option = options(hint)[0]
    if choices := names(option):
        return "{" + ",".join(choices) + ("}" if get_origin(option) is Literal else ",module:function}")
    kind = get_args(option)[0] if get_origin(option) is Annotated else option
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


@functools.cache
def _docstrings(kind: type) -> dict[str, str]:
    """The string below each field in a dataclass's source, on one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def _with_hyphens(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument
