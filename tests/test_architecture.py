"""The import picture: who may import whom, read from the sources, so that it holds without being remembered."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names)

FASTGPT2 = {
    # module: which of our modules it may import (a function's own imports count too)
    "__init__": {"config", "model", "ops", "train"},
    "fields": set(),
    "config": {"fields"},
    "toml": {"config", "fields"},
    "flags": {"fields"},
    "console": {"config", "device", "signals"},
    "attention": set(),
    "embedding": set(),
    "ops": {"attention", "config"},
    "model": {"attention", "config", "embedding", "ops"},
    "data": {"config", "shards"},
    "shards": {"config", "durable"},
    "optim": {"config"},
    "durable": {"config"},
    "tensors": {"config", "durable"},
    "state": {"config"},
    "checkpoint": {"config", "durable", "model", "state", "tensors"},
    "folder": {"checkpoint", "config", "durable", "record", "toml"},
    "arguments": {"config", "console", "fields", "flags", "folder", "toml"},
    "metrics": {"config", "device", "durable"},
    "reporter": set(),
    "signals": set(),
    "outputs": {"checkpoint", "durable", "metrics", "record", "run"},
    "loop": {
        "checkpoint",
        "config",
        "data",
        "device",
        "evaluate",
        "metrics",
        "model",
        "optim",
        "outputs",
        "reporter",
        "run",
    },
    "tokenizer": {"config", "data"},
    "sources": {"config", "data", "durable", "tokenizer"},
    "prepare": {"config", "console", "data", "durable", "fields", "flags", "shards", "sources", "tokenizer"},
    "device": {"config"},
    "pretrained": {"checkpoint", "config", "model", "ops", "tensors"},
    "evaluate": {"config", "console", "data", "device", "fields", "flags", "pretrained"},
    "sample": {"config", "console", "data", "device", "fields", "flags", "model", "pretrained", "tokenizer"},
    "hugging_face": {"config"},
    "graph": set(),
    "memory": {"config", "model"},
    "run": {
        "attention",
        "checkpoint",
        "config",
        "data",
        "device",
        "folder",
        "graph",
        "memory",
        "model",
        "ops",
        "optim",
        "state",
    },
    "record": {"__version__", "device", "durable", "state"},
    "train": {
        "arguments",
        "config",
        "console",
        "data",
        "device",
        "display",
        "durable",
        "folder",
        "loop",
        "metrics",
        "model",
        "outputs",
        "reporter",
        "run",
        "signals",
    },
    "display": {"config", "console", "device", "metrics", "model", "reporter", "run", "signals", "train"},
    "compare": {"attention", "ops"},
    "verify": {"compare", "config", "console", "data", "device", "fields", "flags", "model", "ops", "run", "train"},
}
HEAVY = {"rich", "matplotlib", "safetensors", "tiktoken", "transformers", "triton"}
"""Packages that `train()` can do without: imported inside the functions that need them."""


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports; TYPE_CHECKING blocks don't count."""
    tree = ast.parse(path.read_text())
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found.update(f"{module}.{a.name}" if module in ("fastgpt2", "kernels") else module for a in node.names)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and top_level_only
        if not checking and not inside:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "fastgpt2").glob("*.py")), ids=lambda p: p.stem)
def test_fastgpt2_imports_only_downwards(path: Path) -> None:
    assert path.stem in FASTGPT2, f"{path.name} is new: say in this test what it may import"
    allowed = {f"fastgpt2.{name}" for name in FASTGPT2[path.stem]}
    ours = {name for name in imports(path) if name.split(".")[0] in ("fastgpt2", "kernels", "bench", "tests")}
    assert not any(name.startswith(("bench", "tests")) for name in ours)
    # Kernels are reached through "module:function" strings in ops alone.
    assert not any(name.startswith("kernels") for name in ours), ours
    assert {".".join(name.split(".")[:2]) for name in ours} <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_nothing_of_fastgpt2_and_ops_nothing_of_each_other(path: Path) -> None:
    ours = {name for name in imports(path) if name.split(".")[0] in ("fastgpt2", "kernels", "bench", "tests")}
    shared = {
        "fastgpt2.kernels.tiles",
        "fastgpt2.kernels.tuning",
        "fastgpt2.kernels.launch",
        "fastgpt2.kernels.dropout",
    }
    tools_over_all_of_them = ("inspect", "tune", "bounds", "hazards")
    assert {".".join(n.split(".")[:2]) for n in ours} <= shared or path.stem in tools_over_all_of_them, ours
    assert all(name.startswith("kernels") for name in ours)


@pytest.mark.parametrize("name", ["config", "fields", "flags", "toml"])
def test_settings_need_the_standard_library_only(name: str) -> None:
    assert {name.split(".")[0] for name in imports(ROOT / "fastgpt2" / f"{name}.py")} <= STANDARD | {"fastgpt2"}


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "ops",
        "model",
        "data",
        "optim",
        "checkpoint",
        "metrics",
        "evaluate",
        "outputs",
        "loop",
        "run",
        "train",
        "verify",
    ],
)
def test_what_train_imports_needs_no_further_package(name: str) -> None:
    tops = {module.split(".")[0] for module in imports(ROOT / "fastgpt2" / f"{name}.py", top_level_only=True)}
    assert not tops & HEAVY


def test_nothing_imports_bench_or_tests() -> None:
    for folder in ("fastgpt2", "kernels"):
        for path in (ROOT / folder).glob("*.py"):
            assert not {n.split(".")[0] for n in imports(path)} & {"bench", "tests"}, path
