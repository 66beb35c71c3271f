"""What goes with a spread network, and what does not: said before a network is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from lightllm.models.adapters import Adapter, DoRA, Prefix, PromptTuning, QLoRA
from lightllm.models.transformation import Transformation, TransformationKind
from lightllm.parallel.degrees import Degrees

_NOT_SPLIT: dict[type[Adapter], str] = {
    DoRA: "normalises whole columns of a matrix, of which a rank has a part",
    QLoRA: "stores matrices in blocks of 4-bit numbers, which are not cut",
    Prefix: "puts keys and values of all heads before a row, and a rank has some heads",
    PromptTuning: "reads the table of embeddings beside the network's own call",
}
"""Why an adapter does not go with tensor parallelism."""


def check_composition(degrees: Degrees, adapter: Adapter, transformations: Sequence[Transformation]) -> None:
    """Refuse an adapter or a transformation that a spread network cannot have.

    Raises:
        ValueError: The message says why, and what goes.
    """
    for one in transformations:
        if one.kind in (TransformationKind.MASK, TransformationKind.FAKE_QUANTIZATION):
            raise ValueError(
                f"{one.name} computes with whole matrices between training steps, and a rank has parts of them: train "
                "with strategy ddp, or leave it out"
            )
        if degrees.tensor > 1:
            raise ValueError(
                f"{one.name} makes layers of other shapes than the network's plan for tensor parallelism knows: set "
                "tensor to 1, or leave it out"
            )
    why = _NOT_SPLIT.get(type(adapter))
    if degrees.tensor > 1 and why is not None:
        raise ValueError(
            f"{type(adapter).__name__} {why}: set trainer.strategy.init_args.tensor to 1, or take LoRA or full training"
        )
