"""A GPT-2 with PyTorch alone, as nanoGPT trains it: the peer that exists wherever torch does.

Nothing of ours is in it: the projection is cut into q, k and v, the attention is SDPA's causal one, the padded
vocabulary is predicted whole, and the loss is F.cross_entropy of all logits at once. Parameters carry the names and the
layout of fastgpt2.model.GPT, so that the weights of either load into the other and the losses can be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.config import ModelConfig


class PlainGPT2(nn.Module):
    """The mean cross-entropy of (B, T) tokens and their (B, T) targets; all rows of wte are in the softmax.

    Args:
        rows: of wte; default: the padded vocabulary.
        gelu: "tanh" as GPT-2's, or "none" for nanoGPT's, which is exact.
    """

    def __init__(self, config: ModelConfig, *, rows: int | None = None, gelu: str = "tanh") -> None:
        super().__init__()
        self.wte = nn.Embedding(rows or config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, gelu) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    def __init__(self, config: ModelConfig, gelu: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = Mlp(config, gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig, gelu: str) -> None:
        super().__init__()
        self.gelu = gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
