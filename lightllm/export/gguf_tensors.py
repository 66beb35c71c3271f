"""The tensors of a GGUF file: their types, and their bytes.

What was rounded to a grid already is written as it is, scale for scale and integer for integer; to round it once more
would find other scales.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lightllm.compression.fake_quantizer import LowBitWeight

GGUFType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
GGUF_TYPES: tuple[GGUFType, ...] = get_args(GGUFType)
"""How the matrices of a GGUF file can be stored: 32, 16, 16, 8.5, 4.5 and 5 bits a weight."""

BLOCK = 32
"""How many weights share a scale in the types of few bits."""

Array = np.ndarray[Any, Any]


class Stored(NamedTuple):
    """One tensor of the file."""

    source: str
    """Its name in the network."""
    name: str
    """Its name in the file."""
    kind: GGUFType
    low_bits: LowBitWeight | None = None
    """The integers and scales that are stored as they are; None where the file's type decides."""


def fitting(low_bits: LowBitWeight | None, kind: GGUFType) -> LowBitWeight | None:
    """The integers and scales if a type can hold them: of as many bits, with blocks of 32 within a group."""
    if low_bits is None or kind != type_of(low_bits):
        return None
    group = low_bits.integers.shape[1] // low_bits.scales.shape[1]
    return low_bits if group % BLOCK == 0 else None


def type_of(low_bits: LowBitWeight) -> GGUFType:
    """The type of as many bits."""
    return "Q4_0" if low_bits.bits == 4 else "Q8_0"


def is_exact(tensor: Tensor, stored: Stored) -> bool:
    """Whether the file holds a tensor to the last bit."""
    if stored.low_bits is not None:
        return torch.equal(stored.low_bits.scales.float(), stored.low_bits.scales.half().float())
    return stored.kind == "F32" or (stored.kind == "BF16" and tensor.dtype == torch.bfloat16)


def interleaved(rows: Array, num_heads: int) -> Array:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding.

    transformers rotates a head's first half with its second, llama.cpp each even row with the odd one after it.
    """
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def blocks(low_bits: LowBitWeight) -> Array:
    """Blocks of 32 integers behind their scale, `[out, bytes]`; a scale of more weights is repeated."""
    num_blocks = low_bits.integers.shape[1] // BLOCK
    repeats = num_blocks // low_bits.scales.shape[1]
    scales = low_bits.scales.repeat_interleave(repeats, dim=1).half().cpu().numpy()[..., None].view(np.uint8)
    integers = low_bits.integers.cpu().numpy().reshape(len(scales), num_blocks, BLOCK)
    if low_bits.bits == 4:  # two in a byte: one of the first half, and one of the second in the high bits
        halves = (integers + 8).astype(np.uint8)
        integers = halves[..., : BLOCK // 2] | (halves[..., BLOCK // 2 :] << 4)
    return np.concatenate([scales, integers.view(np.uint8)], axis=-1).reshape(len(scales), -1)
