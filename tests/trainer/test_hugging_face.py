"""Hugging Face's GPT-2 as the model's oracle: same weights in GPT2LMHeadModel, everything in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgpt2 import GPT, ModelConfig
from fastgpt2.config import TrainConfig
from fastgpt2.hugging_face import from_hugging_face, to_hugging_face
from fastgpt2.ops import Site, make_ops
from fastgpt2.optim.groups import make_optimizer
from tests import seeds

pytestmark = pytest.mark.numeric
CONFIG = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=211)


def batch(B: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    shape = (B, CONFIG.block_size + 1)
    tokens = torch.randint(CONFIG.vocab_size, shape, generator=seeds.generator(seed))
    return tokens[:, :-1], tokens[:, 1:]


def pair(attention: str) -> tuple[GPT, nn.Module]:
    """Our model and theirs with the same weights, large enough that attention is peaked and no bias is zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=CONFIG.vocab_size,
            n_positions=CONFIG.block_size,
            n_embd=CONFIG.n_embd,
            n_layer=CONFIG.n_layer,
            n_head=CONFIG.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    )
    torch.manual_seed(seeds.first + 3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1) + float("ln_" in name and "weight" in name))
    theirs = theirs.double()
    ours = GPT(CONFIG, make_ops({"attn": attention}, Site(head_dim=CONFIG.head_dim))[0]).double()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(from_hugging_face(name, theirs.get_parameter(f"transformer.{name}"), CONFIG))
    return ours, theirs


def loss_of(theirs: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    # Not through labels=, which drops to float32.
    return nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())


def test_every_parameter_comes_back_from_their_layout() -> None:
    ours, theirs = pair("sdpa")
    for name, p in ours.named_parameters():
        there = to_hugging_face(name, p, CONFIG)
        assert torch.equal(there, theirs.get_parameter(f"transformer.{name}")), name
        assert torch.equal(from_hugging_face(name, there, CONFIG), p), name


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_logits_loss_and_gradients(attention: str) -> None:
    ours, theirs = pair(attention)
    inputs, targets = batch()
    torch.testing.assert_close(ours(inputs), theirs(inputs).logits, rtol=0, atol=1e-10)
    loss, their_loss = ours(inputs, targets), loss_of(theirs, inputs, targets)
    assert abs(loss.item() - their_loss.item()) < 1e-10
    loss.backward()
    their_loss.backward()
    for name, p in ours.named_parameters():
        expected = from_hugging_face(name, theirs.get_parameter(f"transformer.{name}").grad, CONFIG)
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_fifty_adam_steps() -> None:
    ours, theirs = pair("sdpa")
    our_adam = make_optimizer(ours, TrainConfig(lr=1e-3))
    their_adam = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    losses = []
    for step in range(50):
        inputs, targets = batch(B=4, seed=step % 5)
        both = (ours(inputs, targets), loss_of(theirs, inputs, targets))
        for loss, adam in zip(both, (our_adam, their_adam), strict=True):
            adam.zero_grad()
            loss.backward()
            adam.step()
        losses.append([loss.item() for loss in both])
    difference = max(abs(a - b) for a, b in losses)
    assert losses[-1][0] < losses[0][0] - 1.0, "nothing was learned, so nothing was compared"
    # Adam divides by sqrt(v) + 1e-8, which amplifies rounding where v is tiny; 1.3e-13 was seen.
    assert difference < 1e-10, difference
