"""The import picture: who may import whom is in pyproject.toml, held by import-linter."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_contracts import strings

ROOT = Path(__file__).parent.parent
HEAVY = {"rich", "matplotlib", "safetensors", "tiktoken", "transformers", "triton"}
"""Packages that `train()` can do without: imported inside the functions that need them."""


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)


def test_imports_run_one_way() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources that the contracts read."""
    root = tmp_path_factory.mktemp("checkout")
    only_sources = shutil.ignore_patterns("*.json", "__pycache__", "cpu", "results")
    for folder in ("fastgpt2", "bench"):
        shutil.copytree(ROOT / folder, root / folder, ignore=only_sources)
    (root / "tests").mkdir()
    for name in ("pyproject.toml", "tests/import_contracts.py"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.mark.parametrize(
    "planted",
    [
        {
            "model -> fastgpt2.training": "def _f():\n    import fastgpt2.training\n",
            "kernels.tiles -> fastgpt2.config": '_TABLE = ["fastgpt2.config:TrainConfig"]\n',
            "run -> fastgpt2.kernels.mlp": "from fastgpt2.kernels import mlp\n",
            "config -> torch": "import torch\n",
            "evaluate -> bench.timing": "import bench.timing\n",
        },
        {
            "model -> fastgpt2.training": 'import_module("fastgpt2.training")\n',
            "run -> fastgpt2.kernels.mlp": '_KERNEL = "fastgpt2.kernels.mlp:gelu_mlp"\n',
        },
        {"model -> fastgpt2.training": '_TABLE = {"adam": "fastgpt2.training:train"}\n', "new": "\n"},
    ],
    ids=["statements", "calls and strings", "a table and a module without a layer"],
)
def test_an_import_that_runs_another_way_is_found(copied: Path, planted: dict[str, str]) -> None:
    paths = [copied / "fastgpt2" / f"{fault.split()[0].replace('.', '/')}.py" for fault in planted]
    before = [path.read_text() if path.exists() else None for path in paths]
    for path, source, lines in zip(paths, before, planted.values(), strict=True):
        path.write_text((source or "") + lines)
    try:
        done = lint(copied)
    finally:
        for path, source in zip(paths, before, strict=True):
            path.unlink() if source is None else path.write_text(source)
    assert done.returncode == 1, done.stdout + done.stderr
    missed = [fault for fault in planted if f" fastgpt2.{fault}" not in done.stdout]
    assert not missed, done.stdout


def test_strings_that_import_are_found() -> None:
    source = 'x = "a.b:f"; y = import_module("a.c"); z = "a::d"; w = "a.e"; v = "see a.f:g for it"'
    assert sorted(strings(source)) == [("a.b", 1), ("a.c", 1)]


def test_importing_the_packages_does_no_work() -> None:
    code = (
        "import sys, fastgpt2, fastgpt2.kernels; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)));"
        f"import fastgpt2.training, fastgpt2.verify; print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"
