"""Shards that are damaged, or change while a run reads them: the sums find it, and the line names the file."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
import torch

from fastgpt2 import shards
from fastgpt2.config import ConfigError
from fastgpt2.data import ShardTokens
from fastgpt2.shards import DataError, Shard, write_shard
from tests.trainer.shard_folders import flip, make_folder, source_of


@pytest.fixture(params=["at once", "beside the run"])
def where(request, monkeypatch):
    if request.param == "beside the run":
        monkeypatch.setattr(shards, "AT_ONCE_BYTES", -1)
    return request.param


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("byte", [12, 1023, 1024, 1201, -1])
def test_a_flipped_bit_is_found(tmp_path, where, split, byte):
    folder = make_folder(tmp_path / "d", train=(100, 150), val=(100, 150), sums=True)
    source_of(folder, split).check()
    path = folder / f"some_{split}_000001.bin"
    flip(path, byte % path.stat().st_size, bit=byte % 8)
    message = rf"some_{split}_000001\.bin is damaged or changed: its SHA-256 .* meta\.json .*; copy the folder again"
    if where == "at once":
        with pytest.raises(ConfigError, match=message):
            source_of(folder, split)
    else:
        source = source_of(folder, split)
        assert source.notes[-1].startswith(f"the {split} split, 0.0 GB, is verified while the run goes on: the first")
        for _ in range(2):  # whoever asks is told
            with pytest.raises(DataError, match=message):
                source.check()
        with pytest.raises(DataError, match=message):
            source.tokens(0)
        with pytest.raises(DataError, match=message):
            list(source.sweep())


def test_each_process_verifies_its_part(tmp_path, where):
    """Every shard is one process's, and the others don't read it all."""
    folder = make_folder(tmp_path / "d", train=(100, 150, 90, 20, 30), sums=True)
    for number in range(5):
        path = folder / f"some_train_{number:06d}.bin"
        flip(path, 1030)
        finders = []
        for rank in range(3):
            try:
                ShardTokens(folder, "train", 2, 8, rank=rank, world=3).check()
            except (ConfigError, DataError) as error:
                assert path.name in str(error)
                finders.append(rank)
        flip(path, 1030)
        assert finders == [number % 3]
    os.truncate(folder / "some_train_000004.bin", 1030)
    for rank in range(3):
        with pytest.raises(ConfigError, match=r"some_train_000004\.bin is truncated"):
            ShardTokens(folder, "train", 2, 8, rank=rank, world=3)


def test_a_process_without_a_shard_to_verify(tmp_path, where):
    source = ShardTokens(make_folder(tmp_path / "d", sums=True), "train", 2, 8, rank=1, world=2)
    source.check()
    assert source.tokens(0).shape == (1, 2, 9)


def test_a_shard_of_another_length_than_listed(tmp_path, where):
    """At once, however large: it costs nothing."""
    folder = make_folder(tmp_path / "d", train=(100, 150), sums=True)
    write_shard(folder / "some_train_000001.bin", np.arange(149))
    with pytest.raises(ConfigError, match=r"some_train_000001\.bin has 149 tokens, meta\.json beside it says 150"):
        source_of(folder)


def test_a_shard_that_is_not_listed_is_said(tmp_path):
    folder = make_folder(tmp_path / "d", sums=True)
    write_shard(folder / "other_train_7.bin", np.arange(50))
    source = source_of(folder)
    assert source.notes == [f"read but not verified, since meta.json doesn't list it: other_train_7.bin in {folder}"]
    assert source.token_count == 1050


def test_a_token_outside_the_vocabulary_is_found_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "AT_ONCE_BYTES", -1)
    folder = make_folder(tmp_path / "d", train=(20,), vocab_size=19)
    message = r"some_train_000000\.bin: token 19 has id 19, outside the vocabulary of 19"
    with pytest.raises(DataError, match=message):
        source_of(folder).check()
    # No batch with such a token is handed out, even before verification comes to it.
    monkeypatch.setattr(Shard, "verify", lambda *_: None)
    source = ShardTokens(folder, "train", 1, 19)
    with pytest.raises(DataError, match=message):
        source.tokens(0)


def test_what_fails_in_the_thread_is_not_taken_for_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "AT_ONCE_BYTES", -1)
    monkeypatch.setattr(Shard, "verify", mock.Mock(side_effect=MemoryError("full")))
    with pytest.raises(DataError, match=r"can't verify .*some_train_000000\.bin: full"):
        source_of(make_folder(tmp_path / "d")).check()


def test_a_shard_that_is_cut_short(tmp_path):
    """Through a memory map this is a SIGBUS."""
    path = make_folder(tmp_path / "d", sums=True) / "some_train_000000.bin"
    source = source_of(tmp_path / "d")
    os.truncate(path, 1024 + 2 * 500)
    with pytest.raises(DataError, match=r"some_train_000000\.bin was cut short while it was in use: it ends before"):
        for step in range(source.windows):
            source.tokens(step)
    source.check()  # what was read until then was right


def test_a_disk_that_fails(tmp_path, monkeypatch):
    source = source_of(make_folder(tmp_path / "d"))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"can't read .*some_train_000000\.bin: Input/output error"):
        source.tokens(0)


def test_reads_that_come_in_parts(tmp_path, monkeypatch):
    """As some network file systems give them, and any read over 2 GiB."""
    whole, pread = source_of(make_folder(tmp_path / "d")).tokens(0), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 7) if at > 1023 else size, at))
    assert torch.equal(source_of(tmp_path / "d").tokens(0), whole)


def test_a_shard_that_is_written_to(tmp_path):
    path = make_folder(tmp_path / "d", sums=True) / "some_train_000000.bin"
    source = source_of(tmp_path / "d")
    os.utime(path, (0, 0))
    source.check()  # other times alone are no other contents
    flip(path, 1500)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=r"some_train_000000\.bin is damaged or changed"):
        source.check()


def test_a_shard_whose_name_is_given_to_another_file(tmp_path):
    """As prepare --overwrite does while a run reads: the run goes on with what it began with."""
    folder = make_folder(tmp_path / "d", sums=True)
    source = source_of(folder)
    before = source.tokens(3)
    make_folder(folder, train=(77,), sums=True)
    assert torch.equal(source.tokens(3), before)
    source.check()


def test_files_are_closed_with_their_source(tmp_path):
    folder = make_folder(tmp_path / "d", train=(20,) * 5)
    held = len(os.listdir("/proc/self/fd"))
    source = source_of(folder)
    assert len(os.listdir("/proc/self/fd")) == held + 5
    source.check()
    del source
    assert len(os.listdir("/proc/self/fd")) == held
