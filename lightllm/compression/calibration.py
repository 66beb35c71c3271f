"""Layer by layer through a network on calibration data: what comes into each layer decides how the layer is changed.

The inputs of a block are those that the blocks before it give *after* they were changed, so that each block is fitted
to what it will meet. One block's statistics are in memory at a time, beside the hidden states of the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.compression.block_calls import BlockCall, record_calls, run_block
from lightllm.models.anatomy import blocks, learns_a_prompt
from lightllm.models.inference import inference, network_device, own_random_numbers


class InputStatistics(ABC):
    """What is kept of everything that comes into a layer."""

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Count the inputs of some positions, float32 `[positions, in]`; padding is left out already."""


Statistics = TypeVar("Statistics", bound=InputStatistics)


def change_layer_by_layer(
    network: nn.Module,
    batches: Sequence[TextBatch],
    layers: Mapping[str, nn.Module],
    new_statistics: Callable[[], Statistics],
    change: Callable[[str, nn.Module, Statistics], None],
) -> None:
    """Measure the inputs of every block's layers, change the layers, and go on with what the changed block gives.

    The layers of one block are all measured before the first of them is changed. Cost: two forward passes over the
    blocks. The network computes as in evaluation and without gradients; its mode, its gradients and the random numbers
    are afterwards what they were.

    Args:
        network: Any network of lightllm, with or without an adapter, masks or fake quantizers.
        batches: Calibration data, packed or padded, on any device.
        layers: What is to change, by name: modules within the network's blocks that take one tensor `[..., in]`.
        new_statistics: Makes the empty statistics of a layer.
        change: Takes a layer's name, the layer and its statistics, and changes it in place; it may put another module
            in its place, too.

    Raises:
        ValueError: No data, a layer outside the blocks or one that no token reached, or a network that is no chain of
            blocks or has a learned prompt before its rows.
    """
    if not batches:
        raise ValueError("there is no calibration data: give at least one batch")
    if learns_a_prompt(network):
        raise ValueError("calibration would miss what the adapter puts before every row: take LoRA, Full or Frozen")
    stack = list(blocks(network))
    of_block = _layers_by_block(stack, layers)
    device = network_device(network)
    batches = [_on_device(batch, device) for batch in batches]
    with inference(network), own_random_numbers(device, seed=0):
        hidden, calls = record_calls(network, stack, batches)
        last = max((index for index, names in enumerate(of_block) if names), default=-1)
        for index, block in enumerate(stack[: last + 1]):
            names = of_block[index]
            if names:
                measured = {name: new_statistics() for name in names}
                _measure(block, batches, hidden, calls[index], {name: (layers[name], measured[name]) for name in names})
                for name in names:
                    change(name, layers[name], measured.pop(name))
            if index < last:
                hidden = [run_block(block, states, call) for states, call in zip(hidden, calls[index], strict=True)]
            calls[index].clear()


def _on_device(batch: TextBatch, device: torch.device) -> TextBatch:
    return TextBatch(
        input_ids=batch["input_ids"].to(device),
        labels=batch["labels"].to(device),
        position_ids=batch["position_ids"].to(device),
        document_ids=batch["document_ids"].to(device),
    )


def _layers_by_block(stack: Sequence[nn.Module], layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the names of each block's layers, in the order of `layers`.

    Raises:
        ValueError: A layer is in no block.
    """
    block_of = {id(module): index for index, block in enumerate(stack) for module in block.modules()}
    of_block: list[list[str]] = [[] for _ in stack]
    for name, layer in layers.items():
        if id(layer) not in block_of:
            raise ValueError(
                f"{name!r} is no layer of the network's blocks, and only those are calibrated: leave it out"
            )
        of_block[block_of[id(layer)]].append(name)
    return of_block


def _measure(
    block: nn.Module,
    batches: Sequence[TextBatch],
    hidden: Sequence[Tensor],
    calls: Sequence[BlockCall],
    layers: Mapping[str, tuple[nn.Module, InputStatistics]],
) -> None:
    """Run a block on every batch, and count what comes into its layers.

    Raises:
        ValueError: A layer was never called, or padding can't be told apart in what it is called with.
    """
    reached: set[str] = set()
    for batch, states, call in zip(batches, hidden, calls, strict=True):
        real = batch["document_ids"] != PADDING_DOCUMENT
        with _watched(layers, real, reached):
            run_block(block, states, call)
    missed = sorted(set(layers) - reached)
    if missed:
        raise ValueError(
            f"no token of the calibration data came into {', '.join(missed)}: calibrate on more documents, or leave "
            "these layers out"
        )


@contextmanager
def _watched(
    layers: Mapping[str, tuple[nn.Module, InputStatistics]], real: Tensor, reached: set[str]
) -> Iterator[None]:
    """Count the inputs of layers while a block runs; `real` `[batch, seq]` says which positions are no padding."""

    def watch(name: str, statistics: InputStatistics) -> Callable[..., None]:
        def hook(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = _real_rows(positional[0] if positional else next(iter(named.values())), real, name)
            if len(inputs):
                statistics.add(inputs.float())
                reached.add(name)

        return hook

    with ExitStack() as hooks:
        for name, (layer, statistics) in layers.items():
            hooks.callback(layer.register_forward_pre_hook(watch(name, statistics), with_kwargs=True).remove)
        yield


def _real_rows(inputs: Tensor, real: Tensor, name: str) -> Tensor:
    """The inputs `[..., in]` of a layer without those of padding: `[positions, in]`.

    Raises:
        ValueError: There is padding, and which inputs are padding's can't be told (a mixture's experts, which get the
            tokens that are routed to them).
    """
    if inputs.shape[:-1] == real.shape:
        return inputs[real]
    rows = inputs.reshape(-1, inputs.shape[-1])
    if bool(real.all()):
        return rows
    if len(rows) != real.numel():
        raise ValueError(
            f"the inputs of {name!r} are {list(inputs.shape)}, in which padding can't be told apart: calibrate on rows "
            "without padding (data.batches.mode packed, a small max_length), or leave the layer out"
        )
    return rows[real.flatten()]
