"""Whether data, network and strategy belong together, asked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.strategies import Strategy
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightllm.models.adapters import Adapter
from lightllm.models.anatomy import max_positions, vocabulary_size
from lightllm.models.hidden_states import check_packing
from lightllm.models.transformation import Transformation
from lightllm.modules.build import on_meta
from lightllm.parallel.spreading import SpreadsWeights


def check_composition(
    adapter: Adapter, transformations: Sequence[Transformation], packed: bool, strategy: Strategy
) -> None:
    """Refuse what cannot be trained so, before a network is loaded.

    Args:
        adapter: What is to be done to the network.
        transformations: What else.
        packed: Whether rows hold several documents.
        strategy: The trainer's.

    Raises:
        ValueError: The adapter needs a row a document, or the strategy cannot spread what the network will be.
    """
    if packed and not adapter.supports_packing:
        raise ValueError(
            f"{type(adapter).__name__} puts something before every row, so a row can hold one document only: set "
            "data.batches.mode to sorted"
        )
    if isinstance(strategy, SpreadsWeights):
        strategy.check_composition(adapter, transformations)


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
