"""A step: recomputed activations, no waiting for the device, the document mask."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastgpt2.config import ConfigError, TrainConfig
from fastgpt2.model import GPT
from fastgpt2.ops import Ops, Site, make_ops
from fastgpt2.pretrained import load_run
from fastgpt2.run import Run, activation_bytes, build, numerics, settle
from fastgpt2.slots import SLOTS
from fastgpt2.state import RunState
from fastgpt2.training import train
from tests.trainer.runs import tiny, tiny_on_gpu

CUDA = torch.cuda.is_available()


# ----------------------------------------------------------------------------------------------- recomputed activations


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16"}, {"dropout": 0.2}, {"grad_accum": 2, "grad_clip": 1.0}],
    ids=["float32", "bfloat16", "dropout", "accumulated"],
)
def test_recomputing_gives_the_same_bits(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    plain, again = train(config), train(dataclasses.replace(config, recompute="blocks"))
    assert again.losses == plain.losses
    for p, q in zip(plain.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_recomputing_keeps_the_two_inputs_of_a_block() -> None:
    sizes = [activation_bytes(build(tiny(n_layer=L)), recompute=True) for L in (2, 3, 4)]
    B, T, C = 3, 16, 32
    assert [b - a for a, b in pairwise(sizes)] == [2 * B * T * C * 4] * 2
    run = build(tiny())
    assert activation_bytes(run, recompute=False) > 3 * activation_bytes(run, recompute=True)


def test_counting_the_bytes_leaves_the_run_as_it_was() -> None:
    run = build(tiny(dropout=0.2))
    before = torch.get_rng_state()
    activation_bytes(run, recompute=True)
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------- waiting for the device

SLOT_CHOICES = {
    "auto": {},
    "plain": {"loss": "torch"},
    "loss chunked": {"loss": "chunked"},
    **{f"{slot} triton": {slot: "triton"} for slot in SLOTS},
    "all triton": dict.fromkeys(SLOTS, "triton"),
}


def fake_step(config: TrainConfig, ops: Ops) -> None:
    """Run two steps on fake tensors. They have no values, so anything that reads one, such as .item(), raises."""
    config, device = settle(config)
    with FakeTensorMode():
        model = GPT(config.model_config(), ops, recompute=config.recompute == "blocks")
        run = Run(config, device, RunState.begin(model, config), None, None, {})  # type: ignore[arg-type]
        tokens = torch.zeros(config.grad_accum, config.batch_size, 17, dtype=torch.int64)
        for step in range(2):
            run.step(step, tokens, want_norm=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("slots", "recompute"),
    [*((slots, "none") for slots in SLOT_CHOICES), ("auto", "blocks"), ("all triton", "blocks")],
)
def test_the_step_asks_the_device_for_no_value(slots: str, dtype: str, recompute: str) -> None:
    config = tiny(dtype=dtype, grad_clip=1.0, grad_accum=2, dropout=0.1, recompute=recompute, document_mask=True,
                  end_of_text=3)  # fmt: skip
    compute = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    fake_step(config, make_ops(SLOT_CHOICES[slots], Site(dtype=compute, head_dim=16, dropout=0.1))[0])


def test_a_step_that_asks_is_found() -> None:
    def asks(hidden, weight, targets, *, vocab_size):
        loss = Ops().loss(hidden, weight, targets, vocab_size=vocab_size)
        return loss if loss.item() < 100 else 2 * loss

    with pytest.raises(DataDependentOutputException):
        fake_step(tiny(), Ops(loss=asks))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("slots", SLOT_CHOICES)
def test_the_step_does_not_wait_for_the_gpu(slots: str, dtype: str) -> None:
    flags = SLOT_CHOICES[slots]
    config = tiny_on_gpu(dtype=dtype, grad_clip=1.0, grad_accum=2, **flags)
    with numerics(config):  # deterministic algorithms take other code paths
        run = build(config)
        tokens = run.next_tokens(0)
        run.step(0, tokens)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1, 4):
                run.step(step, tokens, want_norm=True)
                tokens = run.next_tokens(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("slots", ["plain", "all triton"])
def test_another_gpu_than_the_current_one_computes_the_same(slots: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    flags = SLOT_CHOICES[slots]
    first, second = (train(tiny_on_gpu(device=f"cuda:{i}", **flags)).losses for i in (0, 1))
    assert first == second and torch.cuda.current_device() == 0


# -------------------------------------------------------------------------------------------------------- document mask


def shards(folder: Path, end_of_text: int | None) -> Path:
    """Write shards of documents: the end-of-text token, then nine tokens that count up from a random one."""
    folder.mkdir()
    meta = {"vocab_size": 65} | ({} if end_of_text is None else {"end_of_text": end_of_text})
    (folder / "meta.json").write_text(json.dumps(meta))
    numbers = np.random.default_rng(0).integers(1, 56, 400)
    tokens = np.concatenate([[0, *range(n, n + 9)] for n in numbers]).astype(np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    for split in ("train", "val"):
        (folder / f"x_{split}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    return folder


def test_the_document_mask_takes_the_datas_end_of_text_token(tmp_path: Path) -> None:
    data = str(shards(tmp_path / "data", end_of_text=0))
    config = tiny(data=data, steps=3, document_mask=True)
    run = build(config)
    assert run.config.end_of_text == run.model.config.end_of_text == 0
    assert build(tiny(data=data)).model.config.end_of_text is None
    masked = train(config).losses
    assert masked != train(tiny(data=data, steps=3)).losses
    # Every backend's mask gives the naive mask's losses.
    assert train(dataclasses.replace(config, attn="naive")).losses == pytest.approx(masked, abs=1e-5)
    if not CUDA:
        assert train(dataclasses.replace(config, attn="triton")).losses == pytest.approx(masked, abs=1e-5)
    assert train(dataclasses.replace(config, recompute="blocks")).losses == masked


def test_a_document_mask_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--document-mask needs the token .* dummy doesn't name one: give it by --end"
    ):
        build(tiny(document_mask=True))
    data = str(shards(tmp_path / "data", end_of_text=None))
    with pytest.raises(ConfigError, match="give it by --end-of-text"):
        build(tiny(data=data, document_mask=True))
    assert build(tiny(data=data, document_mask=True, end_of_text=7)).model.config.end_of_text == 7
    with pytest.raises(ConfigError, match=r"--end-of-text must be in \[0, 65\), got 65"):
        build(tiny(data=data, document_mask=True, end_of_text=65))


def test_evaluation_of_a_masked_run_is_masked(tmp_path: Path) -> None:
    data = str(shards(tmp_path / "data", end_of_text=0))
    train(tiny(data=data, steps=2, document_mask=True, out=tmp_path / "run", save_every=2))
    model, _ = load_run(tmp_path / "run", torch.device("cpu"))
    assert model.config.end_of_text == 0
