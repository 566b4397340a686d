"""The global batch: what settles it, what is refused with what would work, and what a resumed run keeps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import ConfigError, TrainConfig, checkpoint, train
from fastgpt2.arguments import parse
from fastgpt2.batch import resumed, settle_batch, with_global_batch
from fastgpt2.folder import as_saved
from fastgpt2.settings import resolve
from tests.trainer.runs import SMALL, Watch, edit_state, tiny

pytest.importorskip("safetensors", reason="checkpoints need safetensors")


@pytest.mark.parametrize(
    ("asked", "world", "settled"),
    [
        # batch_size, grad_accum, global_batch
        ((None, None, None), 1, (8, 1, 8)),
        ((None, None, None), 4, (8, 1, 32)),
        ((3, None, None), 2, (3, 1, 6)),
        ((None, 5, None), 2, (8, 5, 80)),
        ((3, 5, None), 2, (3, 5, 30)),
        ((None, None, 480), 1, (8, 60, 480)),
        ((None, None, 480), 4, (8, 15, 480)),
        ((None, None, 12), 1, (6, 2, 12)),
        ((None, None, 7), 1, (7, 1, 7)),
        ((None, None, 26), 2, (1, 13, 26)),
        ((None, None, 3), 3, (1, 1, 3)),
        ((4, None, 48), 3, (4, 4, 48)),
        ((64, None, 64), 1, (64, 1, 64)),
        ((None, 3, 48), 2, (8, 3, 48)),
        ((None, 1, 48), 1, (48, 1, 48)),
        ((4, 6, 48), 2, (4, 6, 48)),
    ],
)
def test_what_settles_the_global_batch(asked: tuple[Any, ...], world: int, settled: tuple[int, ...]) -> None:
    assert settle_batch(*asked, world=world, default=8) == settled
    names = ("batch_size", "grad_accum", "global_batch")
    config = resolve(TrainConfig(**dict(zip(names, asked, strict=True))), cuda=False, world=world)
    assert tuple(getattr(config, name) for name in names) == settled


@pytest.mark.parametrize(
    ("asked", "world", "message"),
    [
        (
            (None, None, 12),
            5,
            "--global-batch 12 is not a multiple of the 5 processes: start 4 or 6, or give --global-batch 10 or 15",
        ),
        (
            (2, 3, 3),
            4,
            "--global-batch 3 is not a multiple of the 4 processes: start 3, or give --global-batch 4",
        ),
        (
            (5, None, 12),
            1,
            "--global-batch 12 is not a multiple of --batch-size 5: give --batch-size 4 or 6, or --global-batch 10 or "
            "15",
        ),
        (
            (4, None, 12),
            2,
            "--global-batch 12 is not a multiple of --batch-size 4 x 2 processes: give --batch-size 3 or 6, or "
            "--global-batch 8 or 16",
        ),
        (
            (16, None, 12),
            2,
            "--global-batch 12 is not a multiple of --batch-size 16 x 2 processes: give --batch-size 6, or "
            "--global-batch 32",
        ),
        (
            (3, None, 2**63 - 1),
            1,
            "--global-batch 9223372036854775807 is not a multiple of --batch-size 3: give --batch-size 1 or 7, or "
            "--global-batch 9223372036854775806 or 9223372036854775809",
        ),
        (
            (2**40, None, 2**63 - 1),
            1,
            "--global-batch 9223372036854775807 is not a multiple of --batch-size 1099511627776: give "
            "--global-batch 9223370937343148032 or 9223372036854775808",
        ),
        (
            (None, 5, 12),
            1,
            "--global-batch 12 is not a multiple of --grad-accum 5: give --grad-accum 4 or 6, or --global-batch 10 or "
            "15",
        ),
        (
            (2, 2, 12),
            2,
            "--batch-size 2 x --grad-accum 2 x 2 processes is 8, not --global-batch 12: give --grad-accum 3, or leave "
            "one of the three out",
        ),
        (
            (2, 2, 12),
            1,
            "--batch-size 2 x --grad-accum 2 is 4, not --global-batch 12: give --grad-accum 6, or leave one of the "
            "three out",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(asked: tuple[Any, ...], world: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        settle_batch(*asked, world=world, default=8)
    assert str(error.value) == message


def test_every_value_that_a_refusal_names_works() -> None:
    for total in range(1, 25):
        for by in range(1, 25):
            for world in (1, 2, 3):
                if total % world or (total // world) % by == 0:
                    continue
                with pytest.raises(ConfigError) as error:
                    settle_batch(by, None, total, world=world, default=8)
                sizes, _, totals = (
                    str(error.value).partition(": give --batch-size ")[2].partition(", or --global-batch ")
                )
                assert sizes and totals
                for size in map(int, sizes.split(" or ")):
                    settle_batch(size, None, total, world=world, default=8)
                for other in map(int, totals.split(" or ")):
                    settle_batch(by, None, other, world=world, default=8)


# ------------------------------------------------------------------------------------------------------ resuming

SAVED = {"batch_size": 4, "grad_accum": 3, "global_batch": 24, "lr": 0.1}


@pytest.mark.parametrize(
    ("asked", "world", "kept"),
    [
        ({}, 2, {"batch_size": 4, "global_batch": 24}),
        ({}, 1, {"batch_size": 4, "global_batch": 24}),
        ({}, 8, {"batch_size": 3, "global_batch": 24}),
        ({}, 24, {"batch_size": 1, "global_batch": 24}),
        ({}, 5, {"batch_size": 4, "global_batch": 24}),  # refused later, with what would work
        ({"batch_size": 2}, 8, {"batch_size": 4, "global_batch": 24}),
        ({"grad_accum": 2}, 2, {"batch_size": 4}),
        ({"grad_accum": 2, "batch_size": 1}, 2, {"batch_size": 4}),
        ({"global_batch": 20}, 2, {"batch_size": 2, "global_batch": 24}),
        ({"global_batch": 36, "grad_accum": 2}, 2, {"global_batch": 24}),
    ],
)
def test_what_a_resumed_run_keeps(asked: dict[str, int], world: int, kept: dict[str, int]) -> None:
    assert resumed(SAVED, asked, world) == kept | {"lr": 0.1}


def test_a_run_of_an_older_version_had_one_process() -> None:
    assert with_global_batch({"batch_size": 4, "grad_accum": 3})["global_batch"] == 12
    assert with_global_batch(SAVED) == SAVED
    assert with_global_batch({"batch_size": 4}) == {"batch_size": 4}


CONFIG = dataclasses.replace(SMALL, batch_size=2, grad_accum=2, steps=2)
FLAGS = ["--device", "cpu", "--steps", "3"]


def as_older(out: Path) -> None:
    """Rewrite a run's settings as versions without a global batch saved them."""
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace("global_batch = 4\n", "grad_accum = 2\n"))
    lines = [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
    for line in lines:
        del line["config"]["global_batch"]
    (out / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for saved in checkpoint.checkpoints(out):
        edit_state(saved, lambda state: state["config"].pop("global_batch"))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("lost", [(), ("config.toml",), ("config.toml", "checkpoints")], ids=str)
@pytest.mark.parametrize(
    ("asked", "world", "expected"),
    [
        ({}, 1, (2, 2, 4)),
        ({}, 4, (1, 1, 4)),
        ({"batch_size": 4}, 1, (4, 1, 4)),
        ({"batch_size": 1}, 2, (1, 2, 4)),
        ({"grad_accum": 3}, 1, (2, 3, 6)),
        ({"grad_accum": 2}, 2, (2, 2, 8)),
        ({"global_batch": 10}, 2, (1, 5, 10)),
    ],
)
def test_the_global_batch_of_a_resumed_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    older: bool,
    lost: tuple[str, ...],
    asked: dict[str, int],
    world: int,
    expected: tuple[int, ...],
) -> None:
    """By the command and in Python, whatever its settings are read from."""
    out = tmp_path / "run"
    train(dataclasses.replace(CONFIG, out=out))
    if older:
        as_older(out)
    for name in lost:
        (out / name).rename(tmp_path / name)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    words = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    by_command = as_saved(parse(["--resume", "--out", str(out), *FLAGS, *words]))
    in_python = as_saved(TrainConfig(out=out, resume=True, **asked))
    for config in (by_command, in_python):
        settled = resolve(config, cuda=False, world=world)
        assert (settled.batch_size, settled.grad_accum, settled.global_batch) == expected


def test_a_refused_world_is_told_with_what_would_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train(dataclasses.replace(CONFIG, out=out))
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = as_saved(parse(["--resume", "--out", str(out), *FLAGS]))
    with pytest.raises(ConfigError, match="--global-batch 4 is not a multiple of the 3 processes: start 2 or 4, or"):
        resolve(config, cuda=False, world=3)


def test_only_another_global_batch_is_told(tmp_path: Path) -> None:
    """As a change since the checkpoint: how a step is divided changes no step."""

    def told(**changes: int) -> list[str]:
        watch = Watch()
        train(dataclasses.replace(CONFIG, out=tmp_path, resume=True, steps=2, **changes), reporters=[watch])
        return [text for text in watch.notes if "changed since" in text]

    train(dataclasses.replace(CONFIG, out=tmp_path))
    assert told(batch_size=4, grad_accum=None) == []
    assert told(batch_size=4, grad_accum=1) == []
    assert told(grad_accum=3) == ["changed since the checkpoint: --global-batch 6 (was 4)"]
    assert told(grad_accum=None, global_batch=2) == ["changed since the checkpoint: --global-batch 2 (was 4)"]


def test_flags_replace_what_a_file_asks_for(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("batch_size = 2\nglobal_batch = 8\n")
    asked = parse(["--config", str(file), "--grad-accum", "3"])
    assert (asked.batch_size, asked.grad_accum, asked.global_batch) == (2, 3, None)
    file.write_text("batch_size = 2\ngrad_accum = 3\n")
    asked = parse(["--config", str(file), "--global-batch", "8"])
    assert (asked.batch_size, asked.grad_accum, asked.global_batch) == (2, None, 8)


def test_a_shard_size_goes_with_the_mode_that_has_it(tmp_path: Path) -> None:
    """A run in hsdp is resumed in another mode: its config.toml has a --shard-size."""
    (tmp_path / "config.toml").write_text(tiny(parallel="hsdp", shard_size=2).to_toml())
    resumed = ["--resume", "--out", str(tmp_path)]
    assert parse(resumed).shard_size == 2
    assert parse([*resumed, "--parallel", "hsdp"]).shard_size == 2
    assert parse([*resumed, "--parallel", "fsdp"]).shard_size is None
