"""Hidden states of a batch from an encoder, whose tokens see those behind them too: documents are kept apart by a mask.

Causal networks need none (see `hidden_states`). transformers' encoders do not look at positions for where a document
ends, and padding is nothing that is behind everybody.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    packed_sequence_mask_function,
)

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.models.anatomy import decoder, first_position, learns_a_prompt, transformers_network, unwrapped
from lightllm.models.hidden_states import reaches


def encoder_states(network: nn.Module, batch: TextBatch, token_types: Tensor | None = None) -> Tensor:
    """The last hidden state, `[batch, seq, hidden]`, of documents that see themselves and nothing else.

    Args:
        network: A transformers encoder, or one that peft adapted.
        batch: Rows of documents.
        token_types: Which of a pair of texts each token is of, int64 `[batch, seq]`; not passed to an encoder that
            does not tell them apart.
    """
    base = transformers_network(network)
    given: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"] + first_position(base),
        "attention_mask": _attention_mask(base, batch),
    }
    if token_types is not None and getattr(base.config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = token_types
    states: Tensor = decoder(base)(**given).last_hidden_state
    return states


def segments(batch: TextBatch) -> Tensor:
    """A number for each document of a row, or piece of one, and another for padding; int64 `[batch, seq]`."""
    documents = (batch["position_ids"] == 0).cumsum(1)
    return documents.masked_fill(batch["document_ids"] == PADDING_DOCUMENT, 0)


def _attention_mask(base: PreTrainedModel, batch: TextBatch) -> Any:
    """What the encoder is told of the rows, in the form that its attention takes; None where each is one document."""
    inside = batch["document_ids"] != PADDING_DOCUMENT
    if not (batch["position_ids"][:, 1:] == 0).any():
        return None if inside.all() else inside.long()
    given: dict[str, Any] = {
        "config": base.config,
        "inputs_embeds": torch.empty(*inside.shape, 0, dtype=base.dtype, device=inside.device),  # for its form alone
        "attention_mask": None,
        "and_mask_function": packed_sequence_mask_function(segments(batch)),
    }
    whole = create_bidirectional_mask(**given)
    kinds = set(getattr(base.config, "layer_types", None) or ())
    if "sliding_attention" not in kinds:
        return whole
    return {
        "full_attention": whole,
        "sliding_attention": create_bidirectional_sliding_window_mask(**given),
    }


def is_encoder(network: nn.Module) -> bool:
    """Whether tokens see those behind them, so that they can be predicted from both sides and nothing else."""
    return reaches(network, torch.arange(8), slice(4, 8), slice(0, 4), encoder_states)


def check_encoder(network: nn.Module, packed: bool) -> None:
    """Refuse a network that is no encoder, or whose documents would see each other.

    Args:
        network: The network.
        packed: Whether rows hold several documents.

    Raises:
        ValueError: It is a causal network, adapted by a learned prompt, or does not keep packed documents apart.
    """
    name = type(unwrapped(network)).__name__
    if learns_a_prompt(network):
        raise ValueError(f"a prompt is learned before the rows of a decoder, not of {name}: take LoRA or Full")
    if not is_encoder(network):
        raise ValueError(f"tokens of {name} do not see those behind them, and this needs an encoder, such as bert")
    if not packed:
        return
    positions = torch.arange(4).repeat(2)
    first, second = slice(0, 4), slice(4, 8)
    leaks = any(reaches(network, positions, *way, encoder_states) for way in ((first, second), (second, first)))
    if leaks or not reaches(network, positions, slice(6, 8), slice(4, 6), encoder_states):
        raise ValueError(
            f"{name} can't be told which tokens of a row are of one document, so documents would see each other: set "
            "data.batches.mode to sorted"
        )
