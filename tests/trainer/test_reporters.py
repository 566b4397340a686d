"""Any number of reporters, including some that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import TrainConfig, train
from fastgpt2.metrics import NonFiniteLossError, read_json_lines
from fastgpt2.reporter import Reporter, TrainResult
from fastgpt2.run import Run

SMALL: dict[str, Any] = {"model": "tiny", "batch_size": 1, "device": "cpu", "steps": 3, "log_every": 1}


class Watch(Reporter):
    def __init__(self, out: Path | None = None) -> None:
        self.out = out
        self.events: list[str] = []
        self.warnings: list[str] = []

    def started(self, run: Run) -> None:
        self.events.append("started")

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def logged(self, record: dict[str, Any]) -> None:
        self.events.append(f"logged {record['step']}")
        if self.out is not None and read_json_lines(self.out / "metrics.jsonl")[-1] != record:
            self.events.append("before it was written")

    def saving(self) -> None:
        self.events.append("saving")
        if self.out is not None and (self.out / "checkpoints").exists():
            self.events.append("after it was saved")

    def close(self) -> list[str]:
        self.events.append("close")
        return ["one line"]

    def finished(self, result: TrainResult) -> None:
        self.events.append(f"finished, missing {result.missing}")

    def failed(self, error: BaseException) -> None:
        self.events.append(f"failed {type(error).__name__}")


class Broken(Reporter):
    """Raises at every record after the first."""

    def logged(self, record: dict[str, Any]) -> None:
        if record["step"] >= 2:
            raise ValueError("no\nroom")


EVENTS = ["started", "logged 1", "logged 2", "logged 3"]


def test_all_are_told_the_metrics_file_first(tmp_path: Path) -> None:
    watches = [Watch(tmp_path), Watch(tmp_path)]
    train(TrainConfig(**SMALL, out=tmp_path), reporters=watches)
    for watch in watches:
        assert watch.events == [*EVENTS, "saving", "close", "finished, missing ['one line', 'one line']"]
        assert watch.warnings == []


def test_one_that_raises_is_dropped_and_named_once(tmp_path: Path) -> None:
    watch = Watch()
    result = train(TrainConfig(**SMALL, out=tmp_path), reporters=[Broken(), watch])
    assert watch.events == [*EVENTS, "saving", "close", "finished, missing ['one line']"]
    assert watch.warnings == ["Broken is dropped: it raised ValueError: no room"]
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert result.losses == train(TrainConfig(**SMALL)).losses


def test_where_all_were_dropped_warnings_are_pythons() -> None:
    with pytest.warns(RuntimeWarning, match=r"^Broken is dropped: it raised ValueError: no room$"):
        assert train(TrainConfig(**SMALL), reporters=[Broken()]).steps_done == 3


def test_a_dropped_reporter_may_still_stop_the_run() -> None:
    class Stops(Broken):
        def logged(self, record: dict[str, Any]) -> None:
            self.stop_requested = True
            raise ValueError

    assert train(TrainConfig(**SMALL), reporters=[Stops(), Watch()]).steps_done == 1


def test_one_that_raises_when_it_is_asked_to_stop_is_dropped() -> None:
    class Asked(Reporter):
        @property
        def stop_requested(self) -> bool:  # type: ignore[override]
            raise ValueError("no answer")

    watch = Watch()
    assert train(TrainConfig(**SMALL), reporters=[Asked(), watch]).steps_done == 3
    assert watch.warnings == ["Asked is dropped: it raised ValueError: no answer"]


def test_each_has_a_record_of_its_own() -> None:
    class Takes(Reporter):
        def logged(self, record: dict[str, Any]) -> None:
            record.clear()

    watch = Watch()
    train(TrainConfig(**SMALL), reporters=[Takes(), watch])
    assert watch.events[: len(EVENTS)] == EVENTS and not watch.warnings


@pytest.mark.parametrize(
    ("reporters", "got"),
    [([None], "instances, got NoneType"), ([Watch], "instances, got the class Watch"), (Watch(), "a list, got Watch")],
)
def test_what_is_no_reporter_is_refused_with_the_right_call(reporters: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"{got}: call train\(config, reporters=\[MyReporter\(\)\]\)"):
        train(TrainConfig(**SMALL), reporters=reporters)


def test_a_reporter_given_by_position_is_refused_with_the_right_call() -> None:
    with pytest.raises(TypeError, match=r"train\(config, ops=\.\.\., reporters=\[\.\.\.\]\)$"):
        train(TrainConfig(**SMALL), Watch())  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyboardInterrupt, NonFiniteLossError])
def test_all_are_told_of_a_run_that_fails(error: type[BaseException]) -> None:
    class Interrupts(Reporter):
        def logged(self, record: dict[str, Any]) -> None:
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt

    watch = Watch()
    huge = {"lr": 1e30} if error is NonFiniteLossError else {}
    with pytest.raises(error):
        train(TrainConfig(**SMALL, **huge), reporters=[watch, Interrupts()])
    assert watch.events[0] == "started"
    assert watch.events[-2:] == ["close", f"failed {error.__name__}"]
