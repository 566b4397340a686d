"""Flash attention's backward for Hopper, played on the CPU as its forward is (played_gluon.py)."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.kernels import (
    attention_device,
    attention_hopper,
    attention_hopper_backward,
    attention_hopper_dkdv,
    attention_hopper_dq,
)
from fastgpt2.kernels.attention import attention_reference
from fastgpt2.kernels.tuning import LaunchConfig
from tests.kernels.played_gluon import Descriptor, Pointer, play

ROWS, CONSUMERS = 4, 2
SHARED = {"place_program": attention_device.place} | {
    name: getattr(attention_hopper, name)
    for name in ("turn", "matrix", "make_tiles", "make_barriers", "store_gradient", "store_column_sums")
}
MODULES = {"dq": attention_hopper_dq, "dkdv": attention_hopper_dkdv}
VALUES = {"ROWS": ROWS, "CONSUMERS": CONSUMERS, "CONSUMER_REGISTERS": 0, "PRODUCER_REGISTERS": 0, "L2_BYTES": 2**10,
          "LOG2_E": math.log2(math.e)}  # fmt: skip


def run(
    name: str,
    qkv: Tensor,
    tensors: dict[str, Tensor],
    stages: int,
    seed: int,
    change: tuple[str, str, str] | None,
) -> None:
    """One of the two kernels, in tiles of 8 of its own rows and 4 of the others."""
    B, T, _, H, D = qkv.shape
    planted = change[1:] if change and change[0] == name else None
    machine, names = play(MODULES[name], SHARED, VALUES, seed, planted)
    kernel = names[f"attention_backward_{name}_hopper_kernel"]
    columns = 1 << (D - 1).bit_length()
    taken = inspect.signature(kernel).parameters
    arguments: dict[str, Any] = {"T": T, "H": H, "scale": D**-0.5, "D": D, "num_stages": stages}
    for key, x in tensors.items():
        if f"{key}_descriptor" in taken:
            arguments[f"{key}_descriptor"] = Descriptor(x, [1, ROWS, 1, columns] if x.dim() == 4 else [1, ROWS])
        elif f"{key}_ptr" in taken:
            arguments[f"{key}_ptr"] = Pointer(x)
    arguments |= {"BLOCK_M": ROWS, "BLOCK_N": ROWS, "BLOCK_M" if name == "dq" else "BLOCK_N": ROWS * CONSUMERS}
    machine.programs = B * H * -(-T // (ROWS * CONSUMERS))
    for program in range(machine.programs):
        machine.program = program
        assert not list(kernel(**arguments)), "a pause outside the roles"


def backward(
    qkv: Tensor,
    do: Tensor,
    stages: int,
    seed: int,
    change: tuple[str, str, str] | None = None,
) -> tuple[Tensor, Tensor]:
    """dqkv (B, T, 3, H, D) and its sum over B and T by the played kernels. change: the kernel, then as for `play`."""
    B, T, _, H, D = qkv.shape
    q, k, v = qkv.unbind(2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    lse = F.pad(scores.logsumexp(-1) * math.log2(math.e), (0, -T % 4)).view(B * H, -1)
    tiles = -(-T // ROWS)
    # Each with a number past its end that must stay as it is.
    sizes = {"dqkv": qkv.numel(), "delta": lse.numel(), "sums": tiles * qkv[:, 0].numel()}
    written = {name: torch.full((size + 1,), math.nan, dtype=torch.float64) for name, size in sizes.items()}
    written["sums"][:-1] = 0.0
    tensors = {"q": q, "k": k, "v": v, "do": do, "o": attention_reference(q, k, v), "lse": lse, **written}
    run("dq", qkv, tensors, stages, seed, change)
    run("dkdv", qkv, tensors | {"delta": written["delta"][:-1].view_as(lse)}, stages, seed, change)
    assert all(x[-1].isnan() for x in written.values()), "written past the end"
    return written["dqkv"][:-1].view(qkv.shape), written["sums"][:-1].view(tiles * B, 3, H, D).sum(0)


def assert_right(qkv: Tensor, stages: int, seed: int, change: tuple[str, str, str] | None = None) -> None:
    do = draw(*qkv.shape[:2], *qkv.shape[3:], seed=1)[:, :, 0]
    dqkv, sums = backward(qkv, do, stages, seed, change)
    x = qkv.clone().requires_grad_()
    attention_reference(*x.unbind(2)).backward(do)
    torch.testing.assert_close(dqkv, x.grad, rtol=1e-11, atol=1e-11)
    expected = x.grad.sum((0, 1))
    expected[1] = 0.0
    torch.testing.assert_close(sums, expected, rtol=1e-11, atol=1e-11)


def draw(B: int, T: int, H: int, D: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, 3, H, D, dtype=torch.float64, generator=generator) * 2


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("T", "D"), [(1, 4), (4, 5), (5, 8), (16, 3), (29, 5)])
def test_roles_in_any_order_are_right(T: int, D: int, stages: int) -> None:
    for seed in range(2):
        assert_right(draw(2, T, 2, D), stages, seed)


BOTH = {
    "the producer waits for the wrong parity": ("empty.index(slot), parity ^ 1", "empty.index(slot), parity"),
    "a tile is overwritten unasked": ("        mbarrier.wait(empty.index(slot), parity ^ 1)\n", ""),
    "the first tile is read unasked": ("    mbarrier.wait(full.index(0), 0)\n", ""),
    "a tile is read unasked": ("mbarrier.wait(full.index(following), parity)", "pass"),
    "the program's own tiles are read unasked": ("    mbarrier.wait(own_full.index(0), 0)\n", ""),
    "a tile is never given back": ("        mbarrier.arrive(empty.index(slot))\n", ""),
    "one consumer gives tiles back for both": ("make_barriers(num_stages, CONSUMERS)", "make_barriers(num_stages, 1)"),
    "the other consumer's rows": ("    start = start + ROWS * CONSUMER\n", ""),
}
TOO_SOON = ("    ds = (p", "    mbarrier.arrive(empty.index(slot))\n    ds = (p")
FAULTS = {
    "dq": BOTH | {
        "a tile is given back too soon": TOO_SOON,
        "dP is used in flight": ("wait(1, deps=(dp,))", "wait(2, deps=(dp,))"),
        "a third of its own bytes is expected": ("3 * CONSUMERS * q_descriptor", "CONSUMERS * q_descriptor"),
        "half of a tile's bytes are expected": ("2 * k_descriptor", "k_descriptor"),
        "a token doesn't see itself": ("query[:, None] >= key[None, :]", "query[:, None] > key[None, :]"),
        "both consumers see two diagonals": ("start // ROWS + CONSUMER + 1", "start // ROWS + 2"),
        "v's tiles in another order": ("v_descriptor, [b, i * ROWS", "v_descriptor, [b, (steps - 1 - i) * ROWS"),
        "delta is left out": ("dp - delta[:, None]", "dp"),
        "delta is not stored": ("    gl.store(delta_ptr + row + query, delta, mask=query < length)\n", ""),
        "delta is stored past its end": ("delta, mask=query < length", "delta, mask=query < length + ROWS"),
        "dq is not scaled": ("    dq *= scale\n", ""),
        "its sums are v's": ("store_column_sums(sums_ptr, 0", "store_column_sums(sums_ptr, 2"),
    },
    "dkdv": BOTH | {
        "a tile is given back too soon": TOO_SOON,
        "dP is used in flight": ("wait(2, deps=(dp,))", "wait(3, deps=(dp,))"),
        "dv is used in flight": ("wait(0, deps=(dk, dv))", "wait(2, deps=(dk, dv))"),
        "half of its own bytes are expected": ("2 * CONSUMERS * k_descriptor", "CONSUMERS * k_descriptor"),
        "the rows' bytes are not expected": (" + lse_descriptor.block_type.nbytes", ""),
        "a token doesn't see itself": ("query[None, :] >= key[:, None]", "query[None, :] > key[:, None]"),
        "tiles from the first on": ("start + (steps - 1 - i) * ROWS", "start + i * ROWS"),
        "both consumers see two diagonals": ("gl.maximum(steps - CONSUMER, 1)", "steps"),
        "another head's lse": ("lse_descriptor, [b * H + h", "lse_descriptor, [h"),
        "delta is left out": ("dp - delta_tiles.index(slot).load(SCORES)", "dp"),
        "dk is not scaled": ("dk * scale", "dk"),
        "its sums are k's": ("store_column_sums(sums_ptr, 2", "store_column_sums(sums_ptr, 1"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "fault"), [(kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]])
def test_a_fault_is_found(kernel: str, fault: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(6):
            assert_right(draw(2, 27, 1, 5), 2, seed, (kernel, *FAULTS[kernel][fault]))


@pytest.mark.parametrize("kernel", MODULES)
def test_one_slot_would_be_a_deadlock(kernel: str) -> None:
    """A consumer waits for the next tile before it gives the last one back."""
    x = draw(1, 16, 1, 4)
    do = x[:, :, 0]
    rows = torch.zeros(1, 16, dtype=torch.float64)
    tensors = {"q": do, "k": do, "v": do, "do": do, "o": do, "lse": rows, "delta": rows, "dqkv": x, "sums": x.clone()}
    with pytest.raises(AssertionError, match="num_stages"):
        run(kernel, x, tensors, 1, 0, None)
    with pytest.raises(AssertionError, match="a deadlock"):
        run(kernel, x, tensors, 1, 0, (kernel, "num_stages >= 2", "num_stages >= 1"))


class Played:
    """A kernel that a launcher starts: played in the tiles that it is compiled for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        machine, names = play(MODULES[self.name], SHARED, VALUES | {"ROWS": 64, "L2_BYTES": 2**24}, seed=0)
        kernel = names[f"attention_backward_{self.name}_hopper_kernel"]
        (machine.programs,) = grid

        def launch(*arguments: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
            given = [self.given(x) for x in arguments]
            for program in range(machine.programs):
                machine.program = program
                assert not list(kernel(*given, **constants)), "a pause outside the roles"

        return launch

    def given(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return Pointer(x)
        return Descriptor(x.base, x.block_shape) if hasattr(x, "block_shape") else x


def test_the_operator_launches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, with rows of lse and delta that copies can't take as they are."""
    for name in MODULES:
        monkeypatch.setattr(attention_hopper_backward, f"attention_backward_{name}_hopper_kernel", Played(name))
    tiles = {"attention_backward_dq_hopper": (128, 64), "attention_backward_dkdv_hopper": (64, 128)}
    monkeypatch.setattr(
        attention_hopper_backward, "lookup", lambda op, *_: LaunchConfig(*tiles[op], num_warps=4, num_stages=2)
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 130, 2, 64, generator=generator).bfloat16() for _ in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o = attention_reference(*exact)
    expected = torch.stack(torch.autograd.grad(o, exact, do.double()), 2)
    scores = torch.einsum("bthd,bshd->bhts", *exact[:2]).detach() / 8
    scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    lse = (scores.logsumexp(-1) * math.log2(math.e)).float()
    options = (True, 0.125, False, None, None, 0.0, True, True)
    dqkv, sums = torch.ops.fastgpt2.attention_backward(do, q, k, v, o.detach().bfloat16(), lse, *options)
    assert dqkv.dtype == torch.bfloat16 and sums.dtype == torch.float32
    assert (dqkv - expected).norm() < 5e-3 * expected.norm()
    expected[:, :, 1] = 0.0
    assert (sums.view(3, 2, 64) - expected.sum((0, 1))).norm() < 5e-3 * expected.sum((0, 1)).norm()
