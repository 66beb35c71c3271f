"""What operations cost: bytes that are alive, products, and bytes that move, counted as tensors are made.

It counts real tensors and fake ones alike (`torch._subclasses.FakeTensorMode`), so a step can be measured that would
not fit on this machine.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from typing_extensions import override


class Operation(NamedTuple):
    """One operation that took time on the device."""

    flops: float
    """A multiply and an add are two; 0 for what is no product."""
    moved: float
    """Bytes read and written."""


class OperationMeter(TorchDispatchMode):
    """Within it, tensors and operations are counted; what was made before is not.

    Attributes:
        live: Bytes of the tensors that were made within and are still there.
        peak: The most that `live` has been since it was set; set it to `live` to begin anew.
        operations: All operations but views and allocations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.operations: list[Operation] = []
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        inputs = _tensors((args, kwargs))
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in given:  # a view of what was made before is nothing new
                self._count(tensor)
        if self.live > self.peak:
            self.peak = self.live
        if inputs and not _is_view(func, given, outputs):
            moved = float(sum(map(_bytes, inputs)) + sum(map(_bytes, outputs)))
            self.operations.append(Operation(_flops(func, args, kwargs, result), moved))
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._storages:
            return
        self.live += size

        def forget(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, forget)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """What a kernel reads of a tensor: an expanded one lies there once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride != 0) * tensor.element_size()


def _is_view(func: Any, given: set[int], outputs: Iterable[Tensor]) -> bool:
    """Tell whether an operation only looks at its input, one of the storages `given`, in another way."""
    return not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in given for tensor in outputs)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    name = func._schema.name
    if "scaled_dot_product" in name:
        return _attention_flops(name, args, kwargs)
    formula = flop_registry.get(func._overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))


def _attention_flops(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Two products of every query with every key that it sees; the fused backward pass makes five."""
    backward = "backward" in name
    query, key = args[1:3] if backward else args[:2]
    batch, heads, length, width = query.shape
    pairs = batch * heads * length * key.shape[-2]
    causal = any(value is True for value in (*args, kwargs.get("is_causal")))
    return 2.0 * (5 if backward else 2) * pairs * width * (0.5 if causal else 1.0)
