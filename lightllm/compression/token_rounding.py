"""Rounding of activations to int8, with ranges found anew for every token, to the bit as torchao does it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm.compression.grids import Q8_0Grid, SymmetricGrid

_GGUF = Q8_0Grid()
_ROWS = SymmetricGrid(8, float32_scales=True)


def round_asymmetric(inputs: Tensor) -> Tensor:
    """Inputs `[..., in]` as 256 steps from a token's smallest value to its largest, 0 among them.

    This is what torchao's tensors of few bits do to activations (`int8_asym_per_token`).
    """
    exact = inputs.float()  # extremes are found faster so, and are the same
    low = exact.amin(-1, keepdim=True).to(inputs.dtype).clamp_(max=0)
    high = exact.amax(-1, keepdim=True).to(inputs.dtype).clamp_(min=0)
    scales = ((high - low) / 255).clamp_(min=torch.finfo(inputs.dtype).smallest_normal)
    zero = (-128 - torch.round(low / scales)).clamp_(-128, 127)
    integers = (inputs * (1.0 / scales)).round_().add_(zero).clamp_(-128, 127)
    return integers.sub_(zero).mul_(scales)


def round_symmetric(inputs: Tensor) -> Tensor:
    """Inputs `[..., in]` as `-128 … 127` times a token's scale, as torchao's int8 tensors do it (`PerRow`)."""
    return _ROWS.round(inputs, _ROWS.scales(inputs)).to(inputs.dtype)


def round_blocks(inputs: Tensor) -> Tensor:
    """Inputs `[..., in]` in blocks of 32 of GGUF's Q8_0, as llama.cpp multiplies them by weights of few bits."""
    return _GGUF.round_weight(inputs).to(inputs.dtype)
