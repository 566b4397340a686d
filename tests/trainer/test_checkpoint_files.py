"""Checkpoints that several processes write, and that another number of them reads, in another mode."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt2 import ConfigError, TrainConfig, checkpoint
from fastgpt2.checkpoint_files import deal
from fastgpt2.durable import OutputError
from fastgpt2.model import GPT
from fastgpt2.parallel import ALONE, Ranks, joined
from fastgpt2.pretrained import load_run
from fastgpt2.settings import Settled, resolve
from fastgpt2.sharding import own_part, spread
from fastgpt2.state import RunState
from fastgpt2.state_json import UNKNOWN
from tests import forked, ranks
from tests.trainer.runs import SUMS, names, seal, step

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = TrainConfig(
    n_layer=1, n_head=1, n_embd=10, block_size=3, vocab_size=40, batch_size=2, optimizer="adamw", weight_decay=0.1,
    lr=1e-2, device="cpu", dtype="float32",
)  # fmt: skip
"""In 4 processes shards are uneven (of 10 rows) and empty (of 3)."""


def begin(mode: str, own: Ranks, seed: int, device: str = "cpu") -> tuple[RunState, nn.Module, Settled]:
    """A state, what its steps call, and its configuration. hsdp shards among two processes."""
    config = resolve(dataclasses.replace(CONFIG, parallel=mode, shard_size=2 if mode == "hsdp" else None), cuda=False)
    torch.manual_seed(seed)
    model = GPT(config.model_config())
    forward = spread(model, config, own, torch.device(device))
    return RunState.begin(model, config), forward, config


def make_step(state: RunState, forward: nn.Module, number: int, rank: int) -> None:
    tokens = torch.arange(8).reshape(2, 4) * (number + 3 * rank + 1) % 40
    tokens = tokens.to(state.device)
    state.zero_grad()
    state.backward(forward(tokens[:, :-1], tokens[:, 1:]))
    state.update()


def own_tensors(state: RunState) -> dict[str, Tensor]:
    """This process's part of each tensor."""
    parts = state.state_dict()
    return {f"{part} {name}": own_part(t) for part in ("model", "optimizer") for name, t in parts[part].items()}


def load_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def on_disk(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by safetensors alone."""
    files = sorted(folder.glob("*.safetensors"))
    return {
        f"{path.name.split('.')[0].split('-')[0]} {name}": tensor
        for path in files
        for name, tensor in load_file(path).items()
    }


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# ------------------------------------------------------------------------------------------------- resumed elsewhere


def pass_on(mode: str, source: Path | None, out: Path, device: str = "cpu") -> tuple[list[str], list[str]]:
    """Restore a checkpoint, or make two steps, and save. Then resume from that: the next step must be the same.

    Returns the tensors that differ after the resume, and after the step.
    """
    with joined(device, 60) as own:
        state, forward, config = begin(mode, own, seed=own.world, device=device)
        if source is None:
            for number in range(2):
                make_step(state, forward, number, own.rank)
        else:
            assert checkpoint.restore(source, state) == 2
        saved = checkpoint.save(out, 2, config, state, UNKNOWN, own)
        resumed, forward_of_resumed, _ = begin(mode, own, seed=99, device=device)
        assert checkpoint.restore(saved, resumed) == 2
        before = differing(own_tensors(state), own_tensors(resumed))
        make_step(state, forward, 2, own.rank)
        make_step(resumed, forward_of_resumed, 2, own.rank)
        return before, differing(own_tensors(state), own_tensors(resumed))


def check_chain(folder: Path, links: list[tuple[int, str]], device: str = "cpu") -> None:
    """Each link resumes from the one before it. All must save the same bits."""
    source, first = None, {}
    for number, (world, mode) in enumerate(links):
        out = folder / f"{number}-{world}-{mode}"
        for found in ranks.call(world, f"{__name__}:pass_on", mode, source, out, device):
            assert found == ([], []), (world, mode)
        source = step(out, 2)
        tensors = on_disk(source)
        first = first or tensors
        assert differing(first, tensors) == [], (world, mode)


def test_any_number_of_processes_resumes_in_any_mode(tmp_path: Path) -> None:
    check_chain(tmp_path, [(2, "ddp"), (4, "fsdp"), (1, "ddp"), (4, "hsdp")])


@pytest.mark.gpu
def test_two_gpus_pass_a_checkpoint_on(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check_chain(tmp_path, [(2, "fsdp"), (1, "ddp"), (2, "ddp"), (2, "fsdp")], "cuda")


# ------------------------------------------------------------------------------------------------- several files

WRITERS = 3


def save_twice(out: Path) -> None:
    """Save after 2 steps and after 3."""
    with joined("cpu", 60) as own:
        state, forward, config = begin("ddp", own, seed=1)
        for number in range(3):
            make_step(state, forward, number, own.rank)
            if number:
                checkpoint.save(out, number + 1, config, state, UNKNOWN, own)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 3, each written by 3 processes."""
    out = tmp_path_factory.mktemp("several") / "run"
    ranks.call(WRITERS, f"{__name__}:save_twice", out)
    return out


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "run"))


FILES = [f"{part}-{n:05d}-of-00003.safetensors" for part in ("model", "optimizer") for n in (1, 2, 3)] + ["state.json"]


def test_each_process_writes_its_share(out: Path) -> None:
    assert sorted(path.name for path in step(out, 3).iterdir()) == sorted([*FILES, SUMS])
    sizes = {name: tensor.nbytes for name, tensor in on_disk(step(out, 3)).items()}
    for rank in range(WRITERS):
        own = sum(t.nbytes for path in step(out, 3).glob(f"*-0000{rank + 1}-of-*") for t in load_file(path).values())
        assert own <= sum(sizes.values()) / WRITERS + max(sizes.values())


def test_a_tensor_goes_to_the_writer_with_the_fewest_bytes() -> None:
    assert deal([4, 9, 4, 4, 1, 1], 2) == [1, 0, 1, 1, 0, 0]
    assert deal([1, 2], 4) == [1, 0] and deal([], 2) == []
    for writers in range(1, 9):
        sizes = [(7 * n) % 13 + 1 for n in range(30)]
        loads = [
            sum(size for size, w in zip(sizes, deal(sizes, writers), strict=True) if w == n) for n in range(writers)
        ]
        assert max(loads) - min(loads) <= max(sizes)


def test_the_sums_of_all_files_are_those_that_sha256sum_reads(out: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("needs sha256sum")
    done = subprocess.run([program, "-c", SUMS], cwd=step(out, 3), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == [f"{name}: OK" for name in FILES]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_or_a_missing_file_is_damage(out: Path, name: str) -> None:
    path = step(out, 3) / name
    intact = path.read_bytes()
    assert checkpoint.damage(step(out, 3)) is None
    for place in (0, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        assert checkpoint.damage(step(out, 3)) == f"{path} is damaged: its SHA-256 is not the one in SHA256SUMS"
    path.unlink()
    problem = f"can't read {path}: No such file or directory"
    assert checkpoint.damage(step(out, 3)) == problem
    if name.startswith("model"):
        with pytest.raises(ConfigError, match=f"{problem}; .*step-00000002 is intact: use that one"):
            load_run(out, torch.device("cpu"))
    assert checkpoint.to_resume(out) == (step(out, 2), [f"{problem}; set aside as damaged-step-00000003"])


def test_a_model_in_several_files_is_loaded_whole(out: Path) -> None:
    model, state = load_run(out, torch.device("cpu"))
    weights = {f"model {name}": weight for name, weight in model.state_dict().items()}
    saved = {name: tensor for name, tensor in on_disk(step(out, 3)).items() if name in weights}
    assert state["step"] == 3 and differing(weights, saved) == []
    assert checkpoint.find(step(out, 3)) == step(out, 3)


def rewrite(path: Path, **changes: Tensor) -> None:
    from safetensors.torch import save_file

    save_file(load_file(path) | changes, path)
    seal(path.parent)


def test_tensors_that_lie_are_one_line_with_the_file_that_holds_them(out: Path) -> None:
    """Only the sums are right."""

    def refusal() -> str:
        state, _, _ = begin("ddp", ALONE, seed=1)
        with pytest.raises(ConfigError) as error:
            checkpoint.restore(step(out, 3), state)
        return str(error.value)

    files = {name: path for path in step(out, 3).glob("*.safetensors") for name in load_file(path)}
    held, other = files["wte.weight/exp_avg"], step(out, 3) / FILES[3]
    assert held != other
    weight = load_file(held)["wte.weight/exp_avg"]
    rewrite(held, **{"wte.weight/exp_avg": weight / 0})
    assert f"{held}: wte.weight/exp_avg is not finite because the run diverged; move " in refusal()
    rewrite(held, **{"wte.weight/exp_avg": weight[:, 1:].contiguous()})
    assert (
        f"{held.with_name(FILES[3])} and 2 more don't fit: wte.weight/exp_avg is [128, 9], not [128, 10]" in refusal()
    )
    rewrite(held, **{"wte.weight/exp_avg": weight})
    rewrite(other, **{"wte.weight/exp_avg": weight})
    assert refusal() == f"{max(held, other)} holds wte.weight/exp_avg, which {min(held, other).name} holds too"


# ------------------------------------------------------------------------------------------------- interrupted


def save_without_room(out: Path, victim: int) -> list[str]:
    """Save while one process can't write more than 2000 bytes to a file, then with room.

    Returns the error of the first save and what it left in the folder.
    """
    with joined("cpu", 60) as own:
        state, forward, config = begin("ddp", own, seed=1)
        make_step(state, forward, 0, own.rank)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if own.rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OutputError) as error:
            checkpoint.save(out, 4, config, state, UNKNOWN, own)
        own.barrier()  # process 0 cleans up
        (left, *others) = own.gather(names(out))
        assert others == [left]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoint.save(out, 5, config, state, UNKNOWN, own)
    return [str(error.value), *left]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_is_full_for_one_process_fails_the_save_in_all(out: Path, victim: int) -> None:
    each = ranks.call(2, f"{__name__}:save_without_room", out, victim)
    failed = f"can't save the checkpoint of step 4 in {out / 'checkpoints'}: process {victim} of 2: "
    for message, *left in each:
        assert message.startswith(failed) and "File too large" in message
        assert message.endswith(f"; the last good one is {step(out, 3)}")
        assert left == ["step-00000002", "step-00000003"]
    assert checkpoint.to_resume(out) == (step(out, 5), [])


def save_and_die(out: Path, victim: int, event: str, name: str) -> None:
    """Save, and end the victim by SIGKILL just before it does something to a file or folder of that name."""

    def hook(happens: str, arguments: tuple[Any, ...]) -> None:
        if happens == event and Path(str(arguments[0])).name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    with joined("cpu", 60) as own:
        state, _, config = begin("ddp", own, seed=1)
        if own.rank == victim:
            sys.addaudithook(hook)
        checkpoint.save(out, 4, config, state, UNKNOWN, own)


WRITING = ".writing-step-00000004"


@pytest.mark.parametrize(
    ("victim", "event", "name"),
    [
        (0, "os.mkdir", WRITING),
        (0, "open", "optimizer-00001-of-00002.safetensors"),
        (0, "open", SUMS),
        (0, "os.rename", WRITING),
        (0, "open", "checkpoints"),  # synced after the rename
        (1, "open", "model-00002-of-00002.safetensors"),
        (1, "os.chmod", "optimizer-00002-of-00002.safetensors"),
    ],
)
def test_killed_while_several_processes_save_a_run_can_be_resumed(
    out: Path, victim: int, event: str, name: str
) -> None:
    code = f"from pathlib import Path, PosixPath; from {__name__} import save_and_die; "
    ended = forked.run_ranks(2, "-c", f"{code}save_and_die{(out, victim, event, name)}", cwd=forked.ROOT)
    assert ended[victim].returncode == -signal.SIGKILL, ended[victim].stderr
    assert ended[1 - victim].returncode == 1, "the other process goes on"
    renamed = name == "checkpoints"
    assert (WRITING in names(out)) == (event != "os.mkdir" and not renamed)
    assert checkpoint.to_resume(out) == (step(out, 4 if renamed else 3), [])
    assert names(out) == ["step-00000002", "step-00000003", *(["step-00000004"] if renamed else [])]
