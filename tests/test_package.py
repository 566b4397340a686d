"""The package as it is installed: what the wheel holds, who else's files it leaves alone, and what an editor sees."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = {"add_layer_norm", "flash_attention", "flash_attention_qkv", "gelu_mlp", "layer_norm", "linear_cross_entropy"}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours, built from a copy: a checkout may hold the remains of older builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("fastgpt2", "kernels"):
        shutil.copytree(
            ROOT / name, folder / "source" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, folder / "source")
    return next(folder.glob("fastgpt2-*.whl"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face's `kernels`, the real one."""
    folder = tmp_path_factory.mktemp("theirs")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "kernels"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("Hugging Face's kernels package can't be downloaded here")
    return next(folder.glob("kernels-*.whl"))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty environment's interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment")
    return tmp_path / "environment" / "bin" / "python"


def install(environment: Path, wheel: Path) -> None:
    pip("--python", environment, "install", "--quiet", "--no-deps", "--no-index", wheel)


def files_of(environment: Path, package: str) -> dict[str, bytes]:
    (site,) = (environment.parents[1] / "lib").glob("python*/site-packages")
    folder = site / package
    return {
        path.relative_to(site).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_one_package_whole(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"fastgpt2"}
    sources = {
        f"fastgpt2/{path.relative_to(ROOT / 'fastgpt2').as_posix()}"
        for path in (ROOT / "fastgpt2").rglob("*")
        if path.is_file()
    } | {f"fastgpt2/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*") if path.is_file()}
    assert names == {name for name in sources if "__pycache__" not in name and not name.endswith(".md")}


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_hugging_faces_kernels(environment: Path, wheel: Path, theirs: Path, ours_first: bool) -> None:
    """In either order both packages are whole; uninstalling ours leaves theirs as it was."""
    for package in (wheel, theirs) if ours_first else (theirs, wheel):
        install(environment, package)
    code = "import fastgpt2.kernels, importlib.util; print(fastgpt2.kernels.__file__)"
    assert run(environment, "-c", code, cwd=environment.parent).strip().endswith("fastgpt2/kernels/__init__.py")
    before = files_of(environment, "kernels")
    with zipfile.ZipFile(theirs) as archive:
        assert before and all(archive.read(name) == content for name, content in before.items())
    pip("--python", environment, "uninstall", "--quiet", "--yes", "fastgpt2")
    assert files_of(environment, "kernels") == before
    assert not files_of(environment, "fastgpt2")


def test_a_bare_checkout_needs_no_installation(environment: Path) -> None:
    code = (
        "import sys, fastgpt2, fastgpt2.kernels as kernels\n"
        "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))\n"
        "print(*sorted(set(dir(kernels)) & set(kernels.__all__)))\n"
        "print(*sorted(set(dir(fastgpt2)) & set(fastgpt2.__all__)))"
    )
    loaded, names, ours = run(environment, "-c", code).splitlines()
    assert loaded == "[]", "importing the packages does no work"
    assert set(names.split()) == PUBLIC and {"GPT", "TrainConfig", "train"} <= set(ours.split())


@pytest.mark.parametrize(
    ("module", "names"), [("fastgpt2.kernels", PUBLIC), ("fastgpt2", {"GPT", "TrainConfig", "train"})]
)
def test_help_shows_the_public_names(module: str, names: set[str]) -> None:
    about = run(sys.executable, "-m", "pydoc", module)
    contents = about.partition("PACKAGE CONTENTS")[0] + about.partition("\nFILE")[0].rpartition("PACKAGE CONTENTS")[2]
    assert all(f"{name}(" in contents or f"class {name}" in contents for name in names), about[:2000]


def test_an_editor_sees_functions(wheel: Path, tmp_path: Path) -> None:
    """The types of an installed package: what mypy reveals is what an editor completes."""
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    asked = tmp_path / "asked.py"
    names = {"fastgpt2": ["train", "GPT"], "fastgpt2.kernels": sorted(PUBLIC)}
    lines = [f"from {module} import {name}\nreveal_type({name})" for module in names for name in names[module]]
    asked.write_text("\n".join(lines))
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nignore_missing_imports = True\n[mypy-torch.*]\nfollow_imports = skip\n")
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(settings), str(asked)],
        cwd=tmp_path,
        env={"MYPYPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    revealed = [line for line in found.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(lines), found
    assert not any('"Any"' in line or "builtins.object" in line for line in revealed), found
    assert all("def (" in line for line in revealed), found


def test_transformers_works_in_a_checkout() -> None:
    """There `import kernels` finds our folder, and transformers looks for Hugging Face's package of that name."""
    code = (
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "print(type(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11))).__name__)"
    )
    assert run(sys.executable, "-c", code).strip() == "GPT2LMHeadModel"
