"""What pruning by a layer's inputs has in common: the documents that they come from, and the way through the layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from lightning.pytorch import Trainer
from torch import nn
from typing_extensions import override

from lightllm.callbacks.calibrating import calibration_batches
from lightllm.callbacks.pruning import Pruning
from lightllm.compression.calibration import Statistics, change_layer_by_layer
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.masks import Amount

if TYPE_CHECKING:
    from lightllm.batch import TextBatch
    from lightllm.modules.base import LanguageModule


class CalibratedPruning(Pruning, Generic[Statistics]):
    """Prunes layer by layer, by what comes into each for training documents at the moment of pruning.

    A leaf says what is kept of a layer's inputs and what follows from it. Every pruning of a `cubic` schedule costs two
    forward passes over the documents. See `Pruning`.

    Args:
        sparsity: See `Pruning`.
        pattern: See `Pruning`.
        num_documents: Documents of the training data to calibrate on.
        seed: Of their choice.
        common: The other fields of `Pruning`.

    Raises:
        ValueError: See `Pruning`.
    """

    statistics: ClassVar[type]
    """Of a layer's inputs, an `InputStatistics` that starts empty."""

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

    @abstractmethod
    def prune_layer(self, layer: EffectiveLayer, inputs: Statistics, amount: Amount) -> None:
        """Set a layer's mask, and perhaps its weight, by its inputs."""

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._batches = calibration_batches(trainer, self.num_documents, self.seed)

    @override
    def prune(self, pl_module: LanguageModule, layers: dict[str, EffectiveLayer], amount: Amount) -> None:
        def change(name: str, _: nn.Module, inputs: Statistics) -> None:
            self.prune_layer(layers[name], inputs, amount)

        modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
        change_layer_by_layer(pl_module.built_network, self._batches, modules, self.statistics, change)
