"""The records of a run: what they hold, how they are written and how they are read back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2 import train
from fastgpt2.arguments import parse
from fastgpt2.data import write_shard
from fastgpt2.durable import OutputError
from fastgpt2.metrics import JsonLines, Meter, NonFiniteLossError, curve, read_json_lines
from fastgpt2.model import FLOPS_PER_TOKEN
from tests.trainer.runs import SMALL, Watch, progress_of, saved_steps, tiny


def test_the_clock_stands_still_outside_steps_and_the_first_interval_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("fastgpt2.metrics.time.perf_counter", lambda: now)
    meter = Meter(torch.device("cpu"), 10, tokens_per_step=48)
    assert meter.tokens_per_s() == 0.0
    meter.add(torch.tensor(1.0))
    now += 8.0
    assert (meter.read(), meter.tokens_per_s()) == (8000.0, 6.0)
    for pauses in ((16.0, 4.0), ()):
        for loss in (2.0, 3.0):
            meter.add(torch.tensor(loss))
            now += 1.0
        for seconds in pauses:
            meter.pause()
            now += seconds
            meter.resume()
        assert meter.read() == 1000.0
    assert meter.tokens_per_s() == 48.0
    assert meter.losses == [1.0, 2.0, 3.0, 2.0, 3.0]
    for loss in (4.0, math.inf, math.nan):
        meter.add(torch.tensor(loss))
    with pytest.raises(NonFiniteLossError, match="the loss of step 17 is inf"):
        meter.read()


def test_metrics_are_complete(tmp_path: Path) -> None:
    schedule = {"log_every": 10, "save_every": 0, "eval_every": 20, "eval_sequences": 3}
    result = train(tiny(out=tmp_path / "run", steps=25, grad_accum=2, **schedule))
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    validated = [r for r in records if "val_loss" in r]
    records = [r for r in records if "val_loss" not in r]
    assert [(r["step"], r["val_loss"]) for r in validated] == result.val_losses
    assert [r["step"] for r in validated] == [20, 25]
    assert all(set(r) == {"step", "val_loss", "tokens", "seconds"} for r in validated)
    assert [r["step"] for r in records] == [1, 10, 20, 25]
    for r, before in zip(records, [0, 1, 10, 20], strict=True):
        assert set(r) == {
            "step", "loss", "last_loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "mfu", "mfu_formula",
            "memory_bytes", "tokens", "seconds", "epoch",
        }  # fmt: skip
        losses = result.losses[before : r["step"]]
        assert r["loss"] == math.fsum(losses) / len(losses) and r["last_loss"] == losses[-1]  # to the last digit
        assert (r["tokens"], r["epoch"]) == (r["step"] * 96, None)
        assert r["mfu"] is None
        assert r["mfu_formula"] == "llm.c"
        assert r["tokens_per_s"] == pytest.approx(96 / r["step_ms"] * 1e3)
        assert r["memory_bytes"] > 50 << 20
    seconds = [r["seconds"] for r in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert seconds == sorted(seconds) and 0.0 < seconds[0] < seconds[-1] < result.seconds
    saved = parse(["--config", str(tmp_path / "run" / "config.toml")])
    assert dataclasses.asdict(saved) == dataclasses.asdict(result.config) | {"grad_accum": None}


def test_a_record_tells_the_share_of_a_known_gpus_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.loop.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    watch = Watch()
    result = train(tiny(log_every=2), reporters=[watch])
    flops = FLOPS_PER_TOKEN["llm.c"](result.model.config)
    for record in watch.records:
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * flops / 66.9e12)
        assert record["grad_norm"] > 0.0
    assert result.mfu == pytest.approx(result.tokens_per_s * flops / 66.9e12)


def test_tokens_epoch_and_seconds_go_on_over_a_resume(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write_shard(tmp_path / "data" / f"{split}.bin", np.arange(90, dtype=np.uint16) % 33)
    (tmp_path / "data" / "meta.json").write_text('{"vocab_size": 33}')
    config = dataclasses.replace(
        SMALL, out=tmp_path / "run", keep_checkpoints=0, data=str(tmp_path / "data"), grad_accum=2, eval_every=4
    )
    train(dataclasses.replace(config, steps=3))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1000'))
    watch = Watch()
    train(dataclasses.replace(config, resume=True), reporters=[watch])
    records = read_json_lines(path)
    assert records[4:] == watch.records and [r["step"] for r in records] == [1, 2, 3, 3, 4, 4, 5, 6, 6]
    assert all(r["tokens"] == r["step"] * 2 * 2 * 8 for r in records)
    windows = watch.run.source.windows  # type: ignore[attr-defined]
    assert all(r["epoch"] == r["step"] * 4 / windows for r in records if "epoch" in r)
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds) and seconds[4] > 1000
    assert {step: kept["samples"] for step, kept in progress_of(tmp_path / "run").items()} == {
        2: 8, 3: 12, 4: 16, 6: 24
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- written


class Full:
    """An open file on a full disk: it accepts `room` more bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.room = file, 10**9

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_records_that_can_not_be_written_are_written_with_the_next(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log._file = disk = Full(log._file)  # type: ignore[assignment]
    log.write({"step": 1})
    disk.room = 5  # room for part of the line
    for step in (2, 3):
        with pytest.raises(OutputError, match=r"can't write .*m\.jsonl: No space left on device"):
            log.write({"step": step})
    disk.room = 10**9
    log.write({"step": 4})
    assert (tmp_path / "m.jsonl").read_text() == "".join(f'{{"step": {n}}}\n' for n in (1, 2, 3, 4))


@pytest.mark.parametrize("until", [4, 100], ids=["for a time", "to the end"])
def test_a_run_outlives_records_that_can_not_be_written(
    until: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks: list[Full] = []

    class Watches(Watch):
        def stepped(self, done: int) -> None:
            disks[0].room = 0 if 2 <= done < until else 10**9

    class OnFull(JsonLines):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            disks.append(Full(self._file))
            self._file = disks[0]  # type: ignore[assignment]

    monkeypatch.setattr("fastgpt2.reporters.metrics_file.JsonLines", OnFull)
    watch = Watches()
    result = train(dataclasses.replace(SMALL, out=tmp_path, keep_checkpoints=0), reporters=[watch])
    assert saved_steps(tmp_path) == [2, 4, 6]  # checkpoints are saved all the same
    path = tmp_path / "metrics.jsonl"
    failed = f"can't write {path}: No space left on device"
    assert watch.warnings == [f"{failed}; continuing, the records are kept and written with the next one"]  # only once
    steps = [record["step"] for record in read_json_lines(path)]
    if until == 4:
        assert steps == [1, 2, 3, 4, 5, 6] and result.missing == []
    else:
        assert steps == [1] and result.missing == [f"the last records are missing: {failed}"]


def test_records_are_strict_json(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log.write({"step": 1, "grad_norm": math.inf, "loss": math.nan, "lr": 1.0})
    log.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "grad_norm": None, "loss": None, "lr": 1.0}


# ----------------------------------------------------------------------------------------------------------------- read


def test_lines_of_any_kind_are_read_or_skipped(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 4.0, "val_loss": null}', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "7", "null",
        '{"step": true}', '{"step": 2.0}', '{"step": 3, "loss": "low"}', '{"step": 4, "loss": NaN}',
        '{"step": 5, "loss": 1e999}', '{"step": 6, "loss": ' + "9" * 400 + "}", '{"step": 7, "loss": [1]}',
        '{"step": 8, "val_loss": 2.5}', '{"step": 9, "loss": 3}',
    ]  # fmt: skip
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines))
    records = read_json_lines(path)
    assert [record["step"] for record in records] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert curve(records, "loss") == ([1, 9], [4.0, 3.0])
    assert curve(records, "val_loss") == ([8], [2.5])
    log = JsonLines(path, keep_up_to_step=8)
    log.close()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in path.read_text().splitlines()] == [
        1, 3, 4, 5, 6, 7, 8
    ]  # fmt: skip


def test_records_that_a_disk_has_damaged_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xe5p": 2}\n{"step": 3}\n{"step" 4}\n7\n{"step": 5}\n{"st')
    assert [record["step"] for record in read_json_lines(path)] == [1, 3, 5]
    JsonLines(path, keep_up_to_step=3).close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_records_past_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    train(tiny(out=tmp_path, steps=4, log_every=1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # after the checkpoint, the last truncated
    train(tiny(out=tmp_path, steps=6, log_every=1, resume=True))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[4]["loss"] != 1.0
