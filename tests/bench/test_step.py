"""The step's benchmark: the peers' models, what is checked before anything is timed, and its results."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import cpu
from bench.contest import Measured
from bench.report.results import load, ratio
from bench.step.bench_train_step import ON_A_CPU, ON_A_GPU
from bench.step.build import HuggingFace, Products, initial_weights, make_nanogpt, make_plain
from bench.step.lockstep import contest
from bench.step.plain_gpt2 import PlainGPT2
from bench.step.steps import STEPS, StepContest, StepShape, agree_in
from bench.timing import ROOT, Timed
from fastgpt2.config import PRESETS, ConfigError, ModelConfig, TrainConfig
from fastgpt2.hugging_face import to_hugging_face
from fastgpt2.model import FLOPS_PER_TOKEN, GPT
from fastgpt2.settings import resolve

CPU = torch.device("cpu")
MIB = 2**20

SIZE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=128)


def weights_of(size: ModelConfig) -> dict[str, torch.Tensor]:
    """Large enough that attention is peaked and no bias is zero; float64, the padding's rows zero."""
    torch.manual_seed(0)
    weights = {name: 0.3 * torch.randn_like(p).double() for name, p in GPT(size).state_dict().items()}
    weights["wte.weight"][size.vocab_size :] = 0.0
    return weights


def peers_of(size: ModelConfig) -> dict[str, nn.Module]:
    plain = PlainGPT2(size).double()
    plain.load_state_dict(weights_of(size))
    return {"plain": plain, "transformers": HuggingFace(size, weights_of(size))}


def batch(size: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(size.vocab_size, (3, size.block_size + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("name", ["plain", "transformers"])
@pytest.mark.parametrize("vocab_size", [128, 101])
def test_a_peer_is_the_same_model(name: str, vocab_size: int) -> None:
    size = dataclasses.replace(SIZE, vocab_size=vocab_size)
    ours, theirs = GPT(size).double(), peers_of(size)[name]
    ours.load_state_dict(weights_of(size))
    loss, their_loss = ours(*batch(size)), theirs(*batch(size))
    if name == "plain" and vocab_size != size.padded_vocab_size:
        # Predicting the padding, whose logits are 0 here, is a little worse.
        assert their_loss.item() - loss.item() > 1e-6
        return
    assert abs(loss.item() - their_loss.item()) < 1e-10
    loss.backward()
    their_loss.backward()
    prefix = "model.transformer." if name == "transformers" else ""
    for parameter, p in ours.named_parameters():
        want = p.grad if name == "plain" else to_hugging_face(parameter, p.grad, size)
        torch.testing.assert_close(theirs.get_parameter(prefix + parameter).grad, want, rtol=0, atol=1e-10)


SHAPE = StepShape("tiny", 2, "float32", T=32)
SETTINGS = STEPS["plain"].on(SHAPE, CPU, compiled=False).arguments["settings"]


def first_values(**changed: Any) -> list[dict[str, float]]:
    step, values = make_plain(SETTINGS | changed), []
    for index in range(3):
        step(index)
        values.append(step.check())
    return values


def test_the_check_before_timing_has_teeth(monkeypatch: pytest.MonkeyPatch) -> None:
    agree, right = agree_in(SHAPE), first_values()
    parameters = len(initial_weights(resolve(TrainConfig(**SETTINGS), cuda=False)))
    assert len(right[0]) == 1 + parameters + 2 * 2, "of each of two blocks q, k and v apart"
    assert agree("ours-auto", right, "plain", right) is None
    assert "the gradient of" in str(agree("ours-auto", first_values(seed=1), "plain", right))
    assert "the loss of step 1" in str(agree("ours-auto", first_values(lr=6e-4), "plain", right))
    sdpa = F.scaled_dot_product_attention

    def faulty(fault: str) -> str | None:
        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> torch.Tensor:
            if fault == "sees the future":
                return sdpa(q, k, v)
            if fault == "no gradient of k":
                return sdpa(q, k.detach(), v, is_causal=True)
            return sdpa(q, k, v, is_causal=True, scale=0.5 * q.size(-1) ** -0.5)

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attention)
            return agree("ours-auto", first_values(), "plain", right)

    assert faulty("sees the future")
    assert "attn.c_attn.weight of k has the norm 0.0, with plain" in str(faulty("no gradient of k"))
    assert "c_attn.weight of q" in str(faulty("half the scale"))
    broken = [dict(values, loss=math.nan) for values in right]
    assert "the loss of step 0 is nan" in str(agree("ours-auto", broken, "plain", right))
    lacking = [{"loss": values["loss"]} for values in right]
    assert "has the norm None, with plain" in str(agree("ours-auto", lacking, "plain", right))


def test_nanogpts_step_agrees_but_for_its_gelu_and_its_decay() -> None:
    shape = StepShape("tiny", 2, "float32", T=32, vocab_size=65)
    settings = STEPS["nanogpt"].on(shape, CPU, compiled=False).settings
    step, values = make_nanogpt(settings), []
    for index in range(2):
        step(index)
        values.append(step.check())
    plain = first_values(vocab_size=65)[:2]
    assert agree_in(shape)("nanogpt", values, "plain", plain) is None
    assert agree_in(shape)("nanogpt", first_values(vocab_size=65, lr=6e-4)[:2], "plain", plain), "another step is found"
    assert values[0]["loss"] == pytest.approx(math.log(65), abs=0.05)
    assert "the gradient of" in str(agree_in(SHAPE)("nanogpt", values, "plain", first_values()[:2]))


def test_the_products_are_those_of_the_linear_layers_and_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    products, mm, flops = Products(SETTINGS), torch.mm, []

    def counted(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        flops.append(2 * a.size(0) * a.size(1) * b.size(1))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    products(0)
    size, tokens = SHAPE.size(), SHAPE.B * 32
    attention = 12 * size.n_layer * size.n_embd * size.block_size
    assert sum(flops) == tokens * (FLOPS_PER_TOKEN["matmul"](size) - attention)


def test_the_padding_that_a_peer_predicts_is_allowed_for() -> None:
    shape = StepShape("gpt2", 1, "float32")
    padding = math.log(50304 / 50257)
    ours, plain = [{"loss": 11.0}], [{"loss": 11.0 + 0.9 * padding}]
    agree = agree_in(shape)
    assert agree("ours-auto", ours, "plain", plain) is None and agree("plain", plain, "transformers", ours) is None
    assert agree("ours-auto", ours, "transformers", plain), "both have the published vocabulary"
    assert agree("plain", plain, "plain", ours)


HELD_APART = """
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
from bench.step.build import make_plain
from tests.bench.test_step import SETTINGS

def found(**held):
    make_plain(SETTINGS, **held)
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True))
    compiled(torch.randn(1, 2, 8, 16))
    return dict(counters["aot_autograd"])

print(found(), found(), found(kernel="flash"), sep="\\n")
"""


def test_code_compiled_for_one_attention_kernel_is_not_found_by_a_candidate_held_to_another(tmp_path: Path) -> None:
    """The compiler's caches outlive a process, and what SDPA is held to is no part of their keys."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HELD_APART], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, again, held = done.stdout.splitlines()
    assert "autograd_cache_miss" in first and "autograd_cache_hit" in again
    assert "autograd_cache_miss" in held and "autograd_cache_hit" not in held


# ----------------------------------------------------------------------------------------------- benchmarks


def test_every_contest_names_candidates_that_can_be_configured() -> None:
    for contests in (ON_A_GPU, ON_A_CPU):
        ids = [f"{entered.title}-{name}" for entered in contests for name in entered.names]
        assert len(set(ids)) == len(ids)
    for entered in (*ON_A_GPU, *ON_A_CPU):
        for name in entered.names:
            arguments = STEPS[name].on(entered.step, torch.device("cuda:0"), compiled=entered.compiled).arguments
            config = resolve(TrainConfig(**arguments["settings"]), cuda=True)
            assert config.batch_size == entered.step.B and config.compile == entered.compiled
            assert config.model_config() == entered.step.size()
    peers = [set(entered.names) for entered in ON_A_GPU if entered.kind == "peers"]
    assert {entered.step.model for entered in ON_A_GPU} == {name for name in PRESETS if name.startswith("gpt2")}
    assert all("ours-auto" in names and names & {"plain", "plain-cudnn"} for names in peers)


def test_a_result_follows_from_the_time() -> None:
    timed = Timed([20.0, 10.0, 30.0], [20.0, 10.0, 30.0], None, "a clock")
    measured = Measured(timed, {"deterministic": True, "peak_memory_bytes": 123, "first_losses": [11.0]})
    contest = StepContest("peers", StepShape("gpt2", 4, "float32"), True, ("plain",), device=CPU)
    found = contest.result("plain", measured).to_json()
    assert found["tokens_per_s"] == pytest.approx(4 * 1024 / 0.020)
    assert found["flops"] == 4 * 1024 * 803_478_528 and found["flops_formula"] == "llm.c"
    assert found["mfu"] == {"llm.c": None, "nanogpt": None}, "no peak is known for a CPU"
    assert found["shape"] == {"model": "gpt2", "n_layer": 12, "B": 4, "T": 1024}
    assert (found["role"], found["compiled"], found["first_losses"]) == ("peer", True, [11.0])
    assert (found["ms_median"], found["round_ms"], found["peak_memory_bytes"]) == (20.0, [20.0, 10.0, 30.0], 123)


def test_the_command_for_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the command does, and put back
    size = ["--model", "tiny", "--n-layer", "1", "--batch-size", "2", "--block-size", "32", "--threads", "1"]
    few = ["--rounds", "2", "--cells", "bfloat16-eager", "--commit", "abc", "--candidates", *cpu.CANDIDATES]
    few += ["plain-flash", "plain-cudnn"]
    assert cpu.main([*size, *few, "--out", str(tmp_path)]) == 0
    (file,) = (tmp_path / "cpu").iterdir()
    assert file.name.endswith("-abc.json")
    record = load(file)
    ours, plain, _, transformers, *_ = record.results
    assert [r.backend for r in record.results] == [*cpu.CANDIDATES, "plain-flash"]
    ((missing, reason),) = record.not_done.items()
    assert missing.endswith("plain-cudnn") and reason.startswith("PyTorch has no such attention")
    assert ours.deterministic and not plain.deterministic
    assert ours.slots == {**(ours.slots or {}), "loss": "chunked"} and ours.dtype == "bfloat16" and not ours.compiled
    assert ratio(ours, plain).paired and ratio(ours, transformers).paired
    assert all(100 * MIB < (r.peak_memory_bytes or 0) < 4096 * MIB for r in record.results)
    assert all(5.5 < loss < 5.7 for r in record.results for loss in r.first_losses), "about log 256"
    lines = capsys.readouterr().out.splitlines()
    assert sum("ours-auto" in line and "bfloat16 eager" in line for line in lines) == 2, "after the contest and last"


@pytest.mark.gpu
def test_a_contest_on_a_gpu() -> None:
    shape, device = StepShape("tiny", 4, "bfloat16"), torch.device("cuda:0")
    names = ("plain", "ours-auto", "ours-auto-graph")
    candidates = {name: STEPS[name].on(shape, device, compiled=False) for name in names}
    outcomes = contest(candidates, rounds=3, seconds=0.3, references=["plain"], agree=agree_in(shape), at_once=3)
    for name, outcome in outcomes.items():
        assert isinstance(outcome, Measured), (name, outcome)
        assert outcome.timed.host_ms > 0 and len(outcome.timed.round_ms) == 3
        # The device's intervals between calls lie within the wall clock over them all.
        assert sum(outcome.timed.samples_ms) / len(outcome.timed.samples_ms) <= 1.01 * max(outcome.timed.round_ms)
        assert outcome.facts["peak_memory_bytes"] > 2**20


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--n-layer", "2"], "--n-layer needs --model"),
        (["--batch-size", "2", "--shapes", "character"], "--batch-size needs --model"),
        (["--model", "tiny", "--shapes", "small"], "--model is another shape: leave it or --shapes out"),
        (["--model", "tiny", "--block-size", "100000"], "--block-size 100000 is over the 64 positions of tiny"),
    ],
)
def test_a_shape_for_a_cpu_is_of_one_kind(given: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}"):
        cpu.main(given)
