"""Builds the candidates of a training step, each in its worker."""

from __future__ import annotations

import atexit
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.step.plain_gpt2 import PlainGPT2
from fastgpt2.config import ConfigError, ModelConfig, TrainConfig
from fastgpt2.data import open_data, split
from fastgpt2.hugging_face import to_hugging_face
from fastgpt2.kernels.tuning import use_table
from fastgpt2.model import GPT
from fastgpt2.run import build, numerics, settle
from fastgpt2.settings import Settled


class Step:
    """A training step that draws its own tokens: what a worker times.

    Args:
        model: whose gradients the work leaves behind; its parameters have the names of fastgpt2.model.GPT's, maybe
            with something before them.
        work: (index, tokens (grad_accum, B, T + 1)) -> the loss, on the device.
        draw: index -> the tokens of a step, on their way to the device.
    """

    def __init__(
        self,
        device: torch.device,
        model: nn.Module,
        work: Callable[[int, Tensor], Tensor],
        draw: Callable[[int], Tensor],
        facts: dict[str, Any],
        *,
        keeps_memory: bool = False,
    ) -> None:
        self.device, self.facts, self.keeps_memory = device, facts, keeps_memory
        self._model, self._work, self._draw = model, work, draw
        self._tokens = draw(0)
        self._loss: Tensor

    def __call__(self, index: int) -> None:
        self._loss = self._work(index, self._tokens)
        self._tokens = self._draw(index + 1)

    def check(self) -> dict[str, float]:
        """The loss of the last step, and the norm of the gradient of each parameter; of q, k and v apart, since at the
        beginning nearly all of the three is v's."""
        values = {"loss": self._loss.item()}
        for name, parameter in self._model.named_parameters():
            name, grad = re.sub(r".*\btransformer\.", "", name), parameter.grad
            if grad is None:
                continue
            if name.endswith("c_attn.weight"):
                parts = grad.chunk(3, dim=0 if grad.size(0) > grad.size(1) else 1)
                values |= {f"{name} of {part}": g.norm().item() for part, g in zip("qkv", parts, strict=True)}
            else:
                values[name] = grad.norm().item()
        return values


def make_ours(settings: dict[str, Any], table: str | None = None, inductor: dict[str, Any] | None = None) -> Step:
    """The trainer's step. Its numerics, a table of launch configurations and settings of torch._inductor.config hold to
    the end of the process."""
    if table is not None:
        use_table(Path(table))
    if inductor is not None:
        _for_good(torch._inductor.config.patch(inductor))
    config, device = settle(TrainConfig(**settings))
    _for_good(numerics(config))
    run = build(config)
    facts = {
        "slots": run.chosen,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "recompute": config.recompute,
        "stream": config.stream,
        "cuda_graph": config.cuda_graph,
    }
    return Step(
        device,
        run.model,
        lambda index, tokens: run.step(index, tokens)[0],
        run.next_tokens,
        facts,
        keeps_memory=config.cuda_graph,
    )


def make_plain(settings: dict[str, Any], kernel: str | None = None, mode: str | None = None) -> Step:
    """bench.step.plain_gpt2, with SDPA held to a kernel and torch.compile in a mode where they are given."""
    if kernel is not None:
        _for_good(sdpa_kernel(getattr(SDPBackend, f"{kernel.upper()}_ATTENTION")))
        # The compiler's caches on disk don't know what SDPA is held to: one candidate would run another's code.
        torch.compiler.config.cache_key_tag = kernel

    def model(size: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
        return _plain_gpt2(size, weights, settings.get("vocab_size"))

    return _peer(settings, model, mode=mode)


def _plain_gpt2(size: ModelConfig, weights: dict[str, Tensor], rows: int | None, gelu: str = "tanh") -> nn.Module:
    """The model with our weights, of which wte has `rows` (default: with its padding)."""
    with torch.device("meta"):
        plain = PlainGPT2(size, rows=rows, gelu=gelu)
    plain.load_state_dict({**weights, "wte.weight": weights["wte.weight"][:rows].clone()}, assign=True)
    return plain


def make_nanogpt(settings: dict[str, Any]) -> Step:
    """bench.step.plain_gpt2 as nanoGPT has it on a CPU: exact GELU, no padding, AdamW that is not fused."""

    def model(size: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
        return _plain_gpt2(size, weights, size.vocab_size, gelu="none")

    def optimizer(parameters: Iterator[nn.Parameter], config: Settled) -> torch.optim.Optimizer:
        every = list(parameters)
        groups = [
            {"params": [p for p in every if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, config.lr, betas=(config.beta1, config.beta2))

    return _peer(settings, model, optimizer)


class Products:
    """The matrix products of a step's linear layers and of its head, alone: forward, input's and weight's gradients.

    A step does more: attention's own products, and all that is not a product. Nothing is allocated in a call.
    """

    keeps_memory = False

    def __init__(self, settings: dict[str, Any]) -> None:
        config, self.device = settle(TrainConfig(**settings))
        size, dtype = config.model_config(), config.torch_dtype
        C, N = size.n_embd, config.batch_size * size.block_size
        layers = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * size.n_layer + [(C, size.padded_vocab_size)]
        self.facts: dict[str, Any] = {}
        made = {shape: self._operands(N, *shape, dtype) for shape in dict.fromkeys(layers)}
        self._layers = [made[shape] for shape in layers]

    def _operands(self, N: int, width: int, out: int, dtype: torch.dtype) -> list[Tensor]:
        """x, w and dy, and room for y, dx and dw; layers of one shape share them."""
        shapes = [(N, width), (out, width), (N, out)]
        values = [torch.randn(shape, dtype=dtype, device=self.device) for shape in shapes]
        return [*values, *(torch.empty_like(values[i]) for i in (2, 0, 1))]

    def __call__(self, index: int) -> None:
        for x, w, _, y, _, _ in self._layers:
            torch.mm(x, w.T, out=y)
        for x, w, dy, _, dx, dw in reversed(self._layers):
            torch.mm(dy, w, out=dx)
            torch.mm(dy.T, x, out=dw)

    def check(self) -> dict[str, float]:
        return {}


def make_transformers(settings: dict[str, Any]) -> Step:
    return _peer(settings, HuggingFace)


class HuggingFace(nn.Module):
    """The mean cross-entropy of transformers' GPT2LMHeadModel with our weights."""

    def __init__(self, size: ModelConfig, weights: dict[str, Tensor]) -> None:
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed") from None
        super().__init__()
        config = GPT2Config(  # type: ignore[call-arg]
            vocab_size=size.vocab_size,
            n_positions=size.block_size,
            n_embd=size.n_embd,
            n_layer=size.n_layer,
            n_head=size.n_head,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = GPT2LMHeadModel(config)
        self.to(next(iter(weights.values())).dtype)
        with torch.no_grad():
            for name, parameter in self.model.transformer.named_parameters():
                parameter.copy_(to_hugging_face(name, weights[name], size))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).logits.flatten(0, 1), targets.flatten())


def _fused_adam(parameters: Iterator[nn.Parameter], config: Settled) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, config.lr, betas=(config.beta1, config.beta2), fused=True)


def _peer(
    settings: dict[str, Any],
    make_model: Callable[[ModelConfig, dict[str, Tensor]], nn.Module],
    make_optimizer: Callable[[Iterator[nn.Parameter], Settled], torch.optim.Optimizer] = _fused_adam,
    mode: str | None = None,
) -> Step:
    """A training loop's body with PyTorch alone."""
    config, device = settle(TrainConfig(**settings))
    dtype = config.torch_dtype
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    model = make_model(config.model_config(), initial_weights(config)).to(device)
    model.train()
    if config.compile:
        model.compile(mode=mode)
    optimizer = make_optimizer(model.parameters(), config)
    mixed = torch.autocast(device.type, dtype) if dtype.itemsize == 2 else contextlib.nullcontext()
    source = open_data(
        config.data,
        split="train",
        vocab_size=config.vocab_size,
        batch_size=config.batch_size,
        block_size=config.block_size,
        grad_accum=1,
        seed=config.seed,
    )

    def draw(index: int) -> Tensor:
        tokens = source.tokens(index)
        return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens

    def work(index: int, tokens: Tensor) -> Tensor:
        inputs, targets = split(tokens[0])
        optimizer.zero_grad(set_to_none=True)
        with mixed:
            loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    facts = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    return Step(device, model, work, draw, facts, keeps_memory=mode is not None)


def initial_weights(config: Settled) -> dict[str, Tensor]:
    """The trainer's initial weights, in float64 for that precision, else in float32."""
    torch.manual_seed(config.seed)
    dtype = torch.promote_types(config.torch_dtype, torch.float32)
    return GPT(config.model_config()).to(dtype).state_dict()


_entered = contextlib.ExitStack()
atexit.register(_entered.close)  # while what they put back is still there


def _for_good(context: contextlib.AbstractContextManager) -> None:
    """Enter a context that a worker never leaves."""
    _entered.enter_context(context)
