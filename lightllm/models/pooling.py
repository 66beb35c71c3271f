"""One vector for a text: how the hidden states of its tokens become an embedding."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.models.anatomy import decoder, learns_a_prompt, transformers_network
from lightllm.models.encoder_states import check_encoder, encoder_states, is_encoder
from lightllm.models.hidden_states import check_packing, hidden_states

Pooling = Literal["mean", "cls", "last"]
"""Of all tokens of a text, of its first, or of its last one."""

_REMEMBERED = "sentence_pooling"
"""Under which name a network's configuration says how its hidden states are pooled."""


class Embeddings(NamedTuple):
    """The documents of a batch as vectors, in the order of their ids."""

    vectors: Tensor
    """`[documents, hidden]`."""
    ids: Tensor
    """Their ids, int64 `[documents]`, rising."""


class TextClassifier(NamedTuple):
    """Classes by a matrix on embeddings."""

    weight: Tensor
    """`[classes, hidden]`."""
    bias: Tensor
    """`[classes]`."""
    classes: list[str]
    """Their names."""
    normalized: bool
    """Whether the embeddings are taken at length 1."""


def embeddings(network: nn.Module, batch: TextBatch, pooling: Pooling, bidirectional: bool) -> Embeddings:
    """Embed each document of a batch.

    Args:
        network: A transformers network, or one that peft adapted; with a head or without.
        batch: Rows of whole documents.
        pooling: How.
        bidirectional: Whether the network is an encoder: see `encoder_states`.
    """
    states = encoder_states(network, batch) if bidirectional else hidden_states(network, batch)
    return pool(states, batch, pooling)


def prepare_to_embed(network: nn.Module, packed: bool) -> bool:
    """Refuse a network that cannot embed texts, and freeze what takes no part in it.

    Args:
        network: A transformers network, or one that peft adapted.
        packed: Whether rows hold several texts.

    Returns:
        Whether it is an encoder: see `embeddings`.

    Raises:
        ValueError: It has a learned prompt, or texts of a row would see each other.
    """
    if learns_a_prompt(network):
        raise ValueError("a learned prompt is for a network that predicts tokens: take LoRA or Full")
    bidirectional = is_encoder(network)
    if bidirectional:
        check_encoder(network, packed)
    elif packed:
        check_packing(network)
    unused = getattr(decoder(network), "pooler", None)  # BERT's own, which is for another task
    if isinstance(unused, nn.Module):
        unused.requires_grad_(False)
    return bidirectional


def embedding_width(network: nn.Module) -> int:
    """How many numbers an embedding has."""
    width = transformers_network(network).config.get_text_config().hidden_size
    assert isinstance(width, int)
    return width


def pool(states: Tensor, batch: TextBatch, pooling: Pooling) -> Embeddings:
    """Make a vector of each document's hidden states `[batch, seq, hidden]`; sums are float32 or wider."""
    inside = batch["document_ids"] != PADDING_DOCUMENT
    flat, positions = states[inside], batch["position_ids"][inside]
    ids, index = batch["document_ids"][inside].unique(return_inverse=True)
    if pooling == "mean":
        dtype = torch.promote_types(flat.dtype, torch.float32)
        sums = torch.zeros(len(ids), flat.shape[-1], dtype=dtype, device=flat.device)
        sums = sums.index_add(0, index, flat.to(dtype))
        return Embeddings(sums / torch.bincount(index, minlength=len(ids))[:, None], ids)
    if pooling == "cls":
        chosen = positions == 0
    else:
        lengths = torch.zeros_like(ids).scatter_reduce(0, index, positions, "amax")
        chosen = positions == lengths[index]
    places = torch.empty_like(ids).scatter(0, index[chosen], chosen.nonzero().flatten())
    return Embeddings(flat[places], ids)


def remember_pooling(network: nn.Module, pooling: Pooling, max_length: int | None) -> None:
    """Write into a network's configuration how it embeds texts, where exports find it.

    Args:
        network: A transformers network, or one that peft adapted.
        pooling: How its hidden states are pooled.
        max_length: Tokens of a text at most, if that is known.
    """
    setattr(transformers_network(network).config, _REMEMBERED, {"pooling": pooling, "max_length": max_length})


def remembered_pooling(network: nn.Module) -> tuple[Pooling, int | None] | None:
    """How a network pools and the length of its texts; None where it was not trained to embed them."""
    found = getattr(transformers_network(network).config, _REMEMBERED, None)
    return None if found is None else (found["pooling"], found["max_length"])
