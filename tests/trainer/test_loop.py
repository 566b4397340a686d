"""After a step come its record, a checkpoint and an evaluation: their order, and what happens when one fails."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastgpt2 import TrainConfig, checkpoint, train
from fastgpt2.command import main
from fastgpt2.data import DataError
from fastgpt2.metrics import NonFiniteLossError, read_json_lines
from fastgpt2.run import Run
from tests.trainer.runs import SMALL, Watch, progress_of, saved_steps


def small(out: Path | None, **changes: Any) -> TrainConfig:
    return dataclasses.replace(SMALL, out=out, keep_checkpoints=0, **changes)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr("fastgpt2.loop.time.sleep", waits.append)
    return waits


# ------------------------------------------------------------------------------------------------- order


def test_a_record_is_on_the_disk_before_the_checkpoint_and_both_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    metrics = tmp_path / "metrics.jsonl"
    fsync, save = os.fsync, checkpoint.save

    def fsynced(descriptor: int) -> None:
        fsync(descriptor)
        if metrics.exists() and os.path.samestat(os.fstat(descriptor), metrics.stat()):
            events.append(f"synced {len(read_json_lines(metrics))}")

    def saves(*args: Any) -> Path:
        events.append("save")
        return save(*args)

    def evaluate(*args: Any, **kwargs: Any) -> float:
        events.append("evaluate")
        return 1.0

    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(checkpoint, "save", saves)
    monkeypatch.setattr("fastgpt2.loop.evaluate", evaluate)
    train(small(tmp_path, steps=2, eval_every=2))
    assert events == ["synced 2", "save", "evaluate", "synced 3"]
    records = read_json_lines(metrics)
    assert [(r["step"], "val_loss" in r) for r in records] == [(1, False), (2, False), (2, True)]


def test_a_reporter_that_asks_to_stop_ends_the_run_after_the_step_at_hand(tmp_path: Path) -> None:
    class Stop(Watch):
        def stepped(self, done: int) -> None:
            self.stop_requested = done == 3

    watch = Stop()
    result = train(small(tmp_path, save_every=100, log_every=100, eval_every=3), reporters=[watch])
    assert result.steps_done == 3 and len(result.losses) == 3 and result.val_losses == [] and result.missing == []
    assert saved_steps(tmp_path) == [3] and [r["step"] for r in watch.records] == [1, 3]
    rest = train(small(tmp_path, resume=True))
    assert result.losses + rest.losses == train(small(None)).losses


# ----------------------------------------------------------------------------------------- failed saves


class Disk:
    """A disk that fails at some of its saves, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: range) -> None:
        self.fails, self.steps, self.write = fails, [], checkpoint.write_tensors  # type: ignore[var-annotated]
        monkeypatch.setattr(checkpoint, "write_tensors", self)

    def __call__(self, folder: Path, *args: Any) -> dict[str, str]:
        self.steps.append(int(folder.name.rpartition("-")[2]))
        if len(self.steps) in self.fails:
            raise OSError(28, "No space left on device")
        return self.write(folder, *args)


def test_a_failed_save_is_tried_again_when_the_next_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, watch = Disk(monkeypatch, range(2, 3)), Watch()
    result = train(small(tmp_path), reporters=[watch])
    assert disk.steps == [2, 4, 6] and saved_steps(tmp_path) == [2, 6] and result.missing == []
    assert watch.warnings == [
        f"can't save the checkpoint of step 4 in {tmp_path / 'checkpoints'}: No space left on device; "
        f"the last good one is {tmp_path / 'checkpoints' / 'step-00000002'}; continuing, next try after step 6"
    ]
    assert result.losses == train(small(None)).losses


def test_the_last_state_is_tried_until_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float]
) -> None:
    disk, watch = Disk(monkeypatch, range(3, 6)), Watch()
    result = train(small(tmp_path), reporters=[watch])
    assert disk.steps == [2, 4, 6, 6, 6, 6] and saved_steps(tmp_path) == [2, 4, 6] and result.missing == []
    assert [text.rpartition("; ")[2] for text in watch.warnings] == [
        "continuing, next try at the end", "next try in 1 s", "next try in 2 s"
    ]  # fmt: skip
    assert no_waiting == [1.0, 2.0]


def test_a_state_that_is_never_saved_is_said_by_result_status_and_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(monkeypatch, range(2, 100))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(small(tmp_path))
    assert all("can't save the checkpoint of step" in str(w.message) for w in caught) and len(caught) == 6
    assert len(disk.steps) == 1 + 6
    missing = f"the state after step 6 is not saved: can't save the checkpoint of step 6 in {tmp_path / 'checkpoints'}"
    assert len(result.missing) == 1 and result.missing[0].startswith(missing) and result.steps_done == 6
    flags = ["--model", "tiny", "--batch-size", "1", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "2")]
    assert main(flags) == 1
    assert capsys.readouterr().err.startswith("error: the state after step 1 is not saved: ")


def test_what_is_no_failure_of_the_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_tensors", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        train(small(tmp_path))


# ------------------------------------------------------------------------------------ diverged, not finite


def losses(monkeypatch: pytest.MonkeyPatch, told: dict[int, float]) -> None:
    """Replace the loss of some steps, counted from 1."""
    real = Run.step

    def step(self: Run, step: int, tokens: Tensor, *, want_norm: bool = False) -> tuple[Tensor, Tensor | None]:
        loss, norm = real(self, step, tokens, want_norm=want_norm)
        return torch.tensor(told[step + 1]) if step + 1 in told else loss, norm

    monkeypatch.setattr(Run, "step", step)


def test_a_run_that_diverged_says_so_once_and_its_checkpoints_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Over the limit: in one step of an interval, then through its mean; then no longer, and just below it.
    uniform = math.log(33)
    losses(monkeypatch, {1: uniform, 2: uniform, 4: uniform + 3.1, 5: 1e9, 10: uniform + 2.9})
    watch = Watch()
    result = train(small(tmp_path, steps=10, log_every=2), reporters=[watch])
    assert {step: kept["diverged"] for step, kept in progress_of(tmp_path).items()} == {
        2: False, 4: True, 6: True, 8: False, 10: False
    }  # fmt: skip
    assert [kept["loss"] for kept in progress_of(tmp_path).values()] == [
        pytest.approx(record["loss"]) for record in watch.records[1:]
    ]
    (text,) = watch.warnings
    assert text.startswith(
        f"the run has diverged: at step 4 the loss is {uniform + 2.1:.4g}, above {uniform + 2.0:.4g}; "
        f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step-00000002'} (it is kept: "
    )
    assert "--lr" in text and result.steps_done == 10


def test_a_rate_that_is_far_too_high_is_said(tmp_path: Path) -> None:
    watch = Watch()
    train(small(tmp_path, lr=1e3, steps=4), reporters=[watch])
    assert len(watch.warnings) == 1 and progress_of(tmp_path)[4]["diverged"]


def test_the_step_of_a_non_finite_loss_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found when step 20 is logged: losses stay on the device until then."""
    losses(monkeypatch, {13: math.nan})
    late = {"steps": 30, "log_every": 10, "save_every": 100}
    with pytest.raises(NonFiniteLossError, match="the loss of step 13 is nan: no good checkpoint was saved"):
        train(small(None, **late))
    train(small(tmp_path, steps=5))
    with pytest.raises(NonFiniteLossError, match=r"loss of step 13 is nan: the last good checkpoint is .*-00000005 "):
        train(small(tmp_path, resume=True, **late))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Poison(Watch):
        def stepped(self, done: int) -> None:
            if done == 4:
                self.run.parameters[-1].data[0] = math.inf

    good = tmp_path / "checkpoints" / "step-00000003"
    message = rf"ln_f\.bias is not finite after step 4: the last good checkpoint is {good} \(continue from it with "
    with pytest.raises(NonFiniteLossError, match=message):
        train(small(tmp_path, save_every=1), reporters=[Poison()])
    assert saved_steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_an_average_of_the_optimizer_that_is_not_finite_is_not_saved(tmp_path: Path, key: str) -> None:
    class Poison(Watch):
        def stepped(self, done: int) -> None:
            if done == 4:
                self.run.state.optimizer.state[self.run.parameters[0]][key][0, 0] = math.inf

    with pytest.raises(NonFiniteLossError, match=rf"the optimizer's {key} of wte\.weight is not finite after step 4: "):
        train(small(tmp_path), reporters=[Poison()])
    assert saved_steps(tmp_path) == [2]


def test_a_gradient_of_1e30_is_found_though_the_loss_is_fine(tmp_path: Path) -> None:
    class Gradient(Watch):
        def started(self, run: Run) -> None:
            super().started(run)
            bias = run.parameters[-1]
            bias.register_hook(lambda gradient: gradient + 1e30 * (bias.grad is None and len(self.records) == 2))

    watch = Gradient()
    with pytest.raises(NonFiniteLossError, match=r"exp_avg_sq of ln_f\.bias is not finite after step 4"):
        train(small(tmp_path), reporters=[watch])
    assert all(math.isfinite(record["loss"]) for record in watch.records) and saved_steps(tmp_path) == [2]


# ------------------------------------------------------------------------------------------- data that is gone


def test_data_that_can_not_be_read_any_more_ends_the_run_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    next_tokens = Run.next_tokens

    def fails(self: Run, step: int) -> Tensor:
        if step == 3:
            raise DataError("shard.bin: Input/output error")
        return next_tokens(self, step)

    monkeypatch.setattr(Run, "next_tokens", fails)
    watch = Watch()
    with pytest.raises(DataError):
        train(small(tmp_path, save_every=100, log_every=100), reporters=[watch])
    assert saved_steps(tmp_path) == [3] and [record["step"] for record in watch.records] == [1, 3]
    flags = ["--model", "tiny", "--batch-size", "1", "--device", "cpu", "--out", str(tmp_path / "2")]
    assert main(flags) == 1
    assert saved_steps(tmp_path / "2") == [3]
    back = f"then continue after step-00000003 with --resume --out {tmp_path / '2'}"
    assert capsys.readouterr().err == f"error: shard.bin: Input/output error; {back}\n"


# ------------------------------------------------------------------------------------------- a folder that is gone


@pytest.mark.parametrize("back", [False, True], ids=["for good", "for a while"])
def test_a_folder_that_is_moved_away_is_said_and_not_made_again(tmp_path: Path, back: bool) -> None:
    """A new folder of that name would lack everything written before, and the lock."""
    out, away = tmp_path / "run", tmp_path / "away"

    class Move(Watch):
        def stepped(self, done: int) -> None:
            if done == 3:
                out.rename(away)
            if done == 5 and back:
                away.rename(out)

    watch = Move()
    result = train(small(out), reporters=[watch])
    gone = f"{out} was moved or deleted during the run: put it back"
    assert watch.warnings[0] == f"{gone}; continuing, next try after step 6"
    if back:
        assert (result.missing, saved_steps(out)) == ([], [2, 6])
        assert [record["step"] for record in read_json_lines(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    else:
        assert not out.exists() and len(result.missing) == 2
        assert saved_steps(away) == [2]
