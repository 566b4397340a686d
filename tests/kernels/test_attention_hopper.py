"""Flash attention's forward for Hopper, and on a GPU its backward, too. Without a GPU its source is played
(played_gluon.py): values against float64, with warp roles, copies and products interleaved at random.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.kernels import attention_device, attention_hopper, flash_attention_qkv, launch
from fastgpt2.kernels.attention import HOPPER_HEAD_DIMS, attention_reference, hopper_why_unsupported
from tests.kernels.cases.attention import ORACLE, inputs, packed
from tests.kernels.oracle import DEVICE, Results, assert_equal
from tests.kernels.played_gluon import Descriptor, Pointer, play

ROWS, CONSUMERS = 4, 2
SHARED = {"place_program": attention_device.place, "update_softmax": attention_device.update_softmax}
VALUES = {"ROWS": ROWS, "CONSUMERS": CONSUMERS, "CONSUMER_REGISTERS": 0, "PRODUCER_REGISTERS": 0, "L2_BYTES": 2**10,
          "LOG2_E": math.log2(math.e)}  # fmt: skip


def forward(
    qkv: Tensor,
    stages: int,
    seed: int,
    change: tuple[str, str] | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse of qkv (B, T, 3, H, D) by the played kernel, in tiles of 8 queries and 8 keys."""
    B, T, _, H, D = qkv.shape
    machine, names = play(attention_hopper, SHARED, VALUES, seed, change)
    q, k, v = qkv.unbind(2)
    columns = 1 << (D - 1).bit_length()
    o, lse = (torch.full((math.prod(shape) + 1,), math.nan, dtype=torch.float64) for shape in ((B, T, H, D), (B, H, T)))
    rows = ROWS * CONSUMERS
    machine.programs = B * H * -(-T // rows)
    for program in range(machine.programs):
        machine.program = program
        run = names["attention_forward_hopper_kernel"](
            Descriptor(q, [1, ROWS, 1, columns]),
            Descriptor(k, [1, rows, 1, columns]),
            Descriptor(v, [1, rows, 1, columns]),
            Pointer(o),
            Pointer(lse),
            T,
            H,
            D**-0.5,
            D=D,
            BLOCK_M=rows,
            BLOCK_N=rows,
            num_stages=stages,
        )
        assert not list(run), "a pause outside the roles"
    assert o[-1].isnan() and lse[-1].isnan(), "written past the end"
    return o[:-1].view(B, T, H, D), lse[:-1].view(B, H, T)


def assert_right(qkv: Tensor, stages: int, seed: int, change: tuple[str, str] | None = None) -> None:
    o, lse = forward(qkv, stages, seed, change)
    q, k, v = qkv.unbind(2)
    torch.testing.assert_close(o, attention_reference(q, k, v), rtol=1e-12, atol=1e-12)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * qkv.size(-1) ** -0.5
    scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1) * math.log2(math.e), rtol=1e-12, atol=1e-12)


def draw(B: int, T: int, H: int, D: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, 3, H, D, dtype=torch.float64, generator=generator) * 3


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("T", "D"), [(1, 4), (4, 5), (5, 8), (16, 3), (29, 5)])
def test_roles_in_any_order_are_right(T: int, D: int, stages: int) -> None:
    for seed in range(2):
        assert_right(draw(2, T, 2, D), stages, seed)


FAULTS = {
    "the producer waits for the wrong parity": ("k_empty.index(slot), parity ^ 1", "k_empty.index(slot), parity"),
    "k is overwritten unasked": ("        mbarrier.wait(k_empty.index(slot), parity ^ 1)\n", ""),
    "v is overwritten unasked": ("        mbarrier.wait(v_empty.index(slot), parity ^ 1)\n", ""),
    "the first k is read unasked": ("    mbarrier.wait(k_full.index(0), 0)\n", ""),
    "k is read unasked": ("        mbarrier.wait(k_full.index(slot), parity)\n", ""),
    "v is read unasked": ("        mbarrier.wait(v_full.index(slot), parity)\n", ""),
    "the first v is read unasked": ("    mbarrier.wait(v_full.index(0), 0)\n", ""),
    "q is read unasked": ("    mbarrier.wait(q_full.index(0), 0)\n", ""),
    "k is never given back": ("        mbarrier.arrive(k_empty.index(slot))\n", ""),
    "v is never given back": ("        mbarrier.arrive(v_empty.index(before))\n", ""),
    "v is given back too soon": ("following = gl", "mbarrier.arrive(v_empty.index(before))\n        following = gl"),
    "scores are used in flight": ("warpgroup_mma_wait(1, deps=(s,))", "warpgroup_mma_wait(2, deps=(s,))"),
    "one consumer gives tiles back for both": ("count=ARRIVALS", "count=1"),
    "half of q's bytes are expected": ("CONSUMERS * q_descriptor.block_type.nbytes", "q_descriptor.block_type.nbytes"),
    "the parity changes with each tile": ("return i % STAGES, (i // STAGES) & 1", "return i % STAGES, i & 1"),
    "tiles from the first on": ("key = (steps - 1 - i) * BLOCK_N", "key = i * BLOCK_N"),
    "a token doesn't see itself": ("query[:, None] >= key[None, :]", "query[:, None] > key[None, :]"),
    "what was summed is not scaled": ("o = o * gl.convert_layout(shrink", "gl.convert_layout(shrink"),
    "the other consumer's queries": ("    start = start + ROWS * CONSUMER\n", ""),
    "rows past T are stored": ("(start + row < T) & (column < D)", "column < D"),
    "columns past D are stored": ("(start + row < T) & (column < D)", "start + row < T"),
}  # fmt: skip


def test_one_slot_would_be_a_deadlock() -> None:
    """The wait for the next v comes before the last one is given back."""
    with pytest.raises(AssertionError, match="num_stages"):
        forward(draw(1, 16, 1, 4), stages=1, seed=0)
    with pytest.raises(AssertionError, match="a deadlock"):
        forward(draw(1, 16, 1, 4), stages=1, seed=0, change=("num_stages >= 2", "num_stages >= 1"))


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(6):
            assert_right(draw(2, 27, 1, 5), 2, seed, change)


def test_inputs_that_it_does_not_take() -> None:
    x = torch.zeros(2, 5, 3, 2, 64, dtype=torch.bfloat16)
    assert attention_hopper.copied_by_tiles(*x.unbind(2))
    odd = torch.zeros(2, 5, 2, 68, dtype=torch.bfloat16)[..., :64]
    for other in (odd, x[:, :, 0].mT, x[:1, :, 0].expand(2, 5, 2, 64), x.view(-1)[1:641].view(1, 5, 2, 64)):
        assert not attention_hopper.copied_by_tiles(x[:, :, 0], other)


def test_why_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, bfloat16 = torch.device("cuda"), torch.bfloat16
    assert "needs an H100 or H200 (sm_90), got cpu" in str(
        hopper_why_unsupported(torch.device("cpu"), bfloat16, 64, 0.0)
    )
    monkeypatch.setattr(launch, "capability", lambda _: (10, 0))
    assert "got compute capability 10.0" in str(hopper_why_unsupported(cuda, bfloat16, 64, 0.0))
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    assert hopper_why_unsupported(cuda, bfloat16, 64, 0.0) is None
    assert hopper_why_unsupported(cuda, bfloat16, 64, 0.1) is None, "the usual kernels drop"
    for arguments, words in (
        ((torch.float32, 64, 0.0), "bfloat16 or float16, got torch.float32"),
        ((bfloat16, 32, 0.0), "one of (64, 80, 96, 128), got 32"),
        ((bfloat16, 64, 1.0), "dropout must be at least 0 and less than 1, got 1.0"),
    ):
        assert words in str(hopper_why_unsupported(cuda, *arguments))


def on_hopper(*tensors: Tensor) -> Results:
    """o and the gradients with the kernel on a GPU that has it."""
    if reason := hopper_why_unsupported(torch.device(DEVICE), torch.bfloat16, 64, 0.0):
        pytest.skip(reason)
    return packed(*tensors, hopper=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("T", [1, 63, 65, 128, 1000, 1024, 1025])
def test_a_gpu_is_right(T: int, D: int, dtype: torch.dtype) -> None:
    ORACLE.assert_right(on_hopper, lambda seed: inputs((2, T, 3, D), dtype, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 65, 1000, 1026])
def test_a_gpus_bias_gradient_is_the_usual_kernels(T: int) -> None:
    if reason := hopper_why_unsupported(torch.device(DEVICE), torch.bfloat16, 64, 0.0):
        pytest.skip(reason)
    *qkv, do = inputs((2, T, 3, 64), torch.bfloat16)
    bias = torch.zeros(3 * 3 * 64, device=DEVICE, requires_grad=True)
    found, expected = (
        torch.autograd.grad(flash_attention_qkv(torch.stack(qkv, 2), bias=bias, hopper=hopper), bias, do)[0]
        for hopper in (True, False)
    )
    assert (found - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.gpu
def test_250_repeats_are_bitwise_equal() -> None:
    args = inputs((4, 1024, 12, 64), torch.bfloat16)
    first = on_hopper(*args)
    for _ in range(250):
        assert_equal(on_hopper(*args), first)
