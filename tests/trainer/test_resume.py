"""Resuming: bitwise equal to an uncut run, with settings left open and with settings changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2 import ConfigError, TrainConfig, checkpoint, train
from fastgpt2.folder import settings_of_run
from fastgpt2.metrics import read_json_lines
from fastgpt2.model import GPT
from fastgpt2.run import build
from fastgpt2.state import RunState
from tests.trainer.runs import SMALL, Watch, edit_state, save, step, tiny

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = dataclasses.replace(SMALL, batch_size=3, steps=4)


def with_(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("cut", [4, 7])
def test_resuming_is_bitwise_the_uncut_run(tmp_path: Path, cut: int) -> None:
    config = tiny(
        dropout=0.2, steps=12, grad_clip=1.0, optimizer="adamw", weight_decay=0.1, save_every=100, log_every=1,
        warmup_steps=3,
    )  # fmt: skip
    whole = train(dataclasses.replace(config, out=tmp_path / "whole"))
    train(dataclasses.replace(config, out=tmp_path / "cut", steps=cut))
    torch.manual_seed(99)  # the generator's state must come from the checkpoint
    rest = train(dataclasses.replace(config, out=tmp_path / "cut", resume=True))
    assert rest.losses == whole.losses[cut:]
    for p, q in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(p, q)
    logged = [
        [(r["step"], r["loss"]) for r in read_json_lines(tmp_path / n / "metrics.jsonl")] for n in ("whole", "cut")
    ]
    assert logged[0] == logged[1]


def test_a_checkpoint_without_steps_has_no_moments(tmp_path: Path) -> None:
    run = build(CONFIG)
    checkpoint.save(tmp_path, 0, run.config, run.state)
    assert train(with_(out=tmp_path, resume=True)).losses == train(CONFIG).losses


# --------------------------------------------------------------------------------------------------- settings left open


@pytest.mark.parametrize("toml", ["whole", "lost", "damaged"])
def test_what_a_python_caller_leaves_open_is_as_the_run_has_it(out: Path, toml: str) -> None:
    """Open settings come from the checkpoint: not from defaults, nor from config.toml, which may be lost."""
    if toml == "lost":
        (out / "config.toml").unlink()
    if toml == "damaged":
        (out / "config.toml").write_bytes(b"\xff")
    whole = train(with_(steps=6))
    rest = train(TrainConfig(out=out, resume=True, steps=6, lr=1e-2, save_every=2, log_every=1))
    assert rest.losses == whole.losses[4:]
    assert rest.config.batch_size == 3 and rest.model.config == whole.model.config


def test_the_precision_of_the_run_is_left_open_as_well(tmp_path: Path) -> None:
    train(with_(dtype="float64", out=tmp_path))
    result = train(TrainConfig(out=tmp_path, resume=True, steps=5))
    assert next(result.model.parameters()).dtype == torch.float64 and result.steps_done == 5


def test_a_model_that_is_asked_for_keeps_its_own_shape(tmp_path: Path) -> None:
    train(TrainConfig(model="tiny", block_size=16, batch_size=1, steps=1, device="cpu", out=tmp_path))
    assert train(TrainConfig(model="tiny", out=tmp_path, resume=True)).model.config.block_size == 16
    with pytest.raises(ConfigError, match=r"another shape: n_layer 2, not 4; .*block_size 16, not 128"):
        train(TrainConfig(model="mini", out=tmp_path, resume=True, device="cpu"))


def test_without_a_checkpoint_the_settings_are_those_of_config_toml(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.to_toml())
    result = train(TrainConfig(out=tmp_path, resume=True))
    assert (result.config.n_embd, result.config.batch_size, result.steps_done) == (16, 3, 4)


def test_saved_settings_are_those_of_the_newest_checkpoint_that_can_be_read(out: Path) -> None:
    def settings() -> dict[str, Any] | None:
        return settings_of_run(out)[1] or None

    (out / "config.toml").unlink()
    (out / "starts.jsonl").unlink()
    found = settings()
    assert found is not None
    assert {"out", "resume", "model"} & set(found) == set() and None not in found.values()
    resolved = build(CONFIG).config
    assert found == {name: getattr(resolved, name) for name in found} and found["n_embd"] == 16
    edit_state(step(out, 4), lambda state: state["config"].update(lr=0.5, nonsense=1))
    found = settings()
    assert found is not None and found["lr"] == 0.5 and "nonsense" not in found
    # A damaged checkpoint is passed over.
    (step(out, 4) / "state.json").write_text((step(out, 4) / "state.json").read_text().replace("0.5", "0.7"))
    assert settings() == {**found, "lr": 1e-2}
    shutil.rmtree(out / "checkpoints")
    assert settings() is None
    (out / "starts.jsonl").write_text(json.dumps({"config": found | {"lr": 0.1}}) + '\n{"config": 5}\n{"conf')
    assert settings() == {**found, "lr": 0.1}
    (out / "starts.jsonl").unlink()
    (out / "checkpoints").touch()
    assert settings() is None


# ----------------------------------------------------------------------------------------------------- settings changed


def test_settings_that_are_not_the_saved_ones_are_named(out: Path) -> None:
    """This also shows a flipped bit in config.toml, if it is still TOML."""
    watch = Watch()
    train(with_(out=out, resume=True), reporters=[watch])
    assert not any("changed since" in text for text in watch.notes)
    train(with_(out=out, resume=True, lr=0.03, steps=5), reporters=[watch])
    assert "changed since the checkpoint: --steps 5 (was 4), --lr 0.03 (was 0.01)" in watch.notes


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"dropout": 0.25}, "--dropout 0.25 (was 0.0)"),
        ({"document_mask": True, "end_of_text": 3}, "--document-mask True (was False), --end-of-text 3 (was None)"),
    ],
)
def test_what_no_tensor_depends_on_may_be_changed(out: Path, changes: dict[str, object], note: str) -> None:
    watch = Watch()
    model = train(with_(out=out, steps=5, resume=True, **changes), reporters=[watch]).model
    assert model.config.dropout == changes.get("dropout", 0.0)
    assert model.config.end_of_text == changes.get("end_of_text")
    assert any(text.startswith("changed since the checkpoint: ") and note in text for text in watch.notes)


def test_a_caller_without_a_reporter_is_warned_of_what_is_resumed_otherwise(out: Path) -> None:
    """In Python every setting has a value, if only its default: --lr would change silently."""
    with pytest.warns(RuntimeWarning, match=r"changed since the checkpoint: .*--lr 0\.0003 \(was 0\.01\)"):
        train(TrainConfig(out=out, resume=True, steps=5))


def restored(out: Path, scaler: torch.amp.GradScaler, **changes: Any) -> tuple[GPT, torch.optim.Optimizer]:
    config = build(with_(**changes)).config
    model = GPT(config.model_config())
    state = dataclasses.replace(RunState.begin(model, config), scaler=scaler)
    latest, _ = checkpoint.to_resume(out)
    assert checkpoint.restore(latest, state) == int(latest.name[5:])
    return model, state.optimizer


def test_a_scaler_is_kept_begun_or_dropped(out: Path) -> None:
    plain, scaled = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    restored(out, scaled)
    assert scaled.get_scale() == 2.0**16
    used = torch.amp.GradScaler("cpu", init_scale=8.0)
    used.scale(torch.ones(()))
    save(out, 6, scaler=used)
    restored(out, scaled)
    assert scaled.get_scale() == 8.0
    restored(out, plain)
    assert plain.state_dict() == {}


def test_adam_goes_on_as_adamw_and_the_reverse(tmp_path: Path) -> None:
    """Both keep the same two moments, and without weight decay they compute the same."""
    whole = train(with_(steps=6)).losses
    for first, then in (("adam", "adamw"), ("adamw", "adam")):
        watch = Watch()
        train(with_(out=tmp_path / first, optimizer=first))
        rest = train(with_(out=tmp_path / first, optimizer=then, steps=6, resume=True), reporters=[watch])
        assert rest.losses == whole[4:]
        assert f"changed since the checkpoint: --steps 6 (was 4), --optimizer {then} (was {first})" in watch.notes


def test_a_count_of_steps_follows_its_parameter(out: Path) -> None:
    """Fused optimizers and CUDA graphs need the count in float32 on the parameter's device."""
    for changes in ({}, {"optimizer": "adamw"}):
        model, optimizer = restored(out, torch.amp.GradScaler("cpu", enabled=False), **changes)
        for parameter in model.parameters():
            count = optimizer.state[parameter]["step"]
            assert (count.dtype, count.device, count.item()) == (torch.float32, parameter.device, 4.0)


def test_an_unwritable_folder_a_used_one_and_another_shape(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't write to --out"):
        train(tiny(out=tmp_path / "file" / "run"))
    train(tiny(out=tmp_path / "run"))
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume"):
        train(tiny(out=tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume"):
        train(tiny(out=tmp_path / "run"))
    with pytest.raises(ConfigError, match="has another shape: n_layer 2, not 3; vocab_size 65, not 80"):
        train(tiny(out=tmp_path / "run", resume=True, n_layer=3, vocab_size=80))
    with pytest.raises(ConfigError, match="no checkpoint under"):
        train(tiny(out=tmp_path / "other", resume=True))
    assert not (tmp_path / "other").exists()
