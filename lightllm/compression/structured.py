"""Structured pruning: what matters least in a network is found, and taken out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.compression.structure import Sizes, Structure, structure_of
from lightllm.compression.structured_importance import Importance, norm_factors, scores
from lightllm.compression.structured_removal import Kept, everything, remove
from lightllm.compression.structured_sizes import Removal, check_removal, kept_sizes, num_parameters
from lightllm.models.layer_removal import keep_layers
from lightllm.models.transformation import Record, Transformation, TransformationKind


def prune(
    network: nn.Module,
    removal: Removal,
    importance: Importance,
    batches: Sequence[TextBatch],
    leave_out: Sequence[int] = (),
) -> Kept:
    """Find the heads, neurons, channels and layers that matter least, and take them out, in place.

    Layers go first: what is in the others is measured in the network without them.

    Args:
        network: A network that `structure_of` knows.
        removal: How much of each goes.
        importance: See `scores`.
        batches: Calibration data, of which importance by magnitude needs none.
        leave_out: Layers that stay in any case, counted from 0; -1 is the last.

    Returns:
        What stays: with it, `remove` does the same to the same network again.

    Raises:
        ValueError: The network is not known, has not so much to remove, or there is no data to measure it on.
    """
    structure = structure_of(network)
    sizes = kept_sizes(structure, removal)
    layers = everything(structure).layers
    if sizes.layers < len(layers):
        layers = _layers(structure, scores(structure, importance, batches).layers, sizes.layers, leave_out)
        keep_layers(network, layers.tolist())
    if sizes == structure.sizes:
        return everything(structure)._replace(layers=layers)
    found = scores(structure, importance, batches)
    heads, neurons = _highest(found.heads, sizes.heads), _highest(found.neurons, sizes.neurons)
    channels = _highest(found.channels, sizes.channels)
    factors = norm_factors(structure, channels, batches).float()
    kept = Kept(everything(structure).layers, heads, neurons, channels, factors)
    remove(network, kept)
    return kept._replace(layers=layers)


def _layers(structure: Structure, found: Tensor, number: int, leave_out: Sequence[int]) -> Tensor:
    """The layers that stay."""
    num_layers = structure.sizes.layers
    for layer in leave_out:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"leave_out has layer {layer}, and the network has {num_layers}, counted from 0")
    stay = {layer % num_layers for layer in leave_out}
    if len(stay) > number:
        raise ValueError(
            f"leave_out has {len(stay)} layers, and {number} are to stay: remove fewer, or leave out fewer"
        )
    found[list(stay)] = torch.inf
    return _highest(found, number)


def _highest(found: Tensor, number: int) -> Tensor:
    """The indices of the highest along the last dimension, ascending; of equals the first."""
    order = found.argsort(dim=-1, descending=True, stable=True)
    return order[..., :number].sort().values.int()


class StructuredRemoval(Transformation):
    """Structured pruning as a step of the build pipeline, which is repeated by the indices of what was kept.

    Args:
        name: Unique in a run.
        removal: How much of each goes.
        importance: See `scores`.
        leave_out: Layers that stay in any case, counted from 0; -1 is the last.
        calibration: Gives the calibration data; called the first time only, and not for importance by magnitude.

    Raises:
        ValueError: The removal is none that a network can have.
    """

    kind = TransformationKind.STRUCTURE

    def __init__(
        self,
        name: str,
        removal: Removal,
        importance: Importance,
        leave_out: Sequence[int],
        calibration: Callable[[], Sequence[TextBatch]],
    ) -> None:
        super().__init__(name)
        check_removal(removal)
        self.removal = removal
        self.importance: Importance = importance
        self.leave_out = leave_out
        self.calibration = calibration
        self.done: Pruned | None = None
        """What was done to the network, once it is."""

    @override
    def apply(self, network: nn.Module, record: Record | None) -> Record:
        structure = structure_of(network)
        before, num_before = structure.sizes, num_parameters(structure, structure.sizes)
        if record is None:
            if any(parameter.is_meta for parameter in network.parameters()):
                raise ValueError(
                    "what matters in a network is measured on its weights, which a sharded one gets later only: prune "
                    "it on one device, and train its export"
                )
            batches = [] if self.importance == "magnitude" else self.calibration()
            kept = prune(network, self.removal, self.importance, batches, self.leave_out)
            record = kept._asdict()
        else:
            remove(network, Kept(**record))
        after = structure.sizes
        self.done = Pruned(before, after, num_before, num_parameters(structure, after))
        return record


class Pruned(NamedTuple):
    """What was done to a network."""

    before: Sizes
    after: Sizes
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        """In a sentence: `134.5M to 101.1M parameters, 24.8% less: 26 of 30 layers, …`."""
        names = ("layers", "key/value heads", "neurons", "channels")
        parts = [f"{now} of {was} {name}" for name, was, now in zip(names, self.before, self.after, strict=True)]
        numbers = f"{self.parameters_before / 1e6:.1f}M to {self.parameters_after / 1e6:.1f}M parameters"
        return f"{numbers}, {1 - self.parameters_after / self.parameters_before:.1%} less: {', '.join(parts)}"
