"""What is measured of a language model: all of it per target token, over everything that was seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


def sum_dtype() -> torch.dtype:
    """Of sums over many batches: float64, which keeps their digits, but for Apple's devices, which have none."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


class TokenMetrics(Metric):
    """Loss per target token and what follows from it, exact over unequal batches and ranks.

    The states are sums, so the result is the mean over all target tokens and never a mean of means:

        loss            sum of -log p(target) / number of targets                     (nats)
        perplexity      exp(loss)
        bits_per_byte   sum of -log2 p(target) / bytes of UTF-8 that the targets stand for
        token_accuracy  share of targets that have the highest probability
    """

    full_state_update = False
    higher_is_better = False

    loss_sum: Tensor
    num_targets: Tensor
    num_correct: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss_sum", "num_targets", "num_correct", "num_bytes"):
            self.add_state(name, torch.zeros((), dtype=sum_dtype()), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, num_targets: Tensor, num_correct: Tensor, num_bytes: Tensor) -> None:
        """Add one batch; every argument is a sum over its target tokens, a scalar."""
        # Not in place: `Trainer.validate` resets the sums in inference mode, and `fit` goes on with them out of it. And
        # not in the dtype of a module that was converted to half precision, its metrics with it.
        dtype = sum_dtype()
        self.loss_sum = self.loss_sum.to(dtype) + loss_sum
        self.num_targets = self.num_targets.to(dtype) + num_targets
        self.num_correct = self.num_correct.to(dtype) + num_correct
        self.num_bytes = self.num_bytes.to(dtype) + num_bytes

    def compute(self) -> dict[str, Tensor]:
        """The four numbers; bits per byte is left out where no bytes were counted."""
        loss = self.loss_sum / self.num_targets
        values = {"loss": loss, "perplexity": loss.exp(), "token_accuracy": self.num_correct / self.num_targets}
        if self.num_bytes > 0:
            values["bits_per_byte"] = self.loss_sum / math.log(2) / self.num_bytes
        return {name: value.float() for name, value in values.items()}
