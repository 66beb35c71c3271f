"""Weights that bitsandbytes stores in 4 or 8 bits: kept fit for training, and read back.

Bitsandbytes and peft take a second to import, so they are where there can be such weights only.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from lightllm.models.module_copy import copy_without_hooks


def keep_differentiable(network: nn.Module) -> nn.Module:
    """Keep bitsandbytes from packing 4-bit weights for inference, in place.

    On processors with bfloat16 instructions, the first evaluation packs them for good: with scales rounded to
    bfloat16, and for a product without a backward pass, so that training that goes on loses the gradients of every
    layer below without a word.

    Args:
        network: Any module; layers that are not in 4 bits stay as they are.

    Returns:
        The same module.
    """
    if not _bitsandbytes_in_use():
        return network
    from bitsandbytes.nn.modules import Linear4bit

    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return network


def is_low_bit(layer: nn.Module) -> bool:
    """Tell whether bitsandbytes holds the layer's weight."""
    if not _bitsandbytes_in_use():
        return False
    from bitsandbytes.nn.modules import Int8Params, Params4bit

    return isinstance(getattr(layer, "weight", None), (Params4bit, Int8Params))


def dequantized_weight(layer: nn.Module) -> Tensor:
    """The weight that a 4- or 8-bit layer multiplies by, `[out, in]` in float32; the layer stays as it is."""
    from peft.utils.integrations import dequantize_module_weight

    own = copy_without_hooks(layer)
    own.state_dict()  # bitsandbytes unpacks what it packed for inference before it saves
    return dequantize_module_weight(own).detach().float()


def _bitsandbytes_in_use() -> bool:
    """Whether anybody has imported it; else nothing is of its classes."""
    return "bitsandbytes" in sys.modules
