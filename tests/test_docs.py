"""README and docs say what is so: commands, flags, code, links, files and figures.

A command is parsed by its own parser; those a reader begins with are run, made short. docs/extending.md is run by
tests/trainer/test_extending.py, and the figures of docs/benchmarks.md are held by tests/bench/test_report.py.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from torch.distributed import run as torchrun

from bench.__main__ import COMMANDS as bench_commands
from bench.report.results import stored
from fastgpt2 import command as train_command
from fastgpt2.__main__ import COMMANDS
from fastgpt2.arguments import parse as parse_train
from fastgpt2.config import PRESETS
from fastgpt2.evaluate import EvaluateConfig
from fastgpt2.flags import read_arguments
from fastgpt2.model import GPT
from fastgpt2.preparation import PrepareConfig
from fastgpt2.sample import SampleConfig
from fastgpt2.verify import VerifyConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS: dict[str, type] = {
    "fastgpt2.prepare": PrepareConfig,
    "fastgpt2.evaluate": EvaluateConfig,
    "fastgpt2.sample": SampleConfig,
    "fastgpt2.verify": VerifyConfig,
}
NOT_OURS = {"source", "cd", "git", "sha256sum", "apt"}
"""Programs whose arguments are not checked."""
SETUP = "python3 -m venv .venv && "
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SEVERAL = ROOT / "docs" / "several-gpus.md"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in some languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline(page: Path) -> list[str]:
    """What a page sets in backticks, each on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page, without environment variables and comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    typed = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    lines += [line[2:] for line in typed.splitlines() if line.startswith("$ ")]
    lines += [
        code for code in inline(page) if re.match(r"([A-Z_]+=\S+ )*(\.venv/bin/|python -[mc] |pytest |fastgpt2 )", code)
    ]
    for part in (part for line in lines for part in re.split(r" && | \| ", line)):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


# ------------------------------------------------------------------------------------------------------ commands


class Parsed(Exception):
    """A parser took all words."""


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a command's own parser read it."""
    program, *rest = words
    if program == "fastgpt2" and not rest:
        return
    if program == "fastgpt2" and rest[0] in COMMANDS:
        check_module(COMMANDS[rest[0]], rest[1:], monkeypatch)
    elif program in ("python", "python3") and rest[0] == "-c":
        compile(rest[1], "python -c", "exec")
    elif program in ("python", "python3"):
        assert rest[0] == "-m", f"{words}: run a module by -m"
        check_module(rest[1], rest[2:], monkeypatch)
    elif program == "torchrun":
        asked = torchrun.get_args_parser().parse_args(rest)
        assert asked.module, f"{words}: run a module by -m"
        check_module(asked.training_script, asked.training_script_args, monkeypatch)
    elif program == "pytest":
        missing = [word for word in rest if "/" in word and not (ROOT / word).exists()]
        assert not missing, f"{words}: no {missing}"
    elif program == "pip":
        check_pip(rest)
    else:
        assert program in NOT_OURS, f"{words}: unknown program"


def check_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "venv":
        return
    if not words:
        assert find_spec(module), f"no module {module}"
    elif module == "fastgpt2.train":
        parse_train(words)
    elif module in KINDS:
        read_arguments(KINDS[module], module, words)
    elif module in ("bench", "fastgpt2"):
        table = import_module(f"{module}.__main__").COMMANDS
        assert words[0] in table, f"{module} has no command {words[0]!r}"
    else:
        check_other_parser(module, words, monkeypatch)


def check_other_parser(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a module's main until its parser, of any kind, has read the words."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser: Any, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = original(parser, args, namespace)
        if unknown:
            return known, unknown
        raise Parsed

    assert find_spec(module), f"no module {module}"
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed):
            main_of(module)()


def main_of(module: str) -> Callable[[], int | None]:
    """What `python -m MODULE` calls."""
    if module == "fastgpt2.train":  # it can't be imported
        return train_command.main
    spec = find_spec(module)
    return import_module(f"{module}.__main__" if spec and spec.submodule_search_locations else module).main


def check_pip(words: list[str]) -> None:
    """What pip is asked for is ours, or something that we need in a version that we take."""
    needs = {need.name: need for need in map(Requirement, PROJECT["dependencies"])}
    assert words[0] == "install"
    for word in words[1:]:
        if word.startswith(("-", "https://")):
            continue
        if extra := re.fullmatch(r"\.(\[(\w+)\])?", word):
            assert extra[2] is None or extra[2] in PROJECT["optional-dependencies"]
            continue
        asked = Requirement(word)
        versions = [pin.version for pin in asked.specifier]
        assert asked.name in needs and all(needs[asked.name].specifier.contains(v) for v in versions), word


@pages
def test_every_command_is_read_by_its_own_parser(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        try:
            check(words, monkeypatch)
        except (SystemExit, ValueError) as error:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err or error}")


@functools.cache
def known_flags() -> set[str]:
    """The flags of our commands, of our pytest options and of torchrun."""
    modules = [*COMMANDS.values(), *bench_commands.values(), "tests.counts", "tests.trainer.faults"]
    options = [path.read_text(encoding="utf-8") for path in (ROOT / "tests/conftest.py", ROOT / "bench/conftest.py")]
    added = re.findall(r'addoption\(\s*"(--[a-z-]+)"', "\n".join(options))
    helps = "\n".join([*map(help_of, modules), torchrun.get_args_parser().format_help()])
    return {*re.findall(r"--[a-z][a-z0-9-]*", helps), *added, "--version"}


def help_of(module: str) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit):
            main_of(module)()
    return printed.getvalue()


@pages
def test_every_flag_exists(page: Path) -> None:
    theirs = {"--check", "--index-url", "--name", "--start", "--out_dir"}  # ruff's, pip's, nanoGPT's
    named = {flag for code in inline(page) for flag in re.findall(r"(?<!\S)--[a-z][a-z0-9_-]*", code)}
    unknown = named - known_flags() - theirs
    assert not unknown


SMALL = "--n-layer 1 --n-head 2 --n-embd 32 --block-size 32 --batch-size 2 --device cpu"
SHORTER = {
    "prepare": "--tokenizer byte",
    "train": f"{SMALL} --steps 2",
    "evaluate": "--device cpu --batches 1",
    "sample": "--device cpu --max-new-tokens 3",
}
"""What the test adds to the first commands of docs/training.md. The last, verify, has tests of its own."""


def test_the_first_commands_of_the_training_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for number in range(20):
        text = f"Chapter {number}. It was the best of times, it was the worst of times. " * 40
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    first = blocks(ROOT / "docs" / "training.md", "sh")[0].splitlines()
    assert [line.split()[2] for line in first] == [f"fastgpt2.{name}" for name in (*SHORTER, "verify")]
    for line in first[: len(SHORTER)]:
        _, _, module, *words = shlex.split(line, comments=True)
        run(module, [*words, *SHORTER[module.partition(".")[2]].split()], monkeypatch)
    assert "Once upon" in capsys.readouterr().out


def run(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        assert not main_of(module)(), (module, words)


# ---------------------------------------------------------------------------------------------------------- code


@pages
def test_every_python_block_compiles_and_what_it_imports_exists(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
        for module, names in re.findall(r"^from (fastgpt2[\w.]*) import ([\w, ]+)$", code, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(import_module(module), name), f"{page.name}: {module} has no {name}"


def test_the_readmes_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks(ROOT / "README.md", "python"):
        exec(compile(code, "README.md", "exec"), {})


def test_nanogpts_data_are_converted_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "openwebtext"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 2000, dtype=np.uint16).tofile(folder / f"{split}.bin")
    (code,) = blocks(ROOT / "docs" / "training.md", "python")
    exec(compile(code, "training.md", "exec"), {})
    words = f"--data data/owt-shards {SMALL} --steps 1 --eval-every 1 --save-every 0 --out run".split()
    run("fastgpt2.train", words, monkeypatch)


# --------------------------------------------------------------------------------------------- links, files, words


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for link in links:
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc, link
            continue
        target = page.parent / parts.path if parts.path else page
        assert target.exists(), f"{page.name}: no {link}"
        assert not parts.fragment or parts.fragment in anchors(target), f"{page.name}: no heading for {link}"
        assert target.suffix not in (".svg", ".png") or target.stat().st_size < 200_000, f"{link} is large"


@functools.cache
def tracked() -> set[str]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {*names, *(name.replace("kernels/", "fastgpt2/kernels/", 1) for name in names if name[:8] == "kernels/")}


def test_every_file_of_ours_that_is_named_exists() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs git to know which files are ours")
    names = {name.rpartition("/")[2] for name in tracked()}
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "correctness.md"):
        for code in inline(page):
            if re.fullmatch(r"[\w./-]+\.(py|md)", code):
                assert code in tracked() if "/" in code else code in names, f"{page.name}: no {code}"
            elif re.fullmatch(r"(fastgpt2|kernels|bench|tests|docs)(/\w+)*/", code):
                assert (ROOT / code).is_dir(), f"{page.name}: no {code}"


def test_what_is_not_measured_is_said_once() -> None:
    """In README, by bench.report, until a GPU is measured."""
    words = re.compile(
        r"not\s+(?:yet\s+)?(?:been\s+)?measured|unmeasured|nothing\s+has\s+run\s+on\s+a\s+gpu", re.IGNORECASE
    )
    said = [page.name for page in PAGES for _ in words.findall(prose(page))]
    assert said == ([] if any(record.on_gpu for record in stored()) else ["README.md"])
    assert not words.search(PROJECT["description"])


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert sum(line.startswith(SETUP) for line in lines) == 2, ".ci/run runs these two"


# ---------------------------------------------------------------------------------------------------- several GPUs


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a row of headings, without it."""
    lines = page.read_text(encoding="utf-8").partition(heading)[2].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(str.strip, lines)]


def test_the_memory_of_several_gpus_follows_from_the_parameters() -> None:
    for name, parameters, whole, shared in rows(SEVERAL, "| model | parameters |"):
        with torch.device("meta"):
            model = GPT(PRESETS[name.strip("`")])
        count = sum(weight.numel() for weight in model.parameters())
        figures = f"{count:,}", f"{16 * count / 2**30:.1f} GiB", f"{16 * count / 8 / 2**30:.1f} GiB"
        assert (parameters, whole, shared) == figures, name


def test_the_failures_of_several_gpus_are_those_of_the_code() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "fastgpt2").glob("*.py")]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    said = [text for text in texts if isinstance(text, str)]
    for message, *_ in rows(SEVERAL, "| message | meaning |"):
        for part in re.split(r"\.\.\.|\d+|RANK", message.strip("`")):
            assert any(part.strip(" ,:") in text for text in said), f"{part!r} of {message}"
