"""QuantizationAwareTraining: the network learns to work with the few bits that it will be stored in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightllm.callbacks.loop_position import at_optimizer_step
from lightllm.callbacks.progress_bar import total_steps
from lightllm.callbacks.transforming import Transforming
from lightllm.compression.fake_quantization import FakeQuantization
from lightllm.compression.schemes import SchemeName, Target, make_scheme
from lightllm.compression.sparsity_schedule import Moment, step_of

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class QuantizationAwareTraining(Transforming):
    """Has the linear layers of the blocks compute with rounded weights and inputs, to the bit as they will be stored.

    Forward passes round, gradients go straight through. With full training, the weights that train stay in their own
    precision (float32 is best: a step that is lost in rounding is no step). With LoRA, what is rounded is the merged
    weight, `Q(W + s B A)`, and the base stays frozen unless `train_base`. Where a mask is on the same layer, what it
    leaves out stays zero. Embedding and head are left alone.

    `lightllm export RUN --format torchao` and `--format gguf` then write the very numbers that were trained.

    Args:
        scheme: int8_dynamic_int4: weights of 4 bits in groups, activations of 8, found anew for every token;
            int4_weight_only, int8_weight_only: weights alone; int8_dynamic_int8: both 8.
        group_size: How many weights in a row share a scale. None: 32 with 4 bits and for gguf, the whole row with 8.
        target: Whose numbers: `torchao`, or `gguf`: Q4_0 and Q8_0, and activations as llama.cpp rounds them.
        start: From when on it rounds: an optimizer step as a whole number, or a share of the run such as 0.2.
        freeze_scales: From when on scales no longer follow the weights, likewise; None: never.
        leave_out: Regular expressions of names of layers that are left as they are: ["down_proj", "layers.0."].
        train_base: Train the rounded layers' base weights beside LoRA; they are in the checkpoints then.

    Raises:
        ValueError: The scheme has no such groups, or scales would be frozen before there are any.
    """

    def __init__(
        self,
        scheme: SchemeName = "int8_dynamic_int4",
        group_size: int | None = None,
        target: Target = "torchao",
        start: Moment = 0,
        freeze_scales: Moment | None = None,
        leave_out: list[str] | None = None,
        train_base: bool = False,
    ) -> None:
        if freeze_scales is not None and type(freeze_scales) is type(start) and freeze_scales < start:
            raise ValueError(f"freeze_scales is {freeze_scales}, before start, {start}: there are no scales yet")
        self.start = start
        self.freeze_scales = freeze_scales
        # Named by its scheme: another for the rest of the layers may stand beside it.
        self._fake = FakeQuantization(scheme, make_scheme(scheme, group_size, target), leave_out or [], train_base)
        self._start_step = 0
        self._freeze_step: int | None = None

    @override
    def transformation(self) -> FakeQuantization:
        return self._fake

    @override
    def setup(self, trainer: Trainer, pl_module: LanguageModule, stage: str) -> None:  # type: ignore[override]
        other = pl_module.transformations.get(self._fake.name)
        if other is not None and other is not self._fake:
            raise ValueError(
                f"two of the callbacks are QuantizationAwareTraining of {self._fake.name}: one is enough for "
                "all layers, and leave_out leaves some to another scheme"
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        num_steps = total_steps(trainer, steps_before=0, epochs_before=0)
        self._start_step = step_of(self.start, num_steps, "start")
        self._freeze_step = None
        if self.freeze_scales is not None:
            self._freeze_step = step_of(self.freeze_scales, num_steps, "freeze_scales")
            if self._freeze_step < self._start_step:
                raise ValueError(
                    f"freeze_scales is step {self._freeze_step}, before anything is rounded at step "
                    f"{self._start_step}: set it to that step or a later one"
                )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        self._switch_if_due(trainer, pl_module)

    @override
    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, batch: Any, batch_idx: int
    ) -> None:
        self._switch_if_due(trainer, pl_module)  # resumed from a checkpoint that another callback made just before

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_optimizer_step(trainer):  # before the step's validation and checkpoint
            self._switch_if_due(trainer, pl_module)

    def _switch_if_due(self, trainer: Trainer, module: LanguageModule) -> None:
        """Switch rounding on, and freeze scales, where it is time and not done yet; checkpoints say what is."""
        step = trainer.global_step
        layers = self._fake.layers
        if step >= self._start_step and not all(quantizer.enabled for _, quantizer in layers):
            for _, quantizer in layers:
                quantizer.enabled = True
            rank_zero_info(f"step {step}: {len(layers)} layers are rounded from now on ({self._fake.scheme.name})")
            self.announce(module)
        if self._freeze_step is not None and step >= self._freeze_step:
            moving = [(layer, quantizer) for layer, quantizer in layers if quantizer.is_straight_through]
            for layer, quantizer in moving:
                quantizer.freeze_scales(layer.masked_weight())
            if moving:
                rank_zero_info(f"step {step}: the scales of {len(moving)} layers are fixed from now on")
