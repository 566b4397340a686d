"""state.json: progress, notes on what changed since, and checkpoints with valid sums but invalid contents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt2 import ConfigError, TrainConfig, checkpoint, train
from fastgpt2.run import build
from fastgpt2.state_json import Progress, carried_over, changed_data, read_progress
from tests.trainer.runs import MODEL, OPTIMIZER, SMALL, edit_state, edit_tensors, names, save, seal, step

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = dataclasses.replace(SMALL, batch_size=3, steps=4)


def with_(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


SCALED = {"format": 3, "processes": 1, "scaler": {"scale": 8.0}, "device": "cuda", "config": {"device": None}}
PLAIN = {"format": 3, "processes": 1, "scaler": {}, "device": "cpu", "config": {"device": None}}
OLDER = {"format": 2, "processes": 1, "scaler": {}, "config": {"device": "cuda:0"}}
OLDEST: dict[str, Any] = {"format": 1, "processes": 1, "scaler": {}, "config": {}}


@pytest.mark.parametrize(
    ("state", "changes", "device", "note"),
    [
        (
            PLAIN,
            {"dtype": "float16"},
            "cpu",
            "has no gradient scaler, because it was not trained in float16: starting a new one",
        ),
        (SCALED, {"dtype": "bfloat16"}, "cuda", "gradient scaler is dropped: --dtype bfloat16 has none"),
        (SCALED, {"dtype": "float16", "dropout": 0.1}, "cuda", None),
        (PLAIN, {"dtype": "float32", "dropout": 0.1}, "cpu", None),
        (PLAIN, {}, "cuda", "changed since the checkpoint: --device cuda (was cpu): results agree up to rounding"),
        (PLAIN, {"dropout": 0.1}, "cuda", "rounding; dropout masks differ"),
        (OLDER, {}, "cuda", None),
        (OLDER, {}, "cpu", "changed since the checkpoint: --device cpu (was cuda): results agree up to rounding"),
        (PLAIN | {"processes": 2}, {}, "cpu", "the number of processes, 1 (was 2): results agree up to rounding"),
        (
            PLAIN | {"processes": 2},
            {"dropout": 0.1},
            "cuda",
            "--device cuda (was cpu), the number of processes, 1 (was 2",
        ),
        (OLDEST, {}, "cpu", None),
        (OLDEST, {"dropout": 0.1}, "cpu", "an older version wrote the checkpoint: dropout masks differ from those it "),
    ],
)
def test_what_has_no_counterpart_is_said(
    state: dict[str, Any], changes: dict[str, Any], device: str, note: str | None
) -> None:
    notes = carried_over(state, with_(**changes), torch.device(device))
    assert len(notes) == (note is not None) and all(note in text for text in notes if note)


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
    save(out, 6, saved)
    assert read_progress(checkpoint.read_state(step(out, 6))) == saved
    assert checkpoint.read_state(step(out, 6))["device"] == "cpu"
    assert build(with_(out=out, resume=True)).resumed == saved
    save(out, 7, dataclasses.replace(saved, loss=math.inf))
    assert read_progress(checkpoint.read_state(step(out, 7))).loss is None
    edit_state(step(out, 7), lambda state: state.pop("progress"))
    assert read_progress(checkpoint.read_state(step(out, 7))) == Progress()
    edit_state(step(out, 7), lambda state: state.update(progress={"samples": 3, "of a later version": 1}))
    assert read_progress(checkpoint.read_state(step(out, 7))) == Progress(samples=3)


# ----------------------------------------------------------------------------------------------- contents that can't be

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
    **{f"no {key}": (drop(key), f"lacks {key}") for key in ("step", "processes", "config", "model", "scaler")},
    **{f"no model.{key}": (drop("model", key), f"lacks model.{key}") for key in ("n_layer", "vocab_size", "dropout")},
    "no config.data": (drop("config", "data"), "lacks config.data"),
    "format 2.0": (put("format", value=2.0), "not a checkpoint of format 1 to 3"),
    "format true": (put("format", value=True), "not a checkpoint of format 1 to 3"),
    "format 4": (put("format", value=4), "not a checkpoint of format 1 to 3"),
    "format 0": (put("format", value=0), "not a checkpoint of format 1 to 3"),
    "no process": (put("processes", value=0), "processes must be an integer from 1 to 99999, got 0"),
    "negative step": (put("step", value=-4), "step must be an integer at least 0, got -4"),
    "step 4.0": (put("step", value=4.0), "step must be an integer at least 0, got 4.0"),
    "another step": (put("step", value=5), "has step 5, but its folder is named step-"),
    "long step": (put("step", value=10**4000), "step must be an integer"),
    "list": (put("model", value=[]), "model must be an object, got []"),
    "NaN": (put("model", "n_embd", value=math.nan), "model.n_embd must be an integer from 1 to 2147483647, got nan"),
    "text": (put("model", "n_layer", value="1"), "model.n_layer must be an integer"),
    "truth": (put("model", "n_layer", value=True), "model.n_layer must be an integer"),
    "infinite dropout": (put("model", "dropout", value=math.inf), "model.dropout must be a number from 0 to 1"),
    "dropout 1": (put("model", "dropout", value=1), "describes an invalid model: --dropout must be in [0, 1)"),
    "heads": (put("model", "n_head", value=3), "an invalid model: --n-embd 16 is not divisible by --n-head 3"),
    "unknown": (put("model", "n_expert", value=8), "describes an invalid model: got an unexpected keyword argument"),
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
    """The error of a resume that is refused. Nothing may have been renamed."""
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
    "missing": (MODEL, drop("ln_f.bias"), "describes a model of "),
    "renamed": (MODEL, lambda t: t.update(other=t.pop("ln_f.bias")), "doesn't fit: it lacks ln_f.bias"),
    "extra": (MODEL, put("other", value=torch.zeros(2)), "describes a model of "),
    "empty extra": (MODEL, put("other", value=torch.zeros(0)), "it has other, which this model lacks"),
    "misshapen": (MODEL, lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}),
                  f"{WEIGHT} is [16, 64], not [64, 16]"),
    "integers": (MODEL, lambda t: t.update({WEIGHT: t[WEIGHT].int()}), f"{WEIGHT} is of type I32, not F32"),
    "NaN": (MODEL, lambda t: t[WEIGHT].fill_(math.nan), f"{WEIGHT} is not finite"),
    "no moments": (OPTIMIZER, dict.clear, "(and 47 more)"),
    "no count": (OPTIMIZER, drop(f"{WEIGHT}/step"), f"it lacks {WEIGHT}/step"),
    "misshapen average": (OPTIMIZER, put(f"{WEIGHT}/exp_avg", value=torch.zeros(3)), "is [3], not [64, 1"),
    "vector of counts": (OPTIMIZER, put(f"{WEIGHT}/step", value=torch.zeros(1)), "/step is [1], not []"),
    "another's average": (OPTIMIZER, put("other/exp_avg", value=torch.zeros(3)), "it has other/exp_avg, w"),
    "infinite average": (OPTIMIZER, lambda t: t[f"{WEIGHT}/exp_avg_sq"].fill_(math.inf),
                         f"{WEIGHT}/exp_avg_sq is not finite because the run diverged; move "),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_lie_are_one_line(out: Path, name: str) -> None:
    file, edit, message = TENSORS[name]
    edit_tensors(step(out, 4), file, edit)
    text = refusal(out)
    assert message in text and str(step(out, 4)) in text


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x10\0\0\0\0\0\0\0" + b"[" * 16, b"text " * 100])
def test_what_is_no_safetensors_file_is_one_line(out: Path, name: str, data: bytes) -> None:
    (step(out, 4) / name).write_bytes(data)
    seal(step(out, 4))
    assert f"can't read {step(out, 4) / name}: " in refusal(out)
