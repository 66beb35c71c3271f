"""Which layers of a network are compressed: the linear layers of its blocks."""

from __future__ import annotations

import re

from torch import nn

from lightllm.models.anatomy import blocks, unwrapped
from lightllm.models.low_bit import is_low_bit


def prunable_layers(network: nn.Module, leave_out: list[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers of the blocks; embedding, head and norms are no part of it.

    Args:
        network: The network, adapted or not.
        leave_out: Regular expressions; layers whose name one of them matches somewhere are left out.

    Returns:
        The layers, adapted ones with their adapters, by name in the plain network.

    Raises:
        ValueError: An expression matches nothing, or there is no such layer.
    """
    stack = blocks(network)
    base = unwrapped(network)
    prefix = next(name for name, module in base.named_modules() if module is stack)
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        inside_found = any(name.startswith(f"{outer}.") for outer in found)
        if name.startswith(f"{prefix}.") and not inside_found and _is_linear(module):
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(base).__name__} has no nn.Linear in its blocks (GPT-2's Conv1D are none): nothing to compress"
        )
    for pattern in leave_out or []:
        matching = [name for name in found if re.search(pattern, name)]
        if not matching:
            raise ValueError(
                f"no layer's name matches {pattern!r}, so nothing is left out by it; {next(iter(found))!r} is one"
            )
        for name in matching:
            del found[name]
    if not found:
        raise ValueError(f"leave_out leaves no layer to compress: {leave_out}")
    return found


def linear_layer(name: str, layer: nn.Module) -> nn.Linear:
    """The layer that holds the weight: `layer` itself, or what its adapter is on.

    Raises:
        ValueError: It is no linear layer with a weight of ordinary numbers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if is_low_bit(base):
        raise ValueError(
            f"the weight of {name} is stored in few bits, which can be neither masked nor rounded once more: take LoRA "
            "instead of QLoRA"
        )
    if not isinstance(base, nn.Linear):
        raise ValueError(f"{name} is a {type(base).__name__}, no linear layer: leave it out")
    return base


def _is_linear(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, nn.Linear)
