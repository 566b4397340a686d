"""Which checkpoint is read, how its weights are loaded, and which ops compute."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2 import GPT, TrainConfig, checkpoint
from fastgpt2.backends.attention import naive_attention
from fastgpt2.config import ConfigError
from fastgpt2.documents import document_bounds
from fastgpt2.evaluate import evaluate_split
from fastgpt2.ops import Ops
from fastgpt2.pretrained import load_run
from fastgpt2.settings import resolve
from fastgpt2.slots import SLOTS
from fastgpt2.state import RunState
from tests.trainer.runs import seal

CPU = torch.device("cpu")


def save(out: Path, step: int, **changes: Any) -> GPT:
    """Save a checkpoint whose weights depend on the step."""
    config = resolve(TrainConfig(model="tiny", n_layer=1, data="nowhere", keep_checkpoints=0, **changes), cuda=False)
    torch.manual_seed(step)
    model = GPT(config.model_config()).to(torch.float64 if config.dtype == "float64" else torch.float32)
    checkpoint.save(out, step, config, RunState.begin(model, config))
    return model.eval()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "run"
    for step in (2, 4):
        save(out, step)
    return out


@pytest.fixture
def out(two: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(two, tmp_path / "run")


def path_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change state.json or the tensors of a checkpoint and recompute its sums."""
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change(load_file(path)), path)
    seal(path.parent)


# ------------------------------------------------------------------------------------------------------- which one


def test_a_run_a_step_or_a_checkpoint(out: Path) -> None:
    two, four = path_of(out, 2), path_of(out, 4)
    assert checkpoint.find(out) == checkpoint.find(out, 4) == four
    assert checkpoint.find(str(out), 2) == checkpoint.find(two) == two
    for name in ("step-best", "damaged-step-00000002"):
        shutil.copytree(two, two.with_name(name))
        assert checkpoint.find(two.with_name(name)) == two.with_name(name)
    moved = shutil.move(two.with_name("step-best"), out.parent / "best")
    assert load_run(Path(moved), CPU)[1]["step"] == load_run(out, CPU, 2)[1]["step"] == 2
    shutil.copy(two / "model.safetensors", out)  # a user's copy for other programs
    assert checkpoint.find(out) == four and load_run(out, CPU)[1]["step"] == 4


def test_home_is_spelled_out(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(out.parent))
    assert checkpoint.find("~/run") == path_of(out, 4)


def test_what_is_no_checkpoint_says_what_there_is(out: Path) -> None:
    empty, two = out.parent / "empty", path_of(out, 2)
    empty.mkdir()
    (two / "model.safetensors").unlink()
    for source, step, message in (
        (out.parent / "gone", None, "can't read .*gone: No such file or directory"),
        (out.parent / ("x" * 300), None, "can't read .*: File name too long"),
        (out / "nul\0", None, "can't read .*: embedded null byte"),
        (empty, None, "no checkpoint under .*empty: a run saves them"),
        (two / "state.json", None, "state.json is a file: give a run's --out folder or the folder of a checkpoint"),
        (two, None, "step-00000002 is a checkpoint that lacks model.safetensors"),
        (path_of(out, 4), 4, "step-00000004 is one checkpoint: leave --step out"),
        (out, 3, "run has no checkpoint of step 3: there are 2, 4"),
        (out, -4, "no checkpoint of step -4: there are 2, 4"),
        (empty, 2, "empty has no checkpoint of step 2: it has none"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            checkpoint.find(source, step)
        assert "\n" not in str(error.value)


def test_of_many_steps_the_last_are_listed(tmp_path: Path) -> None:
    for step in range(1, 41):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"there are \.\.\., 21, 22, .*, 39, 40$"):
        checkpoint.find(tmp_path, 50)


def test_a_damaged_one_names_one_that_is_intact(out: Path) -> None:
    (path_of(out, 2) / "model.safetensors").write_bytes(b"")
    for source, step in ((out, 2), (path_of(out, 2), None)):
        with pytest.raises(ConfigError, match=r"is damaged: .*; .*step-00000004 is intact: use that one"):
            load_run(source, CPU, step)


# ----------------------------------------------------------------------------------------------- how it is loaded


def test_the_weights_are_the_files_and_none_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(tmp_path, 1)
    read = {}
    load_model = checkpoint.load_model

    def spy(*arguments: Any) -> Any:
        result = load_model(*arguments)
        read.update(result[0])
        return result

    monkeypatch.setattr("fastgpt2.pretrained.load_model", spy)
    before = torch.get_rng_state()
    model, _ = load_run(tmp_path, CPU)
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert model.state_dict().keys() == saved.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name)), name
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
        assert parameter.data_ptr() == read[name].data_ptr(), "a second copy is held"
    assert not list(model.buffers())


def test_the_precision_saved_is_kept(tmp_path: Path) -> None:
    saved, tokens = save(tmp_path, 1, dtype="float64"), torch.arange(24).view(2, 12)
    model, _ = load_run(tmp_path, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(tokens), saved(tokens))
    torch.testing.assert_close(model(tokens, tokens), saved(tokens, tokens), rtol=1e-12, atol=0.0)


def test_reading_a_run_imports_no_compiler(two: Path) -> None:
    """Importing it takes longer than everything else, and neither the meta device nor the chunked loss needs it."""
    program = f"""
import sys, torch
from pathlib import Path
from fastgpt2.pretrained import load_run
model, _ = load_run(Path({str(two)!r}), torch.device("cpu"))
tokens = torch.zeros(1, 8, dtype=torch.int64)
with torch.no_grad():
    model(tokens, tokens)
print([name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n.replace("wpe.", "positions."): x for n, x in t.items()},
            r"model.safetensors doesn't fit: it lacks wpe.weight \(and 1 more\)$",
        ),
        (lambda t: t | {"lm_head.weight": torch.zeros(0)}, "it has lm_head.weight, which this model lacks$"),
        (lambda t: t | {"ln_f.bias": torch.zeros(8, 8)}, r"ln_f.bias is \[8, 8\], not \[64\]$"),
        (lambda t: {n: x.half() for n, x in t.items()}, "must all be float32 or all float64"),
        (lambda t: t | {"ln_f.bias": t["ln_f.bias"].double()}, "must all be float32 or all float64"),
    ],
)
def test_tensors_of_another_model_are_told_in_one_line(out: Path, change: Any, message: str) -> None:
    rewrite(path_of(out, 4) / "model.safetensors", change)
    with pytest.raises(ConfigError, match=message) as error:
        load_run(out, CPU)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- by which operations


class Largest(TorchDispatchMode):
    """Records the size of the largest new tensor, and which gradients the chunked loss was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.gradients = 0, []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.ops.fastgpt2.linear_cross_entropy_forward.default:
            self.gradients.append(arguments[-2:])
        result = function(*arguments, **(keywords or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return result


class OneBatch:
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def sweep(self) -> Any:
        return iter([self.tokens])

    def check(self) -> None:
        """Real sources raise here if their data can no longer be read."""


def test_whole_logits_are_never_held_and_no_gradient_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, vocab_size=4096)
    model, _ = load_run(tmp_path, CPU)
    monkeypatch.setitem(sys.modules["fastgpt2.kernels.loss"].MEMORY_BUDGET, "cpu", 1)  # as many chunks as possible
    with Largest() as seen:
        evaluate_split(model, OneBatch(torch.zeros(4, 65, dtype=torch.int64)), CPU)  # type: ignore[arg-type]
    assert seen.gradients == [(False, False)]
    assert seen.elements < 4 * 64 * 4096 / 3


def test_documents_are_masked_as_in_training(tmp_path: Path) -> None:
    saved = save(tmp_path, 1, document_mask=True, end_of_text=7)
    model, _ = load_run(tmp_path, CPU)
    assert model.config.end_of_text == 7
    tokens = torch.tensor([[5, 6, 7, 8, 9, 7, 10, 11]])

    def plain(qkv: Tensor, dropout_p: float, documents: Tensor) -> Tensor:
        assert torch.equal(documents, document_bounds(tokens, 7))
        return naive_attention(qkv, dropout_p, documents)

    expected = GPT(saved.config, Ops(attn=plain)).eval()
    expected.load_state_dict(saved.state_dict())
    torch.testing.assert_close(model(tokens), expected(tokens))
    # Without the mask the logits differ, so this test can fail.
    unmasked = GPT(replace(saved.config, end_of_text=None)).eval()
    unmasked.load_state_dict(saved.state_dict())
    assert (model(tokens) - unmasked(tokens)).abs().max() > 1e-5


@pytest.mark.parametrize("flag", SLOTS)
def test_an_operation_that_is_not_here_is_not_replaced(out: Path, flag: str) -> None:
    def ask(state: dict[str, Any]) -> dict[str, Any]:
        return state | {"config": state["config"] | {flag: "window128"}}

    rewrite(path_of(out, 4) / "state.json", ask)
    with pytest.raises(
        ConfigError, match=rf"was trained with --{flag} window128, .*\(it has {', '.join(SLOTS[flag])}\)"
    ):
        load_run(out, CPU)
