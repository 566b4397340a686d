"""What a run makes of its data: which windows it takes, what it says, and what it saves when the data fails."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fastgpt2 import checkpoint, shards
from fastgpt2.command import main
from fastgpt2.config import ConfigError, TrainConfig
from fastgpt2.data import DataError, ShardTokens, write_shard
from fastgpt2.evaluate import evaluate
from fastgpt2.reporter import Reporter
from fastgpt2.training import train
from tests.trainer.runs import seal


class Watch(Reporter):
    """Keeps the run and what it said, and does something after a step."""

    def __init__(self, at: int = -1, do=lambda: None) -> None:
        self.at, self.do = at, do
        self.notes: list[str] = []

    def started(self, run) -> None:
        self.run = run

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stepped(self, done: int) -> None:
        if done == self.at:
            self.do()


def make_folder(folder: Path, seed: int = 0, val: int = 1500) -> Path:
    """Random bytes in a shard of each split, and meta.json with their sums."""
    folder.mkdir(exist_ok=True)
    rng, listed = np.random.default_rng(seed), {}
    for split, size in (("train", 3000), ("val", val)):
        path = folder / f"{split}_0.bin"
        write_shard(path, rng.integers(0, 256, size))
        listed[path.name] = {"tokens": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 256, "shards": listed}))
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return make_folder(tmp_path / "data")


def small(data: Path, out: Path | None = None, **changes) -> TrainConfig:
    settings = {"model": "tiny", "n_layer": 1, "n_embd": 16, "block_size": 16, "batch_size": 4, "steps": 4}
    return TrainConfig(**settings | {"data": str(data), "out": out, "device": "cpu"} | changes)


def flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0] ^ 1
        file.seek(byte)
        file.write(bytes([value]))


def steps_saved(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(out)]


# Resuming


def test_other_batches_on_resume_go_on_in_the_order(data, tmp_path, monkeypatch):
    taken, tokens = [], ShardTokens.tokens

    def watched(source, step):
        batch = tokens(source, step)
        taken.extend(map(tuple, batch.flatten(0, 1).tolist()))
        return batch

    monkeypatch.setattr(ShardTokens, "tokens", watched)
    for steps, batch_size, grad_accum in ((4, 4, 1), (5, 3, 2), (7, 1, 5), (9, 4, 1)):
        watch = Watch()
        changes = {"batch_size": batch_size, "grad_accum": grad_accum, "steps": steps, "resume": steps > 4}
        train(small(data, tmp_path / "run", **changes), reporters=[watch])
    assert watch.run.samples_before == 4 * 4 + 1 * 6 + 2 * 5
    assert watch.run.samples_done(9) == len(taken) == watch.run.samples_before + 2 * 4
    state = checkpoint.read_state(checkpoint.newest(tmp_path / "run"))
    assert state["progress"]["samples"] == len(taken)
    order = ShardTokens(data, "train", 1, 16)
    assert taken == [tuple(tokens(order, g)[0, 0].tolist()) for g in range(len(taken))]


def test_a_checkpoint_that_counts_no_samples(data, tmp_path):
    """It is older than the count: its batches were all of the size that its configuration says."""
    train(small(data, tmp_path / "run", grad_accum=3))
    saved = checkpoint.newest(tmp_path / "run")
    state = json.loads((saved / "state.json").read_text())
    del state["progress"]
    (saved / "state.json").write_text(json.dumps(state))
    seal(saved)
    watch = Watch()
    train(small(data, tmp_path / "run", batch_size=2, steps=5, resume=True), reporters=[watch])
    assert watch.run.samples_before == 4 * 3 * 4


def test_what_changed_in_the_data_is_said(data, tmp_path):
    def notes(**changes) -> list[str]:
        watch = Watch()
        train(small(data, tmp_path / "run", **changes), reporters=[watch])
        return [note for note in watch.notes if str(data) in note]

    assert notes() == []
    assert notes(steps=5, resume=True) == []
    order = f"--seed 1 shuffles {data} in another order: this epoch may repeat windows"
    assert notes(steps=6, resume=True, seed=1) == [order]
    make_folder(data, seed=1)
    assert notes(steps=7, resume=True, seed=1) == [f"changed since the checkpoint: the training data in {data}"]
    data.rename(tmp_path / "moved")
    data = tmp_path / "moved"
    assert [note for note in notes(steps=8, resume=True, seed=1) if "data in" in note] == []


def test_dummy_tokens_have_no_contents_to_change(tmp_path):
    watch = Watch()
    train(small(Path("dummy"), tmp_path / "run"))
    changes = {"batch_size": 2, "grad_accum": 1, "seed": 1}
    train(small(Path("dummy"), tmp_path / "run", steps=5, resume=True, **changes), reporters=[watch])
    assert not any("data in" in note or "another order" in note for note in watch.notes)
    assert watch.run.samples_done(5) == 4 * 4 + 2


# Validation


def test_a_validation_loss_is_the_same_whatever_the_batch(data):
    def losses(batch_size: int, data=data, **changes) -> list[float]:
        return [
            loss for _, loss in train(small(data, batch_size=batch_size, lr=0.0, eval_every=4, **changes)).val_losses
        ]

    for name in (data, Path("dummy")):
        expected = losses(8, name)
        for batch_size in (1, 3, 64):
            assert losses(batch_size, name) == pytest.approx(expected, rel=1e-6)
    assert losses(8, eval_sequences=40) != losses(8)


def test_a_validation_loss_by_default_is_of_20_batches_of_8(data):
    """To the bit: a run that goes on with this version compares with what it wrote before."""
    watch = Watch()
    result = train(small(make_folder(data, val=5000), batch_size=8, eval_every=4), reporters=[watch])
    source = ShardTokens(data, "val", 8, 16)
    assert source.windows > 160
    assert result.val_losses == [(4, evaluate(watch.run.model, source, 20, "cpu"))]


def test_no_loss_is_told_of_data_that_is_not_verified(data):
    watch = Watch()
    train(small(data), reporters=[watch])
    source = ShardTokens(data, "val", 4, 16)
    source.check = mock.Mock(side_effect=DataError("damaged"))
    with pytest.raises(DataError, match="damaged"):
        evaluate(watch.run.model, source, 2, "cpu")


def test_a_small_validation_split_is_said_once(data):
    watch = Watch()
    result = train(small(data, eval_every=1), reporters=[watch])
    assert len(result.val_losses) == 4
    assert watch.notes.count("a val loss takes all 92 windows of the split, not 160") == 1


# Data that fails


def test_a_shard_that_is_cut_short_ends_the_run_with_its_state_saved(data, tmp_path):
    """At the step before the read that failed; when the shard is whole again, the run goes on as if nothing was."""
    uncut = train(small(data, steps=30)).losses
    whole, path = (data / "train_0.bin").read_bytes(), data / "train_0.bin"
    config, watch = small(data, tmp_path / "run", steps=30), Watch(at=3, do=lambda: os.truncate(path, 2000))
    with pytest.raises(DataError) as error:
        train(config, reporters=[watch])
    (saved,) = steps_saved(tmp_path / "run")
    assert 3 <= saved < 30
    assert str(error.value).startswith(f"{path} was cut short while it was in use: it ends before token ")
    assert str(error.value).endswith(f"then continue after step-{saved:08d} with --resume --out {tmp_path / 'run'}")
    with pytest.raises(ConfigError, match="truncated"):
        train(replace(config, resume=True))
    path.write_bytes(whole)
    assert train(replace(config, resume=True)).losses == uncut[saved:]


def test_the_command_says_in_a_line_that_the_data_failed(data, tmp_path, capsys, monkeypatch):
    read, count = shards.Shard.read, iter(range(1000))

    def fail(shard, *place):
        if next(count) > 100:
            raise DataError(f"can't read {shard.path}: Input/output error")
        return read(shard, *place)

    monkeypatch.setattr(shards.Shard, "read", fail)
    arguments = f"--model tiny --block-size 16 --steps 1000 --device cpu --data {data} --out {tmp_path / 'run'}"
    assert main(arguments.split()) == 1
    captured = capsys.readouterr()
    assert "train_0.bin: Input/output error; then continue after step-" in captured.err.replace("\n", " ")
    assert len(steps_saved(tmp_path / "run")) == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flipped_bit_is_found_before_the_run(data, tmp_path, split):
    flip(data / f"{split}_0.bin", 1500)
    with pytest.raises(ConfigError, match=rf"{split}_0\.bin is damaged or changed"):
        train(small(data, tmp_path / "run", eval_every=2))
    assert not (tmp_path / "run").exists()


def test_nothing_is_saved_of_a_run_whose_data_is_found_damaged_beside_it(data, tmp_path, monkeypatch):
    train(small(data, tmp_path / "run"))
    monkeypatch.setattr(shards, "AT_ONCE_BYTES", -1)
    flip(data / "train_0.bin", 1500)
    for config in (
        small(data, tmp_path / "run", steps=2000, save_every=500, resume=True),
        small(data, tmp_path / "new", steps=2000, save_every=500),
    ):
        with pytest.raises(
            DataError, match=r"train_0\.bin is damaged or changed: .*; (nothing is saved|then continue)"
        ):
            train(config)
    assert steps_saved(tmp_path / "run") == [4]
    assert steps_saved(tmp_path / "new") == []


def test_damaged_validation_data_costs_no_training(data, tmp_path, monkeypatch):
    """It makes no loss, but the weights are good and are saved."""
    monkeypatch.setattr(shards, "AT_ONCE_BYTES", -1)
    flip(data / "val_0.bin", 1500)
    with pytest.raises(DataError, match=r"val_0\.bin is damaged or changed"):
        train(small(data, tmp_path / "run", steps=3, eval_every=3))
    assert steps_saved(tmp_path / "run") == [3]


def test_a_shard_that_is_rewritten_during_a_run_ends_it_unsaved(data, tmp_path):
    path = data / "train_0.bin"
    with pytest.raises(DataError, match=r"train_0\.bin is damaged or changed"):
        train(
            small(data, tmp_path / "run", steps=8, save_every=2), reporters=[Watch(at=5, do=lambda: flip(path, 1500))]
        )
    assert steps_saved(tmp_path / "run") == [2, 4]
