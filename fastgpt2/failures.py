"""Why a run of several processes failed: a file for each process, one line for the run.

One process fails first. The others then lose their connections to it, or wait for it until their time is over. These
errors are consequences, and the user wants the cause. So each process that fails leaves a word in the store, and one of
them reads all words and says which process it was. A process without a word was killed, or hangs.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from fastgpt2.console import printable
from fastgpt2.parallel import Ranks, agent_serves

FOLDER = "failures"
"""In --out."""
GRACE_S = 3.0
"""How long to wait for the word of a process. A failing process leaves it before its connections close."""
POLL_S = 0.02
LONGEST_REASON = 300

Kind = Literal["cause", "lost", "waited"]


@dataclass(frozen=True)
class _Word:
    """What a failing process tells the others."""

    kind: Kind
    """Whether it failed by itself, lost the connection to another, or waited too long for one."""
    reason: str
    step: int | None
    waits_in: str | None
    """Its last collective operation."""
    waits_s: float


def explain(error: BaseException, ranks: Ranks, out: Path | None, reason: str | None = None) -> str | None:
    """Record why this process of several fails, and agree with the others on who says what.

    Appends the traceback to OUT/failures/rank-N.txt.

    Args:
        error: what ends this process.
        out: the run's folder; without one no file is written.
        reason: the error in one line; by default its type and the first line of its message.

    Returns:
        A line for the user that names the process that failed first and its reason. In all processes but one, None.
    """
    word = _word(error, ranks, reason)
    written = _write(error, ranks, out, word)
    where = f"; see {printable(written)}" if written else ""
    try:
        ranks.store.set(_key(ranks.rank), json.dumps(asdict(word)))
        words = {ranks.rank: word} if word.kind == "cause" else _collect(ranks)
        if not _speaks(ranks, words):
            return None
        return _line(ranks, words, _steps(ranks)) + where
    except dist.DistError:
        gone = "torchrun" if agent_serves() else "process 0"
        if gone == "process 0" and written is not None and _first_has_written(ranks, written):
            return None
        return f"process {ranks.rank} of {ranks.world} ended: it lost {gone}{_after(word.step)}{where}"


def _word(error: BaseException, ranks: Ranks, reason: str | None) -> _Word:
    kind, (waits_in, waits_s) = _kind(error), _last_collective()
    if reason is None:
        reason = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    return _Word(kind, reason[:LONGEST_REASON], ranks.place.step, waits_in, waits_s)


def _kind(error: BaseException) -> Kind:
    """Tell causes from consequences. gloo has no error of its own: its messages begin with the line in its source."""
    text = str(error)
    if isinstance(error, RuntimeError) and ("Timed out" in text or "timed out" in text or "wait timeout" in text):
        return "waited"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in text):
        return "lost"
    return "cause"


def _last_collective() -> tuple[str | None, float]:
    """The newest collective operation in PyTorch's flight recorder, and how many seconds ago it began.

    The recorder is not a public interface: without it the operation is unknown.
    """
    begun: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        with contextlib.suppress(Exception):
            begun += json.loads(getattr(torch._C._distributed_c10d, name)())["entries"]
    # Only NCCL's are ever marked as completed.
    pending = [entry for entry in begun if entry["state"] != "completed"]
    if not pending:
        return None, 0.0
    newest = max(pending, key=lambda entry: entry["time_created_ns"])
    return str(newest["profiling_name"]).partition(":")[2], time.time() - newest["time_created_ns"] / 1e9


def _write(error: BaseException, ranks: Ranks, out: Path | None, word: _Word) -> Path | None:
    """Append what is known to this process's file. An earlier attempt may have written there. None if it can't be."""
    if out is None:
        return None
    path = out / FOLDER / _name(ranks.rank)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    who = f"process {ranks.rank} of {ranks.world} on {platform.node()}, PID {os.getpid()}"
    waits = f"last collective operation: {word.waits_in}, begun {word.waits_s:.1f} s before\n" if word.waits_in else ""
    text = f"{now} {who}{_after(word.step)}\n{waits}{''.join(traceback.format_exception(error))}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return path


def _collect(ranks: Ranks) -> dict[int, _Word]:
    """The words of all processes, of those that came when one is a cause, or of those that came in time."""
    limit = time.monotonic() + GRACE_S
    words: dict[int, _Word] = {}
    while True:
        for rank in range(ranks.world):
            if rank not in words and ranks.store.check([_key(rank)]):
                words[rank] = _Word(**json.loads(ranks.store.get(_key(rank))))
        caused = any(word.kind == "cause" for word in words.values())
        if caused or len(words) == ranks.world or time.monotonic() > limit:
            return words
        time.sleep(POLL_S)


def _speaks(ranks: Ranks, words: dict[int, _Word]) -> bool:
    """Whether this process speaks for the run: the first that asks. The lowest rank asks first."""
    if ranks.rank != min(words):
        limit = time.monotonic() + GRACE_S / 2
        while time.monotonic() < limit and not ranks.store.check(["speaker"]):
            time.sleep(POLL_S)
    own = str(ranks.rank)
    return ranks.store.compare_set("speaker", "", own).decode() == own


def _first_has_written(ranks: Ranks, own: Path) -> bool:
    """Whether process 0 failed in this attempt by an error, of which it has told, rather than being killed."""
    with contextlib.suppress(OSError):
        # In the file system's time, as its clock may differ from this machine's.
        joined = own.stat().st_mtime - (time.monotonic() - ranks.place.since)
        return own.with_name(_name(0)).stat().st_mtime > joined
    return False


def _name(rank: int) -> str:
    return f"rank-{rank}.txt"


def _steps(ranks: Ranks) -> dict[int, int]:
    """The step that each process was last known to have done."""
    keys = {rank: f"step/{rank}" for rank in range(ranks.world)}
    return {rank: int(ranks.store.get(key)) for rank, key in keys.items() if ranks.store.check([key])}


def _line(ranks: Ranks, words: dict[int, _Word], steps: dict[int, int]) -> str:
    """Who failed first, and why."""
    for rank, word in words.items():
        if word.kind == "cause":
            return f"process {rank} of {ranks.world} ended{_after(word.step)}: {word.reason}"
    silent = [rank for rank in range(ranks.world) if rank not in words]
    waiting = next((word for word in words.values() if word.kind == "waited"), None)
    if not silent:
        where = {rank: f"process {rank} was in {w.waits_in}{_after(w.step)}" for rank, w in words.items()}
        differing = {word.waits_in: where[rank] for rank, word in words.items()}
        return f"the processes lost each other: {', '.join(differing.values())}: {words[min(words)].reason}"
    who = f"process {silent[0]}" if len(silent) == 1 else f"processes {', '.join(map(str, silent))}"
    known = [f"{steps[rank]}" for rank in silent if rank in steps]
    last = f"last heard of at step {', '.join(known)}" if known else "before the first step"
    if waiting is None:
        return f"{who} of {ranks.world} died without a word, {last}"
    wait = f"the others have waited {waiting.waits_s:.0f} s in {waiting.waits_in or 'a collective operation'}"
    verbs = "hangs or is cut off" if len(silent) == 1 else "hang or are cut off"
    return f"{who} of {ranks.world} {verbs}, {last}: {wait}"


def _after(step: int | None) -> str:
    return "" if step is None else f" after step {step}"


def _key(rank: int) -> str:
    return f"failed/{rank}"
