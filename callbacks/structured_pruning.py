"""StructuredPruning: heads, neurons, hidden channels and layers are taken out before training, which then recovers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.callbacks.calibrating import calibration_batches
from lightllm.callbacks.transforming import Transforming
from lightllm.compression.structured import StructuredRemoval
from lightllm.compression.structured_importance import Importance
from lightllm.compression.structured_sizes import Removal

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class StructuredPruning(Transforming):
    """Makes the network smaller before it trains; its export is a smaller ordinary network for transformers.

    What matters least is found on the run's own training documents, once: the run's checkpoints say what was kept.
    The number that is kept is the same in every layer, since a transformers configuration has one for all; which they
    are is each layer's own. It comes before the adapter: LoRA is then of the smaller network.

    Of layers, heads, neurons and channels, each is a share of them to remove (0.25) or a count (8); 0 removes none. A
    share keeps the nearest number with which transformers builds such a network, of many a multiple of 32. Without
    hidden channels, each norm is rescaled for those that are gone (`lightllm.compression.structured_removal.remove`).

    Args:
        layers: Whole layers.
        heads: Key/value heads, each with the query heads that read it.
        neurons: Of the MLPs.
        channels: Hidden channels: the width of the residual stream, and with it of everything that reads or writes it.
        parameters: At least this share of all parameters: as many neurons go as it takes beside what else goes.
        importance: activation: how much a unit adds to the residual stream, and by how much a layer turns it (block
            influence); taylor: the first-order change of the loss, |weight x gradient|; magnitude: the squares of the
            weights, without data.
        num_documents: Documents of the training data to measure it on.
        leave_out: Layers that stay in any case, counted from 0; -1 is the last.

    Raises:
        ValueError: Nothing is to be removed, or a number is out of its range.
    """

    def __init__(
        self,
        layers: int | float = 0,
        heads: int | float = 0,
        neurons: int | float = 0,
        channels: int | float = 0,
        parameters: float | None = None,
        importance: Importance = "activation",
        num_documents: int = 64,
        leave_out: Sequence[int] = (),
    ) -> None:
        self.num_documents = num_documents
        self._trainer: Trainer | None = None
        removal = Removal(layers, heads, neurons, channels, parameters)
        self._removal = StructuredRemoval(type(self).__name__, removal, importance, leave_out, self._calibration)

    @override
    def transformation(self) -> StructuredRemoval:
        return self._removal

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        self._trainer = trainer
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        rank_zero_info(f"structured pruning: {self._removal.done}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        self._trainer = None

    def _calibration(self) -> list[TextBatch]:
        assert self._trainer is not None  # without one, a network is built by the record of an earlier build
        return calibration_batches(self._trainer, self.num_documents)
