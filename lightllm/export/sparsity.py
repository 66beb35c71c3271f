"""What an export says of zeros: how many weights its masks pruned, and whether in a pattern that hardware knows."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightllm.compression.masking import masks_of
from lightllm.compression.masks import Pattern, common_pattern, follows, sparsity_of

FIELD = "sparsity_config"
"""The field of config.json."""


def sparsity_report(network: nn.Module) -> dict[str, Any] | None:
    """What `export.json` says of a network's masks; None where there are none, or they keep everything.

    `structure` is N:M if every group of every masked layer keeps exactly N, else "unstructured"; `share` is that of the
    weights of the masked `layers` that are pruned.
    """
    masks = masks_of(network)
    sizes = {name: keep.numel() for name, keep in masks.items()}
    pruned = sum(sparsity_of(keep) * sizes[name] for name, keep in masks.items())
    if not pruned:
        return None
    pattern = common_pattern(masks.values())
    structure = "unstructured" if pattern is None else str(pattern)
    return {"structure": structure, "share": pruned / sum(sizes.values()), "layers": len(masks)}


def state_sparsity(merged: PreTrainedModel, network: nn.Module) -> None:
    """Have the configuration of a merged network say that its weights are N:M, if they are.

    The field has the form that compressed-tensors gave it for weights that are stored whole (`format` is "dense"),
    with the layers that are not sparse under `ignore`. It stands by itself, not in `quantization_config`, where
    transformers would ask for that package and vLLM, which has given up 2:4 (its pull request 36799), refuse to load:
    whoever knows the field finds it, everybody else loads ordinary weights. One that the network came with is dropped
    unless its weights still are what it says.

    Args:
        merged: The merged network, whose configuration is changed.
        network: The network that it was made from.
    """
    masks = masks_of(network)
    stated = getattr(merged.config, FIELD, None)
    pattern, names = common_pattern(masks.values()), set(masks)
    linear = {name: module for name, module in merged.named_modules() if isinstance(module, nn.Linear)}
    if not masks and isinstance(stated, dict) and re.fullmatch(r"[1-9]\d*:\d+", str(stated.get("sparsity_structure"))):
        pattern = Pattern.parse(stated["sparsity_structure"])
        names = set(linear) - set(stated.get("ignore") or [])
        if not all(follows(linear[name].weight, pattern) for name in names):
            pattern = None
    if stated is not None:
        delattr(merged.config, FIELD)
    if pattern is None:
        return
    zeros = sum(parameter.numel() - int(torch.count_nonzero(parameter)) for parameter in merged.parameters())
    statement = {
        "format": "dense",
        "sparsity_structure": str(pattern),
        "global_sparsity": zeros / merged.num_parameters(),
        "targets": ["Linear"],
        "ignore": sorted(set(linear) - names),
    }
    setattr(merged.config, FIELD, statement)
