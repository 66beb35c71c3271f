"""Installing effects: which layers of a network compute with their effective weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lightllm.compression.effective_weight import EffectiveLayer, EffectiveLinear, FixedMask, WeightEffect
from lightllm.compression.layers import linear_layer, prunable_layers
from lightllm.models.anatomy import unwrapped


def install_effects(network: nn.Module, names: Iterable[str]) -> dict[str, EffectiveLayer]:
    """Have layers compute with their effective weights, in place; those that do already stay as they are.

    A layer changes its class and gets a submodule `effect`: parameters, their names, and hooks stay.

    Args:
        network: The network, adapted or not.
        names: Names of linear layers as in the plain network, see `prunable_layers`.

    Returns:
        The layers, by name.

    Raises:
        ValueError: A layer of this kind has no weight that could be masked or fake-quantized; the message says why.
    """
    modules = dict(unwrapped(network).named_modules())
    return {name: _effective(name, modules[name]) for name in names}


def effective_layers(network: nn.Module) -> dict[str, EffectiveLayer]:
    """The layers that compute with an effective weight, by name in the plain network."""
    return {name: module for name, module in unwrapped(network).named_modules() if isinstance(module, EffectiveLayer)}


@contextmanager
def inputs_as_they_are(network: nn.Module) -> Iterator[None]:
    """Within it, fake quantizers round weights alone: what others compute with weights that are read from a file."""
    effects = [layer.effect for layer in effective_layers(network).values()]
    try:
        for effect in effects:
            effect.rounds_inputs = False
        yield
    finally:
        for effect in effects:
            effect.rounds_inputs = True


def mask_layers(network: nn.Module, leave_out: list[str]) -> dict[str, EffectiveLayer]:
    """Install a mask that keeps everything on the linear layers of the blocks.

    Args:
        network: The network, adapted or not.
        leave_out: Regular expressions of names of layers that get none.

    Returns:
        The layers, by name in the plain network.

    Raises:
        ValueError: See `install_effects` and `prunable_layers`.
    """
    layers = install_effects(network, prunable_layers(network, leave_out))
    for layer in layers.values():
        weight = layer.base.weight
        layer.effect.masking = layer.effect.masking or FixedMask(weight.shape, weight.device)
    return layers


def _effective(name: str, layer: nn.Module) -> EffectiveLayer:
    if isinstance(layer, EffectiveLayer):
        return layer
    linear_layer(name, layer)  # which refuses what is none
    if type(layer) is nn.Linear:
        layer.__class__ = EffectiveLinear
    else:
        from lightllm.compression.effective_lora import as_effective_lora  # with peft, a second

        as_effective_lora(name, layer)
    assert isinstance(layer, EffectiveLayer)
    layer.effect = WeightEffect()
    # A frozen weight that is loaded anew comes without its mask, which follows from the checkpoint.
    layer.register_load_state_dict_post_hook(_hold_again)
    return layer


def _hold_again(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, EffectiveLayer)
    layer.hold_weight()
