"""Learning rates, gradient clipping and weight decay."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2 import train
from fastgpt2.optim.schedules import learning_rate
from fastgpt2.run import build
from tests.trainer.runs import Watch, tiny


def test_learning_rates() -> None:
    config = tiny(steps=101, warmup_steps=1, lr=1.0, schedule="linear")
    assert [round(learning_rate(config.lr, s, config), 6) for s in (0, 1, 51, 100)] == [
        1.0,
        1.0,
        round(1 - 0.9 * 50 / 99, 6),
        0.1,
    ]
    config = dataclasses.replace(config, warmup_steps=10)
    assert [learning_rate(config.lr, s, config) for s in range(10)] == pytest.approx([0.1 * (s + 1) for s in range(10)])
    config = dataclasses.replace(config, schedule="cosine", steps=111)
    assert learning_rate(config.lr, 60, config) == pytest.approx(0.55)
    assert learning_rate(config.lr, 110, config) == pytest.approx(0.1)
    assert {learning_rate(1e-2, s, tiny()) for s in range(6)} == {1e-2}


def test_a_schedule_scales_each_groups_own_peak() -> None:
    run = build(tiny(lr=1e-2, steps=11, schedule="linear"))
    matrices, vectors = run.state.optimizer.param_groups
    vectors["peak_lr"] = 4e-2
    for step, fraction in ((0, 1.0), (5, 0.55), (10, 0.1)):
        run.step(step, run.next_tokens(0))
        assert [matrices["lr"], vectors["lr"]] == pytest.approx([1e-2 * fraction, 4e-2 * fraction])


def test_a_rate_read_from_memory_gives_the_same_bits() -> None:
    """A CUDA graph reads the rate from a float32 tensor; without a graph it is a Python float."""
    number, memory = (build(tiny(schedule="cosine", steps=50, lr=1e-3)) for _ in range(2))
    for group in memory.state.optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    for step in range(50):
        losses = [run.step(step, run.next_tokens(step))[0] for run in (number, memory)]
        assert losses[0].item() == losses[1].item(), step


def test_the_rate_that_is_logged_is_the_one_that_the_step_had() -> None:
    class Rates(Watch):
        def logged(self, record: dict[str, Any]) -> None:
            self.records.append(record | {"used": self.run.state.optimizer.param_groups[-1]["lr"]})

    watch = Rates()
    result = train(tiny(schedule="cosine", warmup_steps=2, log_every=1), reporters=[watch])
    expected = [learning_rate(result.config.lr, step, result.config) for step in range(6)]
    assert [record["lr"] for record in watch.records] == expected
    assert [record["used"] for record in watch.records] == [float(np.float32(rate)) for rate in expected]


def test_clipping_scales_to_the_norm_that_is_reported() -> None:
    run, clipped = build(tiny(lr=0.0)), build(tiny(lr=0.0, grad_clip=0.05))
    tokens = run.next_tokens(0)
    _, norm = run.step(0, tokens, want_norm=True)
    _, same_norm = clipped.step(0, tokens)
    assert norm is not None
    assert same_norm is not None
    by_hand = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in run.parameters if p.grad is not None))
    assert norm.item() == pytest.approx(by_hand, rel=1e-5)
    assert same_norm.item() == norm.item() > 0.05
    after = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in clipped.parameters if p.grad is not None))
    assert after == pytest.approx(0.05, rel=1e-4)


def test_adamw_decays_matrices_only() -> None:
    config = tiny(optimizer="adamw", weight_decay=0.5, lr=0.1)
    run = build(config)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for p in run.parameters:
        p.grad = torch.zeros_like(p)
    run.state.optimizer.step()
    for name, p in run.model.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0, msg=name)
