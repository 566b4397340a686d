"""The published procedure, promise by promise, and the trainer around it."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import fastgpt2
from fastgpt2 import ConfigError, TrainConfig, reporter, train, training
from fastgpt2.arguments import parse
from fastgpt2.command import main
from fastgpt2.config import preset_name
from fastgpt2.data import split
from fastgpt2.device import peak_flops, peak_memory_bytes
from fastgpt2.metrics import Meter, NonFiniteLossError, read_json_lines
from fastgpt2.model import FLOPS_PER_TOKEN
from fastgpt2.optim.schedules import learning_rate
from fastgpt2.reporter import Reporter
from fastgpt2.run import Run, build, numerics
from fastgpt2.settings import resolve

TINY = TrainConfig(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=16,
    vocab_size=65,
    batch_size=3,
    steps=6,
    lr=1e-2,
    device="cpu",
    dtype="float32",
)


def tiny(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


def weights(config: TrainConfig) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in build(config).model.state_dict().items()}


class Watch(Reporter):
    """Keeps the run and what it told."""

    run: Run

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def started(self, run: Run) -> None:
        self.run = run

    def note(self, text: str) -> None:
        self.notes.append(text)

    def logged(self, record: dict[str, Any]) -> None:
        self.records.append(record)


# -------------------------------------------------------------------------------- the published procedure


def test_the_step_written_out() -> None:
    """The whole procedure once more in its plainest form: the losses are bitwise the trainer's."""
    from fastgpt2.model import GPT

    plain = dataclasses.replace(TINY, loss="torch")
    torch.manual_seed(TINY.seed)
    run = build(plain)
    torch.manual_seed(TINY.seed)
    model = GPT(run.model.config)
    # The trainer rounds the rate to float32, which a CUDA graph reads it as.
    adam = torch.optim.Adam(model.parameters(), lr=float(np.float32(TINY.lr)), fused=True)
    losses = []
    for step in range(6):
        tokens = run.source.tokens(step)[0]
        assert tokens.shape == (3, 16 + 1)
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 65), tokens[:, 1:].reshape(-1))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert train(plain).losses == losses
    # The default computes the same in chunks, in another order.
    assert train(TINY).losses == pytest.approx(losses, abs=1e-6)


def test_same_seed_same_bits_another_seed_others() -> None:
    one, same, other = tiny(dropout=0.1), tiny(dropout=0.1), tiny(dropout=0.1, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(same).values(), strict=True))
    assert not torch.equal(weights(one)["wte.weight"], weights(other)["wte.weight"])
    assert torch.equal(build(one).next_tokens(4), build(same).next_tokens(4))
    assert not torch.equal(build(one).next_tokens(4), build(other).next_tokens(4))
    a, b, c = train(one), train(same), train(other)
    assert a.losses == b.losses
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert all(x != y for x, y in zip(a.losses, c.losses, strict=True))


def test_every_step_draws_its_own_tokens_and_dropout_does_not_shift_them() -> None:
    run, with_dropout = build(TINY), build(tiny(dropout=0.5))
    batches = [run.next_tokens(step) for step in range(6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])
    for step, tokens in enumerate(batches):
        with_dropout.step(step, tokens)
        assert torch.equal(with_dropout.next_tokens(step), tokens)
    assert min(b.min() for b in batches) >= 0
    assert max(b.max() for b in batches) < 65


def test_targets_are_the_inputs_shifted_by_one() -> None:
    inputs, targets = split(build(TINY).next_tokens(0))
    assert inputs.shape == targets.shape == (1, 3, 16)
    assert torch.equal(inputs[..., 1:], targets[..., :-1])


def test_gradients_do_not_accumulate_across_steps() -> None:
    run, fresh = build(tiny(lr=0.0)), build(tiny(lr=0.0))
    for step in range(3):
        run.step(step, run.next_tokens(step))
    fresh.step(2, fresh.next_tokens(2))
    for p, q in zip(run.parameters, fresh.parameters, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_the_model_is_in_train_mode_and_evaluation_puts_it_back() -> None:
    modes = []

    class Modes(Watch):
        def stepped(self, done: int) -> None:
            modes.append(self.run.model.training)

    result = train(tiny(dropout=0.1, eval_every=2, eval_sequences=6), Modes())
    assert modes == [True] * 6
    assert [step for step, _ in result.val_losses] == [2, 4, 6]


def test_evaluation_changes_nothing() -> None:
    plain, evaluated = train(tiny(dropout=0.1)), train(tiny(dropout=0.1, eval_every=1, eval_sequences=6))
    assert plain.losses == evaluated.losses


def test_micro_steps_average_to_the_large_batch() -> None:
    """Four micro-steps of 3 are one batch of 12: the logged loss, and in float64 the weights, agree."""
    micro = tiny(grad_accum=4, dtype="float64")
    run = build(micro)
    large = build(tiny(batch_size=12, dtype="float64"))
    tokens = run.next_tokens(0)
    assert tokens.shape == (4, 3, 17)
    loss, _ = run.step(0, tokens)
    large_loss, _ = large.step(0, tokens.reshape(1, 12, 17))
    assert loss.item() == pytest.approx(large_loss.item(), rel=1e-14)
    assert not loss.requires_grad  # or the meter would keep every step's graph
    for p, q in zip(run.parameters, large.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-16)
    assert train(micro).losses[0] == loss.item()


def test_a_repeated_batch_is_learned_and_uniform_tokens_are_not() -> None:
    fixed, fresh = train(tiny(data="dummy-fixed", steps=60)), train(tiny(steps=60))
    assert fixed.losses[-1] < fixed.losses[0] - 2.0
    assert min(fresh.losses) > math.log(65) - 0.2


def test_defaults_suit_the_device() -> None:
    without, with_gpu = resolve(TrainConfig(), cuda=False), resolve(TrainConfig(), cuda=True, memory_bytes=80 << 30)
    assert (preset_name(without.model_config()), without.batch_size, without.dtype) == ("mini", 8, "float32")
    assert (preset_name(with_gpu.model_config()), with_gpu.batch_size, with_gpu.dtype) == ("gpt2", 32, "bfloat16")
    assert resolve(TrainConfig(), cuda=True, bf16=False).dtype == "float32"
    sizes = {gib: resolve(TrainConfig(), cuda=True, memory_bytes=gib << 30).batch_size for gib in (4, 8, 16, 24, 48)}
    assert sizes == {4: 1, 8: 4, 16: 8, 24: 16, 48: 32}
    assert resolve(TrainConfig(model="gpt2"), cuda=False, data_vocab_size=257).vocab_size == 257
    assert resolve(TrainConfig(vocab_size=300), cuda=False, data_vocab_size=257).vocab_size == 300
    with pytest.raises(ConfigError, match="--vocab-size 256 is smaller than the vocabulary of --data dummy: 257"):
        resolve(TrainConfig(vocab_size=256), cuda=False, data_vocab_size=257)


# ------------------------------------------------------------------------------------ optimizer and schedule


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
    """As a CUDA graph reads it: from a float32 tensor, where a run without has a number of 64 bits."""
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
    result = train(tiny(schedule="cosine", warmup_steps=2, log_every=1), watch)
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


# ------------------------------------------------------------------------------------------------ precision


def test_bfloat16_is_autocast_over_float32_weights() -> None:
    run = build(tiny(dtype="bfloat16"))
    seen: list[torch.dtype] = []
    run.model.h[0].attn.c_attn.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    streams: list[torch.dtype] = []
    for block in run.model.h:
        block.register_forward_hook(lambda m, i, output: streams.append(output[1].dtype))
    loss, _ = run.step(0, run.next_tokens(0))
    assert seen == [torch.bfloat16]
    assert streams == [torch.float32] * 2
    assert loss.dtype == torch.float32
    assert {p.dtype for p in run.parameters} == {torch.float32}
    assert {s["exp_avg"].dtype for s in run.state.optimizer.state.values()} == {torch.float32}


def test_validation_computes_in_the_runs_precision() -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    class Hook(Reporter):
        def started(self, run: Run) -> None:
            product = run.model.h[0].attn.c_attn
            product.register_forward_hook(lambda module, i, output: seen.append((module.training, output.dtype)))

    train(tiny(dtype="bfloat16", steps=1, eval_every=1, eval_sequences=3), Hook())
    assert seen == [(True, torch.bfloat16), (False, torch.bfloat16)]


def set_numerics(precision: str, deterministic: bool, warn_only: bool, fill: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def get_numerics() -> tuple[str, bool, bool, bool]:
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "highest"), ("bfloat16", "highest"), ("tf32", "high")])
def test_numerics_are_those_asked_for_and_put_back(dtype: str, precision: str, deterministic: bool) -> None:
    original = get_numerics()
    try:
        for before in (("medium", not deterministic, False, True), ("high", True, True, False)):
            set_numerics(*before)
            with pytest.raises(KeyboardInterrupt), numerics(tiny(dtype=dtype, deterministic=deterministic)):
                assert get_numerics() == (precision, deterministic, False, False)
                raise KeyboardInterrupt
            assert get_numerics() == before
    finally:
        set_numerics(*original)


@pytest.mark.parametrize("users", [None, ":16:8"])
def test_cublas_is_told_to_be_deterministic_before_anything_is_computed(users: str | None) -> None:
    """PyTorch looks at the first product, and refuses every deterministic one after that if it was not set."""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    environment |= {} if users is None else {"CUBLAS_WORKSPACE_CONFIG": users}
    code = "import fastgpt2, os; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (users or ":4096:8")


def test_peaks_are_known_by_whole_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("NVIDIA H200", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H200 NVL", "bfloat16") == 835.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bfloat16") is None
    assert peak_flops("NVIDIA L40", "bfloat16") is None
    assert peak_flops("cpu", "float32") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float64") is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attn", ["naive", "sdpa", "triton"])
def test_same_bits_twice_on_the_gpu(attn: str, dtype: str) -> None:
    config = tiny(device="cuda", attn=attn, dtype=dtype, n_embd=64, block_size=200, steps=20)
    assert train(config).losses == train(config).losses


# ------------------------------------------------------------------------------------- outputs and resuming


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
        assert r["loss"] == math.fsum(losses) / len(losses) and r["last_loss"] == losses[-1]  # every digit
        assert (r["tokens"], r["epoch"]) == (r["step"] * 96, None)
        assert r["mfu"] is None
        assert r["mfu_formula"] == "llm.c"
        assert r["tokens_per_s"] == pytest.approx(96 / r["step_ms"] * 1e3)
        assert r["memory_bytes"] > 50 << 20
    seconds = [r["seconds"] for r in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert seconds == sorted(seconds) and 0.0 < seconds[0] < seconds[-1] < result.seconds
    saved = parse(["--config", str(tmp_path / "run" / "config.toml")])
    assert dataclasses.asdict(saved) == dataclasses.asdict(result.config)


def test_the_peak_of_memory_stays_when_memory_is_given_back() -> None:
    with mmap.mmap(-1, 64 << 20) as memory:
        memory[::4096] = b"x" * (len(memory) // 4096)
        peak = peak_memory_bytes(torch.device("cpu"))
    # The kernel counts in batches of pages.
    assert peak_memory_bytes(torch.device("cpu")) > peak - (8 << 20) > 64 << 20


def test_a_record_tells_the_share_of_a_known_gpus_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.loop.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    watch = Watch()
    result = train(tiny(log_every=2), watch)
    flops = FLOPS_PER_TOKEN["llm.c"](result.model.config)
    for record in watch.records:
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * flops / 66.9e12)
        assert record["grad_norm"] > 0.0
    assert result.mfu == pytest.approx(result.tokens_per_s * flops / 66.9e12)


def test_the_notes_of_a_run(tmp_path: Path) -> None:
    floor = "the loss stays at ln 65 = 4.1744 nats, its floor"
    expected = [
        (tiny(steps=2, mlp="torch", out=tmp_path), ["auto chose --attn sdpa, --norm torch, --loss chunked", floor]),
        (tiny(steps=2, mlp="torch", out=tmp_path, resume=True),
         ["auto chose", "continuing after step 2", "nothing to do: --steps 2 is no more than the 2 already", floor]),
        (tiny(steps=1, data="dummy-fixed"), ["--mlp torch", "dummy-fixed repeats one batch"]),
    ]  # fmt: skip
    for config, texts in expected:
        watch = Watch()
        train(config, watch)
        assert len(watch.notes) == len(texts)
        assert all(text in note for text, note in zip(texts, watch.notes, strict=True)), watch.notes


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


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tiny(out=tmp_path, save_every=1, keep_checkpoints=2))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000005",
        "step-00000006",
    ]


def test_records_past_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    train(tiny(out=tmp_path, steps=4, log_every=1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # logged after the checkpoint, then cut off
    train(tiny(out=tmp_path, steps=6, log_every=1, resume=True))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[4]["loss"] != 1.0


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 33}, "--n-embd 33 is not divisible by --n-head 2: .*try --n-embd 32"),
        ({"model": "gpt2", "block_size": 2048}, "--block-size 2048 is over the 1024 positions of gpt2"),
        ({"model": "gpt2-mdium"}, "no preset 'gpt2-mdium': .*did you mean 'gpt2-medium'"),
        ({"dtype": "float16"}, "--dtype float16 needs a CUDA GPU"),
        ({"dtype": "bf16"}, "--dtype must be one of .*, got 'bf16'; did you mean 'bfloat16'"),
        ({"device": "gpu"}, "--device 'gpu' is not cpu, cuda or cuda:N"),
        ({"attn": "flash"}, "--attn must be one of auto, naive, sdpa, cudnn, flex, triton, got 'flash'"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"lr": float("nan")}, "--lr must be a finite number, got nan"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"weight_decay": 0.1}, "--weight-decay needs --optimizer adamw"),
        ({"resume": True}, "--resume needs --out"),
        ({"data": "/nowhere"}, "--data /nowhere: no such folder"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        train(tiny(**changes))
    assert "\n" not in str(error.value)


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
    with pytest.raises(ConfigError, match="checkpoint of another shape: it has n_layer 2 not 3, vocab_size 65 not 80"):
        train(tiny(out=tmp_path / "run", resume=True, n_layer=3, vocab_size=80))
    with pytest.raises(ConfigError, match="no checkpoint under"):
        train(tiny(out=tmp_path / "other", resume=True))
    assert not (tmp_path / "other").exists()


def command(*arguments: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | changes
    line = [sys.executable, "-m", "fastgpt2.train", *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


def test_the_command_refuses_in_one_line_with_status_2(tmp_path: Path) -> None:
    done = command("--n-embd", "100", "--n-head", "3", "--device", "cpu", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --n-embd 100 is not divisible by --n-head 3")
    assert not list(tmp_path.iterdir())


def test_triton_without_cuda_or_the_interpreter_says_what_to_do(tmp_path: Path) -> None:
    done = command("--attn", "triton", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())
    assert "--attn sdpa" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
    assert done.stderr.count("\n") == 1


def test_compiling_on_a_cpu_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match=r"--compile on a CPU needs a C\+\+ compiler and /no/such/compiler is not"):
        build(tiny(compile=True))


# ------------------------------------------------------------------------------------------------ the command

SMALL = ["--model", "tiny", "--device", "cpu", "--batch-size", "2"]


def test_the_command_shows_and_writes_what_it_promises(tmp_path: Path) -> None:
    done = command(*SMALL, "--steps", "12", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (
        "ln 256 = 5.5452",
        "final loss",
        "tokens/s",
        "peak memory",
        "run/metrics.jsonl",
        "run/loss.png",
        "12 of 12",
    ):
        assert text in done.stdout, text
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_json_lines(tmp_path / "run" / "metrics.jsonl")) == 3
    # Continued by name alone: the run's own settings hold.
    done = command("--resume", "--out", "run", "--steps", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing after step 12" in done.stdout
    assert [r["step"] for r in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 10, 12, 13, 20]


def test_a_diverged_run_names_the_step_the_checkpoint_and_what_to_try(tmp_path: Path) -> None:
    done = command(*SMALL, "--steps", "60", "--lr", "1e30", "--save-every", "1", "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    first, last = done.stderr.splitlines()[0], done.stderr.splitlines()[-1]
    assert first == last
    assert "error: the loss of step " in first
    assert "--lr" in first
    assert "Traceback" not in done.stderr


def test_the_step_of_a_non_finite_loss_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at the next logging step, from losses kept on the device."""
    real = Run.step

    def poisoned(self: Run, step: int, tokens: Tensor, *, want_norm: bool = False) -> tuple[Tensor, Tensor | None]:
        loss, norm = real(self, step, tokens, want_norm=want_norm)
        return (loss * float("nan") if step + 1 == 13 else loss), norm

    monkeypatch.setattr(Run, "step", poisoned)
    with pytest.raises(NonFiniteLossError, match="the loss of step 13 is nan: no good checkpoint was saved"):
        train(tiny(steps=30, log_every=10))
    train(tiny(steps=5, out=tmp_path))
    with pytest.raises(NonFiniteLossError, match=r"loss of step 13 is nan: the last good checkpoint is .*-00000005 "):
        train(tiny(steps=30, out=tmp_path, resume=True))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Poison(Watch):
        def stepped(self, done: int) -> None:
            if done == 4:
                self.run.parameters[-1].data[0] = math.inf

    before, good = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (2, 3))
    message = rf"ln_f\.bias is not finite after step 4: the last good checkpoint is {good} \(continue from it with "
    with pytest.raises(NonFiniteLossError, match=message):
        train(tiny(out=tmp_path, save_every=1), Poison())
    assert sorted((tmp_path / "checkpoints").iterdir()) == [before, good]


def test_a_run_that_does_not_fit_on_the_gpu_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "step", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "error: out of GPU memory: halve --batch-size and double --grad-accum for the same step in less\n"
    )


def test_interrupted_once_it_saves_and_resumes(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [
        sys.executable,
        "-m",
        "fastgpt2.train",
        *SMALL,
        "--steps",
        "100000",
        "--out",
        "run",
        "--log-every",
        "1",
    ]
    process = subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while len(read_json_lines(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "continue with --resume --out run" in output
    last = read_json_lines(metrics)[-1]["step"]
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "state.json").read_text())
    assert state["step"] == last
    done = command("--resume", "--out", "run", "--steps", str(last + 2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_config_file_gives_way_to_flags_and_refuses_unknown_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "tiny"\nlr = 0.5\nbatch-size = 4\ncompile = true\n')
    config = parse(["--config", str(file), "--lr", "0.25", "--no-compile"])
    assert (config.model, config.lr, config.batch_size, config.compile) == ("tiny", 0.25, 4, False)
    file.write_text("learning_rate = 1.0\nwarmup_step = 3\n")
    with pytest.raises(ConfigError, match="unknown key 'learning_rate'"):
        parse(["--config", str(file)])
    file.write_text("warmup_step = 3\n")
    with pytest.raises(ConfigError, match="unknown key 'warmup_step'; did you mean 'warmup_steps'"):
        parse(["--config", str(file)])
    file.write_text('steps = "many"\n')
    with pytest.raises(ConfigError, match=r"run\.toml: steps must be a whole number, got 'many'"):
        parse(["--config", str(file), "--steps", "3"])  # although the flag wins
    with pytest.raises(ConfigError, match="can't read --config"):
        parse(["--config", str(tmp_path / "none.toml")])


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name.split(".")[0])
sys.meta_path.insert(0, Missing())
from fastgpt2 import ConfigError, TrainConfig, train
config = TrainConfig(model="tiny", steps=2, batch_size=2, device="cpu")
assert len(train(config).losses) == 2
try:
    train(TrainConfig(model="tiny", attn="triton", device="cpu"))
except ConfigError as error:
    print(error)
"""


def test_training_needs_neither_triton_nor_the_command_line_packages() -> None:
    names = ("triton", "rich", "matplotlib", "safetensors", "tiktoken", "transformers")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the triton package is not installed" in done.stdout
    assert "--attn sdpa" in done.stdout


def test_train_is_the_function_whatever_was_imported_before() -> None:
    """Importing a submodule binds it in its package, which would hide the function behind its command."""
    with pytest.raises(ImportError, match=r"in Python: from fastgpt2 import train$"):
        import_module("fastgpt2.train")
    for name in fastgpt2.__all__:
        assert name in dir(fastgpt2)
    assert fastgpt2.train is train is training.train
    assert fastgpt2.TrainResult is reporter.TrainResult
