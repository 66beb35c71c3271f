"""Whether data and network belong together, asked before anything is trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightllm.models.anatomy import max_positions, vocabulary_size
from lightllm.models.hidden_states import check_packing
from lightllm.modules.build import on_meta


def check_agreement(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase | None, length: int | None, packed: bool
) -> None:
    """Refuse data that the network cannot take.

    Args:
        network: The network.
        tokenizer: The data's.
        length: Positions in a row at most, if the data says so.
        packed: Whether rows hold several documents.

    Raises:
        ValueError: The tokenizer is another network's, rows are too long, or documents in a row would see each other.
    """
    if tokenizer is not None and len(tokenizer) > vocabulary_size(network):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the network embeds {vocabulary_size(network)}: "
            "they do not belong together; leave data.tokenizer out to take the network's own"
        )
    limit = max_positions(network)
    if length is not None and limit is not None and length > limit:
        raise ValueError(f"data.max_length is {length}, but the network has positions for {limit} only: lower it")
    if packed and not on_meta(network):
        check_packing(network)
