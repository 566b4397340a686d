"""Documents in a row of tokens: where each begins and ends, and so which keys each query sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_bounds(tokens: Tensor, end_of_text: int) -> Tensor:
    """Where each token's document begins and ends.

    Args:
        tokens: (B, T). A document begins with each end-of-text token, as sampling from one does, and with each row.
        end_of_text: that token.

    Returns:
        (2, B, T) int32: the first position of the token's document, and one past its last. Neither falls along a row.
        Nothing waits for the device.
    """
    T = tokens.size(1)
    position = torch.arange(T, dtype=torch.int32, device=tokens.device)
    opens = tokens == end_of_text
    first = torch.where(opens, position, 0).cummax(1).values
    # The next opening at or after each position; a token's document ends at the one strictly after it.
    opening = torch.where(opens, position, T).flip(1).cummin(1).values.flip(1)
    return torch.stack((first, F.pad(opening[:, 1:], (0, 1), value=T)))


def visible(T: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees, bool: (T, T), or (B, 1, T, T) with documents."""
    position = torch.arange(T, device=device)
    causal = position <= position[:, None]
    return causal if documents is None else causal & (position >= documents[0][:, None, :, None])
