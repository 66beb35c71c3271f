"""WandaPruning: weights that are small, or whose inputs are, go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lightllm.callbacks.calibrated_pruning import CalibratedPruning
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.masking import Masking
from lightllm.compression.masks import Amount
from lightllm.compression.wanda import SquaredNorms, wanda_mask

if TYPE_CHECKING:
    from lightllm.models.transformation import Transformation


class WandaPruning(CalibratedPruning[SquaredNorms]):
    """Prunes the weights with the lowest `|weight| * norm of its input` in each row (arXiv:2306.11695).

    Every row of a layer loses the same number of weights; those that stay are not changed. Fields and errors are those
    of `CalibratedPruning` and `Pruning`.
    """

    statistics = SquaredNorms

    @override
    def transformation(self) -> Transformation:
        return Masking(type(self).__name__, self.leave_out)

    @override
    def prune_layer(self, layer: EffectiveLayer, inputs: SquaredNorms, amount: Amount) -> None:
        layer.set_keep(wanda_mask(layer.merged_weight(), inputs.sum, amount, layer.fixed_mask().keep))
