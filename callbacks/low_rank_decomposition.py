"""LowRankDecomposition: two thin matrices in the place of each linear layer, before anything trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.callbacks.calibrating import calibration_batches
from lightllm.callbacks.transforming import Transforming
from lightllm.compression.low_rank_network import LowRank, rank_report
from lightllm.compression.rank_choice import RankChoice
from lightllm.models.transformation import Transformation

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class LowRankDecomposition(Transforming):
    """Replaces the blocks' linear layers by two thin matrices each, once, when the network is built.

    Activation-aware components (SVD-LLM, arXiv:2403.07378) lose the least of the layers' outputs on training documents;
    plain ones the least of the weights. What trains then are the thin matrices, or an adapter on them. An export is
    dense again (`merged`), or stays small (`factored`).

    Args:
        ranks: What decides the ranks: energy, a budget, or layer by layer.
        activation_aware: Fit to the inputs of training documents; otherwise no data is needed.
        num_documents: How many of them.
        seed: Of their choice.
        leave_out: Regular expressions of names of layers that stay whole.

    """

    def __init__(
        self,
        ranks: RankChoice,
        activation_aware: bool = True,
        num_documents: int = 128,
        seed: int = 0,
        leave_out: list[str] | None = None,
    ) -> None:
        self.ranks = ranks
        self.activation_aware = activation_aware
        self.num_documents = num_documents
        self.seed = seed
        self.leave_out = leave_out
        self._trainer: Trainer | None = None

    @override
    def transformation(self) -> Transformation:
        calibration = self._calibration_batches if self.activation_aware else None
        return LowRank(type(self).__name__, self.ranks, self.leave_out, calibration)

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        self._trainer = trainer
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        rank_zero_info(rank_report(pl_module.built_network).describe())

    def _calibration_batches(self) -> list[TextBatch]:
        assert self._trainer is not None, "the network is built for the first time by a trainer"
        return calibration_batches(self._trainer, self.num_documents, self.seed)
