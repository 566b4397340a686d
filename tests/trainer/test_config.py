"""What a setting may hold, from Python, a TOML file or a flag; and that config.toml brings all of it back."""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
import os
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch

from fastgpt2 import ConfigError, ModelConfig, TrainConfig
from fastgpt2.arguments import parse
from fastgpt2.config import PRESETS, preset_name
from fastgpt2.fields import (
    ACCEPTS,
    FLOAT32_MAX,
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    field_hints,
    flag,
    names,
    options,
)
from fastgpt2.settings import resolve
from fastgpt2.slots import SLOTS
from fastgpt2.toml import read_toml

# ---------------------------------------------------------------------------------------------------- types


class Raises:
    """A value each of whose own methods fails."""

    def fail(self, *_: Any) -> Any:
        raise KeyError("two\nlines")

    __index__ = __int__ = __float__ = __bool__ = __str__ = __repr__ = __eq__ = fail  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class RaisingInteger(int):
    __int__ = __index__ = Raises.fail


class RaisingFloat(float):
    __float__ = Raises.fail


class RaisingString(str):
    __eq__ = __hash__ = __str__ = __fspath__ = Raises.fail  # type: ignore[assignment]


class RaisingPath(os.PathLike[str]):
    __fspath__ = Raises.fail


WRONG: dict[Any, list[Any]] = {
    int: [2.5, 2.0, "4", True, 2**63, -(2**63), 10**5000, np.float64(2), [1], b"4", RaisingInteger(4), torch.tensor(4)],
    float: ["0.1", True, float("inf"), float("nan"), -float("inf"), 1e39, 10**400, 1j, RaisingFloat(1)],
    bool: ["yes", 1, 0, 1.0, np.int64(1)],
    str: [5, b"tiny", True, "", "a\0b", "caf\udce9", ["tiny"]],
    Path: [5, b"run", True, "", "a\0b", "caf\udce9", Path("caf\udce9"), "~nobody-of-this-name/run"],
    Literal: ["nosuch", 1, True, "", ["auto"], b"auto"],
}

TENSORS: list[Any] = [torch.tensor(4.0), torch.tensor(True), np.array(2.5), np.array(2), np.array([1, 2])]
ANYWHERE: list[Any] = [Raises(), RaisingPath(), *TENSORS]
"""Wrong for every field."""
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


def kinds(hint: Any) -> list[Any]:
    """The types that an annotation allows, bounds left out."""
    bare = [get_args(option)[0] if get_origin(option) is Annotated else option for option in options(hint)]
    return [Literal if get_origin(option) is Literal else option for option in bare]


FIELDS = [
    pytest.param(c, n, h, id=f"{c.__name__}-{n}") for c in (TrainConfig, ModelConfig) for n, h in field_hints(c).items()
]


@pytest.mark.parametrize(("config", "name", "hint"), FIELDS)
def test_a_wrong_value_is_one_short_line_that_names_the_field(config: Any, name: str, hint: Any) -> None:
    first = kinds(hint)[0]
    for value in [*WRONG[first], *ANYWHERE, DEEP, *([] if type(None) in kinds(hint) else [None])]:
        with pytest.raises(ConfigError) as error:
            config(**{name: value})
        message = str(error.value)
        assert message.startswith(f"{flag(name)} must be ")
        assert "\n" not in message and len(message) < 250


def test_every_field_has_a_type_that_is_checked() -> None:
    for config in (TrainConfig, ModelConfig):
        for name, hint in field_hints(config).items():
            assert set(kinds(hint)) <= {*ACCEPTS, Literal}, name


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("steps", np.int32(7), 7),
        ("seed", np.uint64(2**63 - 1), 2**63 - 1),
        ("lr", np.float64(0.25), 0.25),
        ("lr", np.float32(0.25), 0.25),
        ("lr", 1, 1.0),
        ("lr", fractions.Fraction(1, 4), 0.25),
        ("grad_clip", FLOAT32_MAX, FLOAT32_MAX),
        ("attn", np.str_("sdpa"), "sdpa"),
        ("attn", RaisingString("sdpa"), "sdpa"),
        ("data", RaisingString("shards"), "shards"),
        ("out", RaisingString("run"), Path("run")),
        ("out", "runs/x", Path("runs/x")),
        ("data", Path("shards"), "shards"),
        ("data", "./~shards", "./~shards"),
    ],
)
def test_what_is_meant_is_accepted_and_made_plain(name: str, given: Any, kept: Any) -> None:
    value = getattr(TrainConfig(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize("name", ["out", "data"])
def test_a_tilde_is_the_home_folder(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text(f'{name} = "~/there"\n')
    for config in (
        TrainConfig(**{name: "~/there"}),
        parse([f"{flag(name)}=~/there"]),
        parse(["--config", "~/c.toml"]),
    ):
        assert str(getattr(config, name)) == str(tmp_path / "there")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 100, "steps": 50}, "--warmup-steps 100 must be below --steps 50"),
        ({"warmup_steps": 50, "steps": 50}, "--warmup-steps 50 must be below --steps 50"),
        ({"lr": float("inf")}, "--lr must be a finite number, got inf"),
        ({"seed": 2**64}, r"--seed must be a whole number below 2\*\*63, got 18446744073709551616"),
        ({"resume": "run", "out": "x"}, "--resume must be true or false or auto, got 'run'"),
        ({"resume": "auto"}, "--resume auto needs --out"),
        ({"stream": "bfloat16"}, "--stream bfloat16 needs --dtype bfloat16, got float32"),
        ({"stream": "bfloat16", "dtype": "float16"}, "--stream bfloat16 needs --dtype bfloat16, got float16"),
        (
            {"stream": "bfloat16-gradient"},
            "--stream bfloat16-gradient needs --norm triton, which needs a CUDA GPU; got --norm auto",
        ),
        ({"model": "tinny"}, "--model must be one of .*, got 'tinny'; did you mean 'tiny'"),
    ],
)
def test_what_can_mean_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig(**changes), cuda=False)


def test_a_default_number_of_steps_bounds_the_warm_up_too() -> None:
    config = TrainConfig(warmup_steps=300)
    assert resolve(config, cuda=False).warmup_steps == 300
    with pytest.raises(ConfigError, match="--warmup-steps 300 must be below --steps 200"):
        resolve(config, cuda=True)


# ---------------------------------------------------------------------------------------------- config.toml

STRINGS = [
    "." * 5000,
    "\"a\".'b'." * 1000,
    "a",
    "with space",
    'quo"te',
    "back\\slash",
    "new\nline",
    "\r\n",
    "tab\t",
    "\x7f\x1b\x01",
    "é 漢字 \U0001f600",
    "#",
    "'",
    "[a]",
]
SIZES: list[Any] = [1, 3, 2**63 - 1]
FRACTIONS: list[Any] = [0.0, 0.1, 0.999999999, 1e-320]
RATES: list[Any] = [0, 0.0, 3e-4, 1e-5, 1e16, 1e22, 5e-324, 1, FLOAT32_MAX]
VALUES: dict[str, list[Any]] = {
    "model": [None, *PRESETS],
    "n_layer": [None, *SIZES],
    "n_head": [None, 1, 2, 2**40],
    "n_embd": [None, 64, 2**41],
    "block_size": [None, 1, 128, 2048, 2**62],
    "vocab_size": [None, 1, 50257, 2**62],
    "end_of_text": [None, 0, 50256],
    "data": ["dummy", "dummy-fixed", "./~x", *STRINGS],
    "device": [None, "cpu", "cuda:1"],
    "out": [None, "run", "/abs/run", "./~run", "../" * 1300 + "run", *STRINGS],
}
BY_KIND: dict[Any, list[Any]] = {
    Count: SIZES,
    Natural: [0, *SIZES],
    Fraction: FRACTIONS,
    NonNegative: RATES,
    Positive: [rate for rate in RATES if rate],
}


def values_of(name: str, hint: Any) -> list[Any]:
    """Values to draw from: those of the tables, or all that the annotation spells out."""
    spelled: list[Any] = [choice for option in options(hint) for choice in names(option)]
    spelled += [True, False] if bool in options(hint) else []
    spelled += [None] if type(None) in options(hint) else []
    spelled += ["mine.attention:f", "mine:<lambda>"] if name in SLOTS else []
    return VALUES.get(name) or [*BY_KIND.get(options(hint)[0], []), *spelled]


HINTS = field_hints(TrainConfig)
NEEDS: dict[str, dict[str, Any]] = {
    "weight_decay": {"optimizer": "adamw"},
    "recompute": {"compile": True},
    "resume": {"out": "run"},
    "stream": {"dtype": "bfloat16", "norm": "triton"},
    "n_embd": {"n_head": 1},
}
"""Settings that are accepted only with others."""


def configurations(draws: int) -> Iterator[TrainConfig]:
    """Each value of each field, then random ones of a third of the fields; those that are accepted."""
    for name, hint in HINTS.items():
        yield from (TrainConfig(**NEEDS.get(name, {}) | {name: value}) for value in values_of(name, hint))
    draw = random.Random(0)
    for _ in range(draws):
        with contextlib.suppress(ConfigError):
            chosen = {name: hint for name, hint in HINTS.items() if draw.random() < 1 / 3}
            yield TrainConfig(**{name: draw.choice(values_of(name, hint)) for name, hint in chosen.items()})


def test_every_accepted_configuration_comes_back_from_config_toml(tmp_path: Path) -> None:
    file, computed = tmp_path / "config.toml", 0
    for number, config in enumerate(configurations(draws=400)):
        file.write_text(config.to_toml(), encoding="utf-8")
        back = TrainConfig(**read_toml(file))
        assert back == dataclasses.replace(config, resume=False)
        assert number % 20 or back == parse(["--config", str(file)])
        try:
            settled = resolve(back, cuda=False)
        except ConfigError:
            continue
        # Settled here, the run computes the same on a machine with other defaults.
        file.write_text(settled.to_toml(), encoding="utf-8")
        assert resolve(TrainConfig(**read_toml(file)), cuda=True, memory_bytes=80 << 30) == settled
        computed += 1
    assert computed > 100


def test_every_character_comes_back() -> None:
    points = [*range(1, 0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 257), 0x10FFFF]
    text = "".join(map(chr, points))
    back = tomllib.loads(TrainConfig(data=text, out=Path(text)).to_toml())
    assert back["data"] == text
    assert back["out"] == str(Path(text))


def test_config_toml_says_what_was_asked_and_what_defines_the_computation() -> None:
    settled = resolve(TrainConfig(), cuda=True, memory_bytes=80 << 30)
    keys = tomllib.loads(settled.to_toml())
    assert not {"model", "device", "out", "resume", "grad_accum"} & set(keys)
    shape = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size"}
    assert shape | {"batch_size", "global_batch", "steps", "dtype"} <= set(keys)
    asked = tomllib.loads(resolve(TrainConfig(model="tiny", device="cpu", out="r"), cuda=False).to_toml())
    assert asked.items() >= {"model": "tiny", "device": "cpu", "out": "r"}.items()


@pytest.mark.parametrize("cuda", [True, False])
def test_more_positions_than_the_default_preset_come_back(cuda: bool, tmp_path: Path) -> None:
    settled = resolve(TrainConfig(block_size=2048), cuda=cuda)
    (tmp_path / "c.toml").write_text(settled.to_toml())
    for anywhere in (True, False):
        assert resolve(parse(["--config", str(tmp_path / "c.toml")]), cuda=anywhere) == settled


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *((preset, name) for name, preset in PRESETS.items()),
        (dataclasses.replace(PRESETS["gpt2"], block_size=256, vocab_size=257, dropout=0.1), "gpt2"),
        (dataclasses.replace(PRESETS["gpt2"], block_size=2048), "custom"),
        (dataclasses.replace(PRESETS["gpt2"], n_head=6), "custom"),
    ],
)
def test_a_shape_is_called_by_its_preset(shape: ModelConfig, name: str) -> None:
    assert preset_name(shape) == name
