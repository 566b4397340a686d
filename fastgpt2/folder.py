"""A run's --out folder: create it, lock it against other processes, and find what to resume from."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fastgpt2 import checkpoint, record
from fastgpt2.batch import resumed
from fastgpt2.config import ConfigError, TrainConfig
from fastgpt2.durable import LOCK_NAME, InUseError, locked
from fastgpt2.parallel import Ranks
from fastgpt2.program import world_size
from fastgpt2.renamed import with_current_names
from fastgpt2.settings import Settled
from fastgpt2.toml import UnreadableError, check_settings, load_toml

_SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
_SETTLED = (*_SHAPE, "vocab_size", "end_of_text", "batch_size", "global_batch", "steps", "dtype", "recompute")
"""What a run settles for itself and is resumed with on any machine."""


@contextlib.contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """Create a folder named by the time for a run without --out; remove it if it stays empty.

    Raises:
        ConfigError: it can't be made.
    """
    name = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    made = not os.path.lexists(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _make_first(parent / name)
    except OSError as error:
        raise ConfigError(f"can't make a folder in {parent}: {error.strerror}; give --out") from None
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # a folder that isn't empty stays
            folder.rmdir()
            if made:
                parent.rmdir()


def _make_first(path: Path) -> Path:
    """Create the first of path, path-2, path-3 ... that doesn't exist; two processes never get the same one."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def settings_of_run(out: Path) -> tuple[str, dict[str, Any], str]:
    """Find a run's settings: their source, the settings, and a warning for the user. All are empty if there is no run.

    The source is config.toml. If that is lost or truncated, it is the newest checkpoint or the record of the last
    start, which have every setting too.

    Raises:
        ConfigError: config.toml is unusable and no other source has the settings.
    """
    path = out / "config.toml"
    try:
        settings = check_settings(load_toml(path, str(path)), str(path))
        if not settings:
            raise UnreadableError(f"{path} was cut short: it is empty")
        return str(path), settings, ""
    except UnreadableError as error:
        saved = checkpoint.saved_config(out)
        where = f"the newest checkpoint of {out}"
        if saved is None:
            saved, where = record.last_config(out), str(out / record.NAME)
        if saved is None:
            if os.path.exists(path):
                raise
            return "", {}, ""
        saved = with_current_names(saved)
        known = {f.name for f in dataclasses.fields(TrainConfig)} - {"out", "resume"}
        settings = check_settings({k: v for k, v in saved.items() if k in known and v is not None}, where)
        return where, settings, f"{error}; taking the settings from {where}"


def as_saved(config: TrainConfig) -> TrainConfig:
    """Fill the fields left at None in a configuration that resumes a run with that run's values.

    A different model name keeps its own shape, and the checkpoint is then refused.

    Raises:
        ConfigError: there is no checkpoint and config.toml is unusable.
    """
    if config.out is None or not config.resume:
        return config
    saved = checkpoint.saved_config(config.out)
    if saved is None:
        _, saved, _ = settings_of_run(config.out)
    other_model = config.model is not None and config.model != saved.get("model")
    names = [name for name in _SETTLED if getattr(config, name) is None and not (other_model and name in _SHAPE)]
    asked = {f.name: value for f in dataclasses.fields(config) if (value := getattr(config, f.name)) is not None}
    saved = saved_for(asked, saved)
    settled: dict[str, Any] = {name: saved.get(name) for name in names}
    return dataclasses.replace(config, **settled)


def saved_for(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings that apply when it resumes with those asked for, on as many processes as there are now."""
    settings = resumed(saved, asked, world_size())
    if asked.get("compile") is False and settings.get("recompute") == "elementwise":  # only torch.compile can
        del settings["recompute"]
    return settings


@dataclass(frozen=True)
class Claim:
    """A locked run folder."""

    latest: Path | None
    """The checkpoint to resume from."""
    notes: list[str]
    """What the user should know."""


def claim(config: Settled, held: contextlib.ExitStack) -> Claim:
    """Create --out, lock it until `held` is closed, and find the checkpoint to resume from.

    Raises:
        ConfigError: it can't be written, is in use, already holds a run, or holds none to resume.
    """
    out = config.out
    assert out is not None
    try:
        # Before creating anything: the name may be a typo.
        if config.resume is True and not _holds_run(out):
            raise ConfigError(
                f"no checkpoint under {out}, nor a config.toml: no run began there that --resume could continue"
            )
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".can-write"
        probe.touch()
        probe.unlink()
        notes = []
        if not held.enter_context(locked(out)):
            notes.append(f"the file system of {out} has no locks: nothing keeps a second run out of this folder")
        return _continue(config, out, notes) if config.resume else _begin(out, notes)
    except InUseError as error:
        raise ConfigError(f"--out {out} is in use by another run ({error.holder})") from None
    except ConfigError:
        raise
    except FileExistsError:
        what = "a link that leads nowhere" if out.is_symlink() else "a file"
        raise ConfigError(f"can't write to --out {out}: it is {what}; give a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ConfigError(f"can't write to --out {out}: {getattr(error, 'strerror', None) or error}") from None


def check_shared(out: Path, ranks: Ranks) -> None:
    """Check that each process sees the folder that rank 0 has claimed.

    Raises:
        ConfigError: one doesn't, so machines have a folder each.
    """

    def look() -> None:
        if not (out / LOCK_NAME).exists():
            raise ConfigError(f"--out {out} is not here: give a folder on a file system that all machines share")

    if ranks.world > 1:
        ranks.together(look)


def _holds_run(out: Path) -> bool:
    return bool(checkpoint.checkpoints(out)) or (out / "config.toml").exists() or _has_records(out)


def _has_records(out: Path) -> bool:
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def _begin(out: Path, notes: list[str]) -> Claim:
    """Refuse a folder in which a new run would overwrite something."""
    if checkpoint.checkpoints(out):
        raise ConfigError(f"--out {out} already holds a run: continue it with --resume, or choose another folder")
    if _has_records(out):
        raise ConfigError(
            f"--out {out} already holds a run: continue it with --resume, from its beginning since it has no "
            f"checkpoint, or choose another folder"
        )
    return Claim(None, notes)


def _continue(config: Settled, out: Path, notes: list[str]) -> Claim:
    if checkpoint.checkpoints(out):
        latest, found = checkpoint.to_resume(out)
        return Claim(latest, notes + found)
    if not _holds_run(out):  # --resume auto
        return Claim(None, notes)
    if not config.save_every and config.resume is True:
        raise ConfigError(
            f"--out {out} holds a run that saves no checkpoints (--save-every 0), so there is nothing to resume: "
            f"give --save-every to start it again with checkpoints, or choose another folder"
        )
    kept = ""
    if _has_records(out):
        place = next(p for n in itertools.count(1) if not os.path.lexists(p := out / f"metrics-{n}.jsonl"))
        (out / "metrics.jsonl").rename(place)
        kept = f"; its records so far are kept as {place.name}"
    notes.append(f"the run in {out} has no checkpoint: starting from its beginning{kept}")
    return Claim(None, notes)
