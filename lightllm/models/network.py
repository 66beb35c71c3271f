"""What a network is to the toolkit: a description that is built once the tokenizer and the strategy are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["by_document", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]
"""`by_document` is sdpa that on a CPU wastes nothing on packed rows, and transformers' own choice for architectures
that it cannot serve; the others are transformers' own."""
Task = Literal["causal", "masked", "encoder"]


class BuildRequest(NamedTuple):
    """What the objective asks of the network it gets."""

    task: Task
    """Which head the network ends in; `encoder` is none."""
    tokenizer: PreTrainedTokenizerBase | None
    """The data's tokenizer, from which a network from scratch takes its vocabulary and special tokens."""
    quantization: QuantizationConfigMixin | None = None
    """How the weights are stored while they are frozen; None stores them in the network's dtype."""


class Network(ABC):
    """A network to be built: cheap to make, checked when made, and heavy only in `build`."""

    @property
    @abstractmethod
    def tokenizer_source(self) -> str | None:
        """Where the network's own tokenizer is loaded from, None if it has none."""

    @property
    @abstractmethod
    def restorable(self) -> bool:
        """Whether `build` gives the same weights every time, so that frozen ones need not be in a checkpoint."""

    @abstractmethod
    def build(self, request: BuildRequest) -> nn.Module:
        """Make the network with its weights.

        Raises:
            ValueError: The network cannot serve the request; the message says why.
        """


_LATER: ContextVar[bool] = ContextVar("weights_come_later", default=False)


@contextmanager
def weights_come_later(later: bool) -> Iterator[None]:
    """Within it, transformers networks are built without weights, on the meta device: another process sends them.

    Args:
        later: Whether it is so; otherwise nothing changes.
    """
    token = _LATER.set(later)
    try:
        yield
    finally:
        _LATER.reset(token)


def are_weights_to_come() -> bool:
    """Whether a network is to be built without weights, see `weights_come_later`."""
    return _LATER.get()


def torch_dtype(name: Dtype) -> torch.dtype | Literal["auto"]:
    """The `torch.dtype` that a configuration names; `auto` stays for transformers to read from the checkpoint."""
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
