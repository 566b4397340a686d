"""The model is GPT-2: closed forms, causality, documents, the padded vocabulary, dropout, activations."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fastgpt2 import GPT, ModelConfig
from fastgpt2.backends.attention import naive_attention
from fastgpt2.backends.loss import torch_loss
from fastgpt2.config import PRESETS
from fastgpt2.model import FLOPS_PER_TOKEN, parameter_count, saved_bytes
from fastgpt2.ops import Ops, Site, make_ops
from fastgpt2.slots import SLOTS
from tests import seeds

pytestmark = pytest.mark.numeric
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=101)
EVERY = [name for name, known in SLOTS["attn"].items() if not known.cuda]


def place(name: str, slot: str = "attn") -> str:
    """Triton's kernels run on the GPU where there is one, in the interpreter elsewhere; all else on the CPU."""
    return "cuda" if SLOTS[slot][name].interpreted and torch.cuda.is_available() else "cpu"


def make(config: ModelConfig = SMALL, attention: str = "naive", seed: int = 0, loss: str = "auto") -> GPT:
    torch.manual_seed(seeds.first + seed)
    device, choices = place(attention), {"attn": attention, "loss": loss}
    return GPT(config, make_ops(choices, Site(device=torch.device(device), head_dim=config.head_dim))[0]).to(device)


def batch(config: ModelConfig = SMALL, B: int = 3, T: int | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(config.vocab_size, (B, (T or config.block_size) + 1), generator=seeds.generator(seed))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_parameter_count_is_its_closed_form(name: str) -> None:
    config = PRESETS[name]
    assert sum(p.numel() for p in GPT(config).parameters()) == parameter_count(config, padded=True)


def test_published_sizes() -> None:
    counts = [parameter_count(PRESETS[name]) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")]
    assert counts == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    assert PRESETS["gpt2"].padded_vocab_size == 50304


def test_flops_are_what_a_naive_step_executes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(n_layer=3, n_head=2, n_embd=48, block_size=40, vocab_size=200)
    model = GPT(config, Ops(attn=naive_attention))  # an opaque operator's products aren't counted
    inputs, targets = batch(config, B=2)
    with FlopCounterMode(display=False) as counter:
        model(inputs, targets).backward()
    assert counter.get_total_flops() == FLOPS_PER_TOKEN["matmul"](config) * inputs.numel()


def test_flop_formulas_at_124m() -> None:
    # The figures both projects' formulas give for GPT-2 124M at T = 1024.
    assert FLOPS_PER_TOKEN["llm.c"](PRESETS["gpt2"]) == 803_478_528
    assert FLOPS_PER_TOKEN["nanogpt"](PRESETS["gpt2"]) == 855_166_464


def test_initialisation() -> None:
    config = ModelConfig(n_layer=8, n_head=4, n_embd=256, block_size=64, vocab_size=300)
    for name, p in make(config).named_parameters():
        if "ln_" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            values, padding = p.split([config.vocab_size, 84]) if name == "wte.weight" else (p, p.new_zeros(1))
            assert not padding.any()
            # The deviation of n draws is known to 1/sqrt(2n): n >= 16384 here, so 4% is over 7 sigma.
            assert abs(values.std().item() / expected - 1) < 0.04, name
            assert abs(values.mean().item()) < 6 * expected / math.sqrt(values.numel()), name


def test_same_seed_same_weights() -> None:
    one, same, other = make(seed=5), make(seed=5), make(seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.wte.weight, other.wte.weight)


def test_auto_is_pytorchs_form_but_for_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt2 import ops
    from fastgpt2.kernels import launch

    monkeypatch.setattr(ops, "_measured", dict)  # as on a GPU where nothing was measured
    plain = {"attn": "sdpa", "mlp": "torch", "norm": "torch"}
    assert make_ops()[1] == make_ops({"loss": "auto"})[1] == {**plain, "loss": "chunked"}
    for capability, loss in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "chunked")):
        monkeypatch.setattr(launch, "capability", lambda _, c=capability: c)
        assert make_ops(site=Site(device=torch.device("cuda"), dtype=torch.bfloat16))[1] == {**plain, "loss": loss}


@pytest.mark.parametrize("name", SLOTS["norm"])
def test_after_the_last_norm_there_is_no_stream(name: str) -> None:
    norm, device = make_ops({"norm": name}, Site(device=torch.device(place(name, "norm"))))[0].norm, place(name, "norm")
    x, residual, weight, bias = (torch.randn(size, device=device) for size in ((3, 16), (3, 16), 16, 16))
    y, total = norm(x, residual, weight, bias)
    last, nothing = norm(x, residual, weight, bias, last=True)
    assert torch.equal(last, y) and torch.equal(total, x + residual) and nothing is None


def model_and_gradients(ops: Ops, config: ModelConfig, *, recompute: bool = False) -> dict[str, Tensor]:
    """The loss and the gradient of each parameter by name, with biases drawn and the same dropout."""
    torch.manual_seed(seeds.first)
    model = GPT(config, ops, recompute=recompute).to(place("triton"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    loss = model(*(t.to(place("triton")) for t in batch(config, B=2)))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    ("slot", "dropout", "recompute"),
    [("norm", 0.0, False), ("norm", 0.0, True), ("norm", 0.2, False), ("attn", 0.0, True), ("attn", 0.2, False)],
)
def test_biases_whose_gradients_a_slot_returns(slot: str, dropout: float, recompute: bool) -> None:
    """Gradients are those of ops that leave every bias to autograd."""
    config = dataclasses.replace(SMALL, dropout=dropout, end_of_text=5)
    site = Site(device=torch.device(place("triton")), head_dim=16, n_embd=32)
    ops = make_ops({slot: "triton", "loss": "torch"}, site)[0]
    assert ops.bias_gradients == {slot}
    want = model_and_gradients(dataclasses.replace(ops, bias_gradients=frozenset()), config)
    found = model_and_gradients(ops, config, recompute=recompute)
    assert found.keys() == want.keys()
    assert torch.equal(found["loss"], want["loss"])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_only_an_implementation_chosen_by_name_returns_bias_gradients() -> None:
    from fastgpt2.kernels.norm import stream_norm

    assert make_ops({"norm": "torch"})[0].bias_gradients == frozenset()
    assert make_ops({"norm": stream_norm})[0].bias_gradients == Ops().bias_gradients == frozenset()
    assert make_ops({"norm": "fastgpt2.kernels.norm:stream_norm"})[0].bias_gradients == frozenset()


@pytest.mark.parametrize("attention", EVERY)
def test_the_past_is_blind_to_the_future(attention: str) -> None:
    model = make(attention=attention).eval()
    tokens = batch(B=2)[0].to(place(attention))
    before = model(tokens)
    for position in (1, 11, 23):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % SMALL.vocab_size
        after = model(changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("attention", EVERY)
def test_no_gradient_reaches_the_future(attention: str) -> None:
    model = make(attention=attention)
    tokens = batch(B=1)[0].to(place(attention))
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.wte.register_forward_hook(keep)
    logits = model(tokens)
    position = 9
    (gradient,) = torch.autograd.grad(logits[0, position].sum(), embedded[0])
    assert torch.equal(gradient[0, position + 1 :], torch.zeros_like(gradient[0, position + 1 :]))
    assert (gradient[0, : position + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("attention", EVERY)
def test_with_the_document_mask_a_document_is_blind_to_the_others(attention: str) -> None:
    """And without it, it is not: positions stay what they are, so nothing else may differ."""
    masked = make(dataclasses.replace(SMALL, end_of_text=5), attention).eval()
    open_ = make(SMALL, attention).eval()
    tokens = batch(B=2)[0].to(place(attention))
    tokens[tokens == 5] = 6
    tokens[:, 10] = tokens[:, 17] = 5  # documents 0..9, 10..16 and 17..23
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] - 5) % 40 + 6
    for model, elsewhere in ((masked, True), (open_, False)):
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :3], after[:, :3])
        assert not torch.equal(before[:, 3:10], after[:, 3:10])
        assert torch.equal(before[:, 10:], after[:, 10:]) is elsewhere


def test_a_document_at_the_start_of_a_row_is_what_it_is_alone() -> None:
    model = make(dataclasses.replace(SMALL, end_of_text=5)).double().eval()
    tokens = batch(B=1)[0]
    tokens[tokens == 5] = 6
    alone = model(tokens[:, :9])
    tokens[:, 9] = 5
    torch.testing.assert_close(model(tokens)[:, :9], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["torch", "chunked"])
def test_loss_is_the_hand_computed_mean_over_the_real_vocabulary(loss: str) -> None:
    model = make(loss=loss).double()
    with torch.no_grad():  # what stands in the padding must not matter
        model.wte.weight[SMALL.vocab_size :] = 7.0
    inputs, targets = batch()
    logits = model(inputs)
    assert logits.shape == (3, 24, SMALL.vocab_size)
    total = 0.0
    for b in range(3):
        for t in range(24):
            row = logits[b, t]
            total += (torch.log(torch.exp(row).sum()) - row[targets[b, t]]).item()
    assert model(inputs, targets).item() == pytest.approx(total / 72, rel=1e-12)


@pytest.mark.parametrize("loss", ["torch", "chunked"])
def test_padded_rows_get_no_gradient(loss: str) -> None:
    model = make(loss=loss)
    assert SMALL.padded_vocab_size == 128
    model(*batch()).backward()
    gradient = model.wte.weight.grad
    assert gradient is not None
    assert not gradient[SMALL.vocab_size :].any()
    assert gradient[: SMALL.vocab_size].abs().sum(-1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_plain_loss_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, 16, generator=generator, dtype=torch.float64) for shape in ((2, 9), (40,)))
    targets = torch.randint(40, (2, 9), generator=generator)
    loss = torch_loss(hidden.to(dtype), weight.to(dtype), targets, vocab_size=40)
    wide = torch.promote_types(dtype, torch.float32)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype)).to(wide)
    expected = (logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]).mean()
    torch.testing.assert_close(loss, expected)


def test_dropout_in_training_only() -> None:
    model = make(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=101, dropout=0.5))
    inputs, targets = batch()
    model.train()
    assert model(inputs, targets).item() != model(inputs, targets).item()
    model.eval()
    evaluated = model(inputs, targets).item()
    assert evaluated == model(inputs, targets).item()
    assert evaluated == make()(inputs, targets).item()  # what a model without dropout gives


@pytest.mark.parametrize("place", ["embedding", "attention", "residual"])
def test_the_three_places_of_dropout(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of GPT-2's dropouts is there: with F.dropout recorded, their shapes are the three kinds."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=101, dropout=0.25)
    model = make(config).train()
    calls: list[tuple[tuple[int, ...], float]] = []
    real = torch.nn.functional.dropout

    def record(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        calls.append((tuple(x.shape), p if training else 0.0))
        return real(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", record)
    model(*batch())
    stream, weights = ((3, 24, 32), 0.25), ((3, 2, 24, 24), 0.25)
    if place == "embedding":
        assert calls[0] == stream
    elif place == "attention":
        assert calls.count(weights) == config.n_layer
    else:
        assert calls.count(stream) == 1 + 2 * config.n_layer


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="25 positions, the model 24"):
        make()(torch.zeros(1, 25, dtype=torch.int64))


def saved(attention: str, *, B: int = 2, T: int = 32, C: int = 32, L: int = 2) -> int:
    config = ModelConfig(n_layer=L, n_head=2, n_embd=C, block_size=T, vocab_size=128)
    # Copies: not two views of one storage.
    inputs, targets = (x.clone().to(place(attention)) for x in batch(config, B=B))
    return saved_bytes(make(config, attention), inputs, targets)


@pytest.mark.parametrize(
    ("name", "values"),
    [("B", (1, 2, 3, 4)), ("T", (16, 32, 48, 64)), ("C", (128, 160, 192)), ("L", (1, 2, 3, 4))],
)
@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_saved_activations_grow_linearly(attention: str, name: str, values: tuple[int, ...]) -> None:
    sizes = [saved(attention, **{name: value}) for value in values]
    steps = {b - a for a, b in pairwise(sizes)}
    assert len(steps) == 1, sizes
    assert steps.pop() > 0


def test_saved_activations_grow_with_the_square_of_t_with_naive() -> None:
    sizes = [saved("naive", T=T) for T in (16, 32, 48, 64)]
    first = [b - a for a, b in pairwise(sizes)]
    second = {b - a for a, b in pairwise(first)}
    # B H T^2 float32 weights and one bool mask T^2 a layer: both are quadratic, so the second difference is
    # constant, and at least that of the weights alone.
    assert len(second) == 1, sizes
    assert second.pop() >= 2 * (2 * 2 * 2 * 4) * 16 * 16
