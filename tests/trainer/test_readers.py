"""sample and evaluate as commands: what they are given, what they say of it, and where their output goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt2 import evaluate as evaluate_module
from fastgpt2 import sample as sample_module
from fastgpt2.data import write_shard
from fastgpt2.evaluate import _perplexity
from fastgpt2.model import GPT
from tests.trainer.test_sample import make_run, run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def write_data(folder: Path, vocab_size: int, tokens: int = 100, **meta: object) -> Path:
    folder.mkdir()
    write_shard(folder / "val_000000.bin", np.arange(tokens) % min(vocab_size, 200))
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size, **meta}))
    return folder


# Which checkpoint


@pytest.mark.parametrize("module", [sample_module, evaluate_module])
def test_a_run_a_step_and_a_checkpoint_are_read_alike(out, monkeypatch, capsys, module) -> None:
    folder = out / "checkpoints"
    said = []
    for arguments in (["--from", out], ["--from", out, "--step", 3], ["--from", folder / "step-00000003"]):
        status, stdout, stderr = run(monkeypatch, capsys, module, *arguments, "--device", "cpu")
        assert status == 0 and f"step 3 of {arguments[1]}" in stdout + stderr
        said.append(stdout.replace(str(arguments[1]), "RUN"))
    assert said[0] == said[1] == said[2]
    status, _, stderr = run(monkeypatch, capsys, module, "--from", out, "--step", 9)
    assert (status, stderr) == (2, f"error: {out} has no checkpoint of step 9: there are 3\n")


@pytest.mark.parametrize("module", [sample_module, evaluate_module])
def test_a_copied_checkpoint_is_of_its_own_data(out, tmp_path, monkeypatch, capsys, module) -> None:
    """Wherever it lies: its state.json says what it was trained on."""
    shutil.copytree(out / "checkpoints" / "step-00000003", tmp_path / "best")
    assert run(monkeypatch, capsys, module, "--from", tmp_path / "best", "--device", "cpu")[0] == 0


# What is asked for


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", -1], "--seed must be at least 0, got -1"),
        (["--seed", 2**64], f"--seed must be a whole number below 2**63, got {2**64}"),
        (["--num-samples", 0], "--num-samples must be at least 1, got 0"),
        (["--max-new-tokens", -3], "--max-new-tokens must be at least 1, got -3"),
        (["--temperature", "nan"], "--temperature must be a finite number, got nan"),
        (["--temperature", "inf"], "--temperature must be a finite number, got inf"),
        (["--data", "a" * 300], "which tells the tokenizer, is no file or folder here: give --data or --tokenizer"),
        (["--tokenizer", "gpt2", "--bpe", "a" * 300], "a has neither vocab.bpe nor encoder.json"),
        (["--bpe", "nowhere"], "--bpe holds GPT-2's tokenizer: it has no use with the byte tokenizer"),
        (["--tokenizer", "gpt2", "--bpe", "nowhere"], "--bpe nowhere has neither vocab.bpe nor encoder.json"),
        (["--prompt", os.fsdecode(b"ab\xff")], "--prompt must be UTF-8, got 'ab\\udcff'"),
    ],
    ids=str,
)
def test_what_sample_cant_do_is_one_line(out, monkeypatch, capsys, flags, message) -> None:
    status, stdout, stderr = run(monkeypatch, capsys, sample_module, "--from", out, *flags)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1


def test_the_largest_values_work(out, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sample_module, "generate", lambda *arguments: iter([120, 256]))
    flags = "--seed", 2**63 - 1, "--top-k", 10**18, "--max-new-tokens", 10**18, "--temperature", 1e38
    assert run(monkeypatch, capsys, sample_module, "--from", out, *flags)[:2] == (0, "x\n")


def test_of_a_long_prompt_the_end_is_seen_and_that_is_said(out, monkeypatch, capsys) -> None:
    contexts = []
    monkeypatch.setattr(GPT, "forward", lambda model, tokens: contexts.append(tokens) or torch.zeros(1, 1, 257))
    prompt = "abcdefghijklm"
    status, stdout, stderr = run(
        monkeypatch, capsys, sample_module, "--from", out, "--prompt", prompt, "--max-new-tokens", 1
    )
    assert status == 0 and stdout.startswith(prompt)
    assert stderr == f"step 3 of {out}\nthe prompt has 13 tokens: the model sees the last 8\n"
    assert bytes(contexts[0][0].tolist()) == b"fghijklm"


# Data of another vocabulary


@pytest.mark.parametrize(("vocab_size", "fits"), [(257, True), (256, False), (258, False), (1, False)])
def test_data_of_another_vocabulary_are_not_evaluated(out, tmp_path, monkeypatch, capsys, vocab_size, fits) -> None:
    """The model's 257 are no padding of 256, which are a multiple of 128 already."""
    data = write_data(tmp_path / "other", vocab_size)
    status, _, stderr = run(monkeypatch, capsys, evaluate_module, "--from", out, "--data", data, "--device", "cpu")
    assert status == (0 if fits else 2), stderr
    assert fits or ("vocabulary" in stderr and stderr.count("\n") == 1)


def test_a_runs_own_data_may_have_fewer_tokens_than_its_model(tmp_path, monkeypatch, capsys) -> None:
    out = make_run(tmp_path, vocab_size=2000)
    for module in (sample_module, evaluate_module):
        assert run(monkeypatch, capsys, module, "--from", out, "--device", "cpu")[0] == 0


def test_shards_of_an_own_vocabulary_are_not_decoded_as_gpt2s(out, tmp_path, monkeypatch, capsys) -> None:
    data = write_data(tmp_path / "own", 257)
    status, stdout, stderr = run(monkeypatch, capsys, sample_module, "--from", out, "--data", data)
    assert (status, stdout) == (2, "") and "names no tokenizer" in stderr and "give --tokenizer" in stderr
    assert run(monkeypatch, capsys, sample_module, "--from", out, "--data", data, "--tokenizer", "byte")[0] == 0


def test_a_split_under_a_window_is_told(out, tmp_path, monkeypatch, capsys) -> None:
    data = write_data(tmp_path / "short", 257, tokens=5)
    status, _, stderr = run(monkeypatch, capsys, evaluate_module, "--from", out, "--data", data)
    assert status == 2 and "the val split of" in stderr and "too short" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(("flag", "value"), [("--batches", 2**63 - 1), ("--batch-size", 2**63 - 1)])
def test_more_than_there_is_is_all(out, monkeypatch, capsys, flag, value) -> None:
    status, stdout, _ = run(monkeypatch, capsys, evaluate_module, "--from", out, flag, value, "--device", "cpu")
    assert status == 0 and ": 96 tokens\n" in stdout


def test_perplexity_of_any_loss() -> None:
    assert [_perplexity(loss) for loss in (0.0, 2.0, 25.0, 1e6)] == ["1.00", "7.39", "e^25.00", "e^1000000.00"]


def test_a_loss_that_is_not_finite_is_said(out, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate_module, "evaluate_split", lambda *_: (float("nan"), 8))
    status, stdout, stderr = run(monkeypatch, capsys, evaluate_module, "--from", out)
    assert (status, stdout) == (
        2,
        "",
    ) and stderr == "error: the loss is nan: the run had diverged at this checkpoint\n"


# Where the output goes


def process(module: str, *arguments: object, encoding: str = "utf-8", **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"fastgpt2.{module}", *map(str, arguments), "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


def test_an_ascii_terminal_shows_what_it_can(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    out = make_run(tmp_path / "é")
    arguments = "--from", out, "--prompt", "é", "--max-new-tokens", 20
    both = [
        process("sample", *arguments, encoding="ascii", stdout=subprocess.PIPE),
        process("evaluate", "--from", out, encoding="ascii", stdout=subprocess.PIPE),
    ]
    said = [(*reader.communicate(), reader.returncode) for reader in both]
    for stdout, stderr, status in said:
        assert status == 0 and b"Traceback" not in stderr, stderr
        assert stdout.isascii()
    assert said[0][0].startswith(b"?") and rb"\xe9/run" in said[0][1] and rb"\xe9/run on the val" in said[1][0]


def test_a_reader_that_goes_away_is_no_traceback(out) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sampling = process("sample", "--from", out, "--max-new-tokens", 50, stdout=writer)
    evaluating = process("evaluate", "--from", out, stdout=writer)
    os.close(writer)
    assert sampling.communicate()[1].decode() == f"step 3 of {out}\n" and sampling.returncode == 1
    assert evaluating.communicate()[1] == b"" and evaluating.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_text_that_cant_be_written_is_one_line(out) -> None:
    with open("/dev/full", "wb") as full:
        sampling = process("sample", "--from", out, "--max-new-tokens", 5, stdout=full)
        _, stderr = sampling.communicate()
    assert sampling.returncode and b"Traceback" not in stderr
    assert stderr.decode().splitlines()[1] == "error: can't write the text: No space left on device"
