"""A step captured as a CUDA graph: simulated on a CPU, and on a GPU bitwise equal to a step without a graph."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch

from fastgpt2.config import ConfigError, TrainConfig
from fastgpt2.cuda_graph import WARM_UP_STEPS, CapturedStep
from fastgpt2.run import Run, build
from fastgpt2.training import train
from tests.trainer.played_cuda import PlayedCuda
from tests.trainer.runs import tiny, tiny_on_gpu


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuda_graph": True}, "--cuda-graph needs a CUDA GPU"),
        ({"cuda_graph": True, "dtype": "float16"}, "--cuda-graph can't skip a step"),
        ({"cuda_graph": True, "recompute": "blocks", "dropout": 0.1}, "--recompute blocks with --dropout rewinds"),
    ],
)
def test_what_a_cuda_graph_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tiny(**changes))


def test_a_played_graph_is_captured_once_on_the_stream_that_warmed_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    played = PlayedCuda(monkeypatch)
    work = played.capturable(lambda tokens: (tokens.sum(), None))
    step = CapturedStep(torch.device("cpu"))
    results = [step(work, torch.full((2,), i)) for i in range(WARM_UP_STEPS + 3)]
    # The meter reads losses many replays later, so each must be a copy.
    assert [(loss.item(), norm) for loss, norm in results] == [(2 * i, None) for i in range(WARM_UP_STEPS + 3)]
    warm_up = ["side waits for main", "work on side", "main waits for side"]
    assert played.log == WARM_UP_STEPS * warm_up + ["capture on side"]


@pytest.mark.usefixtures("everything_on_a_cpu")
@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_a_played_graph_gives_the_losses_and_norms_of_a_run_without(
    monkeypatch: pytest.MonkeyPatch, grad_clip: float
) -> None:
    played = PlayedCuda(monkeypatch)
    monkeypatch.setattr(Run, "_same_every_step", played.capturable(Run._same_every_step))
    changes = {"grad_clip": grad_clip, "schedule": "cosine", "warmup_steps": 2, "dropout": 0.1, "grad_accum": 2}
    logged, weights = [], []
    for cuda_graph in (True, False):
        run = build(tiny(cuda_graph=cuda_graph, **changes))
        steps = [run.step(step, run.next_tokens(step), want_norm=True) for step in range(WARM_UP_STEPS + 3)]
        logged.append([(loss.item(), None if norm is None else norm.item()) for loss, norm in steps])
        weights.append(run.parameters)
    assert played.log.count("work on side") == WARM_UP_STEPS
    assert logged[0] == logged[1]
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


@pytest.mark.usefixtures("everything_on_a_cpu")
def test_a_played_graph_finds_what_changes_in_the_optimizers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    PlayedCuda(monkeypatch)
    run, plain = build(tiny(cuda_graph=True)), build(tiny())
    rates = [group["lr"] for group in run.state.optimizer.param_groups]
    for step in range(2):
        run.step(step, run.next_tokens(step))
    for group, rate in zip(run.state.optimizer.param_groups, rates, strict=True):
        assert isinstance(rate, torch.Tensor) and group["lr"] is rate and group["capturable"]
    assert not any(group["capturable"] for group in plain.state.optimizer.param_groups)


# ------------------------------------------------------------------------------------------------------------- on a GPU


def graphed(**changes: Any) -> TrainConfig:
    return tiny_on_gpu(n_embd=64, block_size=200, steps=20, cuda_graph=True, **changes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float32"},
        {"dropout": 0.1},
        {"grad_accum": 2, "grad_clip": 0.1, "schedule": "cosine", "warmup_steps": 5},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"compile": True},
        {"recompute": "blocks"},
        {"loss": "chunked"},
        {"attn": "triton"},
        {"attn": "triton", "mlp": "triton", "norm": "triton", "loss": "triton"},
        {"attn": "triton", "mlp": "triton", "norm": "triton", "loss": "triton", "compile": True},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()) or "default",
)
def test_a_cuda_graph_gives_the_same_losses(changes: dict[str, Any]) -> None:
    config = graphed(**changes)
    plain = train(dataclasses.replace(config, cuda_graph=False))
    captured = train(config)
    assert captured.losses == plain.losses
    for p, q in zip(plain.model.parameters(), captured.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.gpu
def test_replays_draw_new_dropout_masks() -> None:
    """With one batch and a learning rate of 0, losses differ only by the masks."""
    for attn in ("sdpa", "triton"):
        losses = train(graphed(dropout=0.3, data="dummy-fixed", lr=0.0, attn=attn)).losses
        assert len(set(losses)) == len(losses), attn


@pytest.mark.gpu
def test_a_replayed_step_is_resumed_to_the_bit(tmp_path) -> None:
    pytest.importorskip("safetensors", reason="checkpoints need safetensors")
    config = graphed(dropout=0.1, grad_clip=1.0, save_every=100)
    whole = train(dataclasses.replace(config, out=tmp_path / "whole"))
    train(dataclasses.replace(config, out=tmp_path / "cut", steps=11))
    rest = train(dataclasses.replace(config, out=tmp_path / "cut", resume=True))
    assert rest.losses == whole.losses[11:]


@pytest.mark.gpu
def test_a_graph_goes_with_its_run() -> None:
    run = build(graphed())
    for step in range(WARM_UP_STEPS + 2):
        run.step(step, run.next_tokens(step))
    captured = weakref.ref(run.captured)
    gc.disable()
    try:
        del run
        assert captured() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_dead_graph_is_collected_before_a_capture() -> None:
    """If a graph is destroyed during another graph's capture, the capture fails."""

    def work(tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        gc.collect()
        return tokens.sum(), None

    step, tokens = CapturedStep(torch.device("cuda")), torch.arange(10, device="cuda")
    for _ in range(WARM_UP_STEPS):
        step(work, tokens)
    dead: list[Any] = [torch.cuda.CUDAGraph()]
    with torch.cuda.graph(dead[0]):
        torch.zeros(1, device="cuda")
    dead.append(dead)
    del dead
    assert [step(work, tokens + i)[0].item() for i in range(3)] == [45, 55, 65]


@pytest.mark.gpu
def test_the_norm_is_logged_whether_or_not_the_graph_computes_it() -> None:
    for clip in (0.0, 1.0):
        config = graphed(grad_clip=clip)
        run, plain = build(config), build(dataclasses.replace(config, cuda_graph=False))
        for step in range(6):
            norms = [r.step(step, r.next_tokens(step), want_norm=True)[1] for r in (run, plain)]
            assert norms[0] is not None and norms[1] is not None
            assert norms[0].item() == norms[1].item()
