"""2:4 weights on GPUs whose tensor cores skip the zeros: torch's semi-structured kernels, for inference."""

from __future__ import annotations

import torch
from torch import nn

from lightllm.compression.masks import Pattern, follows

_ROWS, _COLUMNS = 32, 64
"""What the sides of a 16-bit weight must be multiples of for either of torch's two backends (CUTLASS, cuSPARSELt)."""


def use_semi_structured_kernels(network: nn.Module) -> list[str]:
    """Have every linear layer that is 2:4 keep its weight compressed and multiply by it in torch's kernels, in place.

    The weights become `torch.sparse.SparseSemiStructuredTensor`: half of the values and two bits for each that stays.
    They serve inference; nothing trains any more, and the network is saved before this.

    This has not been run on a GPU by its authors: what is tested is which layers it takes, and what it refuses.

    Args:
        network: On a CUDA device of compute capability 8.0 or more (Ampere and later), in float16 or bfloat16; as it
            comes from an export of a 2:4 run.

    Returns:
        The names of the layers that were changed.

    Raises:
        ValueError: There is no such device, the network is not on it, or no layer is 2:4.
    """
    device = next(network.parameters()).device
    if device.type != "cuda":
        raise ValueError(
            f"semi-structured kernels need a CUDA device, and the network is on {device.type}: move it there, or leave "
            "its 2:4 weights dense, which computes the same"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(
            f"semi-structured kernels need compute capability 8.0 (Ampere), and {torch.cuda.get_device_name(device)} "
            f"has {capability[0]}.{capability[1]}: leave the 2:4 weights dense, which computes the same"
        )
    layers = semi_structured_layers(network)
    if not layers:
        raise ValueError(
            "no linear layer of the network is 2:4 in float16 or bfloat16: prune with pattern 2:4, or convert its dtype"
        )
    for layer in layers.values():
        compressed = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        layer.weight = nn.Parameter(compressed, requires_grad=False)
    return list(layers)


def semi_structured_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose weights the kernels take: 2:4, in 16 bits, `[out, in]` of multiples of 32 and 64."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.dtype in (torch.float16, torch.bfloat16)
        and module.out_features % _ROWS == 0
        and module.in_features % _COLUMNS == 0
        and follows(module.weight, Pattern(2, 4))
    }
