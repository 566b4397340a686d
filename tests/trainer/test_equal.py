"""Several processes follow one: the same losses and gradient norms, whatever shares the model."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt2 import TrainConfig, sharding, train
from fastgpt2.batch import Rows
from fastgpt2.data import ShardTokens, split
from fastgpt2.ops import Ops, make_ops
from fastgpt2.parallel import joined
from fastgpt2.run import build
from fastgpt2.slots import SLOTS
from tests import ranks
from tests.trainer.runs import Watch, tiny

LOSS, NORM = 5e-7, 5e-6
"""Relative. Adam hides a gradient that is summed over the processes instead of averaged; its norm does not."""
MODES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "hsdp": {"parallel": "hsdp", "shard_size": 2},
    "fsdp, kept": {"parallel": "fsdp", "reshard": False},
}
HERE = "tests.trainer.test_equal"


def with_(**changes: Any) -> TrainConfig:
    """A run that learns a text and clips at every step. Memorising a batch would amplify the last digits."""
    changes = {"data": argparse.__file__, "vocab_size": None, "batch_size": 2, "lr": 1e-3, **changes}
    return tiny(**{"grad_clip": 1.0, "log_every": 1, **changes})


def followed(config: TrainConfig) -> dict[str, list[float]]:
    """Each step's loss and the norm of its gradients."""
    watch = Watch()
    watch.every_rank = True
    losses = train(config, reporters=[watch]).losses
    return {"loss": losses, "norm": [record["grad_norm"] for record in watch.records if "grad_norm" in record]}


def all_followed(configs: list[TrainConfig]) -> list[dict[str, list[float]]]:
    return [followed(config) for config in configs]


def in_processes(world: int, configs: list[TrainConfig]) -> list[dict[str, list[float]]]:
    """What each configuration's processes followed, which must be the same bits on each."""
    by_rank = ranks.call(world, f"{HERE}:all_followed", configs)
    assert all(found == by_rank[0] for found in by_rank)
    return by_rank[0]


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("world", "accum", "modes"),
    [pytest.param(2, 2, ["ddp", "fsdp"], marks=pytest.mark.numeric), (4, 1, ["ddp", "fsdp", "hsdp"])],
)
def test_several_processes_follow_one(world: int, accum: int, modes: list[str]) -> None:
    config = with_(steps=50)
    one = followed(dataclasses.replace(config, grad_accum=accum * world))
    assert one["loss"][-1] < one["loss"][0] - 0.5
    several = in_processes(world, [dataclasses.replace(config, grad_accum=accum, **MODES[name]) for name in modes])
    for name, found in zip(modes, several, strict=True):
        assert difference(found["loss"], one["loss"]) <= LOSS, name
        assert difference(found["norm"], one["norm"]) <= NORM, name


def test_shards_may_be_uneven_and_empty() -> None:
    """Over four processes: biases of ten elements, and positions of which one process has none."""
    config = with_(steps=3, n_embd=10, block_size=3)
    one = followed(dataclasses.replace(config, grad_accum=4))
    for found in in_processes(4, [dataclasses.replace(config, **MODES[name]) for name in ("fsdp", "hsdp")]):
        assert difference(found["loss"], one["loss"]) <= LOSS
        assert difference(found["norm"], one["norm"]) <= NORM


BITWISE: dict[str, dict[str, Any]] = {
    "float32": {},
    "recomputed": {"recompute": "blocks"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, a bfloat16 stream": {"dtype": "bfloat16", "stream": "bfloat16"},
    "documents": {"document_mask": True, "end_of_text": 7},
}


def test_two_processes_have_the_bits_of_two_micro_steps() -> None:
    """Without clipping: the norm of sharded gradients is summed in another order."""
    cases = [with_(steps=5, grad_clip=0.0, **changes) for changes in BITWISE.values()]
    one = all_followed([dataclasses.replace(case, grad_accum=2) for case in cases])
    for mode in (*MODES.values(), {"parallel": "hsdp", "shard_size": 1}):
        several = in_processes(2, [dataclasses.replace(case, **mode) for case in cases])
        for name, found, expected in zip(BITWISE, several, one, strict=True):
            assert found["loss"] == expected["loss"], (name, mode)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_so_have_our_kernels(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Sharded, a norm doesn't return the gradient of the bias before it: neither may it in the one process."""
    slots = dict.fromkeys(SLOTS, "triton")
    shape = {"n_head": 1, "n_embd": 16, "block_size": 8, "batch_size": 1}
    config = with_(steps=2, grad_clip=0.0, dtype="bfloat16", **shape, **slots)
    (found,) = in_processes(2, [dataclasses.replace(config, parallel=mode)])
    if mode == "fsdp":
        monkeypatch.setattr("fastgpt2.run.make_ops", without_norms_bias_gradient(make_ops))
    assert found["loss"] == followed(dataclasses.replace(config, grad_accum=2))["loss"]


def without_norms_bias_gradient(make: Callable[..., tuple[Ops, dict[str, str]]]) -> Callable[..., Any]:
    def made(*arguments: Any) -> tuple[Ops, dict[str, str]]:
        ops, chosen = make(*arguments)
        return dataclasses.replace(ops, bias_gradients=ops.bias_gradients - {"norm"}), chosen

    return made


def _compiled_eagerly(config: TrainConfig) -> tuple[dict[str, list[float]], int]:
    """What a compiled run followed, and the number of its graphs. They are traced, and run as PyTorch would."""
    compiles = sharding.compile_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgpt2.run.compile_model", lambda *given: compiles(*given[:3], "eager"))
        found = followed(dataclasses.replace(config, compile=True))
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_parts_are_few_and_shared_by_all_blocks(dtype: str) -> None:
    """FSDP's hooks lie between the parts. torch.compile refuses a ninth variant of a function."""
    config = with_(steps=2, n_layer=10, n_embd=16, dtype=dtype, eval_every=2, eval_sequences=2, parallel="fsdp")
    (found, graphs), _ = ranks.call(2, f"{HERE}:_compiled_eagerly", config)
    assert graphs == {"float32": 4, "bfloat16": 8}[dtype]
    plain = followed(dataclasses.replace(config, grad_accum=2))
    assert difference(found["loss"], plain["loss"]) <= {"float32": LOSS, "bfloat16": 1e-3}[dtype]


def _dropout() -> list[list[float]]:
    """Losses of two steps and the first step again, on the same tokens in each process."""
    with joined("cpu", 60):
        run = build(with_(dropout=0.5, lr=0.0))
        tokens = torch.zeros(1, 2, 17, dtype=torch.int64)
        return [run.step(step, tokens)[0].tolist() for step in (0, 1, 0)]


def test_dropout_differs_between_processes_and_steps_and_comes_again() -> None:
    first, second = ranks.call(2, f"{HERE}:_dropout")
    assert len({*first, *second}) == 4
    assert first[0] == first[2] and second[0] == second[2]


def _overflow() -> list[tuple[bool, float, int]]:
    """After a gradient that is infinite in one process's part: are the weights unchanged, the scale, steps skipped."""
    found = []
    with joined("cpu", 60) as own:
        for mode in ("ddp", "fsdp"):
            run = build(with_(parallel=mode))
            run.state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            before = [sharding.own_part(parameter).clone() for parameter in run.parameters]
            inputs, targets = split(run.next_tokens(0)[0])
            run.state.backward(run.called(inputs, targets))
            if own.rank == 1 or mode == "ddp":
                assert run.parameters[0].grad is not None
                sharding.own_part(run.parameters[0].grad)[0, 0] = math.inf
            run.state.update()
            after = [sharding.own_part(parameter) for parameter in run.parameters]
            same = all(map(torch.equal, before, after))
            found.append((same, run.state.scaler.get_scale(), run.skipped_steps(1)))
    return found


def test_an_overflow_in_one_shard_skips_the_step_everywhere() -> None:
    for found in ranks.call(2, f"{HERE}:_overflow"):
        assert found == [(True, 2.0, 1), (True, 2.0, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_gpus_follow_one(dtype: str) -> None:
    """By NCCL, as the processes of a CPU do by gloo. Compiled too."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA GPUs, found {torch.cuda.device_count()}")
    config = with_(steps=20, device="cuda", dtype=dtype)
    one = followed(dataclasses.replace(config, grad_accum=2))
    cases = [{**mode, "compile": compiled} for mode in MODES.values() for compiled in (False, True)]
    several = in_processes(2, [dataclasses.replace(config, **case) for case in cases])
    loss = {"float32": LOSS, "bfloat16": 1e-3, "float16": 1e-3}[dtype]
    for case, found in zip(cases, several, strict=True):
        assert difference(found["loss"], one["loss"]) <= loss, case


# ------------------------------------------------------------------------------------------------------ planted


def _with_summed_gradients() -> list[dict[str, list[float]]]:
    averaged = sharding.spread

    def summed(model: Any, config: Any, own: Any, device: torch.device) -> nn.Module:
        called = averaged(model, config, own, device)
        if hasattr(model, "set_gradient_divide_factor"):
            model.set_force_sum_reduction_for_comms(True)
            model.set_gradient_divide_factor(1.0)
        else:
            for parameter in model.parameters():
                parameter.register_hook(lambda gradient: gradient * own.world)
        return called

    return _planted("fastgpt2.run.spread", summed)


def _with_a_duplicate_batch() -> list[dict[str, list[float]]]:
    of_rank: Callable[..., Tensor] = ShardTokens.tokens

    def of_rank_0(self: Any, step: int) -> Tensor:
        self.rows = Rows(self.rows.batch_size, rank=0, world=2)
        return of_rank(self, step)

    return _planted("fastgpt2.data.ShardTokens.tokens", of_rank_0)


def _planted(place: str, fault: Callable[..., Any]) -> list[dict[str, list[float]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, fault)
        return all_followed([with_(steps=5), with_(steps=5, parallel="fsdp")])


def test_a_planted_sum_and_a_planted_duplicate_batch_are_found() -> None:
    one = followed(with_(steps=5, grad_accum=2))
    (summed, *_), (duplicate, *_) = (
        ranks.call(2, f"{HERE}:{fault.__name__}") for fault in (_with_summed_gradients, _with_a_duplicate_batch)
    )
    for found in summed:
        assert difference(found["norm"], one["norm"]) > 0.5
    for found in duplicate:
        assert difference(found["loss"], one["loss"]) > 1e3 * LOSS
