"""What a block keeps and computes, found by running it on fake tensors, which have shapes and no content.

So it is right for whatever a block is: grouped queries, an adapter, autocast's copies of weights, a kernel that keeps
no scores. One block is run, whatever the network's depth.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from lightllm.models.anatomy import OwnNetwork, blocks, decoder, unwrapped
from lightllm.models.document_attention import BY_DOCUMENT
from lightllm.parallel.operation_meter import Operation, OperationMeter


class MicroBatch(NamedTuple):
    """The rows that a device computes at once."""

    rows: int
    length: int
    """Positions in a row."""
    document: int
    """Positions of a document: the row's, where it holds one."""


@dataclass(frozen=True)
class BlockProfile:
    """A block on one device: bytes and operations of a micro-batch."""

    hidden: int
    """Bytes of the hidden states between blocks."""
    kept: int
    """What the forward pass keeps for the backward pass, its input included if that is kept."""
    keeps_input: bool
    forward_peak: int
    """The most that the forward pass holds beside its input."""
    backward_peak: int
    """The most that the backward pass adds to what was kept, gradients of the block's weights included."""
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]


@dataclass(frozen=True)
class NetworkProfile:
    """What a network of such blocks takes of a device, beside them and its loss."""

    block: BlockProfile
    outside_kept: int
    """Kept for the backward pass outside of blocks, the last hidden states included."""
    outside: tuple[Operation, ...]
    """Of the forward pass, outside of blocks; embedding and norms."""


def profile(
    make: Callable[[], nn.Module], batch: MicroBatch, autocast: torch.dtype | None, by_document: bool
) -> NetworkProfile:
    """Run a network of one block on fake tensors.

    Args:
        make: Makes the network, adapted, on the meta device.
        batch: How many rows, and how long.
        autocast: The type of products under mixed precision.
        by_document: Whether packed documents are attended to one by one, as on a CPU.

    Raises:
        ValueError: Its course depends on values, which fake tensors don't have, or it cannot be run so.
    """
    network = make()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _pretend(network)
            return _Profiler(network.train(), batch, autocast, by_document).profile()
    except (DataDependentOutputException, DynamicOutputShapeException, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"what {type(unwrapped(network)).__name__} keeps cannot be estimated, since a block of it does not run on "
            f"tensors without values: {str(error).splitlines()[0]}"
        ) from error


def _pretend(network: nn.Module) -> None:
    """Put fake tensors of a processor in the places of a network's parameters and buffers; call it among fakes."""
    made: dict[int, Tensor] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                if tensor is not None:
                    tensors[name] = made[id(tensor)]  # type: ignore[assignment]  # a parameter for a parameter


class _Profiler:
    """One block of a fake network, and what is around it."""

    def __init__(self, network: nn.Module, batch: MicroBatch, autocast: torch.dtype | None, by_document: bool) -> None:
        self._network = network
        self._batch = batch
        self._autocast = autocast
        self._by_document = by_document and batch.document < batch.length
        self._block = blocks(network)[0]
        self._meter = OperationMeter()
        self._call: _Call | None = None
        self._span = (0, 0)

    def profile(self) -> NetworkProfile:
        whole_kept, outside = self._run_whole()
        block = self._run_block()
        return NetworkProfile(block, max(whole_kept - block.kept, block.hidden), outside)

    def _cast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast("cpu", self._autocast)

    def _run_whole(self) -> tuple[int, tuple[Operation, ...]]:
        """Bytes that the network of one block keeps, and the operations of its forward pass outside of the block."""
        rows, length = self._batch[:2]
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        positions = torch.arange(length).expand(rows, length)
        meter = self._meter
        handles = [
            self._block.register_forward_pre_hook(self._remember, with_kwargs=True),
            self._block.register_forward_hook(self._leave),
        ]
        with meter:
            with self._cast():
                hidden = self._hidden(tokens, positions)
            kept = meter.live
        for handle in handles:
            handle.remove()
        del hidden
        begin, end = self._span
        return kept, (*meter.operations[:begin], *meter.operations[end:])

    def _hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        base = unwrapped(self._network)
        if isinstance(base, OwnNetwork):
            hidden = base(tokens, positions)
        else:
            hidden = decoder(base)(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    def _remember(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Keep what the block is called with, all but the hidden states; no mask, as on rows of one document."""
        self._span = (len(self._meter.operations), 0)
        if "attention_mask" in options:  # fake positions are taken for packed ones
            options = {**options, "attention_mask": None}
        self._call = _Call.of(arguments, options)
        return arguments, options

    def _leave(self, *_: Any) -> None:
        self._span = (self._span[0], len(self._meter.operations))

    def _lengths(self) -> Tensor:
        """Lengths of the documents, as `by_document` hands them to every layer."""
        base = unwrapped(self._network)
        assert isinstance(base, PreTrainedModel)
        base.set_attn_implementation(BY_DOCUMENT)
        full, rest = divmod(self._batch.length, self._batch.document)
        row = [self._batch.document] * full + ([rest] if rest else [])
        with unset_fake_temporarily():  # it is read
            return torch.tensor(row * self._batch.rows)

    def _run_block(self) -> BlockProfile:
        call = self._call
        assert call is not None
        mask = {"attention_mask": self._lengths()} if self._by_document and "attention_mask" in call.options else {}
        size = call.shape.numel() * call.dtype.itemsize
        meter = OperationMeter()
        with meter:
            start = torch.empty(call.shape, dtype=call.dtype, requires_grad=True)
            before = meter.live
            hidden = start.view_as(start).clone()
            meter.operations.clear()
            meter.peak = meter.live
            with self._cast():
                output = call.repeat(self._block, hidden, mask)
            forward, forward_peak = tuple(meter.operations), meter.peak - before - size
            edge = torch.autograd.graph.get_gradient_edge(output)
            like = output.shape, output.dtype
            given = weakref.ref(hidden.untyped_storage())
            del hidden, output
            kept, keeps_input = meter.live - before, given() is not None
            gradient = torch.empty(like[0], dtype=like[1])
            meter.operations.clear()
            meter.peak = began = meter.live
            torch.autograd.backward([edge], [gradient])
        backward = tuple(meter.operations)
        return BlockProfile(size, kept, keeps_input, forward_peak, meter.peak - began, forward, backward)


class _Call(NamedTuple):
    """What a block was called with, its hidden states apart."""

    shape: torch.Size
    dtype: torch.dtype
    name: str | None
    """Of the hidden states' argument; None where it is the first one."""
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, arguments: tuple[Any, ...], options: dict[str, Any]) -> _Call:
        if arguments:
            hidden, name = arguments[0], None
        else:
            name, hidden = next((name, one) for name, one in options.items() if isinstance(one, Tensor))
        assert isinstance(hidden, Tensor)
        rest = {key: _detached(one) for key, one in options.items() if key != name}
        return cls(hidden.shape, hidden.dtype, name, tuple(map(_detached, arguments[1:])), rest)

    def repeat(self, block: nn.Module, hidden: Tensor, instead: dict[str, Any]) -> Tensor:
        """Call the block again, with other hidden states and some other options."""
        options = {**self.options, **instead}
        if self.name is None:
            output = block(hidden, *self.arguments, **options)
        else:
            output = block(**{self.name: hidden}, **options)
        output = output[0] if isinstance(output, tuple) else output
        assert isinstance(output, Tensor)
        return output


def _detached(argument: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, argument)
