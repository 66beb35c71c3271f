"""What a pipeline knows of an objective."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torchmetrics import Metric

from lightllm.batch import TextBatch
from lightllm.models.adapters import Adapter, Prefix, PromptTuning
from lightllm.models.transformation import Transformation

WHOLE_NETWORK = ("forward", "training_step", "validation_step", "test_step", "measure")
"""Methods that call the network, or decide about what does: an objective with its own does so as it likes."""


@runtime_checkable
class StagedObjective(Protocol):
    """An objective as a pipeline sees it: a criterion on the last stage, and how its losses are counted."""

    network: nn.Module | None
    """None until it is built."""
    metrics: Metric
    """Takes four sums over target tokens."""
    transformations: dict[str, Transformation]
    """What callbacks registered."""
    plan: Any
    """How its network is built: with `compile`, `gradient_checkpointing`."""

    def criterion(self, hidden: Tensor, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """The loss of a batch whose hidden states are `[batch, seq, hidden]`, as a sum and a weight."""

    def training_output(self, loss_sum: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """What a training step returns that has this loss."""

    def measure_tokens(self, hidden: Tensor, batch: TextBatch) -> None:
        """Add a batch's metrics, from its hidden states `[batch, seq, hidden]`."""


def check_objective(module: object, adapter: Adapter, splits_backward: bool) -> StagedObjective:
    """Refuse what cannot be trained in a pipeline, before its network is loaded.

    Args:
        module: What is to be trained.
        adapter: What its network is adapted by.
        splits_backward: Whether the schedule forms gradients of weights apart from those of activations.

    Returns:
        The module.

    Raises:
        ValueError: It cannot; the message says why, and what to do instead.
    """
    name = type(module).__name__
    if not isinstance(module, StagedObjective):
        raise ValueError(f"{name} is no LanguageModule, and a pipeline trains no others: take another strategy")
    # Its methods are compared with those of the class that counts losses, from which every objective inherits.
    base = next(kind for kind in type(module).__mro__ if "training_output" in vars(kind))
    own = [method for method in WHOLE_NETWORK if getattr(type(module), method) is not getattr(base, method)]
    if own:
        raise ValueError(
            f"{name} cannot run in a pipeline: it has a {own[0]} of its own, for which it needs the whole network, and "
            "a pipeline asks an objective for its criterion on the last stage only; take another strategy, such as ddp"
        )
    if isinstance(adapter, (Prefix, PromptTuning)):
        raise ValueError(
            f"{type(adapter).__name__} puts something before every row by a call of the whole network, and no rank of "
            "a pipeline has that: take LoRA, or another strategy, such as ddp"
        )
    if module.transformations:
        raise ValueError(
            f"{', '.join(module.transformations)} would change a network of which each rank of a pipeline has a part: "
            "leave it out, or take another strategy, such as ddp"
        )
    if splits_backward and (module.plan.compile or module.plan.gradient_checkpointing):
        field = "compile" if module.plan.compile else "gradient_checkpointing"
        raise ValueError(
            f"model.{field} does not go with a schedule that cuts the backward pass in two: leave it out, or set "
            "trainer.strategy.init_args.schedule to interleaved_1f1b"
        )
    return module
