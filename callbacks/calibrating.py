"""Calibration data for callbacks: documents of the run's own training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from lightllm.batch import TextBatch


def calibration_batches(trainer: Trainer, num_documents: int, seed: int = 0) -> list[TextBatch]:
    """Draw documents from the training data of a run; neither its loader nor its random numbers move.

    Args:
        trainer: Whose datamodule is set up.
        num_documents: How many documents, or pieces of long ones.
        seed: Of the choice.

    Raises:
        ValueError: The data cannot be drawn from: there is no datamodule or another one than lightllm's, it is a
            stream, or no documents are asked for.
    """
    datamodule = getattr(trainer, "datamodule", None)
    draw: Callable[[int, int], list[TextBatch]] | None = getattr(datamodule, "calibration_batches", None)
    if draw is None:
        raise ValueError(
            f"{type(datamodule).__name__} gives no documents to calibrate on: take data of lightllm's (TextData, "
            "ChatData, …), give yours a method calibration_batches(num_documents, seed), or take what needs none "
            "(MagnitudePruning, LowRankDecomposition with activation_aware: false)"
        )
    return draw(num_documents, seed)
