"""Settings of earlier versions and what they became: read for old flags, config.toml, starts.jsonl and state.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt2.fields import flag


@dataclass(frozen=True)
class Renamed:
    """What a setting became."""

    name: str
    """The setting now."""
    on: str | None = None
    """For a switch: what True means now. False was the default: a file that has it asks for nothing."""
    same_value: bool = True
    """False if the old value means something else now: a file with it is refused."""


RENAMED = {
    "lean": Renamed("recompute", on="elementwise"),
    "recompute": Renamed("recompute", on="blocks"),
    "keep": Renamed("keep_checkpoints"),
    "eval_batches": Renamed("eval_sequences", same_value=False),
}
"""By the earlier name. Of two switches that are on the later one here wins: a run with both recomputed its blocks."""
OFF = "none"
"""What the --no- form of such a switch means now."""


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file by their current names, which win over earlier ones. What can't be converted stays."""
    current = {name: value for name, value in settings.items() if not _converts(name, value)}
    given = frozenset(current)
    for old, renamed in RENAMED.items():
        if old in settings and _converts(old, settings[old]):
            if renamed.on is None:
                current.setdefault(renamed.name, settings[old])
            elif settings[old] and renamed.name not in given:
                current[renamed.name] = renamed.on
    return current


def _converts(name: str, value: Any) -> bool:
    renamed = RENAMED.get(name)
    return renamed is not None and renamed.same_value and (renamed.on is None or isinstance(value, bool))


def with_current_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line arguments with old flags replaced, and a note on each replacement."""
    current: list[str] = []
    notes: list[str] = []
    switches: dict[str, bool] = {}
    first_switch = 0
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        old, equals, value = argument.partition("=")
        new = _OLD_FLAGS.get(old.replace("_", "-"), [])
        is_switch = len(new) > 1
        has_value = bool(equals) or not following.startswith("-")
        if not new or (is_switch and has_value):  # such as --recompute blocks
            current.append(argument)
            continue
        notes.append(f"{old} is now {' '.join(new)}")
        if is_switch:
            first_switch = first_switch if switches else len(current)
            switches[old.replace("_", "-").replace("--no-", "--")] = new[1] != OFF
        else:
            current.append(new[0] + equals + value)
    current[first_switch:first_switch] = _set_by(switches)
    return current, notes


def _set_by(switches: Mapping[str, bool]) -> list[str]:
    """The arguments that stand for old switches, in whatever order they were given."""
    found: dict[str, str] = {}
    for old, renamed in RENAMED.items():
        if (on := switches.get(flag(old))) is not None:
            found.setdefault(flag(renamed.name), OFF)
            if on and renamed.on:
                found[flag(renamed.name)] = renamed.on
    return [argument for pair in found.items() for argument in pair]


def _old_flags() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for old, renamed in RENAMED.items():
        new = flag(renamed.name)
        if renamed.on is not None:
            found |= {flag(old): [new, renamed.on], flag(f"no_{old}"): [new, OFF]}
        elif renamed.same_value:
            found[flag(old)] = [new]
    return found


_OLD_FLAGS = _old_flags()
"""By old flag, the arguments that replace it. --recompute is one of them where no word follows."""
