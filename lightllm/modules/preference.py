"""Tuning to preferences: of two answers to a prompt, one is better."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch
from lightllm.losses import dpo_loss, implicit_rewards, ipo_loss, linear_log_probabilities
from lightllm.models.adapters import Adapter, Full
from lightllm.models.anatomy import adapter_switched_off, has_adapter, output_head
from lightllm.models.hidden_states import hidden_states
from lightllm.models.network import BuildRequest, Network
from lightllm.modules.base import LanguageModule, Loss
from lightllm.modules.build import build_network
from lightllm.modules.token_metrics import sum_dtype


class PairScores(NamedTuple):
    """Log probabilities of the answers of a batch's pairs, each `[pairs]`, in nats."""

    chosen: Tensor
    rejected: Tensor


class PreferenceMetrics(Metric):
    """Loss per pair, and how far the network prefers the chosen answers more than its reference does.

    loss             mean over pairs
    reward_accuracy  share of pairs whose chosen answer has the higher implicit reward
    reward_margin    mean of the chosen answers' rewards minus the rejected ones'
    """

    full_state_update = False

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, dtype=sum_dtype()), dist_reduce_fx="sum")

    def update(self, losses: Tensor, margins: Tensor) -> None:
        """Add pairs by their losses and reward margins, both `[pairs]`."""
        count = torch.tensor(len(losses), device=losses.device)
        # Not in place: `Trainer.validate` resets the sums in inference mode, and `fit` goes on with them out of it.
        self.sums = self.sums + torch.stack([losses.sum(), (margins > 0).sum(), margins.sum(), count])

    def compute(self) -> dict[str, Tensor]:
        """The three numbers."""
        loss, accuracy, margin = (self.sums[:3] / self.sums[3]).float()
        return {"loss": loss, "reward_accuracy": accuracy, "reward_margin": margin}


class PreferenceTuning(LanguageModule):
    """Direct preference optimization against the network as it was at the start.

    Documents come in pairs, `2p` chosen and `2p + 1` rejected, both in one batch (see `PreferenceData`). The reference
    is the same network with its adapter switched off; without an adapter, a frozen second copy.

    Args:
        network: Where the network comes from, usually a fine-tuned one.
        adapter: What trains; with an adapter of peft's, the reference costs no memory.
        loss: `dpo` (arXiv:2305.18290) or `ipo` (arXiv:2310.12036).
        beta: How strongly the network is held to its reference.
        label_smoothing: Of `dpo`: the share of pairs thought to be labelled the wrong way round.
        common: The other fields of `LanguageModule`.

    Raises:
        ValueError: `label_smoothing` with `ipo`, which has none.
    """

    def __init__(
        self,
        network: Network,
        adapter: Adapter | None = None,
        *,
        loss: Literal["dpo", "ipo"] = "dpo",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(network, adapter, **common)
        if loss == "ipo" and label_smoothing:
            raise ValueError(f"ipo has no label smoothing, and label_smoothing is {label_smoothing}: leave it out")
        self.loss = loss
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.reference: nn.Module | None = None

    @override
    def configure_model(self) -> None:
        super().configure_model()
        if self.reference is None and not has_adapter(self.built_network):
            request = BuildRequest(self.task, self.tokenizer)
            plan = self.plan._replace(adapter=Full(), gradient_checkpointing=False)
            self.reference = build_network(plan, request).requires_grad_(False)
            if not self.plan.network.restorable:  # random weights: another build would be another network
                self.reference.load_state_dict(self.built_network.state_dict())

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        losses, _ = self._pairs(hidden, batch)
        return Loss(losses.sum(), torch.tensor(len(losses), device=losses.device))

    @override
    def new_metrics(self) -> Metric:
        return PreferenceMetrics()

    @override
    def measure(self, batch: TextBatch) -> None:
        self.metrics.update(*self._pairs(self(batch), batch))

    def _pairs(self, hidden: Tensor, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Losses and reward margins of the batch's pairs, both `[pairs]`."""
        policy = self._scores(self.built_network, hidden, batch)
        with torch.no_grad(), nullcontext() if self.reference is not None else adapter_switched_off(self.built_network):
            network = self.reference if self.reference is not None else self.built_network
            # A reference does not drop units out: it is one function, not a sample of many.
            training = [module for module in network.modules() if module.training]
            network.eval()
            reference = self._scores(network, hidden_states(network, batch), batch)
            for module in training:
                module.training = True
        scores = (policy.chosen, policy.rejected, reference.chosen, reference.rejected)
        if self.loss == "ipo":
            losses = ipo_loss(*scores, beta=self.beta)
        else:
            losses = dpo_loss(*scores, beta=self.beta, label_smoothing=self.label_smoothing)
        rewards = [implicit_rewards(ours, theirs, self.beta) for ours, theirs in zip(policy, reference, strict=True)]
        return losses, rewards[0] - rewards[1]

    def _scores(self, network: nn.Module, hidden: Tensor, batch: TextBatch) -> PairScores:
        head = output_head(network)
        positions = linear_log_probabilities(hidden, labels=batch["labels"], **head._asdict())
        return pair_scores(positions, batch, mean=self.loss == "ipo")


def pair_scores(positions: Tensor, batch: TextBatch, mean: bool) -> PairScores:
    """Sum or average log probabilities `[batch, seq]` over each answer's target tokens.

    Raises:
        ValueError: A chosen answer has no rejected one in the batch, or the other way round.
    """
    documents = batch["document_ids"]
    inside = documents != PADDING_DOCUMENT
    ids, index = documents[inside].unique(return_inverse=True)
    if len(ids) % 2 or not torch.equal(ids[0::2] + 1, ids[1::2]) or (ids[0::2] % 2).any():
        raise ValueError(
            f"preference batches hold pairs, 2p chosen and 2p + 1 rejected, and this has {ids.tolist()}: "
            "use PreferenceData, or a datamodule that keeps pairs together"
        )
    zeros = torch.zeros(len(ids), dtype=positions.dtype, device=positions.device)
    scores = zeros.index_add(0, index, positions[inside])
    if mean:
        targets = (batch["labels"][inside] != IGNORE_INDEX).to(positions.dtype)
        scores = scores / zeros.index_add(0, index, targets).clamp(min=1)
    return PairScores(scores[0::2], scores[1::2])
