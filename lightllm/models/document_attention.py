"""Attention over packed rows, one document after another, with no mask and no work between documents.

A block-diagonal mask makes attention over a packed row cost its length squared, most of it masked away, and keeps
the causal kernel from being used. On a CPU it is cheaper to run that kernel once a document. The implementation is
registered with transformers as `by_document` and serves every architecture that attends by transformers' interface and
needs nothing that sdpa lacks; wherever it has no advantage (another device, a single document a row, a cache, a sliding
window, an unusual mask) it is transformers' `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

BY_DOCUMENT = "by_document"

SHORT = 512
"""Documents of at most so many tokens are attended to by the formula itself, in half precision."""

_BEYOND_SDPA = ("position_bias", "s_aux", "softcap")
"""What some architectures ask of their attention and the kernel has no argument for."""


def implementation_for(attention: str, architecture: type[PreTrainedModel] | None) -> str | None:
    """What to ask transformers for, so that `by_document` goes only where it gives the architecture's own attention.

    Args:
        attention: What the user asks for.
        architecture: The class of the network, None where it is not transformers' own.

    Returns:
        `attention`, or None for transformers' own choice of sdpa or eager where `by_document` cannot serve: the
        architecture has no sdpa (sinks, soft caps) or does not attend by transformers' interface.
    """
    if attention != BY_DOCUMENT:
        return attention
    serves = architecture is not None and architecture._supports_sdpa and architecture._supports_attention_backend
    return BY_DOCUMENT if serves else None


def document_lengths_or_mask(
    *, mask_function: Callable[..., Tensor], attention_mask: Tensor | None = None, **arguments: Any
) -> Tensor | None:
    """What transformers hands to every layer as its mask.

    Returns:
        The lengths of the row's documents, int64 `[documents]`, row after row, where rows are packed on a CPU;
        otherwise transformers' own mask `[batch, 1, query, key]`, or None for plain causal attention.
    """
    packed_on_cpu = (
        attention_mask is None
        and arguments.get("allow_is_causal_skip") is False
        and not arguments.get("use_vmap")
        and arguments.get("local_size") is None
        and arguments["q_length"] == arguments["kv_length"]
        and torch.device(arguments["device"]).type == "cpu"
    )
    lengths = (
        _document_lengths(mask_function, arguments["batch_size"], arguments["q_length"]) if packed_on_cpu else None
    )
    if lengths is not None:
        return lengths
    mask: Tensor | None = sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **arguments)
    return mask


def _document_lengths(mask_function: Callable[..., Tensor], batch: int, length: int) -> Tensor | None:
    """Read document lengths off the mask: a document begins where a position may not see the one before it."""
    rows, later = torch.arange(batch)[:, None], torch.arange(1, length)[None]
    head = torch.zeros((), dtype=torch.int64)
    if mask_function(rows, head, later - 1, later).any():  # somebody may look ahead: not a causal mask
        return None
    begins = torch.ones(batch, length, dtype=torch.bool)
    begins[:, 1:] = ~mask_function(rows, head, later, later - 1)
    starts = begins.flatten().nonzero().flatten()
    return torch.diff(starts, append=torch.tensor([batch * length]))


def attention_by_document(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Causal attention within each document of `attention_mask`'s lengths, or transformers' `sdpa`.

    Args:
        module: The attention layer.
        query: `[batch, heads, seq, head_dim]`.
        key: `[batch, key_value_heads, seq, head_dim]`.
        value: `[batch, key_value_heads, seq, head_dim]`.
        attention_mask: What `document_lengths_or_mask` gave.
        arguments: Of transformers' attention functions: `dropout`, `scaling`, …

    Returns:
        `[batch, seq, heads, head_dim]`, and no attention weights.

    Raises:
        ValueError: The layer asks for something that sdpa cannot do.
    """
    asked = [name for name in _BEYOND_SDPA if arguments.get(name) is not None]
    if asked:
        raise ValueError(f"{type(module).__name__} needs {asked}, which sdpa does not do: set attention to eager")
    if attention_mask is None or attention_mask.ndim != 1:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        return output, None
    batch, heads, length, _ = query.shape
    lengths = attention_mask.tolist()
    # One split a tensor, not one slice a document: a slice's gradient is a zero-filled tensor of the whole row.
    parts = [states.transpose(1, 2).flatten(0, 1).split(lengths) for states in (query, key, value)]
    dropout, scaling = arguments.get("dropout", 0.0), arguments.get("scaling")
    outputs = [_within_document(q, k, v, dropout, scaling) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs).view(batch, length, heads, -1), None


def _within_document(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """Causal attention of one document: `[length, heads, head_dim]` for queries `[length, heads, head_dim]`."""
    length, heads, _ = query.shape
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    if query.dtype != torch.float32 and length <= SHORT and not dropout:
        return _short_attention(query, key, value, scaling).transpose(0, 1)
    output = scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        dropout_p=dropout,
        scale=scaling,
        is_causal=True,
        enable_gqa=heads != len(key),
    )
    return output[0].transpose(0, 1)


def _short_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """The formula itself, `softmax(scale * Q K' + mask) V`: `[heads, length, head_dim]`.

    In half precision the processor multiplies small matrices 2 to 3 times faster than its fused kernel, whose backward
    pass dominates; what it keeps is `heads * length ** 2` probabilities, little for a short document. Queries that
    share a key/value head are stacked, so that keys and values are not repeated.
    """
    heads, length, width = query.shape
    groups = heads // len(key)
    later = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
    stacked = query.reshape(len(key), groups * length, width)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(later.repeat(groups, 1), stacked, key.transpose(1, 2), alpha=scale)
    return (scores.softmax(-1) @ value).view(heads, length, -1)


AttentionInterface.register(BY_DOCUMENT, attention_by_document)
AttentionMaskInterface.register(BY_DOCUMENT, document_lengths_or_mask)
