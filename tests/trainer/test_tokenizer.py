"""Text to tokens and back: tiktoken's GPT-2 exactly, any text, any merges, and files that are no encoding."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fastgpt2 import tokenizer as tokenizer_module
from fastgpt2.config import ConfigError
from fastgpt2.tokenizer import BPE_FILES, BPE_URL, ByteTokenizer, Gpt2Tokenizer, load_tokenizer, pieces


@pytest.fixture(scope="session")
def gpt2(bpe) -> Gpt2Tokenizer:
    return Gpt2Tokenizer(bpe)


SAMPLES = [
    "",
    "Hello world",
    "  def f(x):\n\treturn x  # it's, we'll, they've\n\n\n",
    "größer 東京 🙂 ́e\u00a0\u2003x\r\n\x85\x1f y",
    "<|endoftext|>",
    "a" * 300 + " " * 300 + "!" * 300 + "7" * 300,
]


def test_known_ids(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert 50256 not in gpt2.encode("<|endoftext|>"), "text is never mistaken for a special token"
    assert gpt2.decode([15496, 50256, 995]) == b"Hello world"


def test_gpt2_is_tiktoken_s(gpt2, bpe, tmp_path, monkeypatch):
    """tiktoken.get_encoding("gpt2") with its cache filled from the local files, so that it needs no network."""
    import tiktoken  # a dependency of ours: its absence is a failure

    for name, sha256 in BPE_FILES.items():
        contents = (bpe / name).read_bytes()
        assert hashlib.sha256(contents).hexdigest() == sha256
        (tmp_path / hashlib.sha1((BPE_URL + name).encode()).hexdigest()).write_bytes(contents)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs = tiktoken.get_encoding("gpt2")
    for text in [*SAMPLES, Path(tokenizer_module.__file__).read_text(), Path(json.__file__).read_text()]:
        assert gpt2.encode(text).tolist() == theirs.encode_ordinary(text)
    assert gpt2.vocab_size == theirs.n_vocab
    # And the road that a user with a network takes ends at the same tokenizer.
    assert load_tokenizer("gpt2", None).encode(SAMPLES[2]).tolist() == theirs.encode_ordinary(SAMPLES[2])


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(gpt2, text):
    for tokenizer in (gpt2, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert tokenizer.decode(ids.tolist()).decode() == text


def test_cutting_a_long_text_changes_no_token(gpt2, monkeypatch):
    text = Path(subprocess.__file__).read_text() + "word  \nword\n\n word" * 50
    whole = gpt2.encode(text)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 20)
    assert len(list(pieces(text))) > 30
    assert "".join(pieces(text)) == text
    assert np.array_equal(gpt2.encode(text), whole)


@pytest.mark.parametrize("run", [" ", "\n", "\u2003", "\r\n", " \n", "a", "!"])
def test_a_text_without_a_place_to_cut(gpt2, run):
    """White space before a letter is what overflowed tiktoken's stack."""
    text = "x" + run * (1_000_000 // len(run)) + "y"
    assert gpt2.decode(gpt2.encode(text).tolist()).decode() == text


def test_a_long_text_is_encoded_in_parts(gpt2, monkeypatch):
    """No part waits for all others, nor are the lists of all ids held at once."""
    text = Path(subprocess.__file__).read_text()
    whole = gpt2.encode(text)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 20)
    monkeypatch.setattr(tokenizer_module, "PIECES_AT_ONCE", 3)
    sizes = []
    batch = gpt2._encoding.encode_ordinary_batch
    monkeypatch.setattr(
        gpt2._encoding, "encode_ordinary_batch", lambda t, **k: (sizes.append(len(t)), batch(t, **k))[1]
    )
    assert np.array_equal(gpt2.encode(text), whole)
    assert len(sizes) > 10 and max(sizes) == 3


def test_a_lone_surrogate_is_no_text(gpt2):
    for tokenizer in (gpt2, ByteTokenizer()):
        with pytest.raises(ConfigError, match="character 2 of the text is a lone surrogate: text must be UTF-8"):
            tokenizer.encode("ab\udcff")


def test_files_that_are_no_encoding(bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"can't read .*vocab\.bpe: No such file"):
        Gpt2Tokenizer(tmp_path)
    for file in ("encoder.json", "vocab.bpe"):
        shutil.copy(bpe / file, tmp_path)
    Gpt2Tokenizer(tmp_path)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ t\n")
    with pytest.raises(ConfigError, match="don't belong to one byte-pair encoding"):
        Gpt2Tokenizer(tmp_path)
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(ConfigError, match="don't belong to one byte-pair encoding"):
        Gpt2Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("merges", "encoder"),
    [
        (None, b"[" * 100_000),
        (None, b"[]"),
        (None, b"7"),
        (None, b'{"a": "b"}'),
        (None, b'{"a": ' + b"9" * 10_000 + b"}"),
        (None, b"\xff"),
        (None, b""),
        (None, '{"\u4e00": 1}'.encode()),
        (b"", None),
        (b"\xff\n", None),
        (b"#version\na\n", None),
        (b"#version\na b c\n", None),
        (b"#version\na b\na b\n", None),
    ],
)
def test_files_of_another_kind(merges, encoder, bpe, tmp_path):
    for name, contents in (("vocab.bpe", merges), ("encoder.json", encoder)):
        (tmp_path / name).write_bytes((bpe / name).read_bytes() if contents is None else contents)
    with pytest.raises(ConfigError, match="don't belong to one byte-pair encoding") as error:
        Gpt2Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_merge_given_twice_leaves_a_hole_in_the_ids(tmp_path):
    with pytest.raises(ConfigError, match="don't belong to one byte-pair encoding"):
        Gpt2Tokenizer(own(tmp_path / "own", ["a b", "a b", "ab c"]))


def test_files_that_would_not_end(bpe, tmp_path):
    shutil.copy(bpe / "vocab.bpe", tmp_path)
    path = tmp_path / "encoder.json"
    path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"encoder\.json is not a regular file"):
        Gpt2Tokenizer(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match=r"encoder\.json is larger than 64 MiB"):
        Gpt2Tokenizer(tmp_path)


def own(folder: Path, merges: list[str]) -> Path:
    """A folder with an encoding of the bytes and these merges."""
    folder.mkdir()
    visible = [chr(b) for b in range(256) if chr(b).isprintable() and b != 32]
    tokens = visible + [chr(256 + n) for n in range(256 - len(visible))] + [merge.replace(" ", "") for merge in merges]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    return folder


def test_other_merges_are_another_tokenizer(bpe, gpt2, tmp_path, monkeypatch):
    """They are found by the files beside the shards, checked, and never taken for GPT-2's."""
    a, b = own(tmp_path / "a", ["a b", "ab c"]), own(tmp_path / "b", ["b c", "a bc"])
    ours = Gpt2Tokenizer(a)
    assert (gpt2.name, ours.name, ours.vocab_size) == ("gpt2", "bpe", 259)
    assert ours.encode("abcab").tolist() == [257, 256]
    assert load_tokenizer("bpe", a, sha256=ours.sha256).decode([257, 256]) == b"abcab"
    assert load_tokenizer("gpt2", a).name == "bpe", "folders of before, which call every encoding gpt2"
    with pytest.raises(ConfigError, match=r"other merges than those that the tokens were made with: give --bpe"):
        load_tokenizer("bpe", b, sha256=ours.sha256)
    with pytest.raises(ConfigError, match=r"other merges than GPT-2's, and .*empty lacks them: give --bpe a folder"):
        load_tokenizer("bpe", tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"made with other merges than GPT-2's: give --bpe a folder"):
        load_tokenizer("bpe", None)
    monkeypatch.setattr(tokenizer_module, "_download", lambda name, sha256: (bpe / name).read_bytes())
    with pytest.raises(ConfigError, match="GPT-2 has other merges than those"):
        load_tokenizer("gpt2", None, sha256=ours.sha256)
    assert load_tokenizer("gpt2", None, sha256=gpt2.sha256).name == "gpt2"


def test_white_space_makes_no_other_encoding(bpe, gpt2, tmp_path):
    shutil.copytree(bpe, tmp_path / "bpe")
    encoder = tmp_path / "bpe" / "encoder.json"
    encoder.write_text(json.dumps(json.loads(encoder.read_text()), indent=1))
    again = Gpt2Tokenizer(tmp_path / "bpe")
    assert (again.name, again.sha256) == ("gpt2", gpt2.sha256)
