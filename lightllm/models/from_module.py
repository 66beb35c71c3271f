"""A user's own `nn.Module` as the network."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from typing_extensions import override

from lightllm.models.anatomy import OwnNetwork
from lightllm.models.network import BuildRequest, Network


class FromModule(Network):
    """A network of one's own: any module that returns hidden states and names its head.

    Args:
        module: Makes the module from the vocabulary size; in YAML its `class_path`, whose first parameter is the
            vocabulary size. It is called as `module(input_ids=…, position_ids=…)`, both `[batch, seq]`, and
            returns hidden states `[batch, seq, hidden]` *before* the head. Positions restart at 0 with each
            document of a packed row; a module that ignores them is refused such rows, and takes data with
            `batches.mode: sorted`.
        head: Dotted name of the module's output projection, an `nn.Linear` `[vocab, hidden]`.
        tokenizer: Where its tokenizer is loaded from, if it has one.
    """

    def __init__(self, module: Callable[[int], nn.Module], head: str = "lm_head", tokenizer: str | None = None) -> None:
        self.module = module
        self.head = head
        self.tokenizer = tokenizer

    @property
    @override
    def tokenizer_source(self) -> str | None:
        return self.tokenizer

    @property
    @override
    def restorable(self) -> bool:
        return False

    @override
    def build(self, request: BuildRequest) -> nn.Module:
        if request.quantization is not None:
            raise ValueError("a module of one's own cannot be loaded in 4 bits: take LoRA or Full instead of QLoRA")
        if request.tokenizer is None:
            raise ValueError("a module of one's own takes its vocabulary size from the data's tokenizer: there is none")
        return OwnNetwork(self.module(len(request.tokenizer)), self.head)
