"""Cutting a network at its blocks into the stages of a pipeline.

A stage is the network's own forward pass, in which the blocks of other stages are passed over: it begins with the
hidden states that came from the stage before, and ends with those that go to the next. Rotary embeddings and masks are
made by that forward pass where they are needed, from the batch's positions, so packed documents stay apart as on one
device; and any architecture can be cut whose blocks hand on hidden states alone, which `check_composition` finds out.

The weights of other stages stay where they were, under their names, on torch's meta device: they have shapes, types
and a place in the optimizer's groups, and take no memory. So names and order of a rank's parameters are those of the
whole network.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.models.hidden_states import hidden_states
from lightllm.models.inference import inference
from lightllm.parallel.layout import Layout, Part, probe_batch


class Stage(nn.Module):
    """Consecutive blocks of a network, with the embedding before the first and the head behind the last.

    Args:
        layout: Where the network keeps what.
        index: Which stage, from 0.
        num_stages: Of how many.
        begin: Its first block.
        end: The block behind its last.
    """

    def __init__(self, layout: Layout, index: int, num_stages: int, begin: int, end: int) -> None:
        super().__init__()
        self.index = index
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self.microbatches: Sequence[TextBatch] = ()
        """Those of the step that runs; `forward` is told which one."""
        self._layout = layout
        blocks = list(layout.stack)
        own = [part for part in layout.parts if (self.is_first if part.before else self.is_last)]
        # What the stage owns, for whoever asks it for its parameters; their names are those that the network gives.
        self.blocks = nn.ModuleList(blocks[begin:end])
        self.parts = nn.ModuleList(part.module for part in own)
        passed = [_PassedOver(block, layout.returns_tuple) for block in blocks]
        stack = nn.ModuleList([*passed[:begin], *blocks[begin:end], *passed[end:]])
        others = [part for part in layout.parts if part not in own]
        # In tuples, so that they are no children of this module.
        self._replacements = (
            (layout.owner, layout.name, stack),
            *((part.owner, part.name, _stand_in(part, blocks[begin])) for part in others),
        )
        self._entrance = () if self.is_first else (passed[begin - 1],)
        self._exit = () if self.is_last else (passed[end],)

    @override
    def forward(self, received: Tensor, number: Tensor) -> Tensor:
        """Run one of `microbatches`.

        Args:
            received: Hidden states `[batch, seq, hidden]` from the stage before; for the first stage, anything.
            number: Which of them, int64 `[1]`.
        """
        output = self.run(self.microbatches[int(number)], None if self.is_first else received)
        if torch.is_grad_enabled() and not output.requires_grad:
            # Nothing trains up to here. A gradient comes back all the same, as to any stage, and ends here.
            output = output.detach().requires_grad_()
        return output

    def run(self, batch: TextBatch, received: Tensor | None) -> Tensor:
        """Hidden states `[batch, seq, hidden]` at the end of the stage: of the last one, those that the head takes.

        Args:
            batch: All of its fields are there on every stage.
            received: Hidden states at the end of the stage before; None for the first stage.
        """
        for way_in in self._entrance:
            way_in.instead = received
        for way_out in self._exit:
            way_out.keeps = True
        with self._layout.context(), _replaced(self._replacements):
            output = hidden_states(self._layout.network, batch)
        for way_in in self._entrance:
            way_in.instead = None
        for way_out in self._exit:
            output = way_out.taken()
        return output.contiguous()


def make_stages(layout: Layout, sizes: Sequence[int]) -> list[Stage]:
    """All stages of a network, of so many blocks each."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    cuts = zip([0, *ends], ends, strict=False)
    return [Stage(layout, index, len(sizes), begin, end) for index, (begin, end) in enumerate(cuts)]


def check_composition(layout: Layout, stages: Sequence[Stage]) -> None:
    """Refuse a network of which the stages, one after another, are not the whole.

    Raises:
        ValueError: More than hidden states goes from block to block.
    """
    batch = probe_batch(layout.network)
    received: Tensor | None = None
    with layout.context(), inference(layout.network):
        whole = hidden_states(layout.network, batch)
        for stage in stages:
            received = stage.run(batch, received)
    assert received is not None
    if not torch.allclose(received, whole, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{layout.architecture} cannot be cut into stages: more than hidden states goes from block to block; take "
            "another strategy, such as ddp"
        )


def drop_others(stages: Sequence[Stage], owned: Collection[int]) -> None:
    """Move the weights of all stages but the owned ones to the meta device, where they take no memory.

    A weight that belongs to two stages, as a head that is tied to the embedding, stays with both.
    """
    mine = [tensor for stage in stages if stage.index in owned for tensor in (*stage.parameters(), *stage.buffers())]
    kept = {id(tensor) for tensor in mine}
    moved: dict[int, Tensor] = {}
    for stage in stages:
        for module in stage.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in kept:
                        moved.setdefault(id(tensor), _on_meta(tensor))
                        tensors[name] = moved[id(tensor)]  # type: ignore[assignment]  # a parameter for a parameter
                        kept.add(id(tensors[name]))


def shared_between(first: Stage, last: Stage, in_last: bool) -> list[tuple[nn.Module, str]]:
    """Where the parameters are that both have, as a head that is tied to the embedding: modules, and names in them.

    Args:
        first: One stage.
        last: The other.
        in_last: Whether the places in `last` are wanted.
    """
    ids = {id(parameter) for parameter in (first if in_last else last).parameters()}
    return [
        (module, name)
        for module in (last if in_last else first).modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in ids
    ]


class _PassedOver(nn.Module):
    """Stands where a block of another stage does, and hands on the hidden states that it is called with.

    Args:
        block: Whose attributes it has: decoders ask some layers what kind they are.
        returns_tuple: Whether the block returns its hidden states as the first of several things.
    """

    def __init__(self, block: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self._block = (block,)
        self.returns_tuple = returns_tuple
        self.instead: Tensor | None = None
        """What it hands on instead."""
        self.keeps = False
        """Whether it keeps what it is called with next."""
        self._kept: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    @override
    def forward(self, *arguments: Any, **options: Any) -> Any:
        hidden = arguments[0] if arguments else options["hidden_states"]
        if self.keeps:
            self._kept, self.keeps = hidden, False
        if self.instead is not None:
            hidden = self.instead
        return (hidden, None) if self.returns_tuple else hidden

    def taken(self) -> Tensor:
        """What it kept, which it gives up."""
        assert self._kept is not None, "the block that this stands for was not called"
        kept, self._kept = self._kept, None
        return kept


class _Blank(nn.Module):
    """Stands where an embedding does that another stage has: zeros of its shape, which go nowhere."""

    def __init__(self, output: Tensor, looks_up: bool, neighbour: nn.Module) -> None:
        super().__init__()
        self.width, self.dtype, self.looks_up = output.shape[-1], output.dtype, looks_up
        self._neighbour = (neighbour,)

    @property
    def weight(self) -> Tensor:
        """Of which some decoders (Llama 4's) ask where it is: a weight of a block that is here."""
        return next(self._neighbour[0].parameters())

    @override
    def forward(self, given: Tensor, *_: Any, **__: Any) -> Tensor:
        shape = given.shape if self.looks_up else given.shape[:-1]
        return torch.zeros(*shape, self.width, dtype=self.dtype, device=given.device)


class _Unchanged(nn.Module):
    """Stands where a part does that another stage has, and whose result goes nowhere."""

    @override
    def forward(self, given: Tensor, *_: Any, **__: Any) -> Tensor:
        return given


def _stand_in(part: Part, neighbour: nn.Module) -> nn.Module:
    if part.before and part.output is not None:
        # Itself, or within what peft puts around one that it adapts or trains a copy of.
        looks_up = any(isinstance(child, nn.Embedding) for child in part.module.modules())
        return _Blank(part.output, looks_up, neighbour)
    return _Unchanged()


def _on_meta(tensor: Tensor) -> Tensor:
    moved = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(moved, requires_grad=tensor.requires_grad)
    return moved


@contextmanager
def _replaced(replacements: Sequence[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Within it, children have others in their places."""
    before = [owner._modules[name] for owner, name, _ in replacements]
    try:
        for owner, name, other in replacements:
            owner._modules[name] = other
        yield
    finally:
        for (owner, name, _), module in zip(replacements, before, strict=True):
            owner._modules[name] = module
