"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, causal attention, tanh-GELU MLP, tied head.

Shapes: B batch, T tokens, C channels, H heads, D = C / H, V vocabulary (stored padded). Parameters carry the
names of the published checkpoint (wte, wpe, h.0.attn.c_attn, ...), in nn.Linear's [out, in] layout.
Compute is in `ops`; this file owns the parameters and the order in which they are used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt2.config import ModelConfig
from fastgpt2.documents import document_bounds
from fastgpt2.embedding import Embedding
from fastgpt2.ops import Ops


class GPT(nn.Module):
    """GPT-2. Weights are drawn from torch's global CPU generator: seed it before constructing.

    Args:
        ops: what computes each slot.
        recompute: in training store only the inputs of each block and recompute it in the backward pass.
        stream: dtype of the residual stream; None: the embeddings'.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops | None = None,
        *,
        recompute: bool = False,
        stream: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops or Ops()
        self.recompute, self.stream = recompute, stream
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, self.ops) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config, self.ops)
        self.initialise()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            tokens: (B, T) integer, T at most block_size.
            targets: (B, T) int64, the token that follows each.

        Returns:
            Logits (B, T, vocab_size), or the scalar mean cross-entropy in nats.
        """
        T = tokens.size(1)
        if self.config.block_size < T:
            raise ValueError(f"tokens has {T} positions, the model {self.config.block_size}")
        x = self.wte(tokens) + self.wpe.weight[:T]
        x = self.drop(x).to(self.stream or x.dtype)
        opens = self.config.end_of_text
        documents = None if opens is None else document_bounds(tokens, opens)
        residual = bias = None
        block: Any  # a ModuleList's items are Modules to mypy
        for block in self.h:
            inputs = x, residual, bias, documents
            if self.recompute and self.training:
                draws = self.config.dropout > 0.0
                x, residual = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)
            else:
                x, residual = block(*inputs)
            bias = block.mlp.c_proj.bias_left
        hidden, _ = self.ln_f(x, residual, bias, last=True)
        if targets is not None:
            return self.ops.loss(hidden, self.wte.weight, targets, vocab_size=self.config.vocab_size)
        return F.linear(hidden, self.wte.weight)[..., : self.config.vocab_size]

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    @torch.no_grad()
    def initialise(self) -> None:
        """GPT-2's: weights N(0, 0.02), projections back into the residual stream over sqrt(2L), biases 0.

        The scale keeps the stream's variance from growing with the 2L branches that are added to it.
        """
        for name, parameter in self.named_parameters():
            if ".ln_" in name or name.startswith("ln_f"):
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "wte.weight":
                nn.init.normal_(parameter[: self.config.vocab_size], std=0.02)
                parameter[self.config.vocab_size :].zero_()
            else:
                branch_end = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if branch_end else 0.02)


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)), with each sum left to the norm that follows it."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config, ops)
        self.attn = Attention(config, ops)
        self.ln_2 = LayerNorm(config, ops)
        self.mlp = Mlp(config, ops)

    def forward(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, C) is the branch not yet added to the residual stream; returns the same two.

        residual: the stream as the norms hand it on, which may be more than a tensor.
        bias: the branch's, if the norm returns its gradient.
        """
        y, residual = self.ln_1(x, residual, bias)
        y, residual = self.ln_2(self.attn(y, documents), residual, self.attn.c_proj.bias_left)
        return self.mlp(y), residual


class Linear(nn.Linear):
    """nn.Linear that may leave the gradient of its bias to the function that follows it.

    leaves_bias: the bias is added here without a gradient, and handed to that function, which has the rows of the
        gradient in registers and returns their sum.
    """

    def __init__(self, inputs: int, outputs: int, *, leaves_bias: bool) -> None:
        super().__init__(inputs, outputs)
        self.leaves_bias = leaves_bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias_to_add)

    @property
    def bias_to_add(self) -> Tensor:
        """The bias as this layer adds it."""
        return self.bias.detach() if self.leaves_bias else self.bias

    @property
    def bias_left(self) -> Tensor | None:
        """The bias for the function that follows; None if autograd computes its gradient here."""
        return self.bias if self.leaves_bias else None


def _branch_end(inputs: int, config: ModelConfig, ops: Ops) -> Linear:
    """c_proj of a branch. A norm can return its bias's gradient unless there is a dropout between them."""
    leaves_bias = "norm" in ops.bias_gradients and config.dropout == 0.0
    return Linear(inputs, config.n_embd, leaves_bias=leaves_bias)


class Attention(nn.Module):
    """Causal multi-head self-attention: (B, T, C) -> (B, T, C); documents as document_bounds gives them, or None."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.op = config, ops.attn
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, leaves_bias="attn" in ops.bias_gradients)
        self.c_proj = _branch_end(config.n_embd, config, ops)

    def forward(self, x: Tensor, documents: Tensor | None) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        qkv = self.c_attn(x).unflatten(-1, (3, self.config.n_head, self.config.head_dim))
        given = {} if self.c_attn.bias_left is None else {"bias": self.c_attn.bias_left}
        y = self.op(qkv, dropout_p=dropout, documents=documents, **given).flatten(-2)
        return F.dropout(self.c_proj(y), dropout, self.training)


class Mlp(nn.Module):
    """Two linear layers around a GELU, four times as wide in the middle: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.op = config, ops.mlp
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = _branch_end(4 * config.n_embd, config, ops)

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias_to_add)
        return F.dropout(y, self.config.dropout, self.training)


class LayerNorm(nn.Module):
    """Residual add and LayerNorm; see backends.norm."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.op = ops.norm
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(
        self, x: Tensor, residual: Tensor | None, branch_bias: Tensor | None, *, last: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """branch_bias: x's, if the norm returns its gradient."""
        given = {} if branch_bias is None else {"branch_bias": branch_bias}
        return self.op(x, residual, self.weight, self.bias, last=last, **given)


def saved_bytes(model: GPT, tokens: Tensor, targets: Tensor) -> int:
    """Bytes that a forward keeps for its backward: each storage once, without weights, tokens and targets.

    Fake tensors do as well (torch._subclasses.FakeTensorMode): then nothing is computed.
    """
    given = {x.untyped_storage()._cdata for x in (*model.parameters(), tokens, targets)}
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in given:
            storages[storage._cdata] = storage  # held, so that its address stays its own
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens, targets)
    return sum(storage.nbytes() for storage in storages.values())


def parameter_count(config: ModelConfig, *, padded: bool = False) -> int:
    """Parameters in closed form: (V + T) C + L (12 C^2 + 13 C) + 2 C; the tied head counts once.

    Args:
        padded: count the stored vocabulary rather than the one predicted.
    """
    C, vocab = config.n_embd, config.padded_vocab_size if padded else config.vocab_size
    return (vocab + config.block_size) * C + config.n_layer * (12 * C * C + 13 * C) + 2 * C


def _flops_llmc(config: ModelConfig) -> int:
    """llm.c: 6 a parameter (all of them, padded) and 6 L C T: of the attention's two matmuls the causal half."""
    return 6 * parameter_count(config, padded=True) + 6 * config.n_layer * config.n_embd * config.block_size


def _flops_nanogpt(config: ModelConfig) -> int:
    """nanoGPT (PaLM, appendix B): 6 a parameter without positions, and 12 L C T: attention without the mask."""
    without_positions = parameter_count(config) - config.block_size * config.n_embd
    return 6 * without_positions + 12 * config.n_layer * config.n_embd * config.block_size


def _flops_matmul(config: ModelConfig) -> int:
    """What a naive step executes: 6 a weight of each matmul (12 L C^2 and the padded head) and 12 L C T."""
    C, L = config.n_embd, config.n_layer
    return 6 * (12 * L * C * C + config.padded_vocab_size * C) + 12 * L * C * config.block_size


def recompute_flops(config: ModelConfig) -> int:
    """FLOPs that --recompute blocks adds per token: the blocks' forward, 24 L C^2 + 2 L C T (causal half)."""
    C, L = config.n_embd, config.n_layer
    return 24 * L * C * C + 2 * L * C * config.block_size


FLOPS_PER_TOKEN = {"llm.c": _flops_llmc, "nanogpt": _flops_nanogpt, "matmul": _flops_matmul}
"""FLOPs of forward and backward for one token, by the name of the formula; always quote the name."""
