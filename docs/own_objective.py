"""An objective of one's own: the focal loss, which learns most from what the network finds hardest."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import linear_log_probabilities
from lightllm.models import Adapter, Network
from lightllm.models.anatomy import output_head
from lightllm.modules import LanguageModule, Loss


class FocalTuning(LanguageModule):
    """Cross-entropy in which a target of probability p counts (1 - p) ** gamma (arXiv:1708.02002).

    Args:
        network: Where the network comes from.
        adapter: What of it trains.
        gamma: How much less an easy target counts; 0 is plain fine-tuning.
        common: The other fields of `LanguageModule`.
    """

    def __init__(self, network: Network, adapter: Adapter | None = None, *, gamma: float = 2.0, **common: Any) -> None:
        super().__init__(network, adapter, **common)
        self.gamma = gamma

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        targets = batch["labels"] != IGNORE_INDEX
        head = output_head(self.built_network)
        log_p = linear_log_probabilities(hidden, labels=batch["labels"], **head._asdict())[targets]
        return Loss((-((1 - log_p.exp()) ** self.gamma) * log_p).sum(), targets.sum())
