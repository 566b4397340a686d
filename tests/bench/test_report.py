"""Stored records: how they are read and compared, and that docs/benchmarks.md and `auto` follow from them.

The records here are made up (tests/records.py), in a folder of the test's own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.record import RecordError, TrainingRun, load
from bench.report import __main__ as report
from bench.report.__main__ import PAGES
from bench.report.results import (
    best_peer,
    pick,
    ratio,
    stored,
    summary,
    table,
    work,
)
from bench.report.sections import SECTIONS, runs_summary
from bench.result import Result
from bench.timing import ROOT
from tests.bench.records import GPU, make_record, recorded, write_record

# ------------------------------------------------------------------------------------------------------ results


def result(backend: str, role: str, round_ms: list[float], **other: Any) -> Result:
    ms = {"ms_median": sorted(round_ms)[len(round_ms) // 2], "ms_p20": min(round_ms), "ms_p80": max(round_ms)}
    known = {"op": "mlp forward", "shape": {"B": 1, "C": 8}, "dtype": "bfloat16", "compiled": None, "contest": "one"}
    return Result(backend=backend, role=role, round_ms=round_ms, **known | ms | other)


def test_a_ratio_is_of_speeds_round_by_round() -> None:
    # The clocks drift by 4x within the contest; ours is 1.25 times as fast in each round but the last.
    mine, theirs = result("a", "ours", [1.0, 2.0, 4.0, 3.0, 1.0]), result("b", "peer", [1.25, 2.5, 5.0, 3.75, 3.0])
    found = ratio(mine, theirs)
    assert (found.median, found.p20, found.p80) == (1.25, 1.25, 1.25) and str(found) == "1.25 (1.25..1.25)"
    changes: list[dict[str, Any]] = [{"contest": "two"}, {"round_ms": [1.25]}]
    for other in changes:
        apart = ratio(mine, replace(theirs, **other))
        # The medians are of different rounds: 3.0 over 2.0.
        assert apart.median == pytest.approx(1.5) and not apart.paired and str(apart) == "~1.50"


def test_the_best_peer_is_the_fastest_that_was_timed_in_turn_and_does_all_of_the_work() -> None:
    mine = result("triton", "ours", [2.0])
    slow, fast = result("torch", "peer", [4.0]), result("liger", "peer", [3.0])
    floor = result("matmuls-alone", "floor", [1.0])
    elsewhere, other = result("quack", "peer", [1.5], contest="two"), result("x", "peer", [1.0], shape={"B": 2, "C": 8})
    ours = result("torch-like", "ours", [1.0])
    assert best_peer(mine, [slow, elsewhere, mine, fast, floor, other, ours]) is fast
    assert best_peer(mine, [floor, elsewhere, other]) is elsewhere
    assert best_peer(mine, [mine, floor, other]) is None


def test_an_eager_step_is_beside_eager_peers() -> None:
    record = recorded()
    for step in (r for r in pick(record, "training step") if r.role == "ours"):
        peer = best_peer(step, record.results)
        assert peer is not None and peer.backend == "plain" and peer.compiled is step.compiled


def test_the_table_has_the_fastest_first_and_says_the_limit() -> None:
    rows = [
        result("torch", "peer", [4.0], limit="memory", limit_fraction=0.25, tokens_per_s=10.0, tflops=1.0),
        result("floor", "floor", [1.0]),
        result("triton", "ours", [2.0], limit="memory", limit_fraction=0.5, host_ms=2.5, peak_memory_bytes=2**30),
    ]
    lines = table(rows).splitlines()
    assert [line.split()[5] for line in lines[1:]] == ["floor", "triton", "torch"]
    assert "mlp forward B=1 C=8 bfloat16" in lines[1]
    assert "memory 50%, launch-bound" in lines[2] and "1.00  2.00 (2.00..2.00)" in lines[2]
    assert "memory 25%" in lines[3] and lines[3].endswith("1.00 (1.00..1.00)")
    assert table([]) == "no benchmark has a result"


def test_the_summary_says_what_was_not_done_and_how_long_the_first_step_took() -> None:
    text = summary(recorded())
    assert text.startswith(f"{GPU}, commit aaaa") and "memory 3.00 TB/s, bfloat16 products 700.0 TFLOP/s" in text
    assert "to the first step: gpt2 n_layer=12 B=32 T=1024 compiled, ours-triton: cold 41.0 s, cached 10.2 s" in text
    assert text.endswith("not done: verify: the minutes were used up")


def test_what_is_no_record_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for text, said in (
        ("{", "can't read"),
        ("[]", "has format None"),
        ('{"format": 1}', "has format 1, this reads 2: measure again"),
        ('{"format": 2, "started": "x", "results": []}', "lacks commit, environment"),
    ):
        path.write_text(text)
        with pytest.raises(RecordError, match=said) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_records_are_read_oldest_first_and_a_repeated_contest_counts_once(tmp_path: Path) -> None:
    write_record(tmp_path, started="2030-03-01T00:00:00+00:00", commit="c" * 40)
    write_record(tmp_path, started="2030-02-01T00:00:00+00:00", commit="b" * 40)
    records = stored(tmp_path)
    assert [record.commit_id[0] for record in records] == ["b", "c"]
    first = records[0].results
    again = replace(records[0], results=[*first, replace(first[0], ms_median=1e-9)])
    assert pick(again, "training step") == pick(records[0], "training step")


def test_runs_of_one_commit_are_one_record(tmp_path: Path) -> None:
    whole = make_record()
    steps, rest = ([r for r in whole["results"] if (r["op"] == "training step") is step] for step in (True, False))
    for minute, results in ((1, rest), (2, steps[:1]), (3, steps)):
        run = whole | {"results": results, "started": f"2030-01-01T00:0{minute}:00+00:00"}
        if minute < 3:
            profile = {"step": "plain", "shape": {}, "compiled": True, "table": False, "slots": None, "kernels": []}
            run["step_kernels"] = [profile | {"ms": float(minute)}]
        (tmp_path / "gpu").mkdir(exist_ok=True)
        (tmp_path / "gpu" / f"{minute}.json").write_text(json.dumps(run | ({"ceilings": None} if minute == 3 else {})))
    (record,) = stored(tmp_path)
    assert [result.name for result in record.results] == [line["name"] for line in (*steps, *steps[:1], *rest)]
    assert [found.ms for found in record.step_kernels] == [2.0, 1.0]
    assert record.ceilings == whole["ceilings"] and record.started.startswith("2030-01-01T00:03")


# ------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with nothing measured."""
    root = tmp_path_factory.mktemp("site")
    (root / "fastgpt2").mkdir()
    (root / "docs").mkdir()
    for page, sections in PAGES.items():
        places = "\n".join(f"<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->" for name in sections)
        (root / page).write_text(f"# head\n\n{places}\n\ntail\n")
    assert report.main([], root) == 0
    return root


@pytest.fixture(scope="module")
def measured(site: Path) -> Path:
    """The same after two runs on a GPU and one on a CPU."""
    assert section(site, "status").startswith("**Not measured on a GPU yet.**")
    assert not any(section(site, name) for name in SECTIONS)
    folder = site / "bench" / "results"
    write_record(folder, machine=1.1)
    write_record(folder, commit="b" * 40, started="2030-02-01T00:00:00+00:00", seed=4)
    write_record(folder, device="cpu")
    assert report.main(["--check"], site) == 1
    assert report.main([], site) == 0
    return site


def section(root: Path, name: str) -> str:
    page = (root / next(page for page, sections in PAGES.items() if name in sections)).read_text()
    assert page.startswith("# head\n") and page.endswith("\ntail\n") and "\nold\n" not in page
    found = re.search(f"<!-- bench:{name} -->\n(.*)<!-- /bench:{name} -->", page, re.DOTALL)
    assert found is not None
    return found[1]


def cells(text: str, *words: str) -> list[str]:
    """The cells of the first line of a table with all the words."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|"))
    return next(row for row in rows if set(words) <= set(row))


def test_every_table_says_where_when_and_with_what_it_was_measured(measured: Path) -> None:
    assert section(measured, "status") == "", "a GPU was measured"
    for name in SECTIONS:
        text = section(measured, name)
        commit = "a" if name == "cpu" else "b"
        assert commit * 12 in text and ("2030-01-01" if name == "cpu" else "2030-02-01") in text, name
        assert "2.99.0" in text and ("cpu, 2 threads" if name == "cpu" else GPU) in text, name
        assert "triton 3.99.0" in text and "transformers 9.9.9" in text and "liger" not in text.split("|")[0], name


def test_the_figures_of_the_step_are_the_records(measured: Path) -> None:
    record = load(measured / "bench" / "results" / "synthetic-gpu-80gb" / "2030-02-01-bbbbbbbbbbbb.json")
    steps = {(*work(r)[1:], r.backend): r for r in pick(record, "training step")}
    size = "gpt2 n_layer=12 B=32 T=1024", "bfloat16", "compiled"
    mine, peer = steps[*size, "ours-triton"], steps[*size, "plain"]
    row = cells(section(measured, "step"), " ".join(size), "ours-triton")
    assert row[2:7] == [
        f"{mine.tokens_per_s:,.0f}", f"{mine.mfu['llm.c']:.1%}", f"{mine.mfu['nanogpt']:.1%}",
        f"{mine.ms_median:.1f}", "20.00",
    ]  # fmt: skip
    assert row[7:] == ["plain", str(ratio(mine, peer)), f"{20 / 31:.2f}"]
    assert "llm.c's counts 6 for each parameter" in section(measured, "step").replace("\n", " ")
    assert "nanoGPT's counts 6 for each parameter" in section(measured, "step").replace("\n", " ")
    assert cells(section(measured, "ablation"), "attn by triton")[2].startswith("1.10 (")
    assert cells(section(measured, "ablation"), "the same with --no-deterministic")[2].startswith("1.19 (")
    assert cells(section(measured, "ops"), "optimizer step")[4:6] == ["memory 82%", "none"]
    assert "matmuls-alone" not in section(measured, "ops")
    assert cells(section(measured, "cpu"), "ours-torch")[0] == "gpt2 n_layer=12 B=8 T=1024 float32 compiled"


def test_the_readme_says_what_the_stored_runs_reached(tmp_path: Path) -> None:
    """Two runs of one commit are read as one record that has both."""
    (tmp_path / "pictures").mkdir()
    for name, steps, seconds, loss in (("ten-minutes", 6000, 540.0, 1.625), ("first-run", 600, 54.0, 2.071)):
        run = TrainingRun(
            command="train", losses=[(1, 5.5), (steps, loss)], val_losses=[], loss=loss, unigram=3.24, seconds=seconds,
            sample_command="sample", sample="", screen=[],
        )  # fmt: skip
        record = recorded(device="cpu")
        record.results.clear()
        record.training_runs.append(run)
        record.write(tmp_path / "pictures" / f"{name}.json")
    said = " ".join(runs_summary(stored(tmp_path)).split())
    assert said.startswith("600 steps take 54 s on 2 threads of a CPU and reach 2.07 nats a byte")
    assert "6,000 steps take 9.0 min on 2 threads of a CPU and reach 1.62" in said


def test_what_is_out_of_step_is_named(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"], measured) == 0

    def named(path: str, change: Any) -> None:
        file = measured / path
        before = file.read_bytes() if file.exists() else None
        change(file)
        capsys.readouterr()
        assert report.main(["--check"], measured) == 1
        said = capsys.readouterr().err
        assert said == f"out of step with bench/results: {path}; run python -m bench.report\n"
        file.unlink(missing_ok=True)
        if before is not None:
            file.write_bytes(before)

    named("docs/benchmarks.md", lambda file: file.write_text(file.read_text().replace("20.00", "19.00", 1)))
    named("README.md", lambda file: file.write_text(file.read_text().replace("On 2 threads", "On 3 threads")))
    named("fastgpt2/auto.json", lambda file: file.write_text(file.read_text().replace("triton", "torch")))
    assert report.main(["--check"], measured) == 0


def test_a_page_without_a_place_for_a_section_is_an_error(site: Path) -> None:
    with pytest.raises(RecordError, match="<!-- bench:targets --> and <!-- /bench:targets --> once each"):
        report.fill("docs/benchmarks.md", "# a page\n", [])


def test_the_pages_are_in_step_with_the_stored_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.report", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert not [record for record in stored() if "Synthetic" in record.device]
