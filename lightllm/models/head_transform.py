"""What masked language models do to hidden states before the output matrix: a layer, an activation, a norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from typing_extensions import override

from lightllm.models.anatomy import decoder, output_layer, transformers_network


def states_for_head(network: nn.Module, hidden: Tensor) -> Tensor:
    """What the output matrix is applied to, of hidden states `[positions, hidden]` or `[batch, seq, hidden]`.

    Every architecture writes that down in a place of its own, and many in the forward pass alone. So that pass is what
    is asked: it gets these hidden states for those of its encoder, and hands on none of them to the output matrix.

    Raises:
        ValueError: The network has no output layer, or does not use it as one.
    """
    base = transformers_network(network)
    layer = output_layer(base)
    if layer is None:
        raise ValueError(f"{type(base).__name__} has no head that makes logits")
    rows = hidden[None] if hidden.dim() == 2 else hidden
    caught: list[Tensor] = []

    def catch(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(given[0])
        return (given[0][:, :0], *given[1:])

    handle = layer.register_forward_pre_hook(catch)
    try:
        with _encoder_that_gives(base, rows):
            base(input_ids=torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device))
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ValueError(
            f"{type(base).__name__} makes its logits in a way that lightllm does not know: it does not call its output "
            "layer; please report this architecture"
        )
    return caught[0][0] if hidden.dim() == 2 else caught[0]


class _Given(nn.Module):
    """Stands for an encoder whose hidden states are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @override
    def forward(self, *_: Any, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.hidden)


@contextmanager
def _encoder_that_gives(base: nn.Module, hidden: Tensor) -> Iterator[None]:
    encoder = decoder(base)
    parent, name = next(
        (module, name) for module in base.modules() for name, child in module.named_children() if child is encoder
    )
    setattr(parent, name, _Given(hidden))
    try:
        yield
    finally:
        setattr(parent, name, encoder)
