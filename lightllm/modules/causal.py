"""Objectives that predict the next token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import linear_cross_entropy
from lightllm.models.adapters import Adapter
from lightllm.models.anatomy import output_head
from lightllm.models.network import Network
from lightllm.modules.base import LanguageModule, Loss


class CausalPretraining(LanguageModule):
    """Next-token prediction on plain text, with every weight trained.

    Args:
        network: Where the network comes from: `FromConfig` for a new one, `Pretrained` to go on with one.
        z_loss: Weight of the squared log-partition, which keeps logits from drifting (arXiv:2204.02311).
        common: The other fields of `LanguageModule`.
    """

    def __init__(self, network: Network, *, z_loss: float = 0.0, **common: Any) -> None:
        super().__init__(network, **common)
        self.z_loss = z_loss

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        return next_token_loss(self, hidden, batch, z_loss=self.z_loss)


class FineTuning(LanguageModule):
    """Next-token prediction on the data's target tokens (a chat's answers), with an adapter of choice.

    Args:
        network: Where the network comes from, usually `Pretrained`.
        adapter: What trains: `Full`, `LoRA`, `RsLoRA`, `DoRA`, `QLoRA`, `Prefix`, `PromptTuning`, `Frozen`.
        label_smoothing: Probability that the target gives up to all tokens, evenly.
        common: The other fields of `LanguageModule`.
    """

    def __init__(
        self, network: Network, adapter: Adapter | None = None, *, label_smoothing: float = 0.0, **common: Any
    ) -> None:
        super().__init__(network, adapter, **common)
        self.label_smoothing = label_smoothing

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        return next_token_loss(self, hidden, batch, label_smoothing=self.label_smoothing)


def next_token_loss(
    module: LanguageModule, hidden: Tensor, batch: TextBatch, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Loss:
    """Cross-entropy summed over the target tokens, and their number."""
    head = output_head(module.built_network)
    total = linear_cross_entropy(
        hidden,
        labels=batch["labels"],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        **head._asdict(),
    )
    return Loss(total, (batch["labels"] != IGNORE_INDEX).sum())
