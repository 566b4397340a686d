"""Token sources: a row is a function of (seed, number), an epoch visits each window once, bad shards are told."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt2 import data, shards
from fastgpt2.config import ConfigError
from fastgpt2.data import (
    DummyTokens,
    ShardTokens,
    count_tokens,
    data_vocab_size,
    open_data,
    split,
    unigram_entropy,
    write_shard,
)
from tests.trainer.shard_folders import make_folder

# sha256 of the batches' bytes, written down when the order was decided.
ORDER_STEP_0 = "48dfced06601f321a8564079b3587cba77d23bfd388ca517adf5bdf4abbb7539"
ORDER_STEP_1000 = "ce977ca71ec6274c0c463948bb730527f88b14f147dd7a2d42445db4d4f5978d"


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


# Both sources


@pytest.fixture(params=["dummy", "shards"])
def source(request, tmp_path):
    """A constructor of (seed, rank) for each source."""
    if request.param == "dummy":
        return lambda seed=0, rank=0: DummyTokens(97, 3, 8, grad_accum=2, seed=seed, rank=rank, world=4)
    folder = make_folder(tmp_path / "d")
    return lambda seed=0, rank=0: ShardTokens(folder, "train", 3, 8, grad_accum=2, seed=seed, rank=rank, world=4)


def test_a_batch_depends_on_seed_step_and_rank_alone(source):
    batch = source(seed=5, rank=1).tokens(7)
    assert batch.shape == (2, 3, 9)
    assert batch.dtype == torch.int64
    assert batch.device.type == "cpu"
    other = source(seed=5, rank=1)
    for step in (0, 30, 3):  # what was read before, in whatever order, makes no difference
        other.tokens(step)
    assert torch.equal(batch, other.tokens(7))
    assert not torch.equal(batch, source(seed=6, rank=1).tokens(7))
    assert not torch.equal(batch, source(seed=5, rank=2).tokens(7))
    assert not torch.equal(batch, source(seed=5, rank=1).tokens(8))


def test_micro_batches_differ(source):
    first, second = source().tokens(0)
    assert not torch.equal(first, second)


def test_global_generators_are_left_alone(source):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    source().tokens(0)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_targets_are_inputs_shifted_by_one(source):
    tokens = source().tokens(0)
    inputs, targets = split(tokens)
    assert inputs.shape == targets.shape == (2, 3, 8)
    assert torch.equal(inputs[..., 1:], targets[..., :-1])
    assert torch.equal(targets[..., -1], tokens[..., -1])


# Dummy tokens


def test_dummy_tokens_are_uniform_over_the_vocabulary():
    tokens = DummyTokens(10, 50, 1999).tokens(0)
    counts = torch.bincount(tokens.flatten(), minlength=10)
    assert counts.sum() == 100_000
    # Chi-squared with 9 degrees of freedom: over 28 in one of a thousand draws; this draw is always the same.
    assert ((counts - 10_000).double() ** 2 / 10_000).sum() < 28


def test_a_row_of_dummy_tokens_is_a_part_of_one_stream():
    """Row i is made of its own words, three blocks of Philox here, and of nothing else."""
    key = int.from_bytes(hashlib.blake2b(b"dummy/train/3", digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(48 * 3 * 4)
    halves = np.stack([words & 0xFFFFFFFF, words >> np.uint64(32)], axis=1).reshape(48, 24)[:, :17]
    expected = [[int(word) * 50257 >> 32 for word in row] for row in halves]
    source = DummyTokens(50257, 4, 16, seed=3)
    assert [source.tokens(step)[0].tolist() for step in (11, 2, 3, 0)] == [
        expected[4 * step : 4 * step + 4] for step in (11, 2, 3, 0)
    ]


def test_fixed_repeats_the_first_rows():
    fixed = DummyTokens(97, 3, 8, grad_accum=2, seed=1, fixed=True)
    assert torch.equal(fixed.tokens(0), DummyTokens(97, 3, 8, grad_accum=2, seed=1).tokens(0))
    assert torch.equal(fixed.tokens(0), fixed.tokens(1234))
    fixed.begin_at(7, 99)
    assert torch.equal(fixed.tokens(0), fixed.tokens(8))


def test_train_and_val_are_other_dummy_tokens():
    train, val = (open_data("dummy", split=s, vocab_size=97, batch_size=3, block_size=8) for s in ("train", "val"))
    assert not torch.equal(train.tokens(0), val.tokens(0))


# Shards


@pytest.mark.parametrize("sizes", [(1000,), (517, 40, 8, 300)])
def test_each_window_once_an_epoch(tmp_path, sizes):
    T = 8
    folder = make_folder(tmp_path / "d", train=sizes)
    windows = ShardTokens(folder, "train", 1, T).windows
    source = ShardTokens(folder, "train", windows, T, seed=3)  # a step is an epoch
    begin, borders = 0, []
    for size in sizes:
        borders.append((begin, begin + size))
        begin += size
    # An epoch takes all of a shard but less than two windows; a shard without a whole window is left out.
    assert windows == sum(max(size // T - 1, 1) for size in sizes if size > T)
    orders, firsts = [], []
    for epoch in range(30):
        (rows,) = source.tokens(epoch)
        assert torch.equal(rows, rows[:, :1] + torch.arange(T + 1)), "windows are contiguous"
        starts = sorted(rows[:, 0].tolist())
        assert all(b - a >= T for a, b in pairwise(starts)), "no two windows overlap"
        for low, high in borders:
            inside = [s for s in starts if low <= s < high]
            assert not inside or inside[-1] + T < high, "no window spans two shards"
            assert inside == list(range(inside[0], inside[-1] + 1, T)) if inside else high - low <= T
            assert not inside or inside[0] - low < T
        orders.append(rows[:, 0].tolist())
        firsts.append(starts[0])
    assert orders[0] != sorted(orders[0])
    assert orders[0] != orders[1] != orders[2]
    assert set(firsts) == set(range(T)), "window borders move from epoch to epoch"


def test_ranks_and_micro_steps_partition_an_epoch(tmp_path):
    folder, world, accum, B = make_folder(tmp_path / "d", train=(8 * 49,)), 2, 3, 4
    alone = ShardTokens(folder, "train", 1, 8, seed=1)
    assert alone.windows == 48 == 2 * world * accum * B
    seen = [
        row[0].item()
        for step in range(2)
        for rank in range(world)
        for row in ShardTokens(folder, "train", B, 8, accum, seed=1, rank=rank, world=world).tokens(step).view(-1, 9)
    ]
    everything = [alone.tokens(i)[0, 0, 0].item() for i in range(48)]
    assert len(set(seen)) == 48
    assert sorted(seen) == sorted(everything)
    # Sample g is ((step * accum + a) * world + rank) * B + b: spread over ranks, the samples are the same.
    step, a, rank, b = 1, 2, 1, 3
    batch = ShardTokens(folder, "train", B, 8, accum, seed=1, rank=rank, world=world).tokens(step)
    assert batch[a, b, 0].item() == everything[((step * accum + a) * world + rank) * B + b]


def test_a_batch_that_spans_epochs(tmp_path):
    folder = make_folder(tmp_path / "d", train=(8 * 11,))
    source, single = ShardTokens(folder, "train", 35, 8), ShardTokens(folder, "train", 1, 8)
    assert single.windows == 10
    expected = torch.cat([single.tokens(g)[0] for g in range(35, 70)])
    assert torch.equal(source.tokens(1)[0], expected)


def test_the_order_is_pinned(tmp_path):
    """Another order would break every run that is resumed after an upgrade."""
    source = ShardTokens(make_folder(tmp_path / "d", train=(40_000,)), "train", 16, 64, grad_accum=2, seed=7)
    assert sha256(source.tokens(0)) == ORDER_STEP_0
    assert sha256(source.tokens(1000)) == ORDER_STEP_1000


def test_sweep_is_every_window_in_order(tmp_path):
    source = ShardTokens(make_folder(tmp_path / "d", val=(33, 8, 20)), "val", 3, 8)
    batches = list(source.sweep())
    assert [len(b) for b in batches] == [3, 3]
    assert torch.cat(batches)[:, 0].tolist() == [0, 8, 16, 24, 41, 49]
    assert torch.equal(batches[1][0], torch.arange(24, 33))


def test_the_shortest_split_that_can_be_read(tmp_path):
    source = ShardTokens(make_folder(tmp_path / "d", train=(9,)), "train", 2, 8)
    assert source.windows == 1
    assert torch.equal(source.tokens(5), torch.arange(9).expand(1, 2, 9))
    with pytest.raises(ConfigError, match=r"train split .* too short: .* 9 tokens, .* --block-size \+ 1 = 10"):
        ShardTokens(tmp_path / "d", "train", 2, 9)


def test_val_windows_are_the_same_for_all_seeds(tmp_path):
    folder = make_folder(tmp_path / "d")
    shape = {"vocab_size": 50257, "batch_size": 3, "block_size": 8}
    val = [open_data(str(folder), split="val", seed=seed, **shape).tokens(2) for seed in (0, 1)]
    assert torch.equal(*val)
    train = [open_data(str(folder), split="train", seed=seed, **shape).tokens(2) for seed in (0, 1)]
    assert not torch.equal(*train)


# Where a resumed run goes on


@pytest.mark.parametrize("kind", ["dummy", "shards"])
@pytest.mark.parametrize("seed", range(8))
def test_other_batches_neither_repeat_nor_skip_rows(tmp_path, kind, seed):
    """Whatever the batches and processes of a run's parts were, it has taken the first rows of the order, each once."""
    rng = np.random.default_rng(seed)
    data = kind
    if kind == "shards":
        data = str(make_folder(tmp_path / "d", train=rng.integers(20, 300, 3).tolist()))
    shape = {"vocab_size": 50257, "block_size": 8, "seed": seed}
    alone = open_data(data, batch_size=1, **shape)
    step, samples, seen = 0, 0, []
    for _ in range(6):
        batch, accum, world = rng.integers(1, 6, 3).tolist()
        ranks = [
            open_data(data, batch_size=batch, grad_accum=accum, rank=rank, world=world, **shape)
            for rank in range(world)
        ]
        for source in ranks:
            source.begin_at(step, samples)
        steps = int(rng.integers(0, 5))
        for _ in range(steps):
            # The order of rows is micro-step, rank, place in the batch.
            seen += torch.stack([source.tokens(step) for source in ranks], dim=1).flatten(0, 2).tolist()
            step += 1
        samples += steps * batch * accum * world
    assert samples == len(seen) > 0
    assert seen == [alone.tokens(g)[0, 0].tolist() for g in range(samples)]


@pytest.mark.parametrize("kind", ["dummy", "dummy-fixed", "shards"])
@pytest.mark.parametrize("begin", [(0, 0), (3, 37)])
def test_a_step_has_the_same_rows_on_any_number_of_processes(tmp_path, kind, begin):
    """So a resumed run with the same global batch makes the same steps. The shards' steps here span epochs."""
    data = str(make_folder(tmp_path / "d", train=(8 * 23, 95))) if kind == "shards" else kind
    shape = {"vocab_size": 50257, "block_size": 8, "seed": 4}

    def rows(world: int, batch: int, accum: int, step: int) -> torch.Tensor:
        parts = []
        for rank in range(world):
            source = open_data(data, batch_size=batch, grad_accum=accum, rank=rank, world=world, **shape)
            source.begin_at(*begin)
            parts.append(source.tokens(step))
        return torch.stack(parts, dim=1).flatten(0, 2)

    for step in (3, 4, 9):
        expected = rows(1, 16, 1, step)
        for world, batch, accum in ((1, 4, 4), (2, 8, 1), (2, 2, 4), (4, 4, 1), (4, 1, 4)):
            assert torch.equal(rows(world, batch, accum, step), expected)
    assert torch.equal(rows(1, 16, 1, 3), rows(1, 16, 1, 4)) == (kind == "dummy-fixed")


def test_a_source_that_begins_at_its_own_step_is_the_same(source):
    plain, begun = source(), source()
    begun.begin_at(5, 5 * 2 * 4 * 3)
    for step in (5, 6, 40):
        assert torch.equal(plain.tokens(step), begun.tokens(step))


def test_a_position_is_never_too_large(tmp_path):
    dummy = DummyTokens(97, 3, 8)
    assert not torch.equal(dummy.tokens(10**30), dummy.tokens(10**30 + 1))
    source = ShardTokens(make_folder(tmp_path / "d"), "train", 3, 8, grad_accum=2)
    source.begin_at(1, 0)
    step = 1 + source.windows * 10**30  # a whole number of epochs, in an integer of its own order
    source.begin_at(0, 0)
    assert source.tokens(step).shape == (2, 3, 9)
    source.begin_at(step, 5)
    first = source.tokens(step)
    source.begin_at(0, 5)
    assert torch.equal(first, source.tokens(0))


# A number of sequences


@pytest.mark.parametrize("kind", ["dummy", "dummy-fixed", "shards"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 8, 200])
def test_so_many_sequences_whatever_the_batch(tmp_path, kind, batch_size):
    data = str(make_folder(tmp_path / "d", val=(2000,))) if kind == "shards" else kind
    shape = {"split": "val", "vocab_size": 50257, "block_size": 8}
    # The ranks take the batches in turn, so each is given all of them.
    source = open_data(data, batch_size=batch_size, sequences=160, rank=1, world=3, **shape)
    # With the default batch these are the sequences of 20 batches of 8.
    default = open_data(data.removesuffix("-fixed"), batch_size=8, **shape)
    rows, expected = (
        torch.cat([s.tokens(i)[0] for i in range(n)]) for s, n in ((source, source.batches), (default, 20))
    )
    assert torch.equal(rows, expected)
    assert source.notes == []
    assert source.rows.batch_size == {1: 1, 3: 2, 4: 4, 7: 5, 8: 8, 200: 160}[batch_size]
    if kind == "shards":
        assert len(torch.unique(rows[:, 0])) == 160


def test_a_split_with_fewer_windows_is_taken_once(tmp_path):
    folder = make_folder(tmp_path / "d", val=(8 * 14,))
    source = ShardTokens(folder, "val", 8, 8, sequences=160)
    assert source.windows == 13
    assert (source.batches, source.rows.batch_size) == (13, 1)
    assert len({source.tokens(i)[0, 0, 0].item() for i in range(13)}) == 13
    assert source.notes == ["a val loss takes all 13 windows of the split, not 160"]
    assert ShardTokens(folder, "val", 8, 8, sequences=13).notes == []


# Tokens that no epoch has


def test_shards_shorter_than_a_window_are_said(tmp_path):
    source = ShardTokens(make_folder(tmp_path / "d", train=(1200, *[8] * 50, 9)), "train", 2, 8)
    assert source.notes == [
        f"read but not verified, since no meta.json has sums: the shards in {tmp_path / 'd'}",
        "the train split leaves out 50 of its 52 shards, 400 of 1,609 tokens: they are shorter than a window, "
        "--block-size + 1 = 9",
    ]
    assert ShardTokens(tmp_path / "d", "val", 2, 8).notes == []


def test_ends_of_shards_that_no_epoch_takes_are_said(tmp_path):
    """What the note says is what 200 epochs leave out."""
    source = ShardTokens(make_folder(tmp_path / "d", train=(23, 39, 9, 16, 17)), "train", 1, 8)
    read = {token for step in range(200 * source.windows) for token in source.tokens(step)[0, 0].tolist()}
    never = source.token_count - len(read)
    assert never == 7 + 7 + 1
    assert source.notes[1:] == [
        f"the train split leaves out {never} of 104 tokens at the ends of its shards: they are only a few times "
        "--block-size 8 long; longer shards lose less"
    ]
    assert ShardTokens(make_folder(tmp_path / "e", train=(8 * 1000 + 7,)), "train", 1, 8).notes[1:] == []


# What identifies the data


def test_a_fingerprint_is_of_the_contents(tmp_path):
    def fingerprint(name: str, train=(1000,), changed: int | None = None, sums: bool = False) -> str:
        folder = make_folder(tmp_path / name, train=train)
        if changed is not None:
            tokens = np.arange(1000)
            tokens[changed] = 0
            write_shard(folder / "some_train_000000.bin", tokens)
        if sums:
            path = folder / "some_train_000000.bin"
            listed = {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
            (folder / "meta.json").write_text(json.dumps({"vocab_size": 50257, "shards": listed}))
        return ShardTokens(folder, "train", 2, 8).fingerprint

    for sums in (False, True):
        same = fingerprint("a", sums=sums)
        assert len(same) == 32
        assert fingerprint("b", sums=sums) == same
        assert fingerprint("c", train=(1000, 9), sums=sums) != same
        assert fingerprint("d", train=(1001,), sums=sums) != same
        for changed in (1, 500, 999):
            assert fingerprint("e", changed=changed, sums=sums) != same
    assert DummyTokens(97, 3, 8).fingerprint == ""


# What --data names


@pytest.mark.parametrize("name", ["", "~nobody-of-this-name/x", "x" * 300, "a\0b", "file/below"])
def test_a_name_that_can_name_no_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="--data") as error:
        data_vocab_size(name)
    assert "\n" not in str(error.value)


def test_no_such_data(tmp_path):
    for function in (data_vocab_size, lambda d: open_data(d, vocab_size=97, batch_size=1, block_size=8)):
        with pytest.raises(
            ConfigError, match=r"--data .*nowhere: no such file or folder; give dummy, dummy-fixed, stdlib, a text"
        ):
            function(str(tmp_path / "nowhere"))
        with pytest.raises(ConfigError, match="is neither a file nor a folder; give dummy, dummy-fixed"):
            function("/dev/null")


def test_vocabularies(tmp_path):
    folder = make_folder(tmp_path / "d", vocab_size=1234)
    assert data_vocab_size("dummy") is None
    assert data_vocab_size("dummy-fixed") is None
    assert data_vocab_size(str(folder)) == 1234
    with pytest.raises(ConfigError, match=r"vocabulary of .*, 1234, is larger than the model's, 1233"):
        open_data(str(folder), vocab_size=1233, batch_size=1, block_size=8)
    (folder / "meta.json").unlink()
    assert data_vocab_size(str(folder)) == 50257


def test_open_data_passes_everything_on(tmp_path):
    folder = make_folder(tmp_path / "d")
    shape = {"batch_size": 3, "block_size": 8, "grad_accum": 2, "seed": 5, "rank": 1}
    opened = open_data(str(folder), vocab_size=50257, world=2, **shape)
    assert torch.equal(opened.tokens(4), ShardTokens(folder, "train", world=2, **shape).tokens(4))
    for name, fixed in (("dummy", False), ("dummy-fixed", True)):
        opened = open_data(name, vocab_size=97, world=2, **shape)
        assert torch.equal(opened.tokens(4), DummyTokens(97, world=2, fixed=fixed, **shape).tokens(4))


# Counting


def test_unigram_entropy():
    counts = np.array([2, 1, 1, 0])
    assert unigram_entropy(counts) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(np.array([0, 7])) == 0.0
    # Under the counts (3, 0, 0, 1), plus one: 4/8, 1/8, 1/8, 2/8.
    expected = (2 * math.log(2) + 2 * math.log(8)) / 4
    assert unigram_entropy(counts, np.array([3, 0, 0, 1])) == pytest.approx(expected)


def test_count_tokens(monkeypatch):
    monkeypatch.setattr(shards, "SCAN_TOKENS", 2)
    assert count_tokens(np.array([0, 2, 2, 1, 2], dtype=np.uint16), 5).tolist() == [1, 1, 3, 0, 0]


def test_data_needs_torch_and_numpy_alone():
    """A training image may lack the packages of the command line. A function may import them when it is called."""
    imported = set()
    files = (
        "batch", "config", "corpus", "data", "durable", "fields", "shards", "slots", "tokenizer", "optim/__init__",
        "optim/schedules",
    )  # fmt: skip
    for module in files:
        for node in ast.parse((Path(data.__file__).parent / f"{module}.py").read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages <= {"torch", "numpy", "fastgpt2"}
    ours = {name.removeprefix("fastgpt2.").replace(".", "/") for name in imported if name.startswith("fastgpt2")}
    assert ours <= {"fastgpt2", *(file.removesuffix("/__init__") for file in files)}
