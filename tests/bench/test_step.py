"""The step's benchmark: contests between processes, the peers' models, and what is checked before anything is timed."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import cpu
from bench.contest import Candidate, Measured, Missing
from bench.report.results import load, ratio
from bench.step.bench_train_step import ON_A_CPU, ON_A_GPU
from bench.step.build import HuggingFace, Products, initial_weights, make_nanogpt, make_plain
from bench.step.lockstep import Limits, Worker, contest
from bench.step.plain_gpt2 import PlainGPT2
from bench.step.steps import STEPS, StepContest, StepShape, agree_in
from bench.step.worker import FIRST_CALLS, Built, Round, Serving
from bench.timing import ROOT, Timed
from fastgpt2.config import PRESETS, ModelConfig, TrainConfig
from fastgpt2.hugging_face import to_hugging_face
from fastgpt2.model import FLOPS_PER_TOKEN, GPT
from fastgpt2.settings import resolve

CPU = torch.device("cpu")
MIB = 2**20

# ------------------------------------------------------------------------------------------------- contests


def sleeper(name: str, log: Path, **arguments: Any) -> Candidate:
    return Candidate("peer", "tests.bench.contestants:Sleeper", {"name": name, "log": str(log), **arguments})


def trouble(name: str, log: Path, what: str, at: int) -> Candidate:
    return Candidate("peer", "tests.bench.contestants:Trouble", {"name": name, "log": str(log), "what": what, "at": at})


def equal(name: str, values: list[dict[str, float]], reference: str, right: list[dict[str, float]]) -> str | None:
    return None if values == right else f"{name} is not {reference}"


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A contest of two that are right and five that are not: its outcomes, and the calls (name, index, begin, end)."""
    log = tmp_path_factory.mktemp("contest") / "calls"
    candidates = {
        "reference": sleeper("reference", log),
        "lean": sleeper("lean", log),
        "fat": sleeper("fat", log, sleep_ms=15.0, hold_bytes=200 * MIB),
        "wrong": sleeper("wrong", log, value=1.5),
        "crashes": trouble("crashes", log, "crash", at=FIRST_CALLS + 3),
        "hangs": trouble("hangs", log, "hang", at=FIRST_CALLS + 3),
        "fails": trouble("fails", log, "fail", at=0),
        "lacks-memory": trouble("lacks-memory", log, "lack_memory", at=0),
    }
    outcomes = contest(
        candidates,
        rounds=4,
        seconds=0.0,  # one call a round, after an untimed one
        limits=Limits(build=60.0, round=4.0),
        references=["not here", "reference"],
        agree=equal,
        at_once=2,
        untimed=["reference"],
    )
    calls = [line.split() for line in log.read_text().splitlines()]
    return {"outcomes": outcomes, "calls": [(n, int(i), float(a), float(b)) for n, i, a, b in calls], "log": log}


def test_what_goes_wrong_in_one_worker_costs_only_that_one(troubled: dict[str, Any]) -> None:
    outcomes = troubled["outcomes"]
    assert list(outcomes) == ["lean", "fat", "wrong", "crashes", "hangs", "fails", "lacks-memory"]
    assert {n for n, o in outcomes.items() if isinstance(o, Measured)} == {"lean", "fat", "lacks-memory"}
    for name in ("lean", "fat", "lacks-memory"):
        assert len(outcomes[name].timed.round_ms) == 4
    reasons = {
        "wrong": "not timed: wrong is not reference",
        "crashes": "the worker was ended by SIGABRT",
        "hangs": "no answer to 'round' within 4 s",
        "fails": "ValueError: what it was given is of no use",
    }
    for name, reason in reasons.items():
        lost = outcomes[name]
        assert isinstance(lost, Missing) and lost.reason == reason and lost.failed, lost
    assert "about to crash" in outcomes["crashes"].output
    assert 'contestants.py", line' in outcomes["hangs"].output, "a hang says where it hung"
    assert "Traceback" in outcomes["fails"].output


def test_rounds_are_interleaved_rotated_and_one_at_a_time(troubled: dict[str, Any]) -> None:
    calls = troubled["calls"]
    rounds: dict[str, list[list[float]]] = {}
    for name, index, began, ended in calls:
        if index >= FIRST_CALLS:  # the first are compared, not timed
            rounds.setdefault(name, []).append([began, ended])
    right = ("lean", "fat", "lacks-memory")
    assert all(len(rounds[name]) == 8 for name in right), "an untimed call and a timed one in each of 4 rounds"
    assert "reference" not in rounds and "wrong" not in rounds, "what only gives its values, or wrong ones, isn't timed"
    intervals = sorted(interval for several in rounds.values() for interval in several)
    assert all(before[1] <= after[0] for before, after in pairwise(intervals))
    assert max(ended for _, index, _, ended in calls if index < FIRST_CALLS) <= intervals[0][0], (
        "all are built before any is timed"
    )
    turns = [name for name, index, _, _ in calls if index in range(FIRST_CALLS + 1, 99, 2) and name in right]
    # Five take part in the first round, and in the second until two of them are lost.
    assert turns[:6] == ["lean", "fat", "lacks-memory", "fat", "lacks-memory", "lean"]
    assert turns[6:] == ["lacks-memory", "lean", "fat", "lean", "fat", "lacks-memory"]


def test_a_workers_time_and_memory_are_its_own(troubled: dict[str, Any]) -> None:
    lean, fat = (troubled["outcomes"][name] for name in ("lean", "fat"))
    assert all(ms >= 15.0 for ms in fat.timed.round_ms) and all(ms >= 5.0 for ms in lean.timed.round_ms)
    held = (fat.facts["peak_memory_bytes"] - lean.facts["peak_memory_bytes"]) / MIB
    assert 150 < held < 250, held
    assert lean.versions["torch"] == torch.__version__
    assert 0 < lean.facts["seconds_to_build"] < lean.seconds_to_first
    assert lean.timed.host_ms is None and lean.timed.info()["rounds"] == 4


def test_what_lacked_memory_beside_others_is_built_again_alone(troubled: dict[str, Any]) -> None:
    assert Path(f"{troubled['log']}.lacked").exists()
    again = [began for name, index, began, _ in troubled["calls"] if (name, index) == ("lacks-memory", 0)]
    assert troubled["outcomes"]["lacks-memory"].facts["built"] == 1, "it went on in the process that it had"
    others = [ended for name, index, _, ended in troubled["calls"] if index < FIRST_CALLS and name != "lacks-memory"]
    assert len(again) == 1 and max(others) <= again[0]


def test_out_of_time_is_no_failure_and_keeps_whole_rounds(tmp_path: Path) -> None:
    lost = contest({"slow": sleeper("slow", tmp_path / "calls")}, rounds=3, seconds=0.0, until=time.monotonic())
    assert lost == {"slow": Missing("the time was up before its first round", False, "")}


def test_a_candidate_that_hangs_while_it_is_built_costs_the_others_no_round(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    candidates = {"hangs": trouble("hangs", log, "hang", at=0), "fine": sleeper("fine", log)}
    by = time.monotonic() + 20.0  # starting takes some seconds
    outcomes = contest(candidates, rounds=2, seconds=0.0, at_once=2, built_by=by, until=by + 60)
    hangs, fine = outcomes["hangs"], outcomes["fine"]
    assert isinstance(fine, Measured) and len(fine.timed.round_ms) == 2
    assert isinstance(hangs, Missing) and hangs.failed and "no answer to 'build'" in hangs.reason
    assert 'contestants.py", line' in hangs.output, "a hang says where it hung"
    nothing = contest({"late": sleeper("late", log)}, rounds=1, seconds=0.0, built_by=time.monotonic())
    assert nothing == {"late": Missing("the time was up before it was built", False, "")}


def test_a_worker_whose_parent_is_killed_goes_too(tmp_path: Path) -> None:
    program = f"""
from bench.contest import Candidate
from bench.step.lockstep import Limits, Worker
arguments = {{"name": "x", "log": {str(tmp_path / "calls")!r}, "what": "hang", "at": 0}}
worker = Worker("x", Candidate("peer", "tests.bench.contestants:Trouble", arguments), Limits())
import threading
threading.Thread(target=lambda: worker.build(), daemon=True).start()
while worker._process is None: pass
print(worker._process.pid, flush=True)
threading.Event().wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    ends = time.monotonic() + 60
    while time.monotonic() < ends and not (tmp_path / "calls.x").exists():
        time.sleep(0.05)
    time.sleep(0.5)  # it is built, and now hangs in its first call
    os.kill(worker, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    ends = time.monotonic() + 30
    while time.monotonic() < ends and _runs(worker):
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        # A zombie whose new parent has not asked after it yet has ended.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_round_on_a_gpu_is_one_wall_clock_over_consecutive_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With clocks that are played: the host launches a call in 2 ms, the device works on it for 10 ms after that."""
    clock = SimpleNamespace(host_s=0.0, device_s=0.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            clock.device_s = max(clock.device_s, clock.host_s)
            self.at_s = clock.device_s

        def elapsed_time(self, later: Event) -> float:
            return 1e3 * (later.at_s - self.at_s)

    class Queued:
        device = torch.device("cuda")

        def __call__(self, index: int) -> None:
            clock.host_s += 0.002
            clock.device_s = max(clock.device_s, clock.host_s) + 0.010

    def synchronize(_: torch.device) -> None:
        clock.host_s = max(clock.host_s, clock.device_s)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("bench.step.worker.time", SimpleNamespace(perf_counter=lambda: clock.host_s))
    serving = Serving()
    serving.contestant = Queued()
    answer = serving._cuda_round(5)
    assert serving.index == 5
    # The first call starts when it has been launched, later ones when the one before has ended.
    assert answer.samples_ms == pytest.approx([12.0, 10.0, 10.0, 10.0, 10.0])
    assert answer.ms == pytest.approx(52.0 / 5) and answer.host_ms == pytest.approx(2.0)


@pytest.mark.parametrize(("kind", "call_s", "untimed"), [("cuda", 1.0, 1), ("cpu", 1.0, 0), ("cpu", 0.1, 1)])
def test_a_round_on_a_gpu_begins_with_a_call_that_takes_back_its_memory(
    monkeypatch: pytest.MonkeyPatch, kind: str, call_s: float, untimed: int
) -> None:
    asked: dict[str, Any] = {}

    def ask(command: str, limit: float, **arguments: Any) -> Round:
        asked.update(arguments)
        return Round(1e3 * call_s, [1e3 * call_s], None)

    with Worker("x", sleeper("x", Path("unused")), Limits(), round_s=2.5) as worker:
        monkeypatch.setattr(worker, "ask", ask)
        worker.built = Built(kind, {}, [], call_s, 0.0, 0.0)
        worker.round()
    assert asked == {"calls": int(2.5 / call_s), "untimed": untimed}


# --------------------------------------------------------------------------------------------------- models

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
