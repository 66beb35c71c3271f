"""SparseGPTPruning: weights that can be made up for go, and those that stay make up for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from torch import nn
from typing_extensions import override

from lightllm.callbacks.calibrating import calibration_batches
from lightllm.callbacks.pruning import Pruning
from lightllm.compression.calibration import change_layer_by_layer
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.masking import MaskingAndAdapting
from lightllm.compression.masks import Amount
from lightllm.compression.second_order import SecondMoment
from lightllm.compression.sparse_gpt import sparse_gpt

if TYPE_CHECKING:
    from lightllm.batch import TextBatch
    from lightllm.models.transformation import Transformation
    from lightllm.modules.base import LanguageModule


class SparseGPTPruning(Pruning):
    """Prunes so that each layer's outputs change least, adapting the weights that stay (arXiv:2301.00774).

    The outputs are those for training documents, layer by layer at the moment of pruning: two forward passes over
    them and a factorization a layer. Frozen weights change too, so that the checkpoints of LoRA hold them all. See
    `Pruning`.

    Args:
        sparsity: See `Pruning`; every layer loses this share, and its rows more or less.
        pattern: See `Pruning`.
        num_documents: Documents of the training data to calibrate on.
        seed: Of their choice.
        block_size: Columns of a layer whose mask is decided at once; a multiple of a pattern's group.
        damping: Steadies the second moment of a layer's inputs, as a share of its mean: more for few documents.
        common: The other fields of `Pruning`.

    Raises:
        ValueError: See `Pruning`; or a block size that cuts a pattern's groups, or a negative damping.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        num_documents: int = 64,
        seed: int = 0,
        block_size: int = 128,
        damping: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, pattern, **common)
        group = 1 if self.pattern is None else self.pattern.group
        if block_size < 1 or block_size % group:
            raise ValueError(f"block_size is {block_size}: give a positive multiple of {group} columns")
        if damping < 0:
            raise ValueError(f"damping is {damping}: give 0 or more (0.01)")
        self.num_documents = num_documents
        self.seed = seed
        self.block_size = block_size
        self.damping = damping
        self._batches: list[TextBatch] = []

    @override
    def transformation(self) -> Transformation:
        return MaskingAndAdapting(type(self).__name__, self.leave_out)

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._batches = calibration_batches(trainer, self.num_documents, self.seed)

    @override
    def prune(self, pl_module: LanguageModule, layers: dict[str, EffectiveLayer], amount: Amount) -> None:
        def prune_one(name: str, _: nn.Module, inputs: SecondMoment) -> None:
            layer = layers[name]
            pruned = sparse_gpt(
                layer.merged_weight(),
                inputs.sum,
                amount,
                block_size=self.block_size,
                damping=self.damping,
                among=layer.fixed_mask().keep,
            )
            layer.write_merged(pruned.weight)
            layer.set_keep(pruned.keep)

        modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
        change_layer_by_layer(pl_module.built_network, self._batches, modules, SecondMoment, prune_one)
