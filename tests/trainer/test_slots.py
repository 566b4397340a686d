"""The table of implementations, and what the command line makes of it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastgpt2.config import TrainConfig
from fastgpt2.fields import ConfigError
from fastgpt2.ops import Ops, Site, as_choices, make_ops, why_not
from fastgpt2.outside import import_name, load
from fastgpt2.slots import AUTO, OURS, REFERENCE, SLOTS, TORCH, Implementation
from tests import forked

ROOT = Path(__file__).parents[2]


def test_the_table_is_standard_library_and_names_what_there_is() -> None:
    code = "import sys, fastgpt2.slots; print([m for m in ('torch', 'numpy', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
    for slot, table in SLOTS.items():
        assert {REFERENCE[slot], TORCH[slot], OURS[slot], *AUTO[slot]} <= set(table)
        for known in table.values():
            if not known.package or find_spec(known.package):
                assert callable(load(known.function, slot)) and (not known.why_not or load(known.why_not, slot))


@pytest.mark.parametrize("slot", SLOTS)
def test_what_errors_suggest_runs_everywhere(slot: str) -> None:
    for name in (AUTO[slot][-1], TORCH[slot], REFERENCE[slot]):
        for dtype in (torch.float64, torch.float16):
            assert why_not(slot, SLOTS[slot][name], Site(dtype=dtype, head_dim=5, n_embd=100_000, dropout=0.5)) is None


def test_a_package_that_is_not_installed_is_named() -> None:
    reason = why_not("mlp", Implementation("nosuch:mlp", package="nosuch_package"), Site())
    assert reason == "the nosuch_package package is not installed (pip has it for Linux); use --mlp torch"


def test_the_norm_kernel_is_refused_at_the_start_for_too_many_channels(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux")
    size = ["--n-layer", "1", "--n-head", "8", "--n-embd", "8200", "--block-size", "8", "--vocab-size", "128"]
    done = forked.run("-m", "fastgpt2.train", *size, "--norm", "triton", "--device", "cpu", cwd=tmp_path)
    reason = "Triton LayerNorm has 1 to 8192 channels, got 8200; use --norm torch"
    assert (done.returncode, done.stderr) == (2, f"error: --norm triton can't run here: {reason}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nosuch.attention:f", "no module 'nosuch'; start in the folder that holds it, or install it"),
        ("fastgpt2.nosuch:f", "no module 'fastgpt2.nosuch'"),
        ("fastgpt2.backends.attention:naive_atention", "did you mean 'naive_attention'?"),
        ("fastgpt2.backends.attention:BLOCK", "must be a function, got int"),
        ("mine:<lambda>", r"give it again, by train\(config, ops=...\)"),
    ],
)
def test_a_function_that_cannot_be_had_is_one_line(name: str, words: str) -> None:
    assert TrainConfig(attn=name).attn == name
    with pytest.raises(ConfigError, match=words) as raised:
        make_ops({"attn": name})
    assert str(raised.value).startswith(f"--attn {name}") and "\n" not in str(raised.value)


def test_a_module_that_fails_at_its_import_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_backend.py").write_text("raise RuntimeError('no\\nsuch luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"broken_backend:f can't be imported: RuntimeError: no such luck \(.*, line 1\)$"
    ):
        make_ops({"mlp": "broken_backend:f"})


@pytest.mark.parametrize("name", ["nosuch", "a:b:c", ":f", "a:", "a b:c"])
def test_what_is_neither_a_name_nor_a_function_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--attn must be one of auto, naive, .*triton or module:function"):
        TrainConfig(attn=name)


def test_a_function_is_saved_by_the_name_that_imports_it_again() -> None:
    def inner() -> None: ...

    assert import_name(make_ops) == "fastgpt2.ops:make_ops" and load(import_name(make_ops), "--attn") is make_ops
    for function in (lambda: None, inner, Ops().__eq__):
        assert "<" in import_name(function), import_name(function)
    inner.__module__, inner.__qualname__ = "__main__", "inner"
    assert import_name(inner) == "<__main__>:inner"


def test_ops_given_in_python_are_checked() -> None:
    mine = Ops(attn=lambda qkv, **_: qkv[:, :, 2])
    assert as_choices(mine)["attn"] is mine.attn
    with pytest.raises(ConfigError, match="did you mean 'attn'"):
        as_choices({"attm": mine.attn})
    with pytest.raises(ConfigError, match=r"ops\['mlp'\] must be a function, got str"):
        as_choices({"mlp": "torch"})  # type: ignore[dict-item]
