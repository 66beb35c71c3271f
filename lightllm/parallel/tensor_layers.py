"""Layers that compute with their part of a matrix: the styles of tensor parallelism.

The parameters of a split layer are DTensors on the mesh's tensor axis, so that optimizers, clipping and checkpoints
know the whole. While the layer runs, its parts stand in for them as plain tensors: whatever the layer does with its
weights (a low-rank update of ours, peft's own forward, a fused kernel) it does with a smaller matrix, and all that is
exchanged is the layer's input or output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lightllm.parallel.exchange import gather_last, sum_gradient, sum_parts

Use = Callable[[Tensor], Tensor]
"""What becomes of a parameter's part before the layer sees it."""


class Part(NamedTuple):
    """How one parameter of a layer is split."""

    placement: Placement
    use: Use | None = None


def split(layer: nn.Module, parts: dict[str, Part], mesh: DeviceMesh) -> None:
    """Split parameters over a mesh, in place, and have the layer compute with this rank's parts.

    Args:
        layer: The module whose forward uses them.
        parts: By the parameters' names in the layer.
        mesh: The tensor axis.
    """
    for name, part in parts.items():
        owner, attribute = _owner(layer, name)
        parameter: Any = owner._parameters[attribute]
        if parameter is None or isinstance(parameter, DTensor):
            continue
        owner._parameters[attribute] = nn.Parameter(
            distribute_tensor(parameter.detach(), mesh, [part.placement], src_data_rank=None),
            requires_grad=parameter.requires_grad,
        )
    places = [(*_owner(layer, name), part.use) for name, part in parts.items()]
    swapped: list[tuple[nn.Module, str, Any]] = []

    def put_parts(*_: Any) -> None:
        for owner, attribute, use in places:
            whole: Any = owner._parameters[attribute]  # declared a parameter, which a DTensor is too
            if isinstance(whole, DTensor):
                swapped.append((owner, attribute, whole))
                part: Any = whole.to_local() if use is None else use(whole.to_local())
                owner._parameters[attribute] = part

    def put_back(*_: Any) -> None:
        while swapped:
            owner, attribute, whole = swapped.pop()
            owner._parameters[attribute] = whole

    layer.register_forward_pre_hook(put_parts)
    layer.register_forward_hook(put_back, always_call=True)


def colwise(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Rows of the matrix, which are the layer's outputs, are split: whole input, a part of the output."""
    group = mesh.get_group()
    names = dict(layer.named_parameters())
    split(layer, {name: _colwise_part(name, lambda x: sum_gradient(x, group)) for name in names}, mesh)
    layer.register_forward_pre_hook(lambda _, inputs: (sum_gradient(inputs[0], group), *inputs[1:]))


def gathered_colwise(layer: nn.Module, mesh: DeviceMesh) -> None:
    """As `colwise`, with the parts of the output beside each other on every rank."""
    group = mesh.get_group()
    colwise(layer, mesh)
    layer.register_forward_hook(lambda _, __, output: gather_last(output, group))


def rowwise(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Columns of the matrix, which take the layer's inputs, are split: a part of the input, whole output."""
    group = mesh.get_group()
    first = mesh.get_local_rank() == 0

    def once(bias: Tensor) -> Tensor:  # it is added on one rank, and the others learn its gradient
        return sum_gradient(bias, group) * float(first)

    names = dict(layer.named_parameters())
    parts = {name: _rowwise_part(name, lambda x: sum_gradient(x, group), once) for name in names}
    split(layer, parts, mesh)
    layer.register_forward_hook(lambda _, __, output: sum_parts(output, group))


def replicated(layer: nn.Module, mesh: DeviceMesh, partial_gradient: bool = False) -> None:
    """Have every rank hold a layer's own parameters whole.

    Args:
        layer: A module with parameters of its own.
        mesh: The tensor axis.
        partial_gradient: Whether each rank finds a part of their gradient only, as a norm of its own heads does.
    """
    group = mesh.get_group()
    use: Use | None = (lambda x: sum_gradient(x, group)) if partial_gradient else None
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    split(layer, {name: Part(Replicate(), use) for name in names}, mesh)


def embedding(layer: nn.Embedding, mesh: DeviceMesh) -> None:
    """Rows of the table, which are tokens, are split: each rank looks up those it has, and the ranks add up."""
    group = mesh.get_group()
    count = layer.num_embeddings // mesh.size()
    begin = mesh.get_local_rank() * count
    padding = layer.padding_idx
    asked: list[Tensor] = []

    def look_up_own(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        asked.append(inputs[0])
        layer.padding_idx = None  # its number is another among this rank's rows
        return ((inputs[0] - begin).clamp(0, count - 1), *inputs[1:])

    def add_up(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        tokens, layer.padding_idx = asked.pop(), padding
        if padding is not None:  # whose row gets no gradient
            output = torch.where((tokens == padding)[..., None], output.detach(), output)
        foreign = (tokens < begin) | (tokens >= begin + count)
        return sum_parts(output.masked_fill(foreign[..., None], 0.0), group)

    split(layer, {"weight": Part(Shard(0))}, mesh)
    layer.register_forward_pre_hook(look_up_own)
    layer.register_forward_hook(add_up)


STYLES: dict[str, Callable[[nn.Module, DeviceMesh], None]] = {
    "colwise": colwise,
    "colwise_gather_output": gathered_colwise,
    "colwise_rep": gathered_colwise,
    "rowwise": rowwise,
    "replicated_with_grad_allreduce": lambda layer, mesh: replicated(layer, mesh, partial_gradient=True),
}
"""By transformers' names."""


def _colwise_part(name: str, partial: Use) -> Part:
    """Of a linear layer, or of a low-rank update whose `A` is whole and whose `B` is split."""
    if "lora_A" in name:
        return Part(Replicate(), partial)
    return Part(Shard(0))


def _rowwise_part(name: str, partial: Use, once: Use) -> Part:
    """Of a linear layer, or of a low-rank update whose `A` is split and whose `B` is whole."""
    if name.endswith("bias"):
        return Part(Replicate(), once)
    if "lora_B" in name:
        return Part(Replicate(), partial)
    return Part(Shard(1))


def _owner(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    path, _, attribute = name.rpartition(".")
    return layer.get_submodule(path), attribute
