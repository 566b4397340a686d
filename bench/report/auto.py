"""What a slot left at `auto` becomes on a GPU where the compiled step was measured: fastgpt2/auto.json.

The ablation times the compiled step in PyTorch's forms and with one slot's implementation changed, all in turn. An
implementation stands in the table, the fastest first, where the step with it is faster than with what `auto` is
without a table, beyond the spread over the rounds (the 20th percentile of the ratio is over 1), in every contest of
that precision. One that the smoke of that day found wrong never stands there, nor does a form that is not the slot's
usual one (smoke.OTHERS) unless that smoke found it right. `python -m bench.report` writes it;
fastgpt2.ops reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from typing import Any

from bench.record import Record
from bench.report.results import Ratio, newest, pick, ratio, work
from bench.result import Result
from bench.smoke import FORMS, OTHERS
from bench.timing import ROOT
from fastgpt2.slots import AUTO, SLOTS

PATH = ROOT / "fastgpt2" / "auto.json"
PLAIN = "ours-torch"
"""Our step in PyTorch's forms, by its backend's name; "ours-mlp-triton" is that with one slot changed, and so on."""
PLAIN_ANY_ORDER = "ours-torch-any-order"
"""The same, where PyTorch may add in any order, and SDPA take cuDNN: what an implementation is held against that
can't run under deterministic algorithms."""
ALL = "ours-triton"
"""With every slot by our kernels."""
ANY_ORDER = "ours-triton-any-order"
"""ALL where PyTorch may add in any order."""
CANDIDATES = {slot: AUTO[slot] if slot == "loss" else tuple(table) for slot, table in SLOTS.items()}
"""What `auto` may become. Of the losses those that never hold all logits, whatever the time: it is for the memory."""


def ablations(record: Record) -> list[dict[str, Result]]:
    """The record's contests of compiled steps where one slot was changed, with the plain step: {backend: result}."""
    contests: dict[Any, dict[str, Result]] = {}
    for result in pick(record, "training step"):
        if result.compiled:
            contests.setdefault((result.contest, work(result)), {})[result.backend] = result
    return [found for found in contests.values() if PLAIN in found and any(changed(slot, found) for slot in SLOTS)]


def changed(slot: str, contest: dict[str, Result]) -> dict[str, Result]:
    """By implementation: the steps with this slot changed alone."""
    return {name: contest[f"ours-{slot}-{name}"] for name in SLOTS[slot] if f"ours-{slot}-{name}" in contest}


def not_right(record: Record) -> set[tuple[str, str]]:
    """(slot, implementation) of what the smoke compared with float64 and didn't find right; of OTHERS also what it
    didn't compare."""
    right = {FORMS[found.slot] for found in record.smokes if found.status == "ok"}
    wrong = {FORMS[found.slot] for found in record.smokes if found.status not in ("ok", "skipped")}
    return wrong | (set(OTHERS.values()) - right)


def best(
    slot: str, contests: Iterable[dict[str, Result]], wrong: Collection[tuple[str, str]] = ()
) -> tuple[list[str], dict[str, str]]:
    """The implementations that beat `auto` without a table in every contest, fastest first; all ratios in words.

    wrong: never among them.
    """
    ratios: dict[str, list[Ratio]] = {}
    for contest in contests:
        steps = changed(slot, contest)
        for name in CANDIDATES[slot]:
            before = _before(slot, contest, steps[name]) if name in steps else None
            if before is not None and steps[name] is not before:
                ratios.setdefault(name, []).append(ratio(steps[name], before))
    speed = {name: math.prod(r.median for r in found) ** (1 / len(found)) for name, found in ratios.items()}
    faster = [name for name, found in ratios.items() if all(r.p20 is not None and r.p20 > 1.0 for r in found)]
    won = [name for name in faster if (slot, name) not in wrong]
    words = {name: ", ".join(str(r) for r in found) for name, found in ratios.items()}
    return sorted(won, key=lambda name: -speed[name]), words


def _before(slot: str, contest: dict[str, Result], step: Result) -> Result | None:
    """The step with what `auto` is without a table, under the same request for determinism; None: it wasn't timed."""
    plain = contest.get(PLAIN if step.deterministic is not False else PLAIN_ANY_ORDER)
    without_table = AUTO[slot][0]
    if plain is None or (plain.slots or {}).get(slot) == without_table:
        return plain
    return changed(slot, contest).get(without_table)


def table(records: Iterable[Record]) -> dict[str, Any]:
    """fastgpt2/auto.json: {"devices": {name: {precision: {"slots", "measured"}}}}, from the newest record of each."""
    devices: dict[str, Any] = {}
    for device, record in newest((record for record in records if record.on_gpu), ablations).items():
        contests = ablations(record)
        for precision in sorted({contest[PLAIN].dtype for contest in contests}):
            chosen = [contest for contest in contests if contest[PLAIN].dtype == precision]
            found = {slot: best(slot, chosen, not_right(record)) for slot in SLOTS}
            devices.setdefault(device, {})[precision] = {
                "slots": {slot: won for slot, (won, _) in found.items() if won},
                "measured": {
                    "commit": record.commit_id,
                    "date": record.date,
                    "versions": record.versions,
                    "steps": [" ".join(work(contest[PLAIN])) for contest in chosen],
                    "speed over auto without a table": {slot: words for slot, (_, words) in found.items() if words},
                },
            }
    return {"devices": dict(sorted(devices.items()))}


def as_text(records: Iterable[Record]) -> str:
    """The file's text."""
    return json.dumps(table(records), indent=1) + "\n"
