"""Old names: flags, files and checkpoints of the version before say the same as the new ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import TrainConfig, checkpoint, train
from fastgpt2.arguments import parse
from fastgpt2.flags import make_parser
from fastgpt2.folder import as_saved
from fastgpt2.renamed import RENAMED


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--lean --compile", "--recompute elementwise --compile"),
        ("--no-lean --compile", "--recompute none --compile"),
        ("--recompute", "--recompute blocks"),
        ("--recompute --steps 3", "--recompute blocks --steps 3"),
        ("--steps 3 --no-recompute", "--steps 3 --recompute none"),
        ("--keep 5", "--keep-checkpoints 5"),
        ("--keep=0", "--keep-checkpoints=0"),
        # Whatever the order, as both were on.
        ("--recompute --lean --compile", "--recompute blocks --compile"),
        ("--lean --recompute --compile", "--recompute blocks --compile"),
        ("--lean --no-recompute --compile", "--recompute elementwise --compile"),
    ],
)
def test_an_old_flag_is_the_new_one_and_says_so(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(old.split()) == parse(new.split())
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: --") and "the next version drops the old flags" in note


def test_a_command_without_flags_has_the_defaults() -> None:
    assert parse([]) == TrainConfig()


def test_several_old_flags_are_one_note(capsys: pytest.CaptureFixture[str]) -> None:
    parse(["--keep", "3", "--lean", "--compile"])
    assert capsys.readouterr().err.startswith("note: --keep is now --keep-checkpoints, --lean is now --recompute e")


@pytest.mark.parametrize("current", ["--recompute none", "--recompute=blocks", "--keep-checkpoints 3", "--compile"])
def test_a_current_flag_needs_no_note(current: str, capsys: pytest.CaptureFixture[str]) -> None:
    parse(current.split())
    assert capsys.readouterr().err == ""


def test_help_shows_no_old_flag() -> None:
    shown = make_parser(TrainConfig, "fastgpt2.train").format_help()
    assert "--lean" not in shown and "--keep " not in shown


OLD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"lean": False, "recompute": False, "keep": 2}, {"keep_checkpoints": 2}),
    ({"lean": True, "recompute": False, "compile": True}, {"recompute": "elementwise", "compile": True}),
    ({"lean": False, "recompute": True}, {"recompute": "blocks"}),
    ({"lean": True, "recompute": True, "compile": True}, {"recompute": "blocks", "compile": True}),
    ({"recompute": "none"}, {"recompute": "none"}),
    (
        {"recompute": "none", "lean": True, "keep": 1, "keep_checkpoints": 5},
        {"recompute": "none", "keep_checkpoints": 5},
    ),
]


@pytest.mark.parametrize(("old", "new"), OLD)
def test_a_file_with_old_names_is_read(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    Path("c.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in old.items()))
    assert parse(["--config", "c.toml"]) == TrainConfig(**new)


def test_a_run_with_old_names_is_resumed(folder: Path) -> None:
    config = TrainConfig(model="tiny", steps=1, batch_size=1, device="cpu", dtype="float32", out=folder / "run")
    train(config)
    (saved,) = checkpoint.checkpoints(folder / "run")
    state_file = saved / "state.json"
    state = json.loads(state_file.read_text())
    old = {"lean": False, "recompute": True, "keep": 5}
    state["config"] = {n: v for n, v in state["config"].items() if n not in ("recompute", "keep_checkpoints")} | old
    state_file.write_text(json.dumps(state | {"format": 1}))  # without checksums
    (saved / "SHA256SUMS").unlink()
    (folder / "run/config.toml").unlink()
    resumed = parse(["--resume", "--out", "run", "--steps", "2"])
    assert (resumed.recompute, resumed.keep_checkpoints) == ("blocks", 5)
    again = train(dataclasses.replace(resumed, device="cpu"))
    assert again.config.recompute == "blocks" and again.steps_done == 2


def test_every_old_name_leads_to_a_setting() -> None:
    current = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {renamed.name for renamed in RENAMED.values()} <= current


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "auto"]])
def test_a_compiled_run_is_resumed_without_the_compiler(resume: list[str], folder: Path) -> None:
    """What it settled for the compiler is not what anybody asked for."""
    Path("run").mkdir()
    Path("run/config.toml").write_text('compile = true\nrecompute = "elementwise"\n')
    again = parse(["--out", "run", *resume, "--no-compile"])
    assert (again.compile, again.recompute) == (False, None)
    assert as_saved(dataclasses.replace(again, compile=True)).recompute == "elementwise"
    assert as_saved(again).recompute is None
