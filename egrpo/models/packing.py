"""Packed latents: tokens of 2 x 2 latent pixels, as FLUX.1 and Qwen-Image take them."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(x: Tensor) -> Tensor:
    """Tokens [B, h/2 * w/2, 4 C] of latents [B, C, h, w]."""
    b, c, h, w = x.shape
    patches = x.view(b, c, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpacked(tokens: Tensor, h: int, w: int) -> Tensor:
    """Latents [B, C, h, w] of tokens [B, h/2 * w/2, 4 C]; undoes :func:`packed`."""
    b, _, c = tokens.shape
    patches = tokens.view(b, h // 2, w // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def token_positions(h: int, w: int, device: torch.device) -> Tensor:
    """FLUX.1's (0, row, column) of each token, [h/2 * w/2, 3]."""
    rows, columns = torch.arange(h // 2, device=device), torch.arange(w // 2, device=device)
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1).float()
