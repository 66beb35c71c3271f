"""Adapters folded into the weights that they adapt: beside the network, never in it.

Peft merges in place, and taking a merge out again leaves other bits than before: a network that goes on training must
not be touched. Merging works on one layer's copy at a time, in float32, and all other weights are shared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightllm.compression.factored_linear import FactoredLinear, factored, replace_layers
from lightllm.compression.quantize import is_stored, stored_weight
from lightllm.export.sparsity import state_sparsity
from lightllm.models.anatomy import transformers_network
from lightllm.models.inference import network_device
from lightllm.models.low_bit import dequantized_weight, is_low_bit
from lightllm.models.module_copy import copy_without_hooks
from lightllm.models.plain_tensors import MadeOfParts, StandsForPlain
from lightllm.models.progress import no_progress_bars


def merged_network(
    network: nn.Module, dtype: torch.dtype | None = None, keep_factored: bool = False
) -> PreTrainedModel:
    """An ordinary transformers model that computes what `network` does, to be saved and not to be run.

    Weights that need no merging and no other dtype are the network's own. Buffers that are not saved (rotary tables)
    stay on the meta device, so that the model takes no memory for them and cannot be called.

    Args:
        network: A transformers model, or a peft model around one.
        dtype: Of the weights; by default the one that most of the network's weights have, and bfloat16 where they are
            stored in 4 or 8 bits.
        keep_factored: Leave layers of two thin matrices as such, instead of multiplying them out.

    Raises:
        ValueError: The adapter is no change of weights, or the network is no transformers model.
    """
    base = transformers_network(network)
    dtype = dtype or prevailing_dtype(network)
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in merged_weights(network, keep_factored)
    }
    config = deepcopy(base.config)
    config.use_cache = True
    config.dtype = dtype
    if "quantization_config" in vars(config):
        del config.quantization_config
    merged = _on_meta(base, config)
    tied = merged.all_tied_weights_keys.items()
    if any(not torch.equal(weights[target], weights[source]) for target, source in tied):
        # The adapter changed one of two weights that were one: they are two now.
        config.tie_word_embeddings = False
        merged = _on_meta(base, config)
    if keep_factored:
        _factor_alike(merged, base)
    merged.load_state_dict(weights, strict=True, assign=True)
    merged.tie_weights()
    if base.can_generate():
        merged.generation_config = deepcopy(base.generation_config)
        merged.generation_config._from_model_config = False  # else transformers may derive it anew
    state_sparsity(merged, network)
    return merged.eval()


def plain_network(network: nn.Module, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A network of ordinary layers that computes what `network` does, with memory of its own.

    Args:
        network: A transformers model, or a peft model around one.
        dtype: Of the weights; see `merged_network`.

    Raises:
        ValueError: See `merged_network`.
    """
    merged = merged_network(network, dtype)
    weights = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    merged.config.use_cache = False
    with no_progress_bars():
        plain = type(merged).from_pretrained(
            None, config=merged.config, state_dict=weights, dtype=merged.dtype, attn_implementation="sdpa"
        )
    moved: nn.Module = plain
    moved.to(network_device(network))
    return plain.eval()


def merged_weights(network: nn.Module, keep_factored: bool = False) -> Iterator[tuple[str, Tensor]]:
    """What a plain transformers model's `state_dict` would hold to compute what `network` does, one at a time.

    Args:
        network: A transformers model, or a peft model around one.
        keep_factored: Leave layers of two thin matrices as such.

    Yields:
        The plain model's name of a weight, and the weight: in float32 where an adapter was merged or bits were few,
        else the network's own tensor, detached.

    Raises:
        ValueError: The adapter is no change of weights, or one that cannot be merged.
    """
    if isinstance(network, PeftModel) and network.active_peft_config.is_prompt_learning:
        kind = PeftType(network.active_peft_config.peft_type).value
        raise ValueError(
            f"an adapter of type {kind} changes no weight, so it cannot be merged: export with layout='adapter'"
        )
    yield from _weights(transformers_network(network), "", keep_factored)


def prevailing_dtype(network: nn.Module) -> torch.dtype:
    """The dtype that most of the network's weights have; bfloat16 if any are stored in 4 or 8 bits."""
    base = transformers_network(network)
    if any(is_low_bit(module) for module in base.modules()):
        return torch.bfloat16
    counts: Counter[torch.dtype] = Counter()
    for parameter in base.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _on_meta(base: PreTrainedModel, config: object) -> PreTrainedModel:
    with torch.device("meta"):
        return type(base)(config)  # type: ignore[arg-type]  # a copy of its own configuration


def _factor_alike(network: PreTrainedModel, base: PreTrainedModel) -> None:
    """Give a plain network on the meta device the thin matrices that another has."""
    thin: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if isinstance(module, FactoredLinear):
            whole = network.get_submodule(name)
            assert isinstance(whole, nn.Linear)
            thin[name] = factored(whole, module.rank)
    replace_layers(network, thin)


def _weights(module: nn.Module, prefix: str, keep_factored: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and value of all that is saved of a module and its children, through peft's layers to what they compute."""
    stays_factored = keep_factored and isinstance(module, FactoredLinear)
    if isinstance(module, StandsForPlain):
        yield from ((prefix + name, tensor) for name, tensor in module.plain_tensors().items())
    elif isinstance(module, BaseTunerLayer):
        assert isinstance(module, nn.Module)
        yield from ((prefix + name, tensor) for name, tensor in _tuned_layer(module).items())
    elif isinstance(module, ModulesToSaveWrapper):
        trained = not module.disable_adapters and module.active_adapters
        used = module.modules_to_save[trained[0]] if trained else module.original_module
        yield from _weights(used, prefix, keep_factored)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(f"peft's {type(module).__name__} cannot be merged here: export with layout='adapter'")
    elif isinstance(module, MadeOfParts) and not stays_factored:
        plain = module.plain_tensors_of(dict(_parts(module, "", keep_factored)))
        yield from ((prefix + name, tensor) for name, tensor in plain.items())
    else:
        yield from _parts(module, prefix, keep_factored)


def _parts(module: nn.Module, prefix: str, keep_factored: bool) -> Iterator[tuple[str, Tensor]]:
    yield from ((prefix + name, tensor) for name, tensor in _own_tensors(module).items())
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.", keep_factored)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a module without its children, at full width."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if name == "weight" and is_low_bit(module):
            tensors[name] = dequantized_weight(module)
        else:
            tensors[name] = stored_weight(module) if is_stored(parameter) else parameter.detach()
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            tensors[name] = buffer.detach()
    return tensors


def _tuned_layer(layer: BaseTunerLayer) -> dict[str, Tensor]:
    """The base layer's tensors with the active adapters merged, in float32."""
    base = layer.get_base_layer()
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return _own_tensors(base)
    if is_low_bit(base):
        return _tuned_low_bit_layer(layer)
    assert isinstance(layer, nn.Module)
    own = copy_without_hooks(layer)
    with torch.no_grad():
        own.float().merge(safe_merge=True)
    return _own_tensors(own.get_base_layer())


def _tuned_low_bit_layer(layer: BaseTunerLayer) -> dict[str, Tensor]:
    """As `_tuned_layer`, but peft would round the merged weight to a few bits again."""
    if not isinstance(layer, LoraLayer):
        raise ValueError(
            f"{type(layer).__name__} over a weight in 4 or 8 bits cannot be merged: export with layout='adapter'"
        )
    tensors = {name: tensor.float() for name, tensor in _own_tensors(layer.get_base_layer()).items()}
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        up, down, scale = layer.lora_B[adapter], layer.lora_A[adapter], layer.scaling[adapter]
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        weight = tensors["weight"] + scale * (up.weight.detach().float() @ down.weight.detach().float())
        variant = layer.lora_variant.get(adapter)
        if isinstance(variant, DoraLinearVariant):
            magnitude = layer.lora_magnitude_vector[adapter].get_parameter("weight").detach().float()
            weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        elif variant is not None:
            raise ValueError(
                f"{type(variant).__name__} over a weight in 4 or 8 bits cannot be merged: export with layout='adapter'"
            )
        tensors["weight"] = weight
        if layer.lora_bias[adapter]:
            tensors["bias"] = tensors["bias"] + scale * up.bias.detach().float()
    return tensors
