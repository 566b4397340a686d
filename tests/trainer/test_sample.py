"""Sampling and evaluating a run: drawn as asked, repeatable, and the loss over a split is the one computed by hand."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt2 import checkpoint, shards
from fastgpt2 import evaluate as evaluate_module
from fastgpt2 import sample as sample_module
from fastgpt2.config import ConfigError, ModelConfig, TrainConfig
from fastgpt2.console import run_command
from fastgpt2.data import DummyTokens, ShardTokens, write_shard
from fastgpt2.evaluate import evaluate, evaluate_split
from fastgpt2.generate import Sampling, draw, generate, stream
from fastgpt2.model import GPT
from fastgpt2.sample import SampleConfig, pick_tokenizer
from fastgpt2.settings import resolve
from fastgpt2.state import RunState
from fastgpt2.tokenizer import ByteTokenizer

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=257)


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, **changes))
    with torch.no_grad():  # larger weights than the initial ones, so that the distribution is far from uniform
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def make_run(tmp_path: Path, data: str | None = None, vocab_size: int = 257) -> Path:
    """A run's folder with one checkpoint, trained (so it says) on a byte-tokenized folder."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    write_shard(folder / "train_000000.bin", rng.integers(0, 257, 500))
    write_shard(folder / "val_000000.bin", rng.integers(97, 123, 100))
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 257}))
    config = resolve(
        TrainConfig(
            model="tiny", n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=vocab_size, data=data or str(folder)
        ),
        cuda=False,
    )
    model = make_model(vocab_size=vocab_size)
    checkpoint.save(tmp_path / "run", 3, config, RunState.begin(model, config))
    return tmp_path / "run"


def run(monkeypatch, capsys, module, *arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        run_command(module.main)
    return exit_.value.code, *capsys.readouterr()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Drawing a token


def drawn(logits: torch.Tensor, n: int = 4000, **changes) -> torch.Tensor:
    """How often each id is drawn, in parts of 1."""
    generator = seeded()
    ids = [draw(logits, Sampling(**{"temperature": 1.0, "top_k": 0, **changes}), generator) for _ in range(n)]
    return torch.bincount(torch.tensor(ids), minlength=len(logits)) / n


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.0025, 0.0625, 0.04]),
        ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2]),  # 0.4 and 0.25 are 0.65: the third crosses the bound and stays
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0]),  # of the two that top_k leaves, the first has 0.615
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-320}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e38}, [1, 1, 1, 1, 1]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_asked_for(changes, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    expected = expected / expected.sum()
    frequencies = drawn(PROBABILITIES.log(), **changes)
    assert (frequencies[expected == 0] == 0).all()
    # Four standard deviations of a frequency over 4000 draws are at most 0.032.
    assert (frequencies - expected).abs().max() < 0.032


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "--temperature must be at least 0, got -0.1"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": math.inf}, "--temperature"),
        ({"top_k": -1}, "--top-k must be at least 0, got -1"),
        ({"top_p": 0.0}, "--top-p must be over 0 and at most 1, got 0.0"),
        ({"top_p": math.nan}, "--top-p must be a finite number, got nan"),
    ],
)
def test_ranges(changes, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**changes)


# Generating


def test_generation_repeats_and_depends_on_the_seed():
    model = make_model()
    texts = [list(generate(model, [1, 2], 30, Sampling(), seeded(seed))) for seed in (0, 0, 1)]
    assert len(texts[0]) == 30
    assert texts[0] == texts[1] != texts[2]
    before = torch.get_rng_state()
    list(generate(model, [1], 3, Sampling(), seeded()))
    assert torch.equal(before, torch.get_rng_state())


def test_greedy_generation_is_the_argmax_given_the_last_block():
    model, contexts = make_model(), []
    model.wte.register_forward_pre_hook(lambda module, arguments: contexts.append(arguments[0].tolist()))
    ids = [5, 6]
    ids += generate(model, ids, 20, Sampling(temperature=0.0), seeded())
    assert contexts == [[ids[max(0, i - 8) : i]] for i in range(2, 22)]
    assert ids[2:] == [model(torch.tensor(context))[0, -1].argmax() for context in list(contexts)]


def test_only_the_vocabulary_is_drawn():
    model = make_model(vocab_size=20)  # stored as 128 rows
    assert model.wte.weight.shape[0] == 128
    hot = Sampling(temperature=100.0, top_k=0)
    assert set(generate(model, [1], 400, hot, seeded())) == set(range(20))
    assert set(generate(model, [1], 200, hot, seeded(), vocab_size=7)) == set(range(7))


def test_a_diverged_model_is_told():
    model = make_model()
    with torch.no_grad():
        model.ln_f.weight.fill_(math.nan)
    with pytest.raises(ConfigError, match="not finite"):
        next(generate(model, [1], 1, Sampling(), seeded()))


def test_text_comes_in_whole_characters():
    raw = "aé東🙂".encode()
    texts = list(stream(iter(raw), ByteTokenizer()))
    assert [t for t in texts if t] == ["a", "é", "東", "🙂"]
    assert "".join(stream(iter([97, 0xE6, 0x9D]), ByteTokenizer())) == "a\ufffd"
    assert "".join(stream(iter([0xFF, 98]), ByteTokenizer())) == "\ufffdb"


# The sample command


def test_sample(tmp_path, monkeypatch, capsys):
    out = make_run(tmp_path)
    arguments = "--from", out, "--prompt", "ab", "--max-new-tokens", 12, "--seed", 4, "--device", "cpu"
    status, stdout, stderr = run(monkeypatch, capsys, sample_module, *arguments)
    assert (status, stderr) == (0, f"step 3 of {out}\n")
    ids = list(generate(make_model(), [97, 98], 12, Sampling(), seeded(4)))
    ids = ids[: ids.index(256)] if 256 in ids else ids
    assert stdout == "ab" + bytes(ids).decode(errors="replace") + "\n"
    assert run(monkeypatch, capsys, sample_module, *arguments)[1] == stdout
    several = run(monkeypatch, capsys, sample_module, *arguments[:-4], "--seed", 3, "--num-samples", 2)[1]
    assert several.startswith("--- sample 1, seed 3\nab")
    assert several.endswith("--- sample 2, seed 4\n" + stdout)


def test_sampling_stops_at_the_end_of_text(tmp_path, monkeypatch, capsys):
    out = make_run(tmp_path)
    monkeypatch.setattr(sample_module, "generate", lambda *arguments: iter([120, 121, 256, 122]))
    assert run(monkeypatch, capsys, sample_module, "--from", out, "--prompt", "ab")[1] == "abxy\n"


def test_an_empty_prompt_begins_a_document(tmp_path, monkeypatch, capsys):
    prompts = []
    monkeypatch.setattr(sample_module, "generate", lambda model, prompt, *_: prompts.append(prompt) or iter([]))
    assert run(monkeypatch, capsys, sample_module, "--from", make_run(tmp_path))[:2] == (0, "\n")
    assert prompts == [[256]]


def test_which_tokenizer(tmp_path):
    config = SampleConfig(from_=tmp_path)
    make_run(tmp_path)
    folder = str(tmp_path / "data")

    def pick(config: SampleConfig, data: str, shape: ModelConfig = SHAPE):
        return pick_tokenizer(config, {"config": {"data": data}}, shape)

    assert pick(config, folder).name == "byte"
    assert pick(replace(config, data=folder), "dummy").name == "byte"
    assert pick(replace(config, tokenizer="byte"), "dummy").name == "byte"
    assert pick(config, folder, replace(SHAPE, vocab_size=1000)).name == "byte"  # --vocab-size 1000, and the run's data
    for gone in (tmp_path / "gone", "~nosuchuser/data"):
        with pytest.raises(ConfigError, match="is no file or folder here: give --data or --tokenizer"):
            pick(config, str(gone))
    meta = tmp_path / "data" / "meta.json"
    for contents, message in (
        ('{"tokenizer": "llama", "vocab_size": 257}', "no tokenizer 'llama': there are gpt2, byte"),
        ('{"vocab_size": 257}', "meta.json names no tokenizer, so that its 257 tokens may stand for any text: give"),
        ('{"tokenizer": "byte", "vocab_size": 200}', "are of 200, its byte tokenizer has 257: give --bpe"),
    ):
        meta.write_text(contents)
        with pytest.raises(ConfigError, match=message):
            pick(config, folder)


@pytest.mark.parametrize("vocab_size", [256, 385])
def test_a_tokenizer_of_another_vocabulary(tmp_path, vocab_size):
    """One byte too few for its ids, and one more than its 257 are padded to."""
    make_run(tmp_path)
    state, shape = {"config": {"data": str(tmp_path / "data")}}, replace(SHAPE, vocab_size=vocab_size)
    with pytest.raises(ConfigError, match=f"257 tokens, but the model has {vocab_size}: it was trained with another"):
        pick_tokenizer(SampleConfig(from_=tmp_path, data=str(tmp_path / "data")), state, shape)
    if vocab_size < 257:
        with pytest.raises(ConfigError, match="it was trained with another"):
            pick_tokenizer(SampleConfig(from_=tmp_path, tokenizer="byte"), state, shape)


def test_shards_without_a_meta_json_are_gpt2s_or_nobodys(tmp_path):
    make_run(tmp_path)
    (tmp_path / "data" / "meta.json").unlink()
    published = SimpleNamespace(name="gpt2", vocab_size=50257, end_of_text=50256)
    state = {"config": {"data": str(tmp_path / "data")}}
    with mock.patch.object(sample_module, "load_tokenizer", lambda *_, **__: published):
        assert pick_tokenizer(SampleConfig(from_=tmp_path), state, replace(SHAPE, vocab_size=50304)).name == "gpt2"
        with pytest.raises(ConfigError, match="50,257 tokens, but the model has 60,000"):
            pick_tokenizer(SampleConfig(from_=tmp_path), state, replace(SHAPE, vocab_size=60000))


@pytest.mark.parametrize("module", [sample_module, evaluate_module])
def test_a_run_on_dummy_tokens_has_no_text(tmp_path, monkeypatch, capsys, module):
    out = make_run(tmp_path, data="dummy-fixed")
    status, stdout, stderr = run(monkeypatch, capsys, module, "--from", out)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(f"error: {out} was trained on dummy tokens")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("module", [sample_module, evaluate_module])
def test_no_such_run_or_device(tmp_path, monkeypatch, capsys, module):
    status, _, stderr = run(monkeypatch, capsys, module, "--from", tmp_path / "gone")
    assert status == 2
    assert stderr == f"error: can't read {tmp_path / 'gone'}: No such file or directory\n"
    status, _, stderr = run(monkeypatch, capsys, module, "--from", make_run(tmp_path), "--device", "cuda:99")
    assert status == 2
    assert stderr.startswith("error: --device cuda:99: ")
    assert stderr.count("\n") == 1


def test_a_tokenizer_larger_than_the_model(tmp_path, monkeypatch, capsys):
    out = make_run(tmp_path, data="dummy", vocab_size=100)
    status, _, stderr = run(monkeypatch, capsys, sample_module, "--from", out, "--tokenizer", "byte")
    assert status == 2
    assert (
        stderr
        == "error: the byte tokenizer has 257 tokens, but the model has 100: it was trained with another vocabulary\n"
    )


# Evaluating


def by_hand(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of each token of (B, T + 1), from the logits."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def test_evaluate_is_the_mean_over_the_first_batches():
    model, source = make_model(), DummyTokens(257, 3, 8, grad_accum=2)
    expected = torch.cat([by_hand(model, source.tokens(step).flatten(0, 1)) for step in range(4)])
    assert evaluate(model, source, 4, "cpu") == pytest.approx(expected.mean().item(), rel=1e-6)
    assert evaluate(model, source, 4, "cpu") == evaluate(model, source, 4, "cpu")


def test_evaluate_is_without_dropout_and_restores_the_mode():
    model, source = make_model(dropout=0.5), DummyTokens(257, 3, 8)
    expected = evaluate(make_model(), source, 2, "cpu")
    for training in (True, False):
        model.train(training)
        assert evaluate(model, source, 2, "cpu") == expected
        assert model.training == model.h[0].training == training
    assert all(parameter.grad is None for parameter in model.parameters())

    class Failing:
        def tokens(self, step):
            raise ConfigError("gone")

    model.train()
    with pytest.raises(ConfigError):
        evaluate(model, Failing(), 2, "cpu")
    assert model.training


def test_a_split_counts_every_window_once_by_its_tokens(tmp_path):
    make_run(tmp_path)
    model = make_model()
    source = ShardTokens(tmp_path / "data", "val", batch_size=5, block_size=8)
    windows = torch.cat(list(source.sweep()))
    assert len(windows) == 12  # (100 - 1) // 8: batches of 5, 5 and 2
    loss, tokens = evaluate_split(model, source, "cpu")
    assert tokens == 96
    assert loss == pytest.approx(by_hand(model, windows).mean().item(), rel=1e-6)
    loss, tokens = evaluate_split(model, source, "cpu", batches=1)
    assert tokens == 40
    assert loss == pytest.approx(by_hand(model, windows[:5]).mean().item(), rel=1e-6)


def test_the_evaluate_command(tmp_path, monkeypatch, capsys):
    out = make_run(tmp_path)
    status, stdout, stderr = run(monkeypatch, capsys, evaluate_module, "--from", out, "--device", "cpu")
    assert (status, stderr) == (0, "")
    source = ShardTokens(tmp_path / "data", "val", batch_size=5, block_size=8)
    loss, _ = evaluate_split(make_model(), source, "cpu")
    counts = np.bincount(source.shards[0].tokens())
    part = counts[counts > 0] / 100
    assert stdout.splitlines() == [
        f"step 3 of {out} on the val split of {tmp_path / 'data'}: 96 tokens",
        f"loss       {loss:.4f} nats/token",
        f"perplexity {math.exp(loss):.2f}",
        f"unigram    {-(part * np.log(part)).sum():.4f} nats/token, the entropy of the split's own token frequencies",
    ]
    write_shard(tmp_path / "data" / "short_val.bin", [97] * 8)
    status, _, stderr = run(monkeypatch, capsys, evaluate_module, "--from", out, "--device", "cpu")
    assert (status, stderr.count("\n")) == (0, 1)
    assert stderr.startswith("note: the val split leaves out 1 of its 2 shards, 8 of 108 tokens: they are shorter than")
    status, _, stderr = run(monkeypatch, capsys, evaluate_module, "--from", out, "--batch-size", 0)
    assert (status, stderr) == (2, "error: --batch-size must be at least 1, got 0\n")


def test_the_evaluate_command_verifies_the_split_however_large(tmp_path, monkeypatch, capsys):
    out = make_run(tmp_path)
    monkeypatch.setattr(shards, "AT_ONCE_BYTES", -1)
    listed = {"val_000000.bin": {"tokens": 100, "sha256": "0" * 64}}
    meta = {"tokenizer": "byte", "vocab_size": 257, "shards": listed}
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    status, stdout, stderr = run(monkeypatch, capsys, evaluate_module, "--from", out, "--device", "cpu")
    note, error = stderr.splitlines()
    assert (status, stdout) == (2, "") and note.startswith("note: the val split, 0.0 GB, is verified while ")
    assert error.startswith(f"error: {tmp_path / 'data' / 'val_000000.bin'} is damaged or changed")


def test_a_terminal_is_not_sent_control_characters(monkeypatch, capsys):
    text = "a\tb\n\x1b[31mred\x16"
    sample_module.emit(text)
    assert capsys.readouterr().out == text, "a pipe gets what was drawn"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample_module.emit(text)
    assert capsys.readouterr().out == "a\tb\n\\x1b[31mred\\x16"
