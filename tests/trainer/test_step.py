"""The step as a whole: what it keeps, what it asks of the device, how it is compiled and captured."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import resource
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend

from fastgpt2.backends.attention import CUDNN
from fastgpt2.config import ConfigError, TrainConfig
from fastgpt2.cuda_graph import WARM_UP_STEPS, CapturedStep
from fastgpt2.device import keep_freed_memory
from fastgpt2.model import GPT, saved_bytes
from fastgpt2.ops import Ops, Site, make_ops
from fastgpt2.pretrained import load_run
from fastgpt2.reporter import Reporter
from fastgpt2.run import Run, activation_bytes, build, inductor_recomputing_elementwise, numerics, settle
from fastgpt2.settings import resolve
from fastgpt2.slots import SLOTS
from fastgpt2.state import RunState
from fastgpt2.training import _notes, train
from tests.trainer.played_cuda import PlayedCuda

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def tiny(**changes: Any) -> TrainConfig:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "vocab_size": 128, "batch_size": 2}
    return TrainConfig(**{**shape, "steps": 6, "device": "cpu", "lr": 1e-3, "save_every": 0, **changes})


# ----------------------------------------------------------------------------------------------- recompute


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
    B, T, C = 2, 24, 32
    assert [b - a for a, b in pairwise(sizes)] == [2 * B * T * C * 4] * 2
    run = build(tiny())
    assert activation_bytes(run, recompute=False) > 3 * activation_bytes(run, recompute=True)


def test_counting_the_bytes_leaves_the_run_as_it_was() -> None:
    run = build(tiny(dropout=0.2))
    before = torch.get_rng_state()
    activation_bytes(run, recompute=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_log_says_what_recomputing_saves_and_costs() -> None:
    class Notes(Reporter):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def note(self, text: str) -> None:
            self.texts.append(text)

    notes = Notes()
    train(tiny(model="gpt2", n_layer=None, n_head=None, n_embd=None, vocab_size=None, batch_size=1, steps=1,
               block_size=8, recompute="blocks"), notes)  # fmt: skip
    (text,) = (t for t in notes.texts if t.startswith("--recompute blocks"))
    # Without attention the blocks are 85 of 124 million weights, and a forward is a third of their FLOPs: 23%.
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
        return SDPBackend(int(pick))  # as torch makes it: equal, another object

    monkeypatch.setattr("fastgpt2.run.sdpa_picks", picks)
    monkeypatch.setattr("fastgpt2.run.ablation", lambda device, precision: measured)
    run = build(tiny(**changes))
    if "device" not in changes:
        run = dataclasses.replace(run, device=torch.device("cuda"))
    with numerics(run.config):
        texts = [text for text in _notes(run) if "cuDNN" in text]
        assert torch.are_deterministic_algorithms_enabled() is run.config.deterministic
    assert len(texts) == said and not any(asked)
    assert all("by arithmetic, not measured" in t and "--no-deterministic" in t and "--attn triton" in t for t in texts)


# ------------------------------------------------------------------------------- waiting for the device


def fake_step(config: TrainConfig, ops: Ops) -> None:
    """Two steps on fake tensors, which have no values: whatever asks for one, as .item() does, raises."""
    config, device = settle(config)
    with FakeTensorMode():
        model = GPT(config.model_config(), ops, recompute=config.recompute == "blocks")
        run = Run(config, device, RunState.begin(model, config), None, None, {})  # type: ignore[arg-type]
        tokens = torch.zeros(config.grad_accum, int(config.batch_size or 0), 25, dtype=torch.int64)
        for step in range(2):
            run.step(step, tokens, want_norm=True)


SLOT_CHOICES = {
    "auto": {},
    "plain": {"loss": "torch"},
    "loss chunked": {"loss": "chunked"},
    **{f"{slot} triton": {slot: "triton"} for slot in SLOTS},
    "all triton": dict.fromkeys(SLOTS, "triton"),
}


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", SLOT_CHOICES)
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
    config = tiny(device="cuda", dtype=dtype, grad_clip=1.0, grad_accum=2, **flags)
    with numerics(config):  # deterministic algorithms are other code
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
    first, second = (train(tiny(device=f"cuda:{i}", **flags)).losses for i in (0, 1))
    assert first == second and torch.cuda.current_device() == 0


# ------------------------------------------------------------------------------------------------ float16


@pytest.fixture
def everything_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 and a CUDA graph, too, which the trainer refuses there."""
    monkeypatch.setattr("fastgpt2.run.settle", lambda config: (resolve(config, cuda=False), torch.device("cpu")))


class Overflow(Reporter):
    """Makes a gradient infinite in one step, counted from 1 in this process; keeps scale and weights after each."""

    def __init__(self, at: int) -> None:
        self.at, self.scales, self.weights = at, [], []  # type: ignore[var-annotated]

    def started(self, run: Run) -> None:
        self.run, self.bias = run, run.parameters[-1]
        self.bias.register_hook(lambda gradient: gradient * (math.inf if len(self.scales) + 1 == self.at else 1.0))

    def stepped(self, done: int) -> None:
        self.scales.append(self.run.state.scaler.get_scale())
        self.weights.append(self.bias.detach().clone())


@pytest.mark.usefixtures("everything_on_a_cpu")
@pytest.mark.parametrize(
    ("dtype", "products", "scale"),
    [
        ("float64", torch.float64, 1.0),
        ("float32", torch.float32, 1.0),
        ("bfloat16", torch.bfloat16, 1.0),
        ("float16", torch.float16, 2.0**16),
    ],
)
def test_products_have_the_precision_asked_for_and_float16_alone_is_scaled(
    dtype: str, products: torch.dtype, scale: float
) -> None:
    run = build(tiny(dtype=dtype))
    with run.autocast():
        assert run.model.h[0].attn.c_attn(run.model.wte.weight).dtype == products
    assert run.state.scaler.get_scale() == scale


@pytest.mark.usefixtures("everything_on_a_cpu")
@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_the_norm_and_the_gradients_of_float16_are_those_without_a_scale(grad_clip: float) -> None:
    norms = []
    for dtype in ("float32", "float16"):
        run = build(tiny(dtype=dtype, grad_clip=grad_clip))
        _, norm = run.step(0, run.next_tokens(0), want_norm=True)
        assert norm is not None
        norms.append((norm.item(), run._norm().item()))
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.usefixtures("everything_on_a_cpu")
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_float16_step_that_overflows_is_skipped_and_counted_and_halves_the_scale(grad_clip: float) -> None:
    watch = Overflow(at=2)
    result = train(tiny(dtype="float16", grad_clip=grad_clip), watch)
    assert watch.scales == [2.0**16] + 5 * [2.0**15]
    assert [torch.equal(a, b) for a, b in pairwise(watch.weights)] == [True] + 4 * [False]
    assert result.skipped_steps == 1


@pytest.mark.usefixtures("everything_on_a_cpu")
def test_a_resumed_float16_run_goes_on_with_its_scaler(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="checkpoints need safetensors")
    config, whole, rest = tiny(dtype="float16", save_every=100), Overflow(at=2), Overflow(at=0)
    uncut = train(dataclasses.replace(config, out=tmp_path / "whole"), whole)
    train(dataclasses.replace(config, out=tmp_path / "cut", steps=3), Overflow(at=2))
    result = train(dataclasses.replace(config, out=tmp_path / "cut", resume=True), rest)
    assert rest.run.state.scaler.state_dict() == whole.run.state.scaler.state_dict()
    assert result.losses == uncut.losses[3:]
    assert result.skipped_steps == uncut.skipped_steps == 1


# ------------------------------------------------------------------------------------------ document mask


def shards(folder: Path, end_of_text: int | None) -> Path:
    """Documents of 10 tokens that count up from a number of their own, each opened by the end-of-text token."""
    folder.mkdir()
    meta = {"vocab_size": 128} | ({} if end_of_text is None else {"end_of_text": end_of_text})
    (folder / "meta.json").write_text(json.dumps(meta))
    numbers = np.random.default_rng(0).integers(1, 100, 400)
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
    # What the trainer computes is what the naive mask computes, whichever the backend.
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
    with pytest.raises(ConfigError, match=r"--end-of-text must be in \[0, 128\), got 128"):
        build(tiny(data=data, document_mask=True, end_of_text=128))


def test_evaluation_of_a_masked_run_is_masked(tmp_path: Path) -> None:
    data = str(shards(tmp_path / "data", end_of_text=0))
    train(tiny(data=data, steps=2, document_mask=True, out=tmp_path / "run", save_every=2))
    model, _ = load_run(tmp_path / "run", torch.device("cpu"))
    assert model.config.end_of_text == 0


# ---------------------------------------------------------------------------------------------- CUDA graph


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
    # Losses are read long after the next replay.
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


def graphed(**changes: Any) -> TrainConfig:
    return tiny(device="cuda", n_embd=64, block_size=200, steps=20, cuda_graph=True, **changes)


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
    """One batch again and again with a learning rate of 0: what differs between the losses is the masks."""
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
    """Destroyed in the middle of another's capture it would end that with an error."""

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


# ------------------------------------------------------------------------------------------------ on a CPU

FAULTS = """
import resource, sys
import torch
import fastgpt2.run
from fastgpt2.config import TrainConfig
if sys.argv[1] == "given back":
    fastgpt2.run.keep_freed_memory = lambda: None
torch.set_num_threads(1)
run = fastgpt2.run.build(TrainConfig(model="tiny", vocab_size=50257, batch_size=4, device="cpu"))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
of_steps = []
for step in range(6):
    before = faults()
    run.step(step, run.next_tokens(step))
    of_steps.append(faults() - before)
print(sum(of_steps[1:]))
"""


def kept_and_given_back(program: str) -> dict[str, int]:
    """What a program prints where the memory that is freed is kept, and where it is given back."""
    # An earlier test's run in this process has asked for large pages, which a child would inherit.
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", program]
    return {
        how: int(subprocess.run([*command, how], capture_output=True, text=True, check=True, env=environment).stdout)
        for how in ("kept", "given back")
    }


def test_a_step_on_a_cpu_reuses_the_memory_of_the_step_before() -> None:
    faults = kept_and_given_back(FAULTS)
    # Two gradients and a chunk of logits, of 13 MB and more each, in pages of 4 KB, in each of five steps. The kernel
    # may take a page back, or hand out a large one, at any time: 61 times as many were seen.
    assert 10 * faults["kept"] < faults["given back"], faults


RESIDENT = """
import sys
from pathlib import Path
import torch
import fastgpt2.training
from fastgpt2.config import TrainConfig
if sys.argv[1] == "kept":
    fastgpt2.training.give_back_freed_memory = lambda: None
torch.set_num_threads(1)
config = TrainConfig(model="tiny", vocab_size=50257, batch_size=4, device="cpu", steps=1, loss="torch")
kept = fastgpt2.training.train(config)
{later}
print(Path("/proc/self/statm").read_text().split()[1])
"""


@pytest.mark.parametrize("later", ["", "torch.ones(2**25)"], ids=["of the run", "after the run"])
def test_what_a_run_on_a_cpu_freed_goes_back_to_the_system(later: str) -> None:
    for _ in range(3):
        pages = kept_and_given_back(RESIDENT.format(later=later))
        # The logits, their gradient and what the loss makes of them are 51 MB each, what is made after the run 134. The
        # kernel may have put a large page where a block is still in use: then not all goes back, as was seen twice.
        if (pages["kept"] - pages["given back"]) * resource.getpagesize() > 2 * 51e6:
            return
    raise AssertionError(pages)


def test_what_the_user_says_of_large_pages_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for users, expected in (("0", "0"), ("", ""), (None, "1")):
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
        if users is not None:
            monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", users)
        keep_freed_memory()
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.skipif(CUDA, reason="counts what the CPU's kernels store")
def test_recomputing_elementwise_stores_two_thirds_of_a_blocks_activations() -> None:
    """In bfloat16, for each channel of a token: x-hat of both norms in float32, q, k, v and o, and the MLP's four
    hidden channels are 24 bytes; both norms' outputs and the four after GELU would be 12 more."""
    B, T, C = 2, 64, 128

    def kept(n_layer: int, backend: Any) -> int:
        config = tiny(dtype="bfloat16", compile=True, block_size=T, n_embd=C, n_layer=n_layer)
        run = build(config)
        run.model.compile(dynamic=False, fullgraph=True, backend=backend)
        tokens = torch.zeros(B, T, dtype=torch.int64)
        with run.autocast():
            return saved_bytes(run.model, tokens, tokens)

    weights = 2 * 12 * C * C
    for backend, bytes_a_channel, copies in ((inductor_recomputing_elementwise, 24, 0), ("inductor", 36, weights)):
        each = kept(2, backend) - kept(1, backend)
        # The log-sum-exps of the attention and the norms' statistics are the rest.
        assert 0 <= each - (bytes_a_channel * B * T * C + copies) <= 4 * B * T * (2 + 2), (backend, each)


def test_a_process_compiles_any_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As verify does, of every backend; each run has code of its own, which dynamo counts."""
    graphs = []

    def eager(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("fastgpt2.run.inductor_recomputing_elementwise", eager)
    # Not monkeypatch's: what it sets in a module of settings it can't set back.
    with torch._dynamo.config.patch(recompile_limit=1):
        for changes in ({"loss": "torch"}, {"loss": "chunked"}, {"dropout": 0.1}):
            run = build(tiny(compile=True, recompute="elementwise", **changes))
            run.step(0, run.next_tokens(0))
    assert len(graphs) == 3


def test_recomputing_elementwise_without_compile_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="--recompute elementwise is done by the compiler: add --compile"):
        tiny(recompute="elementwise")


TRACED = """
import torch
import torch._inductor.lowering as lowering
from torch._subclasses.fake_tensor import FakeTensorMode
from fastgpt2.config import ModelConfig
from fastgpt2.model import GPT
from fastgpt2.ops import Site, make_ops
from fastgpt2.slots import SLOTS

operators = [f"fastgpt2::{name}" for name in (
    "attention_forward", "attention_backward", "gelu_mlp_forward", "gelu_mlp_backward", "layer_norm_forward",
    "layer_norm_backward", "linear_cross_entropy_forward", "embedding_backward",
)]
def known():
    return [name for name in operators if getattr(torch.ops.fastgpt2, name[10:]).default in lowering.lowerings]
ops, _ = make_ops(dict.fromkeys(SLOTS, "triton"))
assert known() == []
with FakeTensorMode():
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=8, vocab_size=64), ops)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens, tokens).backward()
assert known() == operators, known()
"""


def test_inductor_need_not_find_out_that_it_does_not_know_our_operators() -> None:
    """With PyTorch 2.11 that took a time exponential in the layers before: a whole GPT-2 was never compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TRACED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_a_deep_model_compiles() -> None:
    """Every slot by our operators, as deep as GPT-2 124M, which PyTorch 2.11 would not do in any time unless told."""
    slots = dict.fromkeys(("attn", "mlp", "norm", "loss"), "triton")
    train(tiny(n_layer=12, device="cuda", dtype="bfloat16", compile=True, steps=1, **slots))
