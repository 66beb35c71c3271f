"""The only file that knows where a network keeps its decoder, blocks, embedding and head.

A network here is a transformers model, a peft model around one, or a user's module in an `OwnNetwork`. Peft is
imported where it is asked for: it takes a second, and `lightllm fit --help` has no need of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightllm.models.inference import inference


class OwnNetwork(nn.Module):
    """A user's module, which returns hidden states `[batch, seq, hidden]`, with the name of its head.

    Raises:
        ValueError: The module has no `head`, or the head is no matrix.
    """

    def __init__(self, module: nn.Module, head: str) -> None:
        super().__init__()
        self.module = module
        self.head = head
        try:
            found = module.get_submodule(head)
        except AttributeError as error:
            names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
            raise ValueError(
                f"{type(module).__name__} has no module {head!r} for its head; its linear layers are {names}"
            ) from error
        if not isinstance(found, nn.Linear):
            raise ValueError(f"the head {head!r} of {type(module).__name__} is a {type(found).__name__}, not nn.Linear")

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states `[batch, seq, hidden]` of `[batch, seq]` token ids."""
        hidden = self.module(input_ids=input_ids, position_ids=position_ids)
        assert isinstance(hidden, Tensor)
        return hidden


class Head(NamedTuple):
    """How logits come from the last hidden state; its fields are arguments of the losses of the same names."""

    weight: Tensor
    """`[vocab, hidden]`, perhaps the input embedding's own."""
    bias: Tensor | None
    """`[vocab]`."""
    softcap: float | None
    logit_scale: float


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""How configurations name the bound of the logits."""


def unwrapped(network: nn.Module) -> nn.Module:
    """The transformers model (or `OwnNetwork`) within a peft model, with the adapter's layers in place."""
    from peft import PeftModel

    return network.get_base_model() if isinstance(network, PeftModel) else network


def has_adapter(network: nn.Module) -> bool:
    """Whether the network is one that peft adapted."""
    from peft import PeftModel

    return isinstance(network, PeftModel)


def learns_a_prompt(network: nn.Module) -> bool:
    """Whether peft puts something learned before every row now: a prefix or a prompt that is not switched off."""
    from peft import PeftModel

    if not isinstance(network, PeftModel) or network._adapters_disabled:
        return False
    return bool(network.active_peft_config.is_prompt_learning)


def adapter_switched_off(network: nn.Module) -> AbstractContextManager[None]:
    """Within it, the network is what it was before it was adapted.

    Raises:
        ValueError: The network has no adapter.
    """
    from peft import PeftModel

    if not isinstance(network, PeftModel):
        raise ValueError("the network has no adapter that could be switched off")
    context: AbstractContextManager[None] = network.disable_adapter()
    return context


def transformers_network(network: nn.Module) -> PreTrainedModel:
    """The transformers model within `network`.

    Raises:
        ValueError: It is a module of the user's own.
    """
    base = unwrapped(network)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"this needs a transformers network, and {type(base).__name__} is not one")
    return base


def decoder(network: nn.Module) -> nn.Module:
    """The part that makes hidden states: everything but the head."""
    base = unwrapped(network)
    if isinstance(base, OwnNetwork):
        return base.module
    assert isinstance(base, PreTrainedModel)
    inner: nn.Module = base.base_model
    if inner is base and base.get_output_embeddings() is not None:  # its class misnames its own part (Llama 4's)
        inner = next((child for child in base.children() if isinstance(child, PreTrainedModel)), base)
    return inner


def blocks(network: nn.Module) -> nn.ModuleList:
    """The stack of repeated layers, first to last.

    Raises:
        ValueError: No stack is found: no `nn.ModuleList`.
    """
    stacks = [module for module in decoder(network).modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not stacks:
        raise ValueError(f"{type(unwrapped(network)).__name__} has no stack of layers (an nn.ModuleList)")
    # A layer's experts can be a list too, so the stack is the one that holds the most parameters; the first, if equal.
    # Its layers need not be of one class: hybrid networks alternate attention and recurrence.
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))


def input_embedding(network: nn.Module) -> nn.Embedding:
    """The table of token embeddings, `[vocab, hidden]`.

    Raises:
        ValueError: None is found.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = unwrapped(network)
    found = base.get_input_embeddings() if isinstance(base, PreTrainedModel) else None
    if found is None:
        tables = [module for module in base.modules() if isinstance(module, nn.Embedding)]
        # A module of one's own may have a table of positions too: the tokens' has as many rows as the head.
        rows = len(output_head(base).weight) if isinstance(base, OwnNetwork) else None
        found = next((table for table in tables if table.num_embeddings == rows), tables[0] if tables else None)
    table: object = _in_use(found)
    if isinstance(table, BaseTunerLayer):
        table = table.get_base_layer()
    if not isinstance(table, nn.Embedding):
        raise ValueError(f"{type(base).__name__} has no nn.Embedding for its tokens")
    return table


def output_layer(network: nn.Module) -> nn.Module | None:
    """The layer that makes logits, in the copy that is in use; None where a network has none."""
    base = unwrapped(network)
    if isinstance(base, OwnNetwork):
        return _in_use(base.module.get_submodule(base.head))
    assert isinstance(base, PreTrainedModel)
    return _in_use(base.get_output_embeddings())


def output_head(network: nn.Module) -> Head:
    """The head's matrix and what comes after it.

    Raises:
        ValueError: The network has no head, or one with a low-rank update, which is no one matrix.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base, layer = unwrapped(network), output_layer(network)
    if layer is None:
        raise ValueError(f"{type(base).__name__} has no head that makes logits")
    if isinstance(layer, BaseTunerLayer):
        raise ValueError(
            "the adapter's targets include the output head, whose matrix the losses need whole: leave it out of "
            "targets and name it in modules_to_save instead, which trains all of it"
        )
    if isinstance(base, OwnNetwork):
        return Head(_tensor(layer, "weight"), _optional_tensor(layer, "bias"), None, 1.0)
    assert isinstance(base, PreTrainedModel)
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    caps = (getattr(config, name, None) for name in _SOFTCAPS)
    softcap = next((cap for cap in caps if cap is not None), None)
    return Head(_tensor(layer, "weight"), _optional_tensor(layer, "bias"), softcap, scale / divisor)


def vocabulary_size(network: nn.Module) -> int:
    """Rows of the token embedding; may exceed the tokenizer's, where a model padded it."""
    return input_embedding(network).num_embeddings


def max_positions(network: nn.Module) -> int | None:
    """The longest row that the network has positions for, a learned prompt not counted; None where it is not said."""
    from peft import PeftModel

    base = unwrapped(network)
    if not isinstance(base, PreTrainedModel):
        return None
    limit: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        limit -= first_position(base)
    if limit is not None and learns_a_prompt(network):
        assert isinstance(network, PeftModel)
        limit -= network.active_peft_config.num_virtual_tokens
    return limit


def first_position(network: nn.Module) -> int:
    """The position id of a row's first token: 0, or what comes behind the entry for padding, as RoBERTa has it."""
    table = getattr(getattr(decoder(network), "embeddings", None), "position_embeddings", None)
    return table.padding_idx + 1 if isinstance(table, nn.Embedding) and table.padding_idx is not None else 0


def check_head(network: nn.Module, before_head: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
    """Refuse a network whose logits are not what `output_head` says.

    Args:
        network: A network with a head.
        before_head: What it does to hidden states `[batch, seq, hidden]` before the output matrix, if anything.

    Raises:
        ValueError: The architecture does something else to its logits, so that losses from hidden states are wrong.
    """
    base = unwrapped(network)
    if not isinstance(base, PreTrainedModel):
        return
    head = output_head(base)
    input_ids = torch.arange(4, device=head.weight.device)[None] % vocabulary_size(base)
    with inference(base):
        cache = {} if before_head else {"use_cache": False}
        hidden = decoder(base)(input_ids=input_ids, **cache).last_hidden_state
        hidden = before_head(base, hidden) if before_head else hidden
        expected = base(input_ids=input_ids, **cache).logits
        fits = hidden.shape[-1] == head.weight.shape[1] and expected.shape[-1] == len(head.weight)
        difference = (apply_head(hidden, head).float() - expected.float()).abs().max() if fits else torch.inf
    # Both are the same operations in the same dtype: what differs is a rounding or two of the largest logit.
    if difference > expected.float().abs().max() * max(8 * torch.finfo(head.weight.dtype).eps, 1e-4):
        raise ValueError(
            f"{type(base).__name__} makes its logits in a way that lightllm does not know: its head applied to the "
            "last hidden state gives something else; please report this architecture"
        )


def apply_head(hidden: Tensor, head: Head) -> Tensor:
    """Logits `[..., vocab]` of hidden states `[..., hidden]`; for few positions, since losses never form them whole."""
    logits = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _in_use(module: nn.Module | None) -> nn.Module | None:
    """Of a module that peft trains a copy of: that copy, or the original while the adapter is switched off."""
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(module, ModulesToSaveWrapper):
        return module
    return module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapters[0]]


def _tensor(layer: nn.Module, name: str) -> Tensor:
    value = getattr(layer, name)
    assert isinstance(value, Tensor)
    return value


def _optional_tensor(layer: nn.Module, name: str) -> Tensor | None:
    value = getattr(layer, name, None)
    assert value is None or isinstance(value, Tensor)
    return value
