"""The command lines: what flags, a --config file and the run's own settings make together; one line for a mistake."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from fastgpt2 import ConfigError, TrainConfig, checkpoint, train
from fastgpt2.arguments import naming_files, parse, read_command_line
from fastgpt2.command import main
from fastgpt2.console import run_command
from fastgpt2.flags import Parser, make_parser, read_arguments
from fastgpt2.preparation import PrepareConfig
from fastgpt2.settings import resolve

# --------------------------------------------------------------------------------------------------- layers


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        (["--resume"], True),
        (["--resume", "auto"], "auto"),
        (["--resume=auto"], "auto"),
        (["--resume", "--steps", "3"], True),
        (["--no-resume"], False),
        (["--resume", "--no-resume"], False),
        ([], False),
    ],
)
def test_resume_with_and_without_a_word(arguments: list[str], resume: bool | Literal["auto"], folder: Path) -> None:
    config = parse(["--out", "run", *arguments])
    assert config.resume == resume
    assert "resume" not in config.to_toml()


@pytest.mark.parametrize(("text", "resume"), [("true", True), ('"auto"', "auto"), ("false", False)])
def test_resume_in_a_config_file(text: str, resume: bool | str, folder: Path) -> None:
    write("c.toml", f'out = "run"\nresume = {text}\n')
    write("run/config.toml", "lr = 0.5\n")
    config = parse(["--config", "c.toml"])
    assert (config.resume, config.lr) == (resume, 0.5 if resume else 3e-4)
    assert parse(["--config", "c.toml", "--no-resume"]).resume is False


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "auto"]])
def test_a_run_that_is_resumed_keeps_its_settings_under_the_file_and_the_flags(resume: list[str], folder: Path) -> None:
    write("run/config.toml", "lr = 0.1\nbatch_size = 2\nsteps = 5\nkeep_checkpoints = 3\n")
    write("c.toml", 'out = "run"\nbatch-size = 4\nsteps = 6\n')
    config = parse(["--config", "c.toml", *resume, "--steps", "7"])
    assert (config.lr, config.keep_checkpoints, config.batch_size, config.steps) == (0.1, 3, 4, 7)
    # Not resumed, the folder's settings are none of this run's.
    assert parse(["--config", "c.toml", "--steps", "7"]) == TrainConfig(out="run", batch_size=4, steps=7)


def test_a_resumed_run_trains_on_by_its_own_settings(folder: Path) -> None:
    write("c.toml", 'model = "tiny"\nout = "run"\ndevice = "cpu"\nsave_every = 1\n')
    first = train(parse(["--config", "c.toml", "--lr", "0.01", "--batch-size", "3", "--steps", "1"]))
    rest = train(parse(["--config", "c.toml", "--resume", "--steps", "2"]))
    assert (rest.config.lr, rest.config.batch_size, rest.steps_done) == (0.01, 3, 2)
    assert rest.config.model_config() == first.config.model_config()


def test_a_new_folder_is_started_by_resume_auto_with_what_was_given(folder: Path) -> None:
    assert parse(["--resume", "auto", "--out", "new", "--lr", "0.5"]) == TrainConfig(out="new", lr=0.5, resume="auto")


@pytest.mark.parametrize(
    ("arguments", "n_layer", "end_of_text"),
    [
        (["--model", "gpt2"], 12, 256),
        (["--model", "tiny"], 3, 256),  # already so: what was changed of it stays
        (["--model", "gpt2", "--n-layer", "5"], 5, 256),
        (["--data", "others"], 3, None),
        (["--data", "others", "--end-of-text", "9"], 3, 9),
        (["--data", "texts"], 3, 256),
    ],
)
def test_another_preset_or_data_replaces_what_came_with_the_former(
    arguments: list[str], n_layer: int, end_of_text: int | None, folder: Path
) -> None:
    write("c.toml", 'model = "tiny"\nn_layer = 3\nn_embd = 64\ndata = "texts"\nend_of_text = 256\n')
    config = parse(["--config", "c.toml", *arguments])
    assert (resolve(config, cuda=False).n_layer, config.end_of_text) == (n_layer, end_of_text)


def test_a_lost_config_toml_is_taken_from_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"lr": 0.25, "attn": "naive"}
    monkeypatch.setattr(checkpoint, "saved_config", lambda out: saved if out == Path("run") else None)
    for damaged in (None, "lr = ", "\0", ""):
        if damaged is not None:
            write("run/config.toml", damaged)
        config, origins = read_command_line(["--resume", "--out", "run", "--attn", "sdpa"])
        assert (config.lr, config.attn) == (0.25, "sdpa")
        assert origins == {"lr": "the newest checkpoint of run"}
        said = capsys.readouterr().err
        assert "run/config.toml" in said and "taking the settings from the newest checkpoint of run" in said
    write("gone/config.toml", "lr = ")
    with pytest.raises(ConfigError, match=r"gone/config\.toml is not TOML"):
        parse(["--resume", "--out", "gone"])


def test_a_checkpoint_has_the_settings_of_its_run(tmp_path: Path) -> None:
    config = train(TrainConfig(model="tiny", steps=1, lr=0.5, batch_size=1, device="cpu", out=tmp_path)).config
    (tmp_path / "config.toml").unlink()
    (tmp_path / "starts.jsonl").unlink()
    again = parse(["--resume", "--out", str(tmp_path)])
    assert again == parse(["--resume", "--out", str(tmp_path), "--lr", "0.5"])
    assert (again.lr, again.n_embd, again.steps) == (0.5, 64, 1) and resolve(
        again, cuda=False
    ).model_config() == config.model_config()


@pytest.mark.parametrize("at", [0.0, 0.3, 0.9, 0.99])
def test_a_config_toml_that_was_cut_is_not_taken_for_whole(tmp_path: Path, at: float) -> None:
    """Without a checkpoint the record of the start has every setting; without that a cut file is refused."""
    config = TrainConfig(model="tiny", steps=1, lr=0.5, keep_checkpoints=7, batch_size=1, device="cpu", save_every=0)
    result = train(dataclasses.replace(config, out=tmp_path))
    path = tmp_path / "config.toml"
    text = path.read_text()
    # At the end of a line, as what is left is TOML then.
    path.write_text(text[: text.rindex("\n", 0, max(1, int(at * len(text))) + 1) + 1] if at else "")
    again = parse(["--resume", "--out", str(tmp_path)])
    assert (again.lr, again.keep_checkpoints, again.n_embd) == (0.5, 7, 64)
    assert resolve(again, cuda=False).model_config() == result.config.model_config()
    (tmp_path / "starts.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"config\.toml was cut short: i"):
        parse(["--resume", "--out", str(tmp_path)])


# ------------------------------------------------------------------------------------------ who is to blame


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--n-embd", "50", "--data", "dummy"],
            r"^--n-embd 50 is not divisible by --n-head 4: .* \(--n-head is from run/config\.toml\)$",
        ),
        (
            ["--steps", "50"],
            r"^--warmup-steps 100 must be below --steps 50 \(--warmup-steps is from run/config\.toml\)$",
        ),
        (
            ["--recompute", "elementwise"],
            r"^--recompute elementwise is done by the compiler: .*\(--compile is from c\.toml\)$",
        ),
        (["--weight-decay", "0.1", "--optimizer", "adam"], r"^--weight-decay needs --optimizer adamw: [^(]*$"),
        (["--data", "nowhere"], r"^--data nowhere: no such file or folder[^(]*$"),
        ([], r"^--data texts: no such file or folder.* \(--data is from run/config\.toml\)$"),
    ],
)
def test_an_error_blames_the_flag_that_was_given_and_the_file_for_the_rest(
    arguments: list[str], message: str, folder: Path
) -> None:
    write("run/config.toml", 'n_head = 4\nn_embd = 64\nwarmup_steps = 100\ndata = "texts"\noptimizer = "adamw"\n')
    write("c.toml", 'compile = false\nout = "run"\ndevice = "cpu"\n')
    with pytest.raises(ConfigError, match=message):
        main(["--config", "c.toml", "--resume", *arguments])


def test_other_data_is_blamed_for_its_vocabulary() -> None:
    config, origins = TrainConfig(data="other", vocab_size=257), {"vocab_size": "run/config.toml"}
    message = (
        r"^--vocab-size 257 is smaller than the vocabulary of --data other: 50257 "
        r"\(--vocab-size is from run/config\.toml\)$"
    )
    with pytest.raises(ConfigError, match=message), naming_files(origins):
        resolve(config, cuda=False, data_vocab_size=50257)


# ---------------------------------------------------------------------------------------------------- files


def a_file(text: str | bytes) -> Any:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


DOTS = "30,000 dots outside strings are no list of settings"
FILES: dict[str, tuple[Any, str]] = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "not a file"),
    "a pipe": (lambda path: os.mkfifo(path), "not a file"),
    "without end": (lambda path: path.symlink_to("/dev/zero"), "not a file"),
    "its own link": (lambda path: path.symlink_to(path), "can't read"),
    "large": (a_file("# \n" * 30_000), "90,000 bytes are no list of settings"),
    "not UTF-8": (a_file(b"lr = 1 # caf\xe9"), "not UTF-8 at byte 12"),
    "not TOML": (a_file("lr: 1"), "is not TOML"),
    "no value": (a_file("lr = "), "is not TOML"),
    "deep": (a_file("lr = " + "[" * 60_000), "nested too deeply"),
    "a long number": (a_file("steps = " + "9" * 60_000), "a number is too long"),
    "a long hexadecimal number": (a_file("steps = 0x" + "f" * 60_000), "steps must be a whole number below"),
    "many dots": (a_file("a." * 30_000 + "a = 1"), DOTS),
    "many dots in a table's name": (a_file("[" + "a." * 30_000 + "a]"), DOTS),
    "many dots in an inline table": (a_file("lr = {" + "a." * 30_000 + "a = 1}"), DOTS),
    "many dots between quotes": (a_file('"a".' * 15_000 + "a = 1"), "15,000 dots outside strings"),
    "many dots after a string": (a_file('out = "\\"" # "\n' + "a." * 30_000 + 'a = "b"'), DOTS),
    **{
        f"many dots after {quoted}": (
            a_file(f"lr = {{x = {quoted}, " + "a." * 30_000 + "a = 1, z = \"\", q = ''}"),
            DOTS,
        )
        for quoted in ('"b\\""', "'b\\'", '"""b"c"""', '"""b""""', '"""\\""""""', "'''b'c'''", "'''b''''")
    },
    "a string of lines without end": (a_file('out = """' + '\\"""' * 15_000), "is not TOML"),
    "a long key": (a_file("a" * 60_000 + " = 1"), "unknown key 'aaa"),
    "a table": (a_file("[train]\nlr = 1"), "unknown key 'train'"),
    "a table of a setting": (a_file("[lr]\nx = 1"), "lr must be a number, got {'x': 1}"),
    "a date": (a_file("steps = 2026-01-01"), "steps must be a whole number, got datetime.date"),
    "twice": (a_file("batch-size = 1\nbatch_size = 2"), "'batch_size' is given twice"),
    "a string": (a_file('lr = "high"'), "lr must be a number, got 'high'"),
    "no switch": (a_file("compile = 1"), "compile must be true or false, got 1"),
    "not whole": (a_file("steps = 2.0"), "steps must be a whole number, got 2.0"),
    "infinite": (a_file("lr = inf"), "lr must be a finite number, got inf"),
    "NUL": (a_file(r'out = "a\u0000"'), "out must be a string without NUL"),
    "empty": (a_file('out = ""'), "out must be a string that is not empty, got ''"),
    "out of bounds": (a_file("dropout = 1"), "dropout must be in [0, 1), got 1"),
    "no choice": (a_file('attn = "sdp"'), "did you mean 'sdpa'"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_config_file_is_one_line_that_names_it(name: str, folder: Path) -> None:
    make, reason = FILES[name]
    make(folder / "c.toml")
    with pytest.raises(ConfigError) as error:
        # Although each of these flags would win.
        parse(["--config", "c.toml", "--lr=1", "--steps=3", "--out=x", "--attn=sdpa", "--dropout=0", "--no-compile"])
    message = str(error.value)
    assert "--config c.toml" in message and reason in message
    assert "\n" not in message and len(message) < 300


def test_what_an_editor_adds_is_read(folder: Path) -> None:
    (folder / "c.toml").write_bytes(b"\xef\xbb\xbflr = 0.5\r\n")
    assert parse(["--config", "c.toml"]).lr == 0.5


def test_a_setting_of_an_earlier_version_names_the_new_one(folder: Path) -> None:
    write("run/config.toml", "eval_batches = 3\n")
    with pytest.raises(
        ConfigError, match=r"^run/config\.toml: unknown key 'eval_batches'; it is 'eval_sequences' now$"
    ):
        parse(["--resume", "--out", "run"])


# ------------------------------------------------------------------------------------------- every command

COMMANDS = {
    "fastgpt2.command": [],
    "fastgpt2.evaluate": ["--from", "x"],
    "fastgpt2.sample": ["--from", "x"],
    "fastgpt2.prepare": ["x", "--out", "x"],
    "fastgpt2.verify": [],
    "fastgpt2.kernels.tools.inspect": [],
    "fastgpt2.kernels.tools.profile": [],
    "fastgpt2.kernels.tools.sanitize": [],
    "fastgpt2.kernels.tools.tune": [],
    "tests.counts": [],
    "tests.trainer.faults": [],
    "bench.cpu": [],
    "bench.gpu": [],
    "bench.kernel_profile": ["plain"],
    "bench.pictures.__main__": [],
    "bench.report.__main__": [],
    "bench.roofline": [],
    "bench.smoke": [],
}
"""Each with what it can't do without."""
LONG = "a" * 300
"""No file system has such a name."""
MISTAKES = [
    *((module, [*needed, "--oops", "3"], "--oops") for module, needed in COMMANDS.items()),
    ("fastgpt2.command", ["--st", "3"], "--st"),
    ("fastgpt2.evaluate", ["--fro", "x"], "--from"),
    ("fastgpt2.evaluate", ["--from", "x", "--batch-size", "two"], "--batch-size"),
    ("fastgpt2.evaluate", ["--from", "x", "--batch-size", "0"], "--batch-size"),
    ("fastgpt2.evaluate", ["--from", "x", "--batch-size", "1e3"], "--batch-size"),
    ("fastgpt2.evaluate", ["--from", "x", "--batch-size", "9" * 23], "--batch-size"),
    ("fastgpt2.evaluate", ["--from", "x", "--batches", "-1"], "--batches"),
    ("fastgpt2.evaluate", ["--from", "x", "--step", "9" * 5000], "--step"),
    ("fastgpt2.evaluate", ["--from", "x", "--data", ""], "--data"),
    ("fastgpt2.evaluate", ["--from", ""], "--from"),
    ("fastgpt2.evaluate", [], "--from"),
    ("fastgpt2.evaluate", ["--from", "x", "--device", ""], "--device"),
    ("fastgpt2.evaluate", ["--from", LONG], LONG),
    ("fastgpt2.sample", ["--from", LONG], LONG),
    ("fastgpt2.sample", ["--from", "x", "--device", ""], "--device"),
    ("fastgpt2.sample", ["--from", "x", "--data", ""], "--data"),
    ("fastgpt2.sample", ["--from", "x", "--seed", "9" * 30], "--seed"),
    ("fastgpt2.sample", ["--from", "x", "--prompt", "caf\udce9"], "--prompt"),
    ("fastgpt2.sample", ["--from", ""], "--from"),
    ("fastgpt2.sample", ["--from", "x", "--top-k", "1.5"], "--top-k"),
    ("fastgpt2.sample", [], "--from"),
    ("fastgpt2.sample", ["--form=x", "--prompt", "x"], "unknown flag '--form'; did you mean '--from'?"),
    ("fastgpt2.prepare", [], "SOURCE"),
    ("fastgpt2.prepare", ["x", "--out", "caf\udce9"], "--out"),
    ("fastgpt2.prepare", ["x", "--out", "y", "--val-fraction", "nan"], "--val-fraction"),
    ("fastgpt2.verify", ["--device", "gpu"], "--device"),
    ("fastgpt2.verify", ["--device", ""], "--device"),
    ("fastgpt2.verify", ["--steps", "1e3"], "--steps"),
    ("fastgpt2.verify", ["--steps", "0"], "--steps"),
    ("fastgpt2.kernels.tools.inspect", ["--precision", "float8"], "--precision"),
    ("fastgpt2.kernels.tools.tune", ["--arch", "sm_10"], "--arch"),
    ("bench.cpu", ["--rounds", "x"], "--rounds"),
    ("bench.kernel_profile", ["plain", "--dtype", "int8"], "--dtype"),
    ("bench.kernel_profile", ["plain", "x"], "unexpected argument 'x'"),
    ("bench.kernel_profile", ["plain", "--jsonl", "no/lines"], "--jsonl must be a file in a folder that exists"),
    ("bench.cpu", ["--out", "/dev/null"], "can't write to --out /dev/null"),
    ("bench.cpu", ["--threads", "0"], "--threads"),
    ("bench.gpu", ["--part", "3"], "--part"),
    ("bench.gpu", ["--minutes", "inf"], "--minutes must be a finite number"),
    ("bench.smoke", ["--slot", "nrom"], "did you mean 'norm'?"),
    ("bench.roofline", ["--out", "/"], "--out must be a file"),
    ("bench.roofline", ["--out"], "--out needs a value"),
    ("tests.counts", ["--check", "--write"], "--check and --write"),
    ("tests.trainer.faults", ["--rounds", "0"], "--rounds must be at least 1"),
    ("tests.trainer.faults", ["--only", "kiled"], "did you mean 'killed'?"),
    ("fastgpt2.kernels.tools.inspect", ["--op"], "--op needs at least one value"),
    ("fastgpt2.kernels.tools.inspect", ["--json=yes"], "--json takes no value, got 'yes'"),
    ("fastgpt2.kernels.tools.profile", ["--jsonl", "no/lines"], "--jsonl must be a file in a folder that exists"),
    ("fastgpt2.kernels.tools.sanitize", ["--tool", "memchek"], "did you mean 'memcheck'?"),
    ("fastgpt2.kernels.tools.tune", ["--seconds", "-1"], "--seconds must be above 0"),
    ("fastgpt2.command", ["--"], "unexpected argument '--'"),
    ("fastgpt2.command", ["x"], "unexpected argument 'x'"),
    ("fastgpt2.command", [""], "unexpected argument ''"),
    ("fastgpt2.command", ["-s", "5"], "unknown flag '-s'"),
    ("fastgpt2.command", ["--lr", "-1e3"], "--lr needs a value; one that begins with - is given as --lr=-..."),
    ("fastgpt2.command", ["--lr=-1e3"], "--lr must be at least 0"),
    ("fastgpt2.command", ["--lr", "nan"], "--lr must be a finite number"),
    ("fastgpt2.command", ["--model", "gpt3"], "did you mean 'gpt2'?"),
    ("fastgpt2.command", ["--data", "no\nwhere"], r"--data no\nwhere: no such"),
    ("fastgpt2.command", ["--out", "/dev/null/x", "--model", "tiny"], "can't write to --out /dev/null/x"),
    ("fastgpt2.command", ["--config", "/dev/full"], "can't read --config /dev/full: not a file"),
    ("fastgpt2.command", ["--cuda-graph", "--dtype", "float16"], "--cuda-graph"),
    ("fastgpt2.prepare", ["--out", "x"], "missing SOURCE"),
    ("fastgpt2.command", ["--out", ""], "--out"),
    ("fastgpt2.command", ["--out", "caf\udce9"], "--out"),
    ("fastgpt2.command", ["--data", "caf\udce9"], "--data"),
    ("fastgpt2.command", ["--config", "caf\udce9"], "--config"),
    ("fastgpt2.command", ["--caf\udce9"], "--caf"),
    ("fastgpt2.command", ["--steps", "1e3"], "--steps"),
    ("fastgpt2.command", ["--steps", "9" * 5000], "--steps"),
    ("fastgpt2.command", ["--compile", "yes"], "yes"),
    ("fastgpt2.command", ["--compile=yes"], "--compile"),
    ("fastgpt2.command", ["--out", LONG, "--resume"], LONG),
    ("fastgpt2.command", ["--out", LONG, "--resume", "auto"], f"--out {LONG}"),
    ("fastgpt2.command", ["--config", LONG], f"--config {LONG}"),
    ("fastgpt2.command", ["--lr"], "--lr"),
    ("fastgpt2.command", ["--resume", "run", "--out", "x"], "--resume"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "arguments", "named"), MISTAKES, ids=lambda value: ascii(value)[:60])
def test_a_mistake_in_any_command_is_a_line_with_status_2(
    module: str, arguments: list[str], named: str, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(importlib.import_module(module).main)
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    assert line.startswith("error: ") and named.encode("ascii", "backslashreplace").decode() in line
    assert len(line.replace(LONG, "")) < 400
    assert not list(folder.iterdir())


@pytest.mark.parametrize("module", COMMANDS)
def test_any_terminal_can_show_the_help(module: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main()
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage: " in shown and shown.isascii()
    assert max(map(len, shown.splitlines())) <= 80 and "None" not in shown and "0.0)" not in shown


def test_bytes_that_are_no_text_are_one_line_on_an_ascii_terminal(folder: Path) -> None:
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": os.getcwd(),
    }
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "fastgpt2.train", "--out", b"caf\xe9"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"error: --out must be UTF-8" in done.stderr


def test_help_says_what_a_flag_is_and_its_default() -> None:
    shown = " ".join(make_parser(TrainConfig, "fastgpt2.train").format_help().split())
    for text in (
        "--resume [auto] Continue the run in --out",
        "--keep-checkpoints N Number of newest checkpoints to keep",
        "0 keeps all (default: 2).",
        "--dropout X Dropout after",
        "--schedule {constant,cosine,linear}",
        "--compile Compile the model",
        "--deterministic, --no-deterministic",
        "--model {tiny,mini,small,gpt2,gpt2-medium,gpt2-large,gpt2-xl} Preset (default: gpt2 on a GPU",
        "--attn {auto,naive,sdpa,cudnn,flex,triton-hopper,triton,module:function}",
    ):
        assert text in shown
    flags = make_parser(TrainConfig, "fastgpt2.train").format_help()
    assert all(f"--{name.replace('_', '-')}" in flags for name in TrainConfig.__dataclass_fields__)


def test_the_last_of_a_flag_given_twice_wins_and_lists_add_up() -> None:
    assert parse(["--lr", "1", "--lr", "2", "--compile", "--no-compile"]) == TrainConfig(lr=2.0)
    given = read_arguments(
        PrepareConfig, "fastgpt2.prepare", ["a", "b", "--out", "o", "--ext", "py", "--ext", "md", "c"]
    )
    assert (given.sources, given.ext) == ((Path("a"), Path("b")), ("py", "md", "c"))


def test_a_flag_is_the_same_with_hyphens_and_underscores() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--batch-size")
    assert parser.parse_args(["--batch_size", "a_b"]).batch_size == "a_b"
    assert parser.parse_args(["--batch_size=a_b"]).batch_size == "a_b"
    assert parser.parse_args(["--batch-size", "1", "--batch_size", "2"]).batch_size == "2"
    with pytest.raises(SystemExit):  # no abbreviations
        parser.parse_args(["--batch", "3"])
