"""WandaPruning: weights that are small, or whose inputs are, go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from torch import nn
from typing_extensions import override

from lightllm.callbacks.calibrating import calibration_batches
from lightllm.callbacks.pruning import Pruning
from lightllm.compression.calibration import change_layer_by_layer
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.masking import Masking
from lightllm.compression.masks import Amount
from lightllm.compression.wanda import SquaredNorms, wanda_mask

if TYPE_CHECKING:
    from lightllm.batch import TextBatch
    from lightllm.models.transformation import Transformation
    from lightllm.modules.base import LanguageModule


class WandaPruning(Pruning):
    """Prunes the weights with the lowest `|weight| * norm of its input` in each row (arXiv:2306.11695); see `Pruning`.

    The norms are those of training documents, layer by layer at the moment of pruning: two forward passes over them,
    which is what `cubic` costs every time. Weights that stay are not changed.

    Args:
        sparsity: See `Pruning`; every row of a layer loses the same number of weights.
        pattern: See `Pruning`.
        num_documents: Documents of the training data to calibrate on.
        seed: Of their choice.
        common: The other fields of `Pruning`.

    Raises:
        ValueError: See `Pruning`.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        num_documents: int = 64,
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, pattern, **common)
        self.num_documents = num_documents
        self.seed = seed
        self._batches: list[TextBatch] = []

    @override
    def transformation(self) -> Transformation:
        return Masking(type(self).__name__, self.leave_out)

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._batches = calibration_batches(trainer, self.num_documents, self.seed)

    @override
    def prune(self, pl_module: LanguageModule, layers: dict[str, EffectiveLayer], amount: Amount) -> None:
        def mask(name: str, _: nn.Module, norms: SquaredNorms) -> None:
            layer = layers[name]
            layer.set_keep(wanda_mask(layer.merged_weight(), norms.sum, amount, layer.fixed_mask().keep))

        modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
        change_layer_by_layer(pl_module.built_network, self._batches, modules, SquaredNorms, mask)
