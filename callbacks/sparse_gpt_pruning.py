"""SparseGPTPruning: weights that can be made up for go, and those that stay make up for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightllm.callbacks.calibrated_pruning import CalibratedPruning
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.masking import MaskingAndAdapting
from lightllm.compression.masks import Amount
from lightllm.compression.second_order import SecondMoment
from lightllm.compression.sparse_gpt import sparse_gpt

if TYPE_CHECKING:
    from lightllm.models.transformation import Transformation


class SparseGPTPruning(CalibratedPruning[SecondMoment]):
    """Prunes so that each layer's outputs change least, adapting the weights that stay (arXiv:2301.00774).

    Every layer loses the sparsity's share, its rows more or less; a pruning costs a factorization a layer beside the
    passes over the documents. Frozen weights change too, so that the checkpoints of LoRA hold them all. See
    `CalibratedPruning` and `Pruning`.

    Args:
        sparsity: See `Pruning`.
        pattern: See `Pruning`.
        block_size: Columns of a layer whose mask is decided at once; a multiple of a pattern's group.
        damping: Steadies the second moment of a layer's inputs, as a share of its mean: more for few documents.
        common: The other fields of `CalibratedPruning` and `Pruning`.

    Raises:
        ValueError: See `Pruning`; or a block size that cuts a pattern's groups, or a negative damping.
    """

    statistics = SecondMoment

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
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
        self.block_size = block_size
        self.damping = damping

    @override
    def transformation(self) -> Transformation:
        return MaskingAndAdapting(type(self).__name__, self.leave_out)

    @override
    def prune_layer(self, layer: EffectiveLayer, inputs: SecondMoment, amount: Amount) -> None:
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
