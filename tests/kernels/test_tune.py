"""The tuner: what it drops it never times, what it chooses outlasts noise, what it writes is a whole table."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux")

from bench.timing import ROOT
from fastgpt2.console import run_command
from fastgpt2.fields import ConfigError
from fastgpt2.kernels import tuning
from fastgpt2.kernels.tools import inspect, timing, tune
from fastgpt2.kernels.tools.tune import Key, LaunchConfig, Options, choose, configurations, read, serialize, updated
from fastgpt2.kernels.tuning import TABLES, architectures

SMALL, MIDDLE, LARGE = (LaunchConfig(64, 64, num_warps=warps, num_stages=2) for warps in (2, 4, 8))
KEY = Key("attention_forward", "bfloat16", 64)
WHERE = {"date": "2026-01-01", "gpu": "a card", "torch": "2.11", "triton": "3.6"}


def report(**facts: Any) -> Any:
    """What the compiler made of a candidate that nothing is wrong with, but for `facts`."""
    case = SimpleNamespace(arch="sm_90", precision=facts.pop("precision", "bfloat16"))
    right = {"case": case, "spilled": 0, "shared": 1024, "blocks": 2, "missed": 0, "products": 4, "registers": 128}
    return SimpleNamespace(**right | {"races": [], "serialised": False} | facts)


def run(out: Path, reports: dict, times: dict, **options: Any) -> tuple[list[str], list[LaunchConfig]]:
    """Tune with times that are made up: the lines said, and what was timed."""
    lines: list[str] = []
    timed: list[LaunchConfig] = []

    def measure(key: Key, configs: list[LaunchConfig]) -> tune.Measured:
        timed.extend(configs)
        return {config: times[config] for config in configs}, {}

    tune.tune("sm_90", reports.items(), out, measure, WHERE, say=lines.append, **options)
    return lines, timed


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_tables_are_kept_as_the_tuner_writes_them(path) -> None:
    assert serialize(json.loads(path.read_text())) == path.read_text()


def test_the_smallest_size_that_is_no_smaller_serves(monkeypatch) -> None:
    listed = {("op", "float32", 64): SMALL, ("op", "float32", 128): LARGE, ("op", "bfloat16", 96): MIDDLE}
    monkeypatch.setattr(tuning, "configurations", lambda table: listed)
    served = [tuning.configuration.__wrapped__("table", "op", "float32", size) for size in (1, 64, 65, 128, 129)]
    assert served == [SMALL, SMALL, LARGE, LARGE, LARGE]


def test_the_fastest_is_chosen() -> None:
    assert choose({SMALL: 1.5, MIDDLE: 1.0, LARGE: 1.2}, LARGE) == MIDDLE


def test_the_tables_own_stays_unless_it_is_slower_than_noise() -> None:
    assert choose({SMALL: 1.0, LARGE: 1.019}, LARGE) == LARGE
    assert choose({SMALL: 1.0, LARGE: 1.021}, LARGE) == SMALL


def test_of_equals_the_plainest_is_chosen() -> None:
    assert choose({LARGE: 1.0, MIDDLE: 1.009, SMALL: 1.011}, LaunchConfig(16)) == MIDDLE
    staged = replace(LARGE, num_stages=3)
    for times in ({LARGE: 1.001, staged: 1.0}, {staged: 1.0, LARGE: 1.001}):
        assert choose(times, LaunchConfig(16)) == LARGE


def test_the_same_run_gives_the_same_table() -> None:
    """Medians that wander by a third of a percent either way, three candidates within one percent."""
    rng = random.Random(0)
    true = {SMALL: 1.006, MIDDLE: 1.0, LARGE: 1.003, LaunchConfig(128, 128, num_warps=8): 1.1}
    for _ in range(100):
        present = LaunchConfig(16)
        chosen = []
        for _ in range(10):
            present = choose({c: ms * rng.uniform(0.9967, 1.0033) for c, ms in true.items()}, present)
            chosen.append(present)
        assert len(set(chosen)) == 1


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, None),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"spilled": 8, "precision": "float32"}, "spills 8 bytes"),
        ({"races": ["this touches that", "and that"]}, "races: this touches that"),
        ({"serialised": True}, "has its products serialised"),
        ({"shared": 232449}, "needs 232449 bytes of shared memory, the table allows 232448"),
        ({"shared": 232448}, None),
        ({"blocks": 0}, "does not fit on a multiprocessor"),
        ({"missed": 1}, "1 of 4 products miss the matrix units"),
        ({"missed": 4, "precision": "float32"}, None),
    ],
    ids=str,
)
def test_why_dropped(facts, reason) -> None:
    assert tune.why_dropped(report(**facts)) == reason


def test_what_is_dropped_is_never_timed(tmp_path) -> None:
    present = configurations(read("sm_90", tmp_path / "none"))[KEY]
    reports = {KEY: {present: report(), SMALL: report(spilled=4), MIDDLE: "does not compile: it", LARGE: report()}}
    lines, timed = run(tmp_path / "sm_90.json", reports, {present: 1.0, LARGE: 0.5})
    assert timed == [present, LARGE]
    assert lines[0].startswith(f"{KEY}: 2 of 4 candidates are timed")
    assert lines[1:] == [f"{KEY}: {LARGE}, 0.5 ms; before {present}"]
    written = json.loads((tmp_path / "sm_90.json").read_text())
    assert configurations(written)[KEY] == LARGE
    (entry,) = (e for e in written["entries"] if e["measured"])
    assert entry["measured"] == {**WHERE, "ms": 0.5, "next": str(present), "next_ms": 1.0, "timed": 2}


def test_one_configuration_is_replaced_and_no_other() -> None:
    table = read("sm_90", TABLES / "sm_90.json")
    before = configurations(table)
    for key in before:
        changed = updated(table, key, SMALL, {"ms": 1.0})
        after = configurations(changed)
        assert after == before | {key: SMALL}
        listed = [(e["op"], p, n) for e in changed["entries"] for p in e["precisions"] for n in e["sizes"]]
        assert len(listed) == len(set(listed)) == len(before)
        assert sum(e["measured"] == {"ms": 1.0} for e in changed["entries"]) == 1
    again = updated(updated(table, KEY, SMALL, {"ms": 1.0}), KEY, LARGE, {"ms": 2.0})
    assert again == updated(table, KEY, LARGE, {"ms": 2.0})


def test_each_choice_is_written_before_the_next_is_measured(tmp_path) -> None:
    """A run that dies leaves what it has done; what someone else writes meanwhile stays."""
    out = tmp_path / "made" / "for" / "it" / "sm_90.json"
    other, last = replace(KEY, size=128), replace(KEY, size=16)

    def measure(key: Key, configs: list[LaunchConfig]) -> tune.Measured:
        if key == other:
            table = json.loads(out.read_text())
            assert configurations(table)[KEY] == LARGE
            out.write_text(serialize(updated(table, last, MIDDLE, {"by": "hand"})))
        if key == last:
            raise KeyboardInterrupt
        return {LARGE: 1.0}, {}

    reports: dict = {key: {LARGE: report()} for key in (KEY, other, last)}
    with pytest.raises(KeyboardInterrupt):
        tune.tune("sm_90", reports.items(), out, measure, WHERE, say=lambda _: None)
    table = json.loads(out.read_text())
    assert [configurations(table)[key] for key in (KEY, other, last)] == [LARGE, LARGE, MIDDLE]
    assert (
        table["chosen_by"].startswith("fastgpt2.kernels.tools.tune where")
        and table["chosen_by"].count("fastgpt2.kernels.tools.tune") == 1
    )
    assert list(out.parent.iterdir()) == [out]


def test_a_write_that_fails_leaves_the_table(tmp_path, monkeypatch) -> None:
    out = tmp_path / "sm_90.json"
    out.write_text("before")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tune.write(out, {"entries": []})
    assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_timed_is_said_and_left(tmp_path) -> None:
    lines: list[str] = []
    out = tmp_path / "sm_90.json"
    faults = {SMALL: "fails: OutOfResources", LARGE: "disagrees with the first by 1.0e+00 of its norm"}
    reports: dict = {KEY: {SMALL: report(), LARGE: report()}}
    assert tune.tune("sm_90", reports.items(), out, lambda *_: ({}, faults), WHERE, say=lines.append) == 0
    assert len(lines) == 4 and "it fails: OutOfResources" in lines[1] and "left as it was" in lines[3]
    assert not out.exists()


def test_every_kernels_own_configuration_compiles_first_and_a_cut_cancels_the_rest(monkeypatch) -> None:
    submitted: list[tuple[str, LaunchConfig]] = []
    ended: list[dict[str, bool]] = []

    class Pool:
        def __init__(self, *_: Any) -> None: ...

        def submit(self, function: Any, case: inspect.Case) -> Any:
            submitted.append((case.op, case.config))
            return SimpleNamespace(result=lambda: "not compiled")

        def shutdown(self, **how: bool) -> None:
            ended.append(how)

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    table = read("sm_90", TABLES / "sm_90.json")
    wanted = tune.keys("sm_90", table, Options(("layer_norm",), ("bfloat16",), (768,)))
    made = tune.compiled("sm_90", table, wanted)
    key, reports = next(made)
    assert key == wanted[0] and list(reports) == tune.candidates(table, key)
    assert submitted[: len(wanted)] == [(key.op, configurations(table)[key]) for key in wanted] and len(wanted) == 2
    assert set(submitted) == {(key.op, config) for key in wanted for config in tune.candidates(table, key)}
    assert len(submitted) == len(set(submitted)) and ended == []
    made.close()
    assert ended == [{"cancel_futures": True}]


def test_minutes_end_a_run_between_two_kernels(tmp_path) -> None:
    lines, timed = run(tmp_path / "t.json", {KEY: {LARGE: report()}}, {LARGE: 1.0}, minutes=-1.0)
    assert timed == [] and "are left as they were" in lines[0]


def test_keys_follow_the_options_16_bit_first() -> None:
    table = read("sm_90", TABLES / "sm_90.json")
    everything = tune.keys("sm_90", table, Options())
    assert {key.op for key in everything} == set(tune.tunings()) - {"gelu_mlp_forward", "gelu_mlp_backward"}
    precisions = [key.precision for key in everything]
    assert precisions == sorted(precisions, key=["bfloat16", "float16", "tf32", "float32"].index)
    some = tune.keys("sm_90", table, Options(("layer_norm",), ("float32",), (768, 8192)))
    assert [str(key) for key in some] == [
        f"layer_norm_{way} float32 {C}" for way in ("forward", "backward") for C in (768, 8192)
    ]


@pytest.mark.parametrize("arch", architectures())
def test_what_costs_a_step_most_comes_first_and_what_the_gpu_never_launches_not_at_all(arch) -> None:
    found = tune.keys(arch, read(arch, TABLES / f"{arch}.json"), Options(None, ("bfloat16",), (64, 768, 50304)))
    form = "" if arch == "sm_80" else "_tma"
    assert [key.op for key in found] == [
        "attention_forward", "attention_backward_dq", "attention_backward_dkdv",
        f"gelu_mlp_forward{form}", f"gelu_mlp_backward{form}",
        "cross_entropy", "layer_norm_forward", "layer_norm_backward",
        *(f"attention_{name}_hopper" for name in ("forward", "backward_dq", "backward_dkdv") if arch == "sm_90"),
    ]  # fmt: skip


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_mlps_launcher_takes_the_form_that_is_tuned(capability, monkeypatch) -> None:
    mlp = import_module("fastgpt2.kernels.mlp")
    monkeypatch.setattr(mlp.launch, "capability", lambda device: capability)
    aligned = SimpleNamespace(device=torch.device("cuda"), itemsize=2, size=lambda dim: 768, data_ptr=lambda: 256)
    launched = {
        op for op, tuning in tune.tunings().items() if op.startswith("gelu_mlp") and tuning.launched(capability[0])
    }
    form = "_tma" if mlp._descriptors(aligned) else ""
    assert launched == {f"gelu_mlp_forward{form}", f"gelu_mlp_backward{form}"}


def test_results_are_compared_before_anything_is_timed() -> None:
    right = torch.linspace(-1, 1, 100)
    results = {SMALL: (right, None), MIDDLE: (right * 1.001, None), LARGE: (right * 1.1, None)}
    nothing = LaunchConfig(1)

    def launch(config: LaunchConfig) -> Any:
        if config == nothing:
            raise RuntimeError("first line\nout of resource: shared memory")
        return results[config][0]

    faults = dict(timing.checked(launch, [nothing, *results]))
    assert "RuntimeError" in faults[nothing] and "shared memory" in faults[nothing]
    assert faults[SMALL] is faults[MIDDLE] is None
    assert "disagrees with the first by 1.0e-01" in faults[LARGE]
    assert timing.disagreement(right * float("nan"), right) == float("inf")
    assert timing.disagreement((right, right[:0]), [right, right[:0]]) == 0.0
    assert timing.disagreement(None, None) == 0.0


@pytest.mark.parametrize(("size", "sets"), [(10, 16), (100, 4), (10000, 2)])
def test_inputs_rotate_over_four_times_the_cache(size, sets) -> None:
    held = [7]

    def make(seed: int) -> Any:
        held[0] += size
        return seed

    assert timing.rotating(make, 100, lambda: held[0]) == list(range(sets))


@pytest.mark.parametrize(("seconds", "rounds"), [(10.0, timing.ROUNDS), (0.066, 11), (0.0, 5)])
def test_candidates_take_turns_and_the_median_counts(seconds, rounds, monkeypatch) -> None:
    clock, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    cost = {SMALL: 3.0, MIDDLE: 1.0, LARGE: 2.0}

    def launch(which: int) -> Any:
        def call(config: LaunchConfig) -> None:
            calls.append((which, config))
            # A hiccup now and then.
            clock[0] += cost[config] * (50.0 if len(calls) % 10 == 0 else 1.0)

        return call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.milliseconds([launch(0), launch(1)], list(cost), seconds) == pytest.approx(cost)
    assert len(calls) == 3 * (timing.WARM_UP + rounds)
    assert [config for _, config in calls[:6]] == list(cost) * 2
    assert {which for which, config in calls if config == LARGE} == {0, 1}


def test_what_can_be_tuned_is_a_kernel_with_candidates() -> None:
    table = read("sm_90", TABLES / "sm_90.json")
    assert {"layer_norm_forward", "layer_norm_backward"} <= tune.tunings().keys() <= inspect.all_kernels().keys()
    for key in tune.keys("sm_90", table, Options()):
        found = tune.candidates(table, key)
        assert found[0] == configurations(table)[key]
        least = 1 if key.op.endswith("_hopper") else 3  # their tiles are fixed, and 128 channels fit twice
        assert least <= len(found) == len(set(found)) <= 64, (key, len(found))
        if key.op.startswith("gelu_mlp") and key.precision == "bfloat16":  # modded-nanogpt's
            assert {LaunchConfig(128, 256, 64, 8, stages) for stages in (3, 4)} <= set(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own test times them")
@pytest.mark.parametrize(
    ("op", "precision", "size"),
    [("layer_norm_forward", "bfloat16", 768), ("layer_norm_backward", "bfloat16", 768),
     ("layer_norm_forward", "float32", 100), ("layer_norm_backward", "float32", 100),
     ("attention_forward", "bfloat16", 16), ("attention_backward_dq", "float32", 16),
     ("attention_backward_dkdv", "tf32", 16), ("gelu_mlp_forward_tma", "float32", 32),
     ("gelu_mlp_backward", "float32", 32)],
)  # fmt: skip
def test_examples_run_and_do_not_depend_on_the_configuration(op, precision, size, monkeypatch) -> None:
    monkeypatch.setattr(import_module("fastgpt2.kernels.specs.norm"), "EXAMPLE_ROWS", 70)
    monkeypatch.setattr(import_module("fastgpt2.kernels.specs.attention"), "EXAMPLE", (1, 70, 32))
    monkeypatch.setattr(import_module("fastgpt2.kernels.specs.mlp"), "EXAMPLE_ROWS", 70)
    device = torch.device("cpu")
    first, second = (tune.tunings()[op].example(precision, size, device, seed) for seed in (0, 1))
    tiles = {"attention": [(16, 16), (64, 32)], "gelu_mlp": [(32, 32, 16), (64, 64, 32)], "layer_norm": [(16,), (64,)]}
    (kernel,) = (name for name in tiles if op.startswith(name))
    configs = [LaunchConfig(*tile) for tile in tiles[kernel]]
    assert [fault for _, fault in timing.checked(first, configs)] == [None, None]
    assert timing.disagreement(first(configs[0]), second(configs[0])) > timing.AGREE


def test_a_dry_run_compiles_and_says_what_it_drops(tmp_path) -> None:
    """Of three candidates one spills and one can't compile; in a process that compiles, and so can't interpret."""
    code = (
        "from fastgpt2.kernels.tools import tune\n"
        "from fastgpt2.kernels.specs.records import Tuning\n"
        "from fastgpt2.kernels.tuning import LaunchConfig\n"
        "bad = [LaunchConfig(16, num_warps=16), LaunchConfig(3, num_warps=4)]\n"
        "tune.tunings = lambda: {'layer_norm_backward': Tuning(lambda *_: bad, None)}\n"
        "given = ['--dry-run', '--arch', 'sm_90', '--precision', 'bfloat16', '--size', '768', '--out', 'table.json']\n"
        "raise SystemExit(tune.main(given))\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    head, shipped, spilling, impossible = done.stdout.splitlines()
    assert head == "layer_norm_backward bfloat16 768 on sm_90: 1 of 3 candidates would be timed"
    assert "registers" in shipped and "dropped" not in shipped
    assert "dropped: spills" in spilling and "dropped: does not compile" in impossible
    assert list(tmp_path.iterdir()) == []


def test_the_command_times_each_kernel_for_the_seconds_asked(tmp_path, monkeypatch) -> None:
    asked: list[tuple[str, float]] = []

    def measure(device: Any, seconds: float, key: Key, configs: list[LaunchConfig]) -> tune.Measured:
        asked.append((key.op, seconds))
        return {LARGE: 1.0}, {}

    monkeypatch.setattr(tune, "_this_arch", lambda: "sm_90")
    monkeypatch.setattr(tune, "_present", lambda: (torch.device("cpu"), WHERE))
    monkeypatch.setattr(tune, "compiled", lambda arch, table, wanted: ((key, {LARGE: report()}) for key in wanted))
    monkeypatch.setattr(tune, "measure", measure)
    out = tmp_path / "OUT" / "sm_90.json"
    given = ["--precision", "bfloat16", "--size", "64", "768", "50304", "--seconds", "3", "--minutes", "1.4"]
    assert tune.main([*given, "--out", str(out)]) == 0
    assert len(asked) == 11 and {seconds for _, seconds in asked} == {3.0}
    measured = [entry for entry in json.loads(out.read_text())["entries"] if entry["measured"]]
    assert sorted(entry["op"] for entry in measured) == sorted(op for op, _ in asked)


def test_without_a_gpu_one_line_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(tune, "_this_arch", lambda: None)
    for arguments in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match=r"^no CUDA GPU here; .*--arch"):
            tune.main(arguments)
    with pytest.raises(ConfigError, match="--arch is for --dry-run"):
        tune.main(["--arch", "sm_90"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--seconds", "nan"], "--seconds must be a finite number, got nan"),
        (["--out", "table.json"], "--out must be named sm_90.json, after this GPU's architecture, got table.json"),
        (["--out", "sm_90.json"], "--out: sm_90.json is not a table: it has no entries"),
        (["--prec", "bfloat16"], "unknown flag '--prec'; did you mean '--precision'?"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path, monkeypatch, capsys, arguments, reason) -> None:
    monkeypatch.setattr(tune, "_this_arch", lambda: "sm_90")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sm_90.json").write_text("[]")
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: tune.main(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {reason}")


@pytest.mark.gpu
def test_a_real_run_is_repeatable(tmp_path, capsys) -> None:
    """One small kernel, twice: the second run finds the first's choice and keeps it."""
    out = tmp_path / f"{tune._this_arch()}.json"
    chosen = []
    key = Key("layer_norm_forward", "bfloat16", 256)
    for _ in range(2):
        arguments = ["--op", key.op, "--precision", key.precision, "--size", str(key.size), "--out", str(out)]
        assert tune.main(arguments) == 0, capsys.readouterr()
        table = json.loads(out.read_text())
        chosen.append(configurations(table)[key])
        (entry,) = (e for e in table["entries"] if e["measured"] and (e["op"], e["sizes"]) == (key.op, [key.size]))
        assert entry["measured"]["gpu"] == torch.cuda.get_device_name() and entry["measured"]["timed"] >= 3
        # x, residual, sum and y of 65,536 rows, no faster than any memory yet.
        assert entry["measured"]["ms"] > 65536 * 256 * 12 / 10e12 * 1e3
    assert chosen[0] == chosen[1]
