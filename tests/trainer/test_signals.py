"""A signal stops a run: it saves, says so in one line, and exits with 128 + the signal's number."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastgpt2 import checkpoint, signals
from fastgpt2.command import main
from fastgpt2.data import DummyTokens
from fastgpt2.metrics import read_json_lines
from fastgpt2.reporters.display import TrainDisplay
from tests import forked

RUN = ["--model", "tiny", "--batch-size", "2", "--block-size", "8", "--device", "cpu", "--steps", "9"]
RUN += ["--save-every", "100", "--log-every", "1"]
EVERY = pytest.mark.parametrize("number", signals.STOPPING, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.reporters.display.plot_losses", lambda out, result: out / "loss.png")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Call `action` after a step is launched, before its loss is read."""
    stepped = TrainDisplay.stepped

    def then(self: TrainDisplay, done: int) -> None:
        stepped(self, done)
        if done == step:
            action()

    monkeypatch.setattr(TrainDisplay, "stepped", then)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def saved(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(out)]


@EVERY
def test_every_signal_that_asks_to_stop_saves(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in signals.STOPPING]
    at_step(monkeypatch, 3, lambda: send(number))
    assert main([*RUN, "--out", str(tmp_path)]) == 128 + number
    assert saved(tmp_path) == [3] and [r["step"] for r in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    output, errors = capfd.readouterr()
    again = " (press Ctrl-C again to stop now)" if number == signal.SIGINT else ""
    assert errors == f"{number.name}: stopping after this step{again}\n"
    assert f"stopped early; continue with --resume --out {tmp_path}\n" in output
    assert [signal.getsignal(each) for each in signals.STOPPING] == before


@EVERY
def test_only_a_second_ctrl_c_ends_at_once(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP and SIGTERM often come together, and one of them may come twice."""
    at_step(monkeypatch, 3, lambda: send(number, *signals.STOPPING[1:], number))
    second = number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt) if second else contextlib.nullcontext():
        assert main([*RUN, "--out", str(tmp_path)]) == 128 + number
    assert saved(tmp_path) == ([] if second else [3])


def test_a_signal_in_the_last_step_is_no_early_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 9, lambda: send(signal.SIGTERM))
    assert main([*RUN, "--out", str(tmp_path)]) == 0 and saved(tmp_path) == [9]


def test_a_signal_before_the_first_step_has_nothing_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = TrainDisplay.started
    monkeypatch.setattr(TrainDisplay, "started", lambda self, run: (started(self, run), send(signal.SIGTERM)))
    assert main([*RUN, "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    assert saved(tmp_path) == [] and read_json_lines(tmp_path / "metrics.jsonl") == []
    assert "continue with --resume" not in capsys.readouterr().out


def test_a_signal_during_a_save_lets_it_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *args: (send(signal.SIGTERM), write(*args))[1])
    assert main([*RUN, "--save-every", "2", "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    assert saved(tmp_path) == [2] and checkpoint.damage(checkpoint.newest(tmp_path)) is None


@pytest.mark.parametrize("save_every", [4, 100], ids=["saved", "not saved"])
def test_an_evaluation_is_cut_short_by_a_signal_and_never_delays_a_save(
    save_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = DummyTokens.tokens, []

    def tokens(self: DummyTokens, step: int) -> Tensor:
        if self.stream == "val":
            drawn.append(step)
            assert len(drawn) < 3
            # The step's record and any checkpoint that is due are written before the evaluation begins.
            assert read_json_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 4
            assert saved(tmp_path) == ([4] if save_every == 4 else [])
            if len(drawn) == 2:
                send(signal.SIGTERM)
        return draw(self, step)

    monkeypatch.setattr(DummyTokens, "tokens", tokens)
    evaluation = ["--eval-every", "4", "--eval-sequences", "8000000"]
    assert main([*RUN, *evaluation, "--save-every", str(save_every), "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    assert len(drawn) == 2 and saved(tmp_path) == [4]
    assert not any("val_loss" in record for record in read_json_lines(tmp_path / "metrics.jsonl"))


def test_no_evaluation_begins_after_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 4, lambda: send(signal.SIGUSR1))
    assert main([*RUN, "--eval-every", "4", "--out", str(tmp_path)]) == 128 + signal.SIGUSR1
    assert not any("val_loss" in record for record in read_json_lines(tmp_path / "metrics.jsonl"))


@contextlib.contextmanager
def ignored(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 3, lambda: send(signal.SIGHUP))
    with ignored(signal.SIGHUP):
        assert main([*RUN, "--out", str(tmp_path)]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


# ------------------------------------------------------------------------------------ before there is a run

NO_TORCH = """
import os, signal
os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])
raise SystemExit("still alive")
"""


@EVERY
def test_a_signal_while_torch_is_imported_ends_in_one_line(number: signal.Signals, tmp_path: Path) -> None:
    """A file in torch's place sends the signal."""
    (tmp_path / "torch.py").write_text(NO_TORCH)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "SIGNAL": number.name}
    line = [sys.executable, "-m", "fastgpt2.train", *RUN]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 128 + number, done.stderr
    assert done.stdout == ""
    assert done.stderr == (f"stopped by {number.name}: no step was being computed, so there is nothing to save\n")


def test_a_signal_while_the_run_is_built_ends_in_one_line(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; import fastgpt2.run as run; from fastgpt2.command import main\n"
        "build = run._open_sources\n"
        "run._open_sources = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), build(*args))[1]\n"
        "sys.exit(main())"
    )
    done = forked.run("-c", program, *RUN, "--out", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, ""), done.stderr
    assert done.stderr.startswith("stopped by SIGTERM: ") and done.stderr.count("\n") == 1


def test_the_function_train_handles_no_signals() -> None:
    from fastgpt2 import TrainConfig, train
    from fastgpt2.reporter import Reporter

    seen = []

    class Watch(Reporter):
        def stepped(self, done: int) -> None:
            seen.append([signal.getsignal(number) for number in signals.STOPPING])

    before = [signal.getsignal(number) for number in signals.STOPPING]
    train(TrainConfig(model="tiny", block_size=8, batch_size=1, steps=1, device="cpu"), reporters=[Watch()])
    assert seen == [before]
