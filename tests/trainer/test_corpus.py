"""Text that --data names: prepared on first use into the cache, and used by every command."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from fastgpt2 import TrainConfig, corpus, preparation, train
from fastgpt2.command import main
from fastgpt2.config import ConfigError
from fastgpt2.corpus import about, shard_folder, val_unigram_entropy
from fastgpt2.data import ShardTokens, data_end_of_text, data_vocab_size, open_data, read_meta, unigram_entropy
from fastgpt2.evaluate import main as evaluate
from fastgpt2.sample import SampleConfig, pick_tokenizer
from tests.trainer.preparing import documents_of
from tests.trainer.runs import SMALL, Watch
from tests.trainer.shard_folders import flip

SHAPE = {"vocab_size": 257, "batch_size": 1, "block_size": 8}
FLAGS = [
    "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "8", "--batch-size", "2", "--steps", "3",
    "--device", "cpu", "--dtype", "float32",
]  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastgpt2"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library."""
    folder = tmp_path / "library"
    (folder / "json").mkdir(parents=True)
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.py").write_text("no part of the library\n")
    for number in range(100):
        (folder / "json" / f"part{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(folder)}[name])
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text("".join(f"line {number} of größe\n" for number in range(200)), encoding="utf-8")
    return path


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were prepared."""
    folders, fill = [], preparation.fill
    monkeypatch.setattr(preparation, "fill", lambda config, *rest: (folders.append(config.out), fill(config, *rest))[1])
    return folders


# What is prepared, and when


def test_the_library_is_prepared_on_first_use_only(cache, library, prepared):
    folder = shard_folder("stdlib")
    assert folder.is_relative_to(cache) and prepared == [folder]
    documents = {document for split in ("train", "val") for document in documents_of(folder, split)}
    assert documents == {path.read_text() for path in (library / "json").iterdir()}
    assert shard_folder("stdlib") == folder and prepared == [folder]
    assert read_meta(folder)["tokenizer"] == "byte"
    (library / "json" / "part0.py").write_text("x = 1\n")
    assert shard_folder("stdlib") not in (folder, None) and len(prepared) == 2


def test_a_text_file_is_known_by_its_contents(cache, text, tmp_path, prepared):
    folder = shard_folder(str(text))
    whole = "".join(documents_of(folder, split)[0] for split in ("train", "val"))
    assert whole == text.read_text(encoding="utf-8")
    os.utime(text, (1, 1))
    text.rename(tmp_path / "moved.txt")
    assert shard_folder(str(tmp_path / "moved.txt")) == folder and prepared == [folder]
    (tmp_path / "moved.txt").write_text("edited " * 100)
    assert shard_folder(str(tmp_path / "moved.txt")) != folder


def test_names_below_home_are_expanded(cache, text, monkeypatch):
    monkeypatch.setenv("HOME", str(text.parent))
    assert shard_folder("~/poem.txt") == shard_folder(str(text))


def test_a_folder_is_itself_and_its_vocabulary_is_read(cache, text, tmp_path):
    folder = shard_folder(str(text))
    assert shard_folder(folder) == folder
    for data in (str(text), str(folder)):
        assert (data_vocab_size(data), data_end_of_text(data)) == (257, 256)
        assert open_data(data, **SHAPE).fingerprint == open_data(str(folder), **SHAPE).fingerprint


def test_the_vocabulary_alone_prepares_nothing(cache, text):
    assert (data_vocab_size(str(text)), data_vocab_size("stdlib")) == (257, 257)
    assert val_unigram_entropy(str(text)) is None
    assert not cache.exists()


def test_first_uses_at_once_prepare_once(cache, text, prepared):
    threads = [threading.Thread(target=shard_folder, args=(str(text),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prepared == [shard_folder(str(text))]


def test_killed_first_use_is_done_again(cache, text, monkeypatch, prepared):
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard_folder(str(text))
    folder = shard_folder(str(text))
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".bin") == [
        "train_000000.bin",
        "val_000000.bin",
    ]
    assert len(prepared) == 2


@pytest.mark.parametrize("damage", ["cut", "lost", "no meta", "unfinished"])
def test_damaged_shards_are_prepared_again(cache, text, prepared, damage):
    folder = shard_folder(str(text))
    shard, good = folder / "train_000000.bin", (folder / "train_000000.bin").read_bytes()
    if damage == "cut":
        os.truncate(shard, 1500)
    elif damage == "lost":
        shard.unlink()
    else:
        (folder / "meta.json").write_text("{}" if damage == "no meta" else '{"vocab_size": 1}')
    open_data(str(text), **SHAPE)
    assert shard.read_bytes() == good and len(prepared) == 2


def test_flipped_bits_are_refused_and_the_folder_named(cache, text):
    shard = shard_folder(str(text)) / "train_000000.bin"
    flip(shard, 1100)
    with pytest.raises(ConfigError, match=rf"{shard} is damaged .*delete it and prepare the data again"):
        open_data(str(text), **SHAPE)


def test_a_text_edited_while_it_is_prepared_is_refused(cache, text, monkeypatch):
    fill, contents = preparation.fill, text.read_text(encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "fill", lambda *given: (text.write_text("edited " * 100), fill(*given)))
        with pytest.raises(ConfigError, match=r"--data .*poem\.txt changed while it was read: start again"):
            shard_folder(str(text))
    text.write_text(contents, encoding="utf-8")
    folder = shard_folder(str(text))
    assert documents_of(folder, "train")[0][:20] == contents[:20]


# What can't be taken


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("x.txt", b"", "it is empty"),
        ("x.txt", b"\0\1\2", "it is binary"),
        ("x.txt", b"\xff\xfeab", "UTF-16: convert it to UTF-8"),
        ("x.txt", "größe".encode("latin-1"), "it is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n', "reading .jsonl comes later; extract the texts to a .txt file first"),
        ("x.csv", b"a,b\n", "python -m fastgpt2.prepare --ext .csv takes it as it stands"),
        ("x.gz", b"\x1f\x8b", "unpack it first"),
        ("train_000000.bin", b"\0", "is one file of tokens; give its folder: --data "),
    ],
)
def test_what_is_not_text_is_one_line_and_leaves_nothing(cache, tmp_path, capfd, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ConfigError) as error:
        open_data(str(tmp_path / name), **SHAPE)
    assert str(error.value).startswith("--data ") and message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        main(["--data", str(tmp_path / name), "--out", str(tmp_path / "run")])
    assert capfd.readouterr() == ("", "")
    assert not cache.exists() and not (tmp_path / "run").exists()


def test_a_short_text_names_the_block_size(cache, tmp_path):
    (tmp_path / "x.txt").write_text("short\n")
    with pytest.raises(ConfigError, match=r"the train split of .*x\.txt is too short: .*--block-size \+ 1 = 9"):
        open_data(str(tmp_path / "x.txt"), **SHAPE)


def test_a_python_without_its_sources(cache, library, tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(
        ConfigError, match=r"--data stdlib: this Python has no \.py files in .*; give --data a text file"
    ):
        shard_folder("stdlib")


def test_a_cache_that_cant_be_written(text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = r"can't prepare --data .*poem\.txt in the cache folder .*: Not a directory; set XDG_CACHE_HOME"
    with pytest.raises(ConfigError, match=message):
        shard_folder(str(text))


# What is said


def test_the_notes_name_the_folder_and_the_tokens(cache, library, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdlib = str(shard_folder("stdlib"))
    (note,) = about("stdlib")
    tokens = sum(path.stat().st_size + 1 for path in (library / "json").iterdir())
    assert f" {tokens:,} byte tokens" in note and note.endswith(stdlib)
    (tmp_path / "stdlib").mkdir()
    assert [*about("stdlib")][1:] == ["for the folder stdlib that is here, give --data ./stdlib"]
    folder = shard_folder(str(text))
    first, second = about(str(text))
    assert first.endswith(f" byte tokens, in {folder}") and f"fastgpt2.prepare {text} --out DIR" in second
    assert [*about(str(folder)), *about("dummy")] == []


def test_train_prints_nothing_and_notes_what_it_prepared(cache, text, tmp_path, capfd):
    watch = Watch()
    train(TrainConfig(**vars(SMALL) | {"data": str(text), "vocab_size": None}), reporters=[watch])
    assert capfd.readouterr() == ("", "")
    assert any("byte tokens, in" in note for note in watch.notes)


def test_the_notes_outlive_the_text(cache, text):
    shard_folder(str(text))
    text.write_text("edited")
    assert [*about(str(text))] == [] and val_unigram_entropy(str(text)) is None
    text.unlink()
    assert [*about(str(text))] == [] and val_unigram_entropy(str(text)) is None


def test_the_loss_curve_has_the_unigram_entropy_of_the_val_split(cache, text, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **style: drawn.append((y, style["label"])))
    monkeypatch.chdir(tmp_path)
    text.rename("dummy.txt")
    assert main([*FLAGS, "--data", "dummy.txt", "--out", "run"]) == 0
    counts = ShardTokens("dummy.txt", "val", 1, 8).count_tokens()
    ((entropy, label),) = drawn
    assert entropy == pytest.approx(unigram_entropy(counts))
    assert label == f"unigram entropy of the val split: {entropy:.3f}"


# The commands


def test_train_resume_evaluate_and_sample(cache, library, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FLAGS, "--data", "stdlib", "--out", "run", "--eval-every", "3", "--eval-sequences", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("preparing stdlib as byte tokens in ") and printed.err.count("\n") == 1
    assert 'data = "stdlib"' in (tmp_path / "run" / "config.toml").read_text()
    evaluate(["--from", "run"])
    assert "on the val split of stdlib" in capsys.readouterr().out
    model = TrainConfig(vocab_size=257)
    state = {"config": {"data": "stdlib"}}
    assert pick_tokenizer(SampleConfig(from_=Path("run")), state, model).name == "byte"
    assert main(["--out", "run", "--resume", "--steps", "4"]) == 0
    printed = capsys.readouterr()
    assert "changed since the checkpoint: the" not in printed.out and printed.err == ""
    # As another Python's library is.
    (library / "json" / "new.py").write_text("x = 1\n" * 100)
    assert main(["--out", "run", "--resume", "--steps", "5"]) == 0
    printed = capsys.readouterr()
    assert "changed since the checkpoint: the training" in printed.out and "preparing stdlib" in printed.err


def test_a_text_edited_between_two_starts_is_noted(cache, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FLAGS, "--data", "poem.txt", "--out", "run"]) == 0
    text.write_text("other words\n" * 200)
    assert main(["--out", "run", "--resume", "--steps", "4"]) == 0
    assert "changed since the checkpoint: the training data in poem.txt" in capsys.readouterr().out


def test_two_commands_at_once(cache, text, tmp_path):
    program = "import sys; from fastgpt2.corpus import prepare_aloud; prepare_aloud(sys.argv[1])"
    pair = [subprocess.Popen([sys.executable, "-c", program, text], stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert sum(line.startswith("preparing") for lines in said for line in lines.splitlines()) == 1
    assert "".join(said).count("\n") == 1


def test_a_folder_named_as_one_of_ours_is_named_so_that_it_is_found(cache, text, tmp_path, monkeypatch, capsys):
    from fastgpt2.prepare import main as prepare

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", "poem.txt", "--out", "stdlib", "--tokenizer", "byte"])
    assert prepare() == 0
    assert capsys.readouterr().out.endswith("train on it: python -m fastgpt2.train --data ./stdlib\n")
    assert corpus.shard_folder("./stdlib") == Path("stdlib")
