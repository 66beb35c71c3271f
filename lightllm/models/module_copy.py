"""Copies of single layers out of a network in training."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

from torch import nn

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def copy_without_hooks(module: ModuleType) -> ModuleType:
    """A copy with weights of its own, on which no hook is registered.

    A hook is often a method, of a callback or a whole training module, and copying it would copy that too.
    """
    hooks = {
        id(value): type(value)()
        for child in module.modules()
        for name, value in vars(child).items()
        if "_hooks" in name and isinstance(value, dict)
    }
    return deepcopy(module, dict(hooks))
