"""The published training procedure, what `train` tells the user about it, and what importing it needs."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import fastgpt2
from fastgpt2 import reporter, training
from fastgpt2.backends.attention import CUDNN
from fastgpt2.config import TrainConfig
from fastgpt2.data import split
from fastgpt2.run import build, numerics
from fastgpt2.training import _notes, train
from tests.trainer.runs import TINY, Watch, tiny


def weights(config: TrainConfig) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in build(config).model.state_dict().items()}


def test_the_step_written_out() -> None:
    """Written out in plain PyTorch, the procedure gives the trainer's losses bit for bit."""
    from fastgpt2.model import GPT

    plain = dataclasses.replace(TINY, loss="torch")
    torch.manual_seed(TINY.seed)
    run = build(plain)
    torch.manual_seed(TINY.seed)
    model = GPT(run.model.config)
    # The trainer rounds the learning rate to float32, the type that a CUDA graph reads.
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
    # The default loss sums in chunks, so in another order. With a large step Adam turns the signs of gradients that are
    # nearly 0 into differences that rounding alone doesn't make.
    assert train(tiny(lr=1e-4)).losses == pytest.approx(train(tiny(lr=1e-4, loss="torch")).losses, abs=1e-6)


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

    result = train(tiny(dropout=0.1, eval_every=2, eval_sequences=6), reporters=[Modes()])
    assert modes == [True] * 6
    assert [step for step, _ in result.val_losses] == [2, 4, 6]


def test_evaluation_changes_nothing() -> None:
    plain, evaluated = train(tiny(dropout=0.1)), train(tiny(dropout=0.1, eval_every=1, eval_sequences=6))
    assert plain.losses == evaluated.losses


def test_micro_steps_average_to_the_large_batch() -> None:
    """Four micro-steps of 3 equal one batch of 12, in the logged loss and in the gradients."""
    micro = tiny(grad_accum=4, dtype="float64")
    run = build(micro)
    large = build(tiny(batch_size=12, dtype="float64"))
    tokens = run.next_tokens(0)
    assert tokens.shape == (4, 3, 17)
    loss, _ = run.step(0, tokens)
    large_loss, _ = large.step(0, tokens.reshape(1, 12, 17))
    assert loss.item() == pytest.approx(large_loss.item(), rel=1e-14)
    assert not loss.requires_grad  # otherwise the meter would keep every step's graph
    for p, q in zip(run.parameters, large.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-16)
    assert train(micro).losses[0] == loss.item()


def test_a_repeated_batch_is_learned_and_uniform_tokens_are_not() -> None:
    fixed, fresh = train(tiny(data="dummy-fixed", steps=60)), train(tiny(steps=60))
    assert fixed.losses[-1] < fixed.losses[0] - 2.0
    assert min(fresh.losses) > math.log(65) - 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attn", ["naive", "sdpa", "triton"])
def test_same_bits_twice_on_the_gpu(attn: str, dtype: str) -> None:
    config = tiny(device="cuda", attn=attn, dtype=dtype, n_embd=64, block_size=200, steps=20)
    assert train(config).losses == train(config).losses


# ------------------------------------------------------------------------------------------------ what the user is told


def test_train_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny(out=tmp_path, eval_every=3, log_every=1, save_every=2))
    assert capfd.readouterr() == ("", "")


def test_what_a_shell_shows_is_short(tmp_path: Path) -> None:
    config = tiny(eval_every=6, out=tmp_path)
    assert eval(repr(config), {"TrainConfig": TrainConfig, "PosixPath": Path}) == config
    assert repr(TrainConfig(steps=2)) == "TrainConfig(steps=2)"
    result = train(config)
    loss, val = result.losses[-1], result.val_losses[-1][1]
    assert repr(result) == (
        f"TrainResult(6 of 6 steps, loss {loss:.4f}, val {val:.4f}, {result.tokens_per_s:,.0f} tokens/s, "
        f"{result.seconds:.1f} s, out='{tmp_path}')"
    )
    assert repr(result.model.ops) == (
        "Ops(attn=sdpa_attention, mlp=torch_mlp, norm=torch_norm, loss=linear_cross_entropy(implementation='chunked'))"
    )
    assert repr(build(tiny())) == "Run(custom on cpu, 6 steps, attn=sdpa, mlp=torch, norm=torch, loss=chunked)"
    assert repr(result.config).startswith("Settled(n_layer=2, ") and len(repr(result.config)) < 400
    assert repr(result.model).count("\n") < 40


def test_the_notes_of_a_run(tmp_path: Path) -> None:
    floor = "the loss stays at ln 65 = 4.1744 nats, its floor"
    expected = [
        (tiny(steps=2, mlp="torch", out=tmp_path), ["auto chose --attn sdpa, --norm torch, --loss chunked", floor]),
        (tiny(steps=2, mlp="torch", out=tmp_path, resume=True),
         ["auto chose", "continuing after step 2", "nothing to do: --steps 2 is not above the 2 steps already", floor]),
        (tiny(steps=1, data="dummy-fixed"), ["--mlp torch", "dummy-fixed repeats one batch"]),
    ]  # fmt: skip
    for config, texts in expected:
        watch = Watch()
        train(config, reporters=[watch])
        assert len(watch.notes) == len(texts)
        assert all(text in note for text, note in zip(texts, watch.notes, strict=True)), watch.notes


def test_the_log_says_what_recomputing_saves_and_costs() -> None:
    watch = Watch()
    train(tiny(model="gpt2", n_layer=None, n_head=None, n_embd=None, vocab_size=None, batch_size=1, steps=1,
               block_size=8, recompute="blocks"), reporters=[watch])  # fmt: skip
    (text,) = (t for t in watch.notes if t.startswith("--recompute blocks"))
    # The blocks hold 85 of 124 million weights, and their forward is a third of their FLOPs: 23%, attention aside.
    assert "MiB of activations instead of" in text and "23% more FLOPs" in text


@pytest.mark.parametrize(
    ("changes", "pick", "measured", "said"),
    [
        ({}, CUDNN, {}, True),
        ({"attn": "sdpa"}, CUDNN, {}, True),
        ({"attn": "naive"}, CUDNN, {}, False),
        ({"deterministic": False}, CUDNN, {}, False),
        ({"document_mask": True, "end_of_text": 7}, CUDNN, {}, False),
        ({}, SDPBackend.FLASH_ATTENTION, {}, False),
        ({}, CUDNN, {"slots": {}}, False),
        ({"device": "cpu"}, CUDNN, {}, False),
    ],
    ids=["auto", "sdpa", "naive", "any order", "documents", "PyTorch picks flash", "measured", "cpu"],
)
def test_the_log_says_what_keeps_sdpa_from_cudnn(changes, pick, measured, said, monkeypatch) -> None:
    asked = []

    def picks(*_: Any) -> SDPBackend:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return SDPBackend(int(pick))  # equal but not identical, as torch returns it

    monkeypatch.setattr("fastgpt2.run.sdpa_picks", picks)
    monkeypatch.setattr("fastgpt2.run.ablation", lambda device, precision: measured)
    run = build(tiny(**changes))
    if "device" not in changes:
        run = dataclasses.replace(run, device=torch.device("cuda"))
    with numerics(run.config):
        texts = [text for text in _notes(run) if "cuDNN" in text]
        assert torch.are_deterministic_algorithms_enabled() is run.config.deterministic
    assert len(texts) == said and not any(asked)
    assert all(
        "Estimated cost, not measured" in t and "--no-deterministic" in t and "--attn triton" in t for t in texts
    )


# --------------------------------------------------------------------------------------------------------- dependencies

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({names!r}))  # None: importing it raises ModuleNotFoundError
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
    """Importing a submodule sets it as an attribute of its package, which would hide the function train."""
    with pytest.raises(ImportError, match=r"in Python: from fastgpt2 import train$"):
        import_module("fastgpt2.train")
    for name in fastgpt2.__all__:
        assert name in dir(fastgpt2)
    assert fastgpt2.train is train is training.train
    assert fastgpt2.TrainResult is reporter.TrainResult
