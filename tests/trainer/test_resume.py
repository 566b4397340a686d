"""What a run is resumed from: settings left open, settings changed, and checkpoints that lie."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2 import ConfigError, TrainConfig, checkpoint, train
from fastgpt2.durable import OutputError, sha256
from fastgpt2.folder import settings_of_run
from fastgpt2.loop import Loop
from fastgpt2.model import GPT
from fastgpt2.outputs import Outputs
from fastgpt2.reporter import Reporter, Reporters
from fastgpt2.run import build
from fastgpt2.state import RunState
from fastgpt2.state_json import Progress, carried_over, changed_data, read_progress
from tests.trainer.test_checkpoint import names, step

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = TrainConfig(
    n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=33, batch_size=3, steps=4, lr=1e-2,
    device="cpu", save_every=2, log_every=1,
)  # fmt: skip
OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"
OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"


class Notes(Reporter):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def with_(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with the checkpoints of its second and its last."""
    out = tmp_path_factory.mktemp("trained")
    train(with_(out=out))
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def seal(folder: Path) -> None:
    """Make the sums right: what is in the files is meant."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in checkpoint.FILES]
    (folder / checkpoint.SUMS).write_text("".join(lines))


def edit_state(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((folder / "state.json").read_text())
    edit(state)
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)


def edit_tensors(folder: Path, name: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)
    seal(folder)


# ------------------------------------------------------------------------------------------ settings left open


@pytest.mark.parametrize("toml", ["whole", "lost", "damaged"])
def test_what_a_python_caller_leaves_open_is_as_the_run_has_it(out: Path, toml: str) -> None:
    """Nothing comes from a default, and nothing from config.toml, which may be lost."""
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
    with pytest.raises(ConfigError, match=r"another shape: it has n_layer 2 not 4, .*block_size 16 not 128"):
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
    # One that isn't as it was written.
    (step(out, 4) / "state.json").write_text((step(out, 4) / "state.json").read_text().replace("0.5", "0.7"))
    assert settings() == {**found, "lr": 1e-2}
    shutil.rmtree(out / "checkpoints")
    assert settings() is None
    (out / "starts.jsonl").write_text(json.dumps({"config": found | {"lr": 0.1}}) + '\n{"config": 5}\n{"conf')
    assert settings() == {**found, "lr": 0.1}
    (out / "starts.jsonl").unlink()
    (out / "checkpoints").touch()
    assert settings() is None


# ----------------------------------------------------------------------------------------- settings changed


def restored(out: Path, scaler: torch.amp.GradScaler, **changes: Any) -> tuple[GPT, torch.optim.Optimizer]:
    config = build(with_(**changes)).config
    model = GPT(config.model_config())
    state = dataclasses.replace(RunState.begin(model, config), scaler=scaler)
    latest, _ = checkpoint.to_resume(out)
    assert checkpoint.restore(latest, state) == int(latest.name[5:])
    return model, state.optimizer


def save(out: Path, number: int, scaler: torch.amp.GradScaler, progress: Progress = Progress()) -> None:  # noqa: B008
    run = build(CONFIG)
    run.step(0, run.next_tokens(0))
    checkpoint.save(out, number, run.config, dataclasses.replace(run.state, scaler=scaler), progress)


def test_a_scaler_is_kept_begun_or_dropped(out: Path) -> None:
    plain, scaled = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    restored(out, scaled)
    assert scaled.get_scale() == 2.0**16
    used = torch.amp.GradScaler("cpu", init_scale=8.0)
    used.scale(torch.ones(()))
    save(out, 6, used)
    restored(out, scaled)
    assert scaled.get_scale() == 8.0
    restored(out, plain)
    assert plain.state_dict() == {}


SCALED = {"scaler": {"scale": 8.0}, "device": "cuda", "config": {"device": None}}
PLAIN = {"scaler": {}, "device": "cpu", "config": {"device": None}}
OLDER = {"scaler": {}, "config": {"device": "cuda:0"}}
OLDEST: dict[str, Any] = {"scaler": {}, "config": {}}


@pytest.mark.parametrize(
    ("state", "changes", "device", "note"),
    [
        (PLAIN, {"dtype": "float16"}, "cpu", "has no gradient scaler, as it was not trained in float16: a new one"),
        (SCALED, {"dtype": "bfloat16"}, "cuda", "gradient scaler is dropped: --dtype bfloat16 has none"),
        (SCALED, {"dtype": "float16", "dropout": 0.1}, "cuda", None),
        (PLAIN, {"dtype": "float32", "dropout": 0.1}, "cpu", None),
        (PLAIN, {}, "cuda", "changed since the checkpoint: cuda (was cpu), the same up to rounding"),
        (PLAIN, {"dropout": 0.1}, "cuda", "rounding; dropout draws other masks, as the generators differ"),
        (OLDER, {}, "cuda", None),
        (
            OLDER,
            {"dropout": 0.1},
            "cpu",
            "changed since the checkpoint: cpu (was cuda), the same up to rounding; dropout",
        ),
        (OLDEST, {"dropout": 0.1}, "cpu", None),
    ],
)
def test_what_has_no_counterpart_is_said(
    state: dict[str, Any], changes: dict[str, Any], device: str, note: str | None
) -> None:
    notes = carried_over(state, with_(**changes), torch.device(device))
    assert len(notes) == (note is not None) and all(note in text for text in notes if note)


def test_adam_goes_on_as_adamw_and_the_reverse(tmp_path: Path) -> None:
    """Both keep the same two averages: without decay the same numbers."""
    whole = train(with_(steps=6)).losses
    for first, then in (("adam", "adamw"), ("adamw", "adam")):
        notes = Notes()
        train(with_(out=tmp_path / first, optimizer=first))
        rest = train(with_(out=tmp_path / first, optimizer=then, steps=6, resume=True), notes)
        assert rest.losses == whole[4:]
        assert f"changed since the checkpoint: --steps 6 (was 4), --optimizer {then} (was {first})" in notes.texts


def test_a_count_of_steps_follows_its_parameter(out: Path) -> None:
    """A fused optimizer, and a step that is captured as a CUDA graph, need it where the parameter is, in float32."""
    for changes in ({}, {"optimizer": "adamw"}):
        model, optimizer = restored(out, torch.amp.GradScaler("cpu", enabled=False), **changes)
        for parameter in model.parameters():
            count = optimizer.state[parameter]["step"]
            assert (count.dtype, count.device, count.item()) == (torch.float32, parameter.device, 4.0)


def test_other_data_under_the_same_name_is_said() -> None:
    def said(parts: str) -> list[str]:
        return [f"changed since the checkpoint: the {parts} data in shards"]

    known: list[str | None] = ["a", "b", "a+c"]
    nothing: list[str | None] = [None, ""]
    for was in known + nothing:
        for now in known + nothing:
            differ = was in known and now in known and "b" in (was, now) and was != now
            assert changed_data(was, now, "shards") == (said("training") if differ else [])
    assert changed_data("a+c", "a+d", "shards") == said("validation")
    assert changed_data("a+c", "b+d", "shards") == said("training and validation")


def test_progress_comes_back_and_may_be_missing(out: Path) -> None:
    saved = Progress(samples=12, data="abc", loss=1.5, diverged=False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    save(out, 6, scaler, saved)
    assert read_progress(checkpoint.read_state(step(out, 6))) == saved
    assert checkpoint.read_state(step(out, 6))["device"] == "cpu"
    assert build(with_(out=out, resume=True)).resumed == saved
    save(out, 7, scaler, dataclasses.replace(saved, loss=math.inf))
    assert read_progress(checkpoint.read_state(step(out, 7))).loss is None
    edit_state(step(out, 7), lambda state: state.pop("progress"))
    assert read_progress(checkpoint.read_state(step(out, 7))) == Progress()
    edit_state(step(out, 7), lambda state: state.update(progress={"samples": 3, "of a later version": 1}))
    assert read_progress(checkpoint.read_state(step(out, 7))) == Progress(samples=3)


def test_a_caller_without_a_reporter_is_warned_of_what_is_resumed_otherwise(out: Path) -> None:
    """Python gives every setting, if only by its default: --lr would fall back to it in silence."""
    with pytest.warns(RuntimeWarning, match=r"changed since the checkpoint: .*--lr 0\.0003 \(was 0\.01\)"):
        train(TrainConfig(out=out, resume=True, steps=5))


# ----------------------------------------------------------------------------------------------------- keep


def test_the_newest_checkpoint_that_has_not_diverged_is_kept(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    kept = []
    for number, diverged in enumerate([False, False, True, True, True, False, False], 1):
        save(tmp_path, number, scaler, Progress(diverged=diverged))
        kept.append([int(name[5:]) for name in names(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]


def test_what_is_not_known_to_be_good_takes_no_good_one_away(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for number, diverged in ((1, False), (2, False), (3, True)):
        save(tmp_path, number, scaler, Progress(diverged=diverged))
    (step(tmp_path, 2) / "state.json").write_bytes(b"")
    shutil.copytree(step(tmp_path, 3), step(tmp_path, 1))
    edit_state(step(tmp_path, 1), lambda state: state.update(step=1, progress={"diverged": False}))
    for number in (4, 5):
        save(tmp_path, number, scaler, Progress(diverged=True))
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]


def test_a_run_that_diverged_is_good_again_when_its_loss_is_near_the_last_good_one(tmp_path: Path) -> None:
    """Also over resumes: falling a little, it is not, and the good checkpoint stays."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    save(tmp_path, 1, scaler, Progress(loss=1.0))
    save(tmp_path, 2, scaler, Progress(loss=9.0, diverged=True))
    for loss, keeps in ((2.9, [1, 3]), (1.9, [4])):
        run = build(with_(out=tmp_path, resume=True, keep_checkpoints=1))
        loop = Loop(run, Reporters(), Outputs(run, print), 0.0)
        assert (loop.diverged, loop.good_loss) == (True, 1.0)
        loop.done += 1
        loop.meter.losses, loop.meter.interval = [loss], [loss]
        loop._watch()
        loop._save("")
        assert [int(name[5:]) for name in names(tmp_path)] == keeps


def test_resuming_what_had_diverged_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    save(tmp_path, 1, scaler)
    save(tmp_path, 2, scaler, Progress(diverged=True))
    latest, notes = checkpoint.to_resume(tmp_path)
    assert latest == step(tmp_path, 2)
    assert notes == [
        f"the loss had diverged when {step(tmp_path, 2)} was saved; the last good one is {step(tmp_path, 1)}: "
        "move the newer away to go back"
    ]


def test_copies_are_neither_resumed_nor_counted_nor_deleted(out: Path) -> None:
    others = ("step-best", "step-final", "step-", "step-4x", "step-00000004-copy", "damaged-step-00000001")
    for name in others:
        shutil.copytree(step(out, 2), out / "checkpoints" / name)
    (out / "checkpoints" / "step-00000099").touch()  # a file is none
    assert train(with_(out=out, steps=8, resume=True)).steps_done == 8
    assert names(out) == sorted([*others, "step-00000006", "step-00000008", "step-00000099"])


def test_steps_are_compared_as_numbers(out: Path) -> None:
    for name, number in (("step-10", 10), ("step-9", 9)):
        edit_state(
            Path(shutil.copytree(step(out, 4), out / "checkpoints" / name)), lambda s, n=number: s.update(step=n)
        )
    assert [path.name for path in checkpoint.checkpoints(out)][-2:] == ["step-9", "step-10"]


def test_a_link_is_deleted_and_what_it_leads_to_stays(out: Path, tmp_path: Path) -> None:
    archive = Path(shutil.move(step(out, 2), tmp_path / "archive"))
    step(out, 2).symlink_to(archive)
    train(with_(out=out, steps=8, resume=True))
    assert names(out) == ["step-00000006", "step-00000008"] and (archive / "state.json").exists()


# ----------------------------------------------------------------------------------------------- unreadable


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.SUMS])
def test_an_unreadable_file_is_not_damaged(out: Path, name: str) -> None:
    """An input/output error, as of a disk or a network that fails: the contents may be right."""
    path = step(out, 4) / name
    path.unlink()
    path.symlink_to("/proc/self/mem")  # its first byte can't be read
    message = (
        f"can't read .*{name}: Input/output error; mend that, or move {step(out, 4)} away to use the one before it"
    )
    with pytest.raises(ConfigError, match=message):
        train(with_(out=out, resume=True))
    assert names(out) == ["step-00000002", "step-00000004"]
    shutil.move(step(out, 4), out / "elsewhere")
    assert train(with_(out=out, resume=True)).steps_done == 4


def test_an_unreadable_folder_is_not_an_empty_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.os, "scandir", denied)
    for resume in (True, "auto", False):
        with pytest.raises(ConfigError, match=r"can't read .*checkpoints: Permission denied"):
            train(with_(out=out, resume=resume))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_damage_and_is_not_waited_for(out: Path, make: Callable[[Path], object]) -> None:
    for name in (checkpoint.MODEL, checkpoint.SUMS):
        (step(out, 4) / name).unlink()
        make(step(out, 4) / name)
    latest, notes = checkpoint.to_resume(out)
    assert latest == step(out, 2) and len(notes) == 1 and notes[0].endswith("; set aside as damaged-step-00000004")


def test_a_damaged_checkpoint_that_can_not_be_renamed_is_said(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (step(out, 4) / checkpoint.MODEL).write_bytes(b"")

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint.os, "replace", read_only)
    latest, notes = checkpoint.to_resume(out)
    assert latest == step(out, 2)
    assert notes[0].endswith("; can't set it aside as damaged-step-00000004: Read-only file system")


def test_a_second_damaged_checkpoint_of_a_step_keeps_the_first(out: Path) -> None:
    for _ in range(2):
        (step(out, 4) / checkpoint.MODEL).write_bytes(b"")
        checkpoint.to_resume(out)
        train(with_(out=out, resume=True))
    assert names(out) == [
        "damaged-step-00000004", "damaged-step-00000004-2", "step-00000002", "step-00000004",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- lies

Edit = Callable[[Any], object]


def put(*path: str, value: Any) -> Edit:
    def edit(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return edit


def drop(*path: str) -> Edit:
    def edit(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return edit


SCALER = {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
STATES: dict[str, tuple[Edit, str]] = {
    **{f"no {key}": (drop(key), f"lacks {key}") for key in ("step", "config", "model", "scaler")},
    **{f"no model.{key}": (drop("model", key), f"lacks model.{key}") for key in ("n_layer", "vocab_size", "dropout")},
    "no config.data": (drop("config", "data"), "lacks config.data"),
    "format 2.0": (put("format", value=2.0), "not a checkpoint of format 1 or 2"),
    "format true": (put("format", value=True), "not a checkpoint of format 1 or 2"),
    "format 3": (put("format", value=3), "not a checkpoint of format 1 or 2"),
    "negative step": (put("step", value=-4), "step must be an integer at least 0, got -4"),
    "step 4.0": (put("step", value=4.0), "step must be an integer at least 0, got 4.0"),
    "another step": (put("step", value=5), "is of step 5, not of the step that its folder is named for"),
    "long step": (put("step", value=10**4000), "step must be an integer"),
    "list": (put("model", value=[]), "model must be an object, got []"),
    "NaN": (put("model", "n_embd", value=math.nan), "model.n_embd must be an integer from 1 to 2147483647, got nan"),
    "text": (put("model", "n_layer", value="1"), "model.n_layer must be an integer"),
    "truth": (put("model", "n_layer", value=True), "model.n_layer must be an integer"),
    "infinite dropout": (put("model", "dropout", value=math.inf), "model.dropout must be a number from 0 to 1"),
    "dropout 1": (put("model", "dropout", value=1), "describes no model: --dropout must be in [0, 1)"),
    "heads": (put("model", "n_head", value=3), "describes no model: --n-embd 16 is not divisible by --n-head 3"),
    "unknown": (put("model", "n_expert", value=8), "describes no model: got an unexpected keyword argument"),
    "end of text": (put("model", "end_of_text", value="x"), "model.end_of_text must be null or an integer"),
    "4 billion": (put("model", "block_size", value=4 * 10**9), "model.block_size must be an integer from 1"),
    "2 billion": (put("model", "block_size", value=2 * 10**9), "describes a model of 32,000,0"),
    "layers": (put("model", "n_layer", value=2 * 10**9), "describes a model of "),
    "config text": (put("config", "block_size", value="8"), "config.block_size must be an integer from 1"),
    "config size": (put("config", "n_embd", value=math.nan), "config.n_embd must be an integer from 1"),
    "data": (put("config", "data", value=7), "config.data must be a string, got 7"),
    "seed": (put("config", "seed", value=-1), "config.seed must be an integer from 0"),
    "scaler list": (put("scaler", value=[1]), "scaler must be an object, got [1]"),
    "scaler lacks": (put("scaler", value={"scale": 8.0}), "lacks scaler.growth_factor"),
    "scale text": (put("scaler", value=SCALER | {"scale": "8"}), "scaler.scale must be a number"),
    "scale 0": (put("scaler", value=SCALER | {"scale": 0.0}), "scaler.scale must be a number"),
    "scale NaN": (put("scaler", value=SCALER | {"scale": math.nan}), "scaler.scale must be a number"),
    "scale long": (put("scaler", value=SCALER | {"scale": 10**4000}), "scaler.scale must be a number"),
    "interval": (put("scaler", value=SCALER | {"growth_interval": 0.5}), "scaler.growth_interval must be an integer"),
    "progress": (put("progress", value=[]), "progress must be an object, got []"),
    "samples": (put("progress", value={"samples": -1}), "progress.samples must be null or an integer at least 0"),
    "loss": (put("progress", value={"loss": math.inf}), "progress.loss must be null or a number"),
    "diverged": (put("progress", value={"diverged": 1}), "progress.diverged must be true or false, got 1"),
}  # fmt: skip


def refusal(out: Path) -> str:
    """The line in which a run is not resumed; nothing has been renamed, and nothing large allocated."""
    with pytest.raises(ConfigError) as error:
        train(TrainConfig(out=out, resume=True, device="cpu"))
    assert names(out) == ["step-00000002", "step-00000004"]
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_lies_is_one_line(out: Path, name: str) -> None:
    edit, message = STATES[name]
    edit_state(step(out, 4), edit)
    text = refusal(out)
    assert str(step(out, 4) / "state.json") in text and message in text
    with pytest.raises(ConfigError) as error:
        checkpoint.load_model(out)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": ' + "1" * 5000 + "}", "null", '{"step": NaN'])
def test_a_state_that_is_no_object_is_one_line(out: Path, text: str) -> None:
    (step(out, 4) / "state.json").write_text(text)
    seal(step(out, 4))
    assert f"can't read {step(out, 4) / 'state.json'}: " in refusal(out)


WEIGHT = "h.0.mlp.c_fc.weight"
TENSORS: dict[str, tuple[str, Edit, str]] = {
    "missing": (checkpoint.MODEL, drop("ln_f.bias"), "describes a model of "),
    "renamed": (checkpoint.MODEL, lambda t: t.update(other=t.pop("ln_f.bias")), "doesn't fit: it lacks ln_f.bias"),
    "extra": (checkpoint.MODEL, put("other", value=torch.zeros(2)), "describes a model of "),
    "empty extra": (checkpoint.MODEL, put("other", value=torch.zeros(0)), "it has other, which this model has not"),
    "misshapen": (checkpoint.MODEL, lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}),
                  f"{WEIGHT} is [16, 64], not [64, 16]"),
    "integers": (checkpoint.MODEL, lambda t: t.update({WEIGHT: t[WEIGHT].int()}), f"{WEIGHT} is of type I32, not F32"),
    "NaN": (checkpoint.MODEL, lambda t: t[WEIGHT].fill_(math.nan), f"{WEIGHT} is not finite"),
    "no moments": (OPTIMIZER, dict.clear, "(and 47 more)"),
    "no count": (OPTIMIZER, drop(f"{WEIGHT}/step"), f"it lacks {WEIGHT}/step"),
    "misshapen average": (OPTIMIZER, put(f"{WEIGHT}/exp_avg", value=torch.zeros(3)), "is [3], not [64, 1"),
    "vector of counts": (OPTIMIZER, put(f"{WEIGHT}/step", value=torch.zeros(1)), "/step is [1], not []"),
    "another's average": (OPTIMIZER, put("other/exp_avg", value=torch.zeros(3)), "it has other/exp_avg, w"),
    "infinite average": (OPTIMIZER, lambda t: t[f"{WEIGHT}/exp_avg_sq"].fill_(math.inf),
                         f"{WEIGHT}/exp_avg_sq is not finite, the run had diverged; move "),
    "short generator": (RNG, put("cpu", value=torch.zeros(5).byte()), "holds no state of a generator"),
    "generator of floats": (RNG, put("cpu", value=torch.zeros(5056)), "holds no state of a generator"),
    "zeros for a generator": (RNG, lambda t: t["cpu"].zero_(), "holds no state of a generator"),
    "no generator": (RNG, lambda t: t.update(other=t.pop("cpu")), "lacks the CPU's generator"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_lie_are_one_line(out: Path, name: str) -> None:
    file, edit, message = TENSORS[name]
    edit_tensors(step(out, 4), file, edit)
    text = refusal(out)
    assert message in text and str(step(out, 4)) in text


@pytest.mark.parametrize("name", [checkpoint.MODEL, OPTIMIZER, RNG])
@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x10\0\0\0\0\0\0\0" + b"[" * 16, b"text " * 100])
def test_what_is_no_safetensors_file_is_one_line(out: Path, name: str, data: bytes) -> None:
    (step(out, 4) / name).write_bytes(data)
    seal(step(out, 4))
    assert f"can't read {step(out, 4) / name}: " in refusal(out)


def test_a_checkpoint_without_steps_has_no_moments(tmp_path: Path) -> None:
    run = build(CONFIG)
    checkpoint.save(tmp_path, 0, run.config, run.state)
    assert train(with_(out=tmp_path, resume=True)).losses == train(CONFIG).losses


def test_a_save_that_fails_leaves_the_others_whatever_keep_says(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save(out, 9, torch.amp.GradScaler("cpu", enabled=False))
    assert names(out) == ["step-00000002", "step-00000004"]
