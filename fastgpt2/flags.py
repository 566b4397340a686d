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
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

from fastgpt2.fields import ConfigError, FunctionChoice, checked, field_hints, flag, from_text, names, nearest, options
from fastgpt2.program import program, world_size

T = TypeVar("T")

MANY, LONGEST_CHOICE = "NAME", 65
"""What --help shows for a choice of more characters than this; the help text then lists the names."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviations; `_` and `-` are the same in a flag. Of a flag given twice the
    last wins; lists add up."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, add_help=False, **settings)
        self.add_argument("-h", "--help", action="help", help="Show this help.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does; the error for an unknown flag suggests the nearest one."""
        arguments = [_with_hyphens(argument) for argument in (sys.argv[1:] if args is None else args)]
        # Before argparse, which names a missing flag first: it may be there, but misspelt.
        for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
            if argument.startswith("--"):
                self._check_known(argument)
        given, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self._check_known(unknown[0])
            self.error(f"unexpected argument {unknown[0]!r}")
        return given

    def _check_known(self, argument: str) -> None:
        name = argument.partition("=")[0]
        if re.match("--?[A-Za-z]", name) and name not in self._option_string_actions:
            known = re.findall(r"--[a-z][a-z0-9-]*", self.format_help())
            self.error(f"unknown flag {name!r}{nearest(name, known)}")

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        for theirs, ours in _IN_OUR_WORDS.items():
            message = re.sub(theirs, ours, message)
        self.exit(2, f"error: {message} ({self.prog} --help shows every flag)\n")


_IN_OUR_WORDS = {
    r"^the following arguments are required: ": "missing ",
    r"^argument (--[\w-]+).*: expected one argument$": r"\1 needs a value; one that begins with - is given as \1=-...",
    r"^argument (--[\w-]+).*: expected at least one argument$": r"\1 needs at least one value",
    r"^argument (--[\w-]+).*: ignored explicit argument ": r"\1 takes no value, got ",
}
"""argparse's messages and what replaces them."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows a flag that takes several values as --flag VALUE ..."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == argparse.ONE_OR_MORE:
            return f"{action.metavar or default_metavar} ..."
        return super()._format_args(action, default_metavar)


def read_arguments(kind: type[T], module: str, arguments: Sequence[str] | None = None) -> T:
    """Make a dataclass from the command line of a command that runs in one process.

    Args:
        module: the command's module, whose docstring --help shows.

    Raises:
        ConfigError: a value has the wrong type or range, or torchrun has started several processes.
    """
    given = given_flags(make_parser(kind, module), kind, arguments)
    if world_size() > 1:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but {program(module)} runs in one process: start it without torchrun"
        )
    return _make(kind, given)


def make_parser(kind: type, module: str) -> Parser:
    """A parser with a flag for each field of a dataclass, nested dataclasses included.

    A field whose metadata has "group" starts a group of --help. A field with no string below it is hidden from --help.
    """
    about, examples = documentation(module)
    width = shutil.get_terminal_size().columns - 2
    words = "".join(f" {_words(field, hint)}" for field, hint, _ in _fields(kind) if _is_positional(field, hint))
    parser = Parser(
        prog=program(module),
        usage=f"%(prog)s{words} [flags]",
        description=textwrap.fill(about, width),
        epilog=examples.replace(f"python -m {module}", program(module)),
        argument_default=argparse.SUPPRESS,
    )
    flags: argparse._ActionsContainer = parser
    for field, hint, text in _fields(kind):
        if "group" in field.metadata:
            flags = parser.add_argument_group(field.metadata["group"])
        _add(flags, field, hint, text)
    return parser


def documentation(module: str) -> tuple[str, str]:
    """What a command does and its examples: the first line of its module's docstring, and the commands indented in it.

    The module is not imported.
    """
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    first, *paragraphs = text.split("\n\n")
    about = first.partition("\n")[0].rpartition("`: ")[2]
    examples = [paragraph for paragraph in paragraphs if re.match(r" +(# |python -m )", paragraph)]
    return about[:1].upper() + about[1:], "\n".join(["examples:", *examples] if examples else [])


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
    about = _about(field, hint, text).replace("%", "%%") if text else argparse.SUPPRESS
    name: dict[str, Any] = {"dest": field.name, "help": about}
    if _is_positional(field, hint):
        several: dict[str, Any] = {"nargs": "+"} if get_origin(hint) is tuple else {}
        parser.add_argument(field.name, metavar=_word(field), help=about, **several)
    elif get_origin(hint) is tuple:
        parser.add_argument(flag(field.name), action="extend", nargs="+", metavar=_metavar(hint), **name)
    elif hint is bool and field.default:
        parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **name)
    elif hint is bool:
        parser.add_argument(flag(field.name), action="store_true", **name)
        _add_off(parser, field)
    elif bool in options(hint):  # a switch that may take a word
        word = "|".join(word for option in options(hint) for word in get_args(option))
        parser.add_argument(flag(field.name), nargs="?", const=True, metavar=word, **name)
        _add_off(parser, field)
    else:
        parser.add_argument(flag(field.name), required=required, metavar=_metavar(hint), **name)


def _add_off(parser: argparse._ActionsContainer, field: dataclasses.Field[Any]) -> None:
    """Add the flag that turns a switch off. --help leaves it out: only a switch that a file turned on needs it."""
    parser.add_argument(flag(f"no_{field.name}"), dest=field.name, action="store_false", help=argparse.SUPPRESS)


def _about(field: dataclasses.Field[Any], hint: Any, text: str) -> str:
    """A flag's help, with its default unless the text itself tells it or there is none, and with many choices."""
    default = field.default
    if default not in (dataclasses.MISSING, "", (), None) and default is not False and "(default" not in text:
        words = default if isinstance(default, tuple) else (f"{default:g}" if isinstance(default, float) else default,)
        text = f"{text.removesuffix('.')} (default: {' '.join(map(str, words))})."
    choices = names(options(_item(hint))[0])
    return text if _metavar(hint) != MANY else f"{text} One of {', '.join(choices)}."


def _is_positional(field: dataclasses.Field[Any], hint: Any) -> bool:
    several = get_origin(hint) is tuple and field.default is dataclasses.MISSING
    return several or field.metadata.get("positional", False)


def _words(field: dataclasses.Field[Any], hint: Any) -> str:
    return f"{_word(field)} ..." if get_origin(hint) is tuple else _word(field)


def _word(field: dataclasses.Field[Any]) -> str:
    return field.name.removesuffix("s").upper()


def _metavar(hint: Any) -> str:
    """{a,b} for a choice, else the type; of a list's item."""
    option = options(_item(hint))[0]
    if choices := names(option):
        outside = any(isinstance(rule, FunctionChoice) for rule in get_args(option))
        shown = "{" + ",".join(choices) + (",module:function}" if outside else "}")
        return shown if len(shown) <= LONGEST_CHOICE else MANY
    kind = get_args(option)[0] if get_origin(option) is Annotated else option
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _item(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is tuple else hint


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
