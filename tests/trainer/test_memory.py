"""A run too large for any machine is refused before anything is made; one that runs out of memory ends in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastgpt2 import ConfigError, TrainConfig, memory, train
from fastgpt2.command import main
from fastgpt2.console import run_command
from fastgpt2.memory import ADDRESSABLE_BYTES, check_memory, least_bytes, memory_bytes
from fastgpt2.model import GPT
from fastgpt2.run import Run, build
from fastgpt2.settings import resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LARGEST = 2**63 - 1


def settled(**changes: Any) -> TrainConfig:
    return resolve(TrainConfig(**{"model": "tiny", **changes}), cuda=False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 10**8}, "--batch-size or --block-size"),
        ({"batch_size": LARGEST}, "--batch-size or --block-size"),
        ({"grad_accum": 10**15}, "--grad-accum, --batch-size or --block-size"),
        ({"n_layer": 10**9}, "--model, --n-layer or --n-embd"),
        ({"n_embd": 4_000_000_000}, "--model, --n-layer or --n-embd"),
        ({"n_embd": LARGEST - 1, "n_layer": LARGEST, "n_head": 1}, "--model, --n-layer or --n-embd"),
        ({"vocab_size": 9 * 10**18}, "--vocab-size or --n-embd"),
        ({"model": None, "block_size": 10**12}, "--batch-size or --block-size"),
        ({"model": None, "block_size": 10**14, "batch_size": 1, "n_layer": 1}, "--block-size or --n-embd"),
        ({"batch_size": 10**8, "recompute": "blocks"}, "--batch-size or --block-size"),
        ({"batch_size": 10**8, "compile": True}, "--batch-size or --block-size"),
    ],
    ids=str,
)
def test_what_no_machine_holds_is_one_line_before_anything_is_made(
    changes: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt2.run._open_sources", mock.Mock(side_effect=AssertionError("too late")))
    with pytest.raises(ConfigError) as error:
        build(TrainConfig(**{"model": "tiny", "device": "cpu", "out": tmp_path / "run", **changes}))
    message = str(error.value)
    assert message.startswith("training needs at least ") and message.endswith(f": make {named} smaller")
    assert "\n" not in message and len(message) < 200
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("shape", [{}, {"n_layer": 1, "batch_size": 1}, {"batch_size": 64, "grad_accum": 3}], ids=str)
def test_the_bound_is_under_what_a_step_holds(dtype: str, shape: dict[str, Any]) -> None:
    """The bound against what is counted: weights, gradients and moments after a step, or a forward's activations."""
    run = build(TrainConfig(model="tiny", device="cpu", dtype=dtype, recompute="blocks", **shape))
    tokens = run.next_tokens(0)
    kept = memory_of_a_forward(run, tokens[0])
    run.step(0, tokens)
    weights = list(run.model.parameters())
    averages = [x for state in run.state.optimizer.state.values() for x in state.values() if x.dim()]
    stepping = size(*weights, *averages, *(w.grad for w in weights if w.grad is not None))
    bound, _ = least_bytes(run.config, run.model.config, whole_step=True)
    assert bound == size(tokens) + stepping or bound <= size(tokens, *weights) + kept
    assert bound >= size(tokens) + stepping
    host, _ = least_bytes(run.config, run.model.config, whole_step=False)
    assert host == max(size(tokens), size(*GPT(run.model.config).parameters()))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_bound_divides_by_the_processes_that_share_the_model(dtype: str) -> None:
    """It is under what a process holds that has its part of each weight, gradient and average."""
    config = settled(dtype=dtype, batch_size=1)
    model = GPT(config.model_config()).to(config.torch_dtype)
    tokens = config.block_size + 1
    for shards in (1, 2, 3, 64):
        # FSDP2 divides the first dimension, rounded up.
        parts = sum(-(-len(w) // shards) * w[0].numel() * w.element_size() for w in model.parameters())
        bound, _ = least_bytes(config, config.model_config(), whole_step=True, shards=shards)
        inputs = config.n_layer * config.block_size * config.n_embd * config.torch_dtype.itemsize
        assert bound <= 8 * tokens + parts + max(3 * parts, inputs)
        assert bound >= 8 * tokens + 4 * (size(*model.parameters()) // shards)
    alone, _ = least_bytes(config, config.model_config(), whole_step=False)
    assert alone == least_bytes(config, config.model_config(), whole_step=False, shards=64)[0]


def test_a_sharded_model_fits_where_a_whole_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settled(batch_size=1)
    needed, _ = least_bytes(config, config.model_config(), whole_step=True, shards=2)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed)
    check_memory(config, CPU, shards=2)
    with pytest.raises(ConfigError, match="training needs at least"):
        check_memory(config, CPU)
    drawn, _ = least_bytes(config, config.model_config(), whole_step=False)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: drawn - 1)
    with pytest.raises(ConfigError, match="training needs at least"):
        check_memory(config, CPU, shards=64)  # each process draws the whole model


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def memory_of_a_forward(run: Run, tokens: torch.Tensor) -> int:
    from fastgpt2.model import saved_bytes

    with run.autocast():
        return saved_bytes(run.model, tokens[:, :-1].clone(), tokens[:, 1:].clone())


def test_a_run_is_held_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settled()
    needed, _ = least_bytes(config, config.model_config(), whole_step=True)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed)
    check_memory(config, CPU)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=r"at least 0\.0 GiB of memory and the CPU has 0\.0 GiB"):
        check_memory(config, CPU)


@pytest.mark.parametrize(("place", "kind"), [("cuda", "GPU"), ("cpu", "CPU")])
def test_a_gpus_memory_and_its_hosts_are_both_asked(place: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 100 if device.type == place else ADDRESSABLE_BYTES)
    with pytest.raises(ConfigError, match=f"the {kind} has 0.0 GiB"):
        check_memory(settled(), GPU)


# ------------------------------------------------------------------------------------- what a machine has

MEMINFO = "MemTotal:        1000 kB\nMemFree: 5 kB\nSwapCached: 7 kB\nSwapTotal:       24 kB\n"
UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ADDRESSABLE_BYTES),
        ({"meminfo": "SwapTotal: 0 kB\n"}, ADDRESSABLE_BYTES),
        ({"meminfo": MEMINFO}, 1024 * 1024),
        ({"meminfo": MEMINFO, "self/cgroup": "0::/\n", "memory.max": "max\n"}, 1024 * 1024),
        ({"meminfo": MEMINFO, "self/cgroup": "0::/a/b\n", "a/b/memory.max": "max", "a/memory.max": "5000"}, 29576),
        ({"meminfo": MEMINFO, "self/cgroup": "0::/host/path\n", "memory.max": "6000\n"}, 30576),
        ({"meminfo": MEMINFO, "self/cgroup": "0::/../..\n", "memory.max": "6000\n"}, 30576),
        ({"meminfo": MEMINFO, "self/cgroup": "4:cpu,memory:/a:b\n", "memory/a:b/memory.limit_in_bytes": "7000"}, 31576),
        ({"meminfo": MEMINFO, "self/cgroup": "4:memory:/\n", "memory/memory.limit_in_bytes": UNLIMITED}, 1024 * 1024),
    ],
    ids=str,
)
def test_the_memory_of_a_linux_machine(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        folder = tmp_path / "proc" if name in ("meminfo", "self/cgroup") else tmp_path / "cgroup"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    assert memory_bytes(CPU) == expected


def test_this_machine_has_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        swap = 1024 * int((Path("/proc/meminfo").read_text().split("SwapTotal:")[1]).split()[0])
        assert 2**28 < memory_bytes(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + swap
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory_bytes(CPU) == ADDRESSABLE_BYTES


# --------------------------------------------------------------------------------------------- running out

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


def allocate_too_much(*_: object, **__: object) -> None:
    torch.empty(2**46)  # beyond a process's address space


@pytest.mark.parametrize(
    ("fails", "kind"),
    [
        (mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")), "GPU memory"),
        (mock.Mock(side_effect=RuntimeError(CPU_ERROR)), "memory"),
        (mock.Mock(side_effect=MemoryError()), "memory"),
        (allocate_too_much, "memory"),
    ],
)
def test_a_run_out_of_memory_ends_in_one_line(fails: Any, kind: str, tmp_path: Path, monkeypatch: Any, capsys) -> None:
    monkeypatch.setattr(Run, "step", fails)
    assert main(["--model", "tiny", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said == f"error: out of {kind}: halve --batch-size and double --grad-accum to make the same step in less\n"


def test_another_error_of_torch_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "step", mock.Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["--model", "tiny", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "run")])
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_command(mock.Mock(side_effect=RuntimeError("shapes differ")))


def test_any_command_out_of_memory_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(allocate_too_much)
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (1, "")
    assert said.err.startswith("error: out of memory: ") and said.err.count("\n") == 1


def test_what_fits_trains_as_before(tmp_path: Path) -> None:
    assert len(train(TrainConfig(model="tiny", steps=1, batch_size=1, device="cpu")).losses) == 1
