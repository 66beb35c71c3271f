"""What is measured of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_f1_score
from torchmetrics.utilities import dim_zero_cat

from lightllm.modules.token_metrics import sum_dtype


class ClassMetrics(Metric):
    """Exact over unequal batches and ranks.

    loss      mean cross-entropy over texts                                (nats)
    accuracy  share of texts whose class has the highest score
    macro_f1  mean over classes of the harmonic mean of precision and recall
    """

    full_state_update = False
    higher_is_better = False

    loss_sum: Tensor
    found: list[Tensor]
    expected: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=sum_dtype()), dist_reduce_fx="sum")
        self.add_state("found", [], dist_reduce_fx="cat")
        self.add_state("expected", [], dist_reduce_fx="cat")

    def update(self, losses: Tensor, found: Tensor, expected: Tensor) -> None:
        """Add texts: their losses, the classes that were found and the right ones, each `[texts]`."""
        # Not in place: `Trainer.validate` resets the sum in inference mode, and `fit` goes on with it out of it.
        self.loss_sum = self.loss_sum + losses.sum()
        self.found.append(found)
        self.expected.append(expected)

    def compute(self) -> dict[str, Tensor]:
        """The three numbers."""
        found, expected = dim_zero_cat(self.found), dim_zero_cat(self.expected)
        classes = max(2, int(torch.maximum(found.max(), expected.max())) + 1)
        return {
            "loss": (self.loss_sum / len(found)).float(),
            "accuracy": (found == expected).float().mean(),
            "macro_f1": multiclass_f1_score(found, expected, num_classes=classes, average="macro"),
        }
