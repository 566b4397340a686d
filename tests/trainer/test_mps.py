"""--device mps: what it takes and refuses, and a run on an MPS that is simulated on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastgpt2 import ConfigError, TrainConfig, train
from fastgpt2.device import pick_device
from fastgpt2.ops import Site, make_ops
from fastgpt2.run import build, settle
from fastgpt2.slots import SLOTS
from fastgpt2.verify import main as verify

MPS = torch.device("mps")
SUPPORTED = {"attn": ["sdpa"], "mlp": ["torch"], "norm": ["torch"], "loss": ["torch", "chunked"]}


class PlayedMps(TorchFunctionMode):
    """Sends to the CPU what is meant for MPS, and counts calls of torch.mps. PyTorch for Linux has no MPS."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.seeds: list[int] = []
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.mps, "synchronize", lambda: self.calls.append("synchronize"))
        monkeypatch.setattr(torch.mps, "manual_seed", self.seeds.append)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def on_cpu(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) and value == MPS else value

        return function(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> PlayedMps:
    return PlayedMps(monkeypatch)


def asked(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": "tiny", "steps": 3, "batch_size": 2, "device": "mps", "dropout": 0.1, **changes})


def test_mps_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"--device mps: torch .* sees no Apple GPU here; use --device cpu"):
        pick_device("mps")


def test_mps_is_taken_but_never_the_default(mps: PlayedMps) -> None:
    assert pick_device("mps") == MPS
    assert pick_device(None).type in ("cpu", "cuda")


def test_a_run_on_mps_is_float32_without_autocast(mps: PlayedMps) -> None:
    config, device = settle(TrainConfig(device="mps"))
    assert (device, config.dtype, config.recompute, config.batch_size) == (MPS, "float32", "none", 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "bfloat16"}, "--dtype bfloat16 is not supported with --device mps: use --dtype float32"),
        ({"dtype": "float16"}, "--dtype float16 is not supported with --device mps: use --dtype float32"),
        ({"dtype": "float64"}, "--dtype float64 is not supported with --device mps: use --dtype float32"),
        ({"dtype": "tf32"}, "--dtype tf32 is not supported with --device mps: use --dtype float32"),
        ({"compile": True}, "--compile is not supported with --device mps: leave it out"),
        ({"cuda_graph": True}, "--cuda-graph needs a CUDA GPU: leave it out"),
    ],
)
def test_what_mps_does_not_take(changes: dict[str, Any], said: str, mps: PlayedMps) -> None:
    with pytest.raises(ConfigError) as error:
        build(asked(**changes))
    assert str(error.value) == said


def test_each_choice_of_a_slot_runs_on_mps_or_says_what_does() -> None:
    site = Site(device=MPS)
    for slot, table in SLOTS.items():
        for name in table:
            if name in SUPPORTED[slot]:
                assert make_ops({slot: name}, site)[1][slot] == name
                continue
            with pytest.raises(ConfigError) as error:
                make_ops({slot: name}, site)
            instead = SUPPORTED[slot][-1]
            reason = "it is not supported with --device mps"
            assert str(error.value) == f"--{slot} {name} can't run here: {reason}; use --{slot} {instead}"
    assert make_ops(site=site)[1] == {"attn": "sdpa", "mlp": "torch", "norm": "torch", "loss": "chunked"}


def test_a_run_on_played_mps_is_the_cpus_run(mps: PlayedMps) -> None:
    on_cpu = train(asked(device="cpu"))
    with mps, pytest.warns(RuntimeWarning, match="--device mps is untested"):
        result = train(asked())
    assert result.losses == on_cpu.losses
    assert result.peak_memory_bytes is None
    assert "synchronize" in mps.calls


def test_a_functions_own_attention_is_tried_on_mps(mps: PlayedMps) -> None:
    with mps:
        run = build(asked(attn="fastgpt2.backends.attention:sdpa_attention"))
    assert run.chosen["attn"] == "fastgpt2.backends.attention:sdpa_attention"


def test_a_step_seeds_the_generator_of_mps(mps: PlayedMps) -> None:
    with mps:
        train(asked(steps=3))
    assert len(set(mps.seeds[-3:])) == 3


def test_verify_has_no_reference_on_mps(mps: PlayedMps) -> None:
    with pytest.raises(ConfigError, match="--device mps has no float64 for the reference: use --device cpu"):
        verify(["--device", "mps"])
