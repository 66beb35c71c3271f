"""A network without its weights: on the meta device, from its configuration alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lightllm.models.anatomy import OwnNetwork
from lightllm.models.document_attention import implementation_for
from lightllm.models.from_config import FromConfig
from lightllm.models.from_module import FromModule
from lightllm.models.layer_subset import EveryNthLayer
from lightllm.models.load import resolve_checkpoint
from lightllm.models.network import Network, Task, torch_dtype
from lightllm.models.pretrained import AUTO_CLASSES, Pretrained, architecture_for


def empty_network(network: Network, task: Task, vocabulary: int | None = None) -> nn.Module:
    """Build a network whose tensors have shapes and types and no content.

    Args:
        network: What would be built. Of pretrained weights, only the configuration is read.
        task: Which head it ends in.
        vocabulary: Of the data's tokenizer, which a network from scratch takes over.

    Raises:
        ValueError: A network from scratch has no vocabulary, or the network is of another kind.
    """
    if isinstance(network, FromModule):
        if vocabulary is None:
            raise ValueError("a module of one's own takes its vocabulary size from the data's tokenizer: there is none")
        with torch.device("meta"):
            return OwnNetwork(network.module(vocabulary), network.head)
    config, dtype = _configuration(network, vocabulary)
    attention = implementation_for(network.attention, architecture_for(config, task))  # type: ignore[attr-defined]
    return network_of(config, task, dtype, attention)


def network_of(config: PreTrainedConfig, task: Task, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """Build the transformers network of a configuration on the meta device."""
    with torch.device("meta"):
        network = AUTO_CLASSES[task].from_config(config, dtype=dtype, attn_implementation=attention)  # type: ignore[attr-defined]
    assert isinstance(network, PreTrainedModel)
    network.config.use_cache = False
    return network


def _configuration(network: Network, vocabulary: int | None) -> tuple[PreTrainedConfig, torch.dtype]:
    """The transformers configuration, and the type of the weights."""
    if isinstance(network, FromConfig):
        # The tokenizer says which token is padding; an architecture's own choice may be beyond this vocabulary.
        taken_over = {} if vocabulary is None else {"vocab_size": vocabulary, "pad_token_id": 0}
        fields = {**taken_over, **network.fields}
        dtype = torch_dtype(network.dtype)
        config = FromConfig(network.architecture, fields).configuration(None)
        return config, torch.float32 if dtype == "auto" else dtype
    if not isinstance(network, Pretrained):
        raise ValueError(f"a {type(network).__name__} cannot be looked at without being built")
    try:
        config = AutoConfig.from_pretrained(
            resolve_checkpoint(network.name),
            revision=network.revision,
            trust_remote_code=network.trust_remote_code,
        )
    except OSError as error:
        raise ValueError(f"cannot read the configuration of {network.name!r}: {error}") from error
    dtype = torch_dtype(network.dtype)
    if dtype == "auto":
        dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    if isinstance(network, EveryNthLayer):
        _keep_every(config, network.first, network.step)
    assert isinstance(dtype, torch.dtype)
    return config, dtype


def _keep_every(config: PreTrainedConfig, first: int, step: int) -> None:
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    text.num_hidden_layers = len(range(first, num_layers, step))
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == num_layers:  # one for each layer
            setattr(text, name, value[first::step])
