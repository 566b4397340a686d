"""docs/extending.md does what it says: its code and commands, from a folder outside the checkout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(MINE,) = (block for block in BLOCKS if block.startswith('"""Causal attention'))
SCRIPTS = {
    name: next(block for block in BLOCKS if mark in block)
    for name, mark in {
        "train": 'out=Path("first")',
        "watch": "class EarlyStop",
        "source": "source=counting",
        "loop": "optimizer.step()",
        "ops": "Ops(loss",
        "load": "import load",
        "kernels": "flash_attention(",
        "mine": "ops={",
    }.items()
}
COMMANDS = re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)
SMALL = "--n-layer 1 --n-head 2 --n-embd 32 --block-size 32 --batch-size 2 --device cpu"
SHORTER = {
    "verify": "--steps 3 --device cpu",
    "prepare": "",
    "train --data": f"{SMALL} --steps 2",
    "train --resume": "--steps 4",
    "evaluate": "--device cpu --batches 1",
    "sample": "--device cpu --max-new-tokens 3",
}
"""What the test adds to a command of the page, or gives in place of a value there."""


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return forked.run(*words, cwd=folder, environment=environment)


def command(about: str) -> list[str]:
    """A command of the page, by how it begins, made short."""
    (line,) = [line for line in COMMANDS if line.startswith(f"python -m fastgpt2.{about}")]
    words, added = shlex.split(line)[1:], shlex.split(SHORTER[about])
    if "--steps" in words:
        at = words.index("--steps")
        del words[at : at + 2]
    return words + added


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the page has made: mine.py, and text."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mine.py").write_text(MINE)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    return folder


def test_the_page_is_run_whole() -> None:
    ours = [line for line in COMMANDS if line.startswith("python -m ")]
    assert sum(any(f"fastgpt2.{about}" in line for about in SHORTER) for line in ours) == len(ours) == len(SHORTER)
    assert sorted([MINE, *SCRIPTS.values()]) == sorted(BLOCKS)
    assert MINE.count("\n") < 25 and SCRIPTS["loop"].count("\n") < 25


def test_the_scripts_of_the_page_do_what_it_says(folder: Path) -> None:
    """In one process, in the order of the page."""
    for name, script in SCRIPTS.items():
        (folder / f"script_{name}.py").write_text(script)
    lines = [f"print('=== {name}'); runpy.run_path('script_{name}.py', run_name='__main__')" for name in SCRIPTS]
    done = run(folder, "-c", "\n".join(["import runpy", *lines]), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    parts = (part.partition("\n") for part in done.stdout.split("=== ")[1:])
    printed = {name: text.splitlines() for name, _, text in parts}
    assert printed["train"][0].startswith("TrainResult(100 of 100 steps, loss ")
    assert float(printed["train"][1]) < 4.0  # it began at ln 256 = 5.5
    assert 10 < int(printed["watch"][-1].split()[0]) < 1000 and printed["watch"][0].startswith("tiny: ")
    for name in ("source", "loop"):
        assert float(printed[name][-1]) < 3.5  # it began at ln 128 = 4.9
    plain, chunked = map(float, printed["ops"][0].split())
    assert chunked == pytest.approx(plain, abs=1e-5)
    assert printed["load"][0] == "torch.Size([1, 3, 256])" and printed["load"][1].count(",") == 9
    assert printed["mine"] == ["mine:attention"] and printed["kernels"] == []


def test_an_attention_from_outside_is_trained_resumed_evaluated_and_sampled(folder: Path) -> None:
    for about in ("prepare", "train --data", "train --resume", "evaluate", "sample"):
        done = run(folder, *command(about))
        assert done.returncode == 0, (about, done.stderr)
    assert 'attn = "mine:attention"' in (folder / "run" / "config.toml").read_text()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(folder / "data", elsewhere / "data")
    for about in ("train --resume", "evaluate", "sample"):
        words = [str(folder / word) if word in ("run", "data") else word for word in command(about)]
        done = run(elsewhere, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (about, done.stderr)
        assert "--attn mine:attention can't be imported: no module 'mine'; start in the folder" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="--compile on a CPU needs a C++ compiler")
def test_an_attention_from_outside_is_compiled(folder: Path) -> None:
    words = ["-m", "fastgpt2.train", *SMALL.split(), "--vocab-size", "128", "--steps", "1", "--save-every", "0"]
    done = run(folder, *words, "--compile", "--attn", "mine:attention", "--out", "compiled")
    assert done.returncode == 0, done.stderr


def test_an_attention_from_outside_is_proved_and_a_wrong_one_is_found(folder: Path) -> None:
    done = run(folder, *command("verify"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 within budget" in done.stdout and "attn mine:attention" in done.stdout
    assert MINE.count("** -0.5") == MINE.count("position > rows") == 1
    (folder / "wrong.py").write_text(MINE.replace("** -0.5", "** -0.25"))
    done = run(folder, *[word.replace("mine", "wrong") for word in command("verify")])
    assert done.returncode == 1 and done.stdout.count("OUT OF BUDGET") >= 4, done.stdout
    (folder / "ahead.py").write_text(MINE.replace("position > rows", "position > 1 + rows"))
    done = run(folder, *[word.replace("mine", "ahead") for word in command("verify")])
    assert done.returncode == 2 and "ahead:attention is not causal" in done.stderr, done.stdout + done.stderr
    done = run(folder, *[word.replace("mine", "nosuch") for word in command("verify")])
    assert done.returncode == 2 and "no module 'nosuch'" in done.stderr


RESUME = """
import dataclasses, sys
from fastgpt2 import TrainConfig, train
from fastgpt2.backends.attention import sdpa_attention

class Own:
    def __call__(self, qkv, dropout_p=0.0, documents=None):
        return sdpa_attention(qkv)

size = dict(n_layer=1, n_head=2, n_embd=32, block_size=8, batch_size=2, vocab_size=64, device="cpu", out="own")
first = train(TrainConfig(**size, steps=1), ops={"attn": Own()})
again = train(TrainConfig(**size, steps=2, resume=True), ops={"attn": Own()})
print(first.config.attn, again.steps_done)
"""


def test_what_cannot_be_imported_is_resumed_from_python_alone(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RESUME)
    done = run(tmp_path, "script.py")
    assert done.stdout == "__main__:<Own> 2\n", done.stderr
    for words in (["train", "--resume", "--out", "own", "--steps", "3"], ["sample", "--from", "own"]):
        refused = run(tmp_path, "-m", f"fastgpt2.{words[0]}", *words[1:])
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert "--attn __main__:<Own> was given in Python and can't be imported" in refused.stderr
