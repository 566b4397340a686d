"""The gate on counts: the file tells the truth, a planted fault is found, and the counter counts what there is."""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt2.backends.attention import sdpa_attention
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.config import ModelConfig, TrainConfig
from fastgpt2.kernels import launch
from fastgpt2.model import FLOPS_PER_TOKEN, GPT
from fastgpt2.ops import Ops, Site, make_ops
from fastgpt2.settings import resolve
from tests import counts
from tests.counts import CASES, PROBLEMS, changes, checked_in, compile_counts, slot_counts, step_counts
from tests.operator_counter import OperatorCounter, tallied

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="Triton's launchers are counted where it interprets")
PLAIN = {"attn": "sdpa", "mlp": "torch", "norm": "torch", "loss": "torch"}


@pytest.mark.parametrize("case", CASES)
def test_the_counts_are_those_of_the_file(case: str) -> None:
    known = checked_in()
    if not known:
        pytest.skip(f"counts.json has no counts of torch {counts.version()}: python -m tests.counts --write")
    if lines := changes(case, known.get(case), CASES[case]()):
        pytest.fail("\n".join([*lines, counts.INTENDED]), pytrace=False)


def test_the_file_has_what_ci_runs_and_nothing_else() -> None:
    known = json.loads(counts.CHECKED_IN.read_text())
    assert "2.13" in known
    for version, cases in known.items():
        assert cases.keys() == CASES.keys(), f"torch {version}: {counts.INTENDED}"


def test_a_step_waits_for_nothing_and_is_one_graph() -> None:
    for version, cases in json.loads(counts.CHECKED_IN.read_text()).items():
        for case, found in cases.items():
            if case.startswith("compile"):
                assert found == {"graphs": 1, "graph breaks": 0, "recompilations": 0}, (version, case)
            else:
                assert found["host synchronisations"] == 0, (version, case)


# ------------------------------------------------------------------------------------------------ planted faults


def one_block(**changed: Callable[..., Any]) -> dict[str, Any]:
    return step_counts(PLAIN, "float32", Ops(**changed), n_layer=1)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return step_counts(PLAIN, "float32", n_layer=1)


def test_a_planted_copy_is_found(plain: dict[str, Any]) -> None:
    lines = changes("step", plain, one_block(attn=lambda qkv, **given: sdpa_attention(qkv.clone(), **given)))
    size, clones = 4 * 1024 * 3 * 768 * 4, plain["calls"]["clone"]
    assert f"step: operators grew from {plain['operators']:,} to {plain['operators'] + 1:,}" in lines
    assert f"step, calls: clone grew from {clones} to {clones + 1}" in lines
    grown = plain["allocated bytes"], plain["allocated bytes"] + size
    assert "step: allocated bytes grew from {:,} to {:,}".format(*grown) in lines


def test_a_planted_wait_for_the_device_is_found(plain: dict[str, Any]) -> None:
    def mlp(x: Tensor, *weights: Tensor) -> Tensor:
        return torch_mlp(x, *weights) if x.sum().item() else x

    assert "step: host synchronisations grew from 0 to 1" in changes("step", plain, one_block(mlp=mlp))


def test_what_a_forward_keeps_is_found(plain: dict[str, Any]) -> None:
    def keeps(x: Tensor, *weights: Tensor) -> Tensor:
        return torch_mlp(x, *weights).square()

    lines = changes("step", plain, one_block(mlp=keeps))
    grown = plain["saved bytes"], plain["saved bytes"] + 4 * 1024 * 768 * 4
    assert "step: saved bytes grew from {:,} to {:,}".format(*grown) in lines


def test_a_copy_planted_inside_a_launcher_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("fastgpt2.kernels.norm")
    before, rows = slot_counts("norm", "triton", "bfloat16"), module._rows
    monkeypatch.setattr(module, "_rows", lambda x: rows(x).clone())
    lines = changes("norm", before, slot_counts("norm", "triton", "bfloat16"))
    # Forward x and the residual, backward dy, the sum and its gradient: three of float32, two of bfloat16.
    assert "norm, calls: clone grew from 0 to 5" in lines
    grown = before["allocated bytes"], before["allocated bytes"] + 4096 * 768 * (3 * 4 + 2 * 2)
    assert "norm: allocated bytes grew from {:,} to {:,}".format(*grown) in lines


def test_a_planted_graph_break_is_found() -> None:
    def breaks(qkv: Tensor, **given: Any) -> Tensor:
        torch._dynamo.graph_break()
        return sdpa_attention(qkv, **given)

    found = compile_counts(PLAIN, "float32", Ops(attn=breaks))
    assert found["graph breaks"] > 0 and found["graphs"] > 1


def test_a_planted_recompilation_is_found() -> None:
    calls = [0]

    def changing(qkv: Tensor, **given: Any) -> Tensor:
        calls[0] += 1
        return sdpa_attention(qkv * float(calls[0]), **given)

    assert compile_counts(PLAIN, "float32", Ops(attn=changing))["recompilations"] == 2


def test_no_norm_of_a_compiled_model_has_a_gradient_of_zeros_to_read() -> None:
    """torch.compile makes one for a result that nothing uses, as the sum would be that the last norm doesn't return."""
    read = []

    def backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        norms = [n for n in graph.graph.nodes if n.target is torch.ops.fastgpt2.layer_norm_backward.default]
        read.extend(None if n.args[1] is None else n.args[1].target for n in norms)
        return make_boxed_func(graph.forward)

    size = ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=8, vocab_size=64)
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, tokens = GPT(size, make_ops({"norm": "triton"})[0]), torch.zeros(2, 8, dtype=torch.int64)
        model.compile(backend=backend, fullgraph=True)
        model(tokens, tokens).backward()
    torch.compiler.reset()
    # Backward: the last norm, the second of the block, the first.
    assert read == [None, operator.getitem, None]


# ------------------------------------------------------------------------------------------------ the counter


def test_bytes_are_freed_as_tensors_are() -> None:
    kilo = torch.zeros(256)
    with OperatorCounter() as counter:
        a = kilo + 1.0
        b = a.view(16, 16).add_(1.0) * 2.0  # a view and a write in place make nothing
        del a
        c = b + 1.0
        del b
    assert (counter.allocated, counter.peak, counter.live) == (3 * 1024, 2 * 1024, 1024)
    assert counter.calls == {"add": 2, "view": 1, "add_": 1, "mul": 1} and counter.views == 1
    del c
    assert counter.live == 0


def test_flops_of_a_naive_step_are_the_matmuls_formula() -> None:
    found = step_counts({**PLAIN, "attn": "naive"}, "float32", n_layer=2)
    size = resolve(TrainConfig(model="gpt2", n_layer=2), cuda=False, bf16=False, memory_bytes=0).model_config()
    assert found["flops"] == 4 * 1024 * FLOPS_PER_TOKEN["matmul"](size)


def test_our_operators_count_the_flops_of_those_they_replace() -> None:
    for slot, plain in (("attn", "sdpa"), ("mlp", "torch"), ("loss", "torch")):
        assert slot_counts(slot, "triton", "bfloat16")["flops"] == slot_counts(slot, plain, "bfloat16")["flops"] > 0


def test_our_operators_keep_what_they_say() -> None:
    B, T, H, D = 4, 1024, 12, 64
    attention = slot_counts("attn", "triton", "bfloat16")
    assert attention["saved bytes"] == 2 * B * T * H * D + 4 * B * H * T  # o and lse
    assert attention["launches"] == {
        "attention_backward_dkdv_kernel": 1,
        "attention_backward_dq_kernel": 1,
        "attention_forward_kernel": 1,
    }
    norm = slot_counts("norm", "triton", "bfloat16")
    assert norm["saved bytes"] == 4 * B * T * (H * D + 2)  # the sum, mean and rstd


@pytest.mark.parametrize("slot", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_launcher_gives_is_what_its_fake_says(slot: str, dtype: torch.dtype) -> None:
    """The counts take the launcher's tensors in place of those that torch.compile is told of."""
    op = getattr(make_ops({slot: "triton"}, Site(dtype=dtype))[0], slot)

    def results() -> list[Tensor]:
        module = counts._Slot(op, PROBLEMS[slot], dtype)
        outputs = module(tokens := torch.zeros(1024, dtype=torch.int64), tokens)
        return [
            *outputs,
            *torch.autograd.grad(outputs, list(module.parameters()), [torch.empty_like(y) for y in outputs]),
        ]

    with FakeTensorMode():
        fake = results()
        with tallied(), OperatorCounter():
            launched = results()
    assert [(x.shape, x.stride(), x.dtype) for x in launched] == [(x.shape, x.stride(), x.dtype) for x in fake]


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_checks_and_says_what_differs(monkeypatch, tmp_path, capsys) -> None:
    file, found = tmp_path / "counts.json", {"operators": 3, "calls": {"mul": 3}, "graphs": 1}
    monkeypatch.setattr(counts, "CHECKED_IN", file)
    monkeypatch.setattr(counts, "CASES", {"a case": lambda: found})

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["counts", *arguments])
        status, told = counts.main(), capsys.readouterr()
        progress, *errors = told.err.splitlines(keepends=True)
        assert progress.startswith("1 of 1: ")
        return status, told.out + "".join(errors)

    status, told = run("--check")
    assert status == 1 and told.startswith("no counts of torch") and told.endswith("python -m tests.counts --write\n")
    file.write_text('{"1.0": {"old": {}}}')
    assert run("--write")[0] == 0
    assert json.loads(file.read_text()) == {"1.0": {"old": {}}, counts.version(): {"a case": found}}
    assert run("--check") == (0, "1 cases: the counts are those of counts.json\n")
    found.update(operators=4, calls={"mul": 2, "add": 2})
    assert run("--check") == (
        1,
        "a case: operators grew from 3 to 4\n"
        "a case, calls: add grew from 0 to 2\n"
        "a case, calls: mul fell from 3 to 2\n"
        f"{counts.INTENDED}\n",
    )
    monkeypatch.setattr(counts, "CASES", {"another": lambda: found})
    status, told = run("--check")
    assert told.splitlines()[:2] == ["a case: in counts.json, not counted now", "another: not in counts.json"]


def test_the_table_aligns_what_it_shows() -> None:
    norm, compiled = slot_counts("norm", "torch", "float32"), {"graphs": 1, "graph breaks": 0}
    *lines, last = counts.table({"norm": norm, "a longer name": norm, "compile": compiled}).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 3
    # The sum, y, the sum's gradient of two paths, and its sum: 12 MiB each; the sum is kept.
    assert lines[1].split()[1:] == ["4", "0", "0", "0", "48.0", "MiB", "48.0", "MiB", "12.0", "MiB", "0.0"]
    assert last == "compile: graphs 1, graph breaks 0"
