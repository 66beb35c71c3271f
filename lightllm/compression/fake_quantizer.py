"""Fake quantization: a layer computes with rounded weights and inputs, and learns as if they were not rounded.

Rounding has no slope, so gradients go straight through it (arXiv:1308.3432): the backward pass is free and nothing is
kept for it. A weight takes six passes over its memory and an input eight, of which one or two make a tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lightllm.compression.effective_weight import EffectiveLayer, FakeQuantizer
from lightllm.compression.effects import install_effects
from lightllm.compression.grids import Grid
from lightllm.compression.layers import prunable_layers
from lightllm.compression.schemes import Scheme, check_groups


class LowBitWeight(NamedTuple):
    """A weight as a file of few bits holds it."""

    integers: Tensor
    """`[out, in]`, int8."""
    scales: Tensor
    """`[out, groups]`, in the dtype in which they multiply the integers."""
    bits: int
    """Of an integer."""

    def dense(self) -> Tensor:
        """What it stands for, `[out, in]`."""
        groups = self.integers.unflatten(-1, (self.scales.shape[-1], -1))
        return (groups.to(self.scales.dtype) * self.scales[..., None]).flatten(-2)


def to_low_bits(weight: Tensor, grid: Grid, scales: Tensor | None = None) -> LowBitWeight:
    """Round a weight `[out, in]` to a grid, by its own scales or by given ones `[out, groups, 1]`."""
    groups = grid.groups(weight.detach())
    scales = grid.scales(groups) if scales is None else scales
    integers = grid.integers(groups, scales).flatten(-2).to(torch.int8)
    return LowBitWeight(integers, grid.stored_scales(scales).squeeze(-1), grid.bits)


class SharedInputs:
    """Rounds a tensor once for all layers that read it one after the other: queries, keys and values; gate and up.

    The rounded inputs of the latest layer are kept until another tensor comes. They are those of this very tensor in
    this state, and of the same pass: what a backward pass recomputes is rounded anew, so that it keeps the same
    tensors as the forward pass did.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._state: tuple[int, ...] = ()
        self._rounded: Tensor | None = None

    def __reduce__(self) -> tuple[type[SharedInputs], tuple[()]]:
        return type(self), ()  # a copy of a network has nothing kept

    def rounded(self, inputs: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function(inputs)`, with gradients that go straight through."""
        if torch.compiler.is_compiling():  # which finds common expressions itself
            return straight_through(inputs, function)
        state = (
            0 if inputs.is_inference() else inputs._version,
            torch._C._current_graph_task_id(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        if self._source is None or self._source() is not inputs or self._state != state or self._rounded is None:
            self._rounded = straight_through(inputs, function)
            self._source, self._state = weakref.ref(inputs), state
        return self._rounded


class GridFakeQuantizer(FakeQuantizer):
    """Rounds a layer's weight, and perhaps its inputs, as a scheme says; switched off until it is switched on.

    Checkpoints hold a tensor of no element while it is off, of one while it is on, and of the scales once these are
    frozen.

    Args:
        scheme: How.
        shared: Where the network's rounded inputs are kept.
    """

    frozen_scales: Tensor
    """`[out, groups, 1]`; empty while scales follow the weight."""

    def __init__(self, scheme: Scheme, shared: SharedInputs) -> None:
        super().__init__()
        self.scheme = scheme
        self.enabled = False
        self.is_straight_through = True
        self._shared = shared
        self.register_buffer("frozen_scales", torch.empty(0), persistent=False)

    @override
    def weight(self, weight: Tensor) -> Tensor:
        if self.is_straight_through:
            return straight_through(weight, self.scheme.grid.round_weight)
        rounded: Tensor = _Clipped.apply(weight, self.scheme.grid, self.frozen_scales)
        return rounded

    @override
    def inputs(self, inputs: Tensor) -> Tensor:
        return inputs if self.scheme.inputs is None else self._shared.rounded(inputs, self.scheme.inputs)

    def freeze_scales(self, weight: Tensor) -> None:
        """Round by the scales of this weight `[out, in]` from now on, which then no longer follow the weight."""
        grid = self.scheme.grid
        self.freeze(grid.scales(grid.groups(weight.detach())))

    def freeze(self, scales: Tensor) -> None:
        """Round by these scales `[out, groups, 1]` from now on; by the weight's own if they are empty."""
        self.frozen_scales = scales
        self.is_straight_through = scales.numel() == 0

    def low_bits(self, weight: Tensor) -> LowBitWeight:
        """The weight `[out, in]` as it is to be stored."""
        return to_low_bits(weight, self.scheme.grid, None if self.is_straight_through else self.frozen_scales)

    @override
    def get_extra_state(self) -> Tensor:
        return torch.ones(1 if self.enabled else 0) if self.is_straight_through else self.frozen_scales

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.enabled = state.numel() > 0
        scales = state if state.ndim == 3 else torch.empty(0)
        self.freeze(scales.to(self.frozen_scales.device, copy=True))


def fake_quantize(network: nn.Module, scheme: Scheme, leave_out: list[str]) -> dict[str, EffectiveLayer]:
    """Install fake quantizers, switched off, on the linear layers of the blocks.

    Args:
        network: The network, adapted or not.
        scheme: How they round.
        leave_out: Regular expressions of names of layers that get none.

    Returns:
        The layers, by name in the plain network.

    Raises:
        ValueError: A layer cannot be quantized so, or is by something else; see also `install_effects`.
    """
    layers = install_effects(network, prunable_layers(network, leave_out))
    check_groups(scheme, {name: layer.base for name, layer in layers.items()})
    shared = SharedInputs()
    for name, layer in layers.items():
        if layer.effect.fake_quantizer is not None:
            raise ValueError(f"{name} is quantized already: name it in leave_out of one of the two")
        weight = layer.base.weight
        layer.effect.fake_quantizer = GridFakeQuantizer(scheme.stored_in(weight.dtype), shared).to(weight.device)
    return layers


def straight_through(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(values)`, whose gradient is taken for that of `values`."""
    rounded: Tensor = _StraightThrough.apply(values, function)
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Clipped(torch.autograd.Function):
    """Rounding by scales that are given: a weight beyond the grid's end has no slope, so no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid, scales: Tensor) -> Tensor:
        groups = grid.groups(weight)
        distance = (groups.float() / scales).sub_(grid.integers(groups, scales)).abs_()
        ctx.save_for_backward((distance <= 0.501).flatten(-2))
        return grid.round_weight(weight, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None
