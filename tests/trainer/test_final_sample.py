"""The sample that the train command prints when a run has made all its steps."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastgpt2 import TrainConfig, final_sample, train
from fastgpt2.command import main
from fastgpt2.final_sample import local_tokenizer, print_sample
from fastgpt2.preparation import PrepareConfig, prepare
from fastgpt2.reporter import TrainResult
from fastgpt2.sample import main as sample
from tests.trainer.runs import SMALL

FLAGS = [
    "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "8", "--batch-size", "2", "--steps", "3",
    "--device", "cpu", "--dtype", "float32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes may share the cores."""
    monkeypatch.setattr(final_sample, "SECONDS", 600.0)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "poem.txt"
    path.write_text("".join(f"line {number}\n" for number in range(200)))
    return path


@pytest.fixture
def result(text: Path) -> TrainResult:
    return train(TrainConfig(**vars(SMALL) | {"data": str(text), "vocab_size": None, "dropout": 0.5}))


def printed(result: TrainResult) -> str:
    file = io.StringIO()
    print_sample(result, Console(file=file, width=500))
    return file.getvalue()


def test_it_is_what_the_sample_command_prints(text, monkeypatch, capsys):
    learned = ["--lr", "0.05", "--steps", "60"]
    assert main([*FLAGS, *learned, "--data", "poem.txt", "--out", "my run"]) == 0
    shown = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["sample", "--from", "my run", "--device", "cpu"])
    sample()
    drawn = capsys.readouterr().out.strip("\n")
    assert len(drawn) > 100
    end = "more: python -m fastgpt2.sample --from 'my run' --prompt TEXT\n"
    assert shown.endswith(f"\na sample from the trained model:\n{drawn}\n{end}")


def test_it_changes_neither_the_model_nor_the_generators(result):
    before, weights = torch.get_rng_state(), [p.clone() for p in result.model.parameters()]
    assert result.model.training
    assert printed(result) == printed(result)
    assert result.model.training and torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, result.model.parameters(), strict=True))


def test_no_escape_sequence_reaches_the_terminal(result, monkeypatch):
    monkeypatch.setattr(final_sample, "generate", lambda *_: iter(b"a\x1b[31mb\tc\n[bold]d"))
    assert "\na\\x1b[31mb c\n[bold]d\n" in printed(result)


def test_it_ends_in_time(result, monkeypatch):
    monkeypatch.setattr(final_sample, "SECONDS", 0.0)
    monkeypatch.setattr(final_sample, "generate", lambda *_: iter(b"ab" * 50))
    assert "\na\n" in printed(result)


def test_a_signal_ends_the_sample_only(result, monkeypatch):
    def drawn(*_):
        yield from b"ab"
        os.kill(os.getpid(), signal.SIGINT)
        yield from b"cd"

    monkeypatch.setattr(final_sample, "generate", drawn)
    before = signal.getsignal(signal.SIGINT)
    assert "\nabc\n" in printed(result)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_failure_is_a_note_and_the_status_stays(text, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(final_sample, "generate", fails)
    assert main([*FLAGS, "--data", "poem.txt", "--out", "run"]) == 0
    assert capsys.readouterr().out.endswith("no sample: out of luck\n")


def test_a_run_without_checkpoints_names_no_command(result):
    result.out = None
    assert "fastgpt2.sample" not in printed(result)


@pytest.mark.parametrize("what", ["stopped early", "nothing to do", "not saved", "dummy"])
def test_when_there_is_none(result, what):
    if what == "stopped early":
        result.steps_done -= 1
    elif what == "nothing to do":
        result.losses = []
    elif what == "not saved":
        result.missing = ["the last records are missing"]
    else:
        result = train(SMALL)
    assert printed(result) == ""


def test_a_compiled_model_is_not_compiled_anew(result, monkeypatch):
    monkeypatch.setattr(type(result.model), "__call__", None)
    assert "a sample from" in printed(result)


def test_a_tokenizer_that_needs_no_network(text, tmp_path, bpe):
    folder = tmp_path / "shards"
    prepare(PrepareConfig(sources=(text,), out=folder, bpe=bpe))
    found = local_tokenizer(str(folder))
    assert found is not None and found.name == "gpt2"
    (folder / "encoder.json").unlink()
    assert local_tokenizer(str(folder)) is None
    assert local_tokenizer("dummy") is None
