"""What a network is made of, seen as a pipeline: its blocks, and what is computed before and behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightllm.batch import TextBatch
from lightllm.models.anatomy import blocks, learns_a_prompt, unwrapped, vocabulary_size
from lightllm.models.hidden_states import hidden_states
from lightllm.models.inference import inference, network_device

Cost = Literal["flops", "parameters"]
"""What stages are to have equally much of: multiplications per token, or weights."""


Context = Callable[[], AbstractContextManager[Any]]
"""Makes a context: autocast, say."""

_NO_OWNER = "so no stage of a pipeline could own it: take another strategy, such as ddp"


class Part(NamedTuple):
    """Something with weights that is no block: an embedding, a norm, the head."""

    owner: nn.Module
    name: str
    """Under which its owner knows it."""
    module: nn.Module
    before: bool
    """Whether it is computed before the first block; otherwise behind the last."""
    output: Tensor | None
    """What it returned for a few tokens, None if it was not asked: as the head, which belongs to the loss."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a network keeps its blocks and parts, and what goes from block to block."""

    network: nn.Module
    architecture: str
    stack: nn.ModuleList
    owner: nn.Module
    """The module whose attribute `name` the stack is."""
    name: str
    parts: tuple[Part, ...]
    returns_tuple: bool
    """Whether a block returns its hidden states as the first of several things."""
    width: int
    """Of the hidden states."""
    dtype: torch.dtype
    """Of the hidden states."""
    context: Context = nullcontext
    """Makes that in which the network computes."""

    def costs(self, cost: Cost) -> tuple[list[float], float, float]:
        """What each block costs, and what is before and behind them, in the unit of `cost`."""
        measure = _multiplications if cost == "flops" else _weights
        before = sum(measure(part.module) for part in self.parts if part.before)
        behind = sum(measure(part.module) for part in self.parts if not part.before)
        return [float(measure(block)) for block in self.stack], float(before), float(behind)


def find_layout(network: nn.Module, context: Context = nullcontext) -> Layout:
    """Look at a network, and at what it does with a few tokens.

    Args:
        network: The whole network, with its weights.
        context: Makes that in which it computes: autocast, say.

    Raises:
        ValueError: It cannot be cut at its blocks; the message says why.
    """
    if learns_a_prompt(network):
        raise ValueError(
            "a learned prompt or prefix is put before every row by the whole network, which a stage of a pipeline is "
            "not: take LoRA or Full as the adapter"
        )
    base, stack = unwrapped(network), blocks(network)
    path = _path(base, stack)
    places = _parts(path)
    with _watched(stack, [child for _, _, child in places]) as watch, context(), inference(network):
        hidden_states(network, probe_batch(network))
    for owner, _ in path:
        for name, _ in owner.named_parameters(recurse=False):
            raise ValueError(f"{type(base).__name__} keeps {name!r} in no layer of its own, {_NO_OWNER}")
    for _, name, child in places:
        if watch.phases.get(id(child), {"behind"}) not in ({"before"}, {"behind"}):
            raise ValueError(f"{type(base).__name__} uses its {name!r} between its blocks or at both ends, {_NO_OWNER}")
    output = watch.block
    assert output is not None, "the network does not call its blocks"
    hidden = output if isinstance(output, Tensor) else output[0]
    owner, name = path[-1]
    return Layout(
        network=network,
        architecture=type(base).__name__,
        stack=stack,
        owner=owner,
        name=name,
        parts=tuple(
            Part(*place, watch.phases.get(id(place[2])) == {"before"}, watch.outputs.get(id(place[2])))
            for place in places
        ),
        returns_tuple=not isinstance(output, Tensor),
        width=hidden.shape[-1],
        dtype=hidden.dtype,
        context=context,
    )


def probe_batch(network: nn.Module) -> TextBatch:
    """One row of eight tokens, on the network's device."""
    positions = torch.arange(8, device=network_device(network))[None]
    tokens = positions % vocabulary_size(network)
    return TextBatch(input_ids=tokens, labels=tokens, position_ids=positions, document_ids=torch.zeros_like(tokens))


def _parts(path: list[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str, nn.Module]]:
    """What has weights beside the way to the stack: its owner, its name there, and itself."""
    on_path = {id(owner._modules[name]) for owner, name in path}
    return [
        (owner, name, child)
        for owner, _ in path
        for name, child in owner._modules.items()
        if child is not None and id(child) not in on_path and any(True for _ in child.parameters())
    ]


class _Watch:
    """What was seen of the network's modules in a call."""

    def __init__(self) -> None:
        self.phase = "before"
        self.phases: dict[int, set[str]] = {}
        self.outputs: dict[int, Tensor] = {}
        self.block: Any = None

    def enter_blocks(self, *_: object) -> None:
        self.phase = "within"

    def leave_blocks(self, _: nn.Module, __: object, output: Any) -> None:
        self.phase, self.block = "behind", output

    def see(self, module: nn.Module, _: object, output: Any) -> None:
        self.phases.setdefault(id(module), set()).add(self.phase)
        if isinstance(output, Tensor):
            self.outputs[id(module)] = output


@contextmanager
def _watched(stack: nn.ModuleList, parts: list[nn.Module]) -> Iterator[_Watch]:
    watch = _Watch()
    handles = [part.register_forward_hook(watch.see) for part in parts]
    handles.append(stack[0].register_forward_pre_hook(watch.enter_blocks))
    handles.append(stack[-1].register_forward_hook(watch.leave_blocks))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _path(base: nn.Module, stack: nn.ModuleList) -> list[tuple[nn.Module, str]]:
    """The modules around the stack, outermost first, each with the name that leads on."""
    names = next(name for name, module in base.named_modules() if module is stack).split(".")
    owners = [base]
    for name in names[:-1]:
        owners.append(owners[-1].get_submodule(name))
    return list(zip(owners, names, strict=True))


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiplications(module: nn.Module) -> int:
    """Multiply-adds per token: of matrices; embeddings are looked up."""
    total = 0
    for child in module.modules():
        if isinstance(child, nn.Linear):  # asked for its shape, since a 4-bit weight is packed
            total += child.in_features * child.out_features
        elif not isinstance(child, nn.Embedding):
            total += sum(one.numel() for one in child.parameters(recurse=False) if one.ndim >= 2)
    return total
