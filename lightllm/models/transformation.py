"""What a callback may do to the network while it is built, and how that is done again when a run is read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, ClassVar

from torch import nn


class TransformationKind(IntEnum):
    """In what order transformations are applied, whatever the order in which they were registered.

    Those before the adapter change what is adapted: LoRA on a network of fewer heads is LoRA of their size. Those
    behind it see the weights that the adapter makes.
    """

    STRUCTURE = 0
    LOW_RANK = 1
    MASK = 2
    FAKE_QUANTIZATION = 3

    @property
    def before_adapter(self) -> bool:
        """Whether the network is transformed before it is adapted."""
        return self in (TransformationKind.STRUCTURE, TransformationKind.LOW_RANK)


Record = dict[str, Any]
"""Plain values and tensors by which a transformation is repeated; part of the checkpoint."""


class Transformation(ABC):
    """A change to the network, registered by a callback's `setup` and made in the build pipeline."""

    kind: ClassVar[TransformationKind]
    changes_frozen_weights: ClassVar[bool] = False
    """Whether frozen weights are no longer those that the network is loaded with; checkpoints then hold them all."""

    def __init__(self, name: str) -> None:
        self.name = name
        """Unique in a run: the key of the record."""

    @abstractmethod
    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        """Change a network in place.

        Args:
            network: The network so far.
            record: What an earlier build of the same run returned: the same is done again, without data. The weights
                are those of the untransformed network; a checkpoint's are loaded after. None for the first time.

        Returns:
            What repeats it; None if it takes nothing to repeat.

        Raises:
            ValueError: The network cannot be changed so; the message says why.
        """


class Announcements:
    """Who is told when a step of changing the network is done, so that it can be measured at that moment."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[str, nn.Module], None]] = []

    def listen(self, listener: Callable[[str, nn.Module], None]) -> None:
        """Have a function called with the name of each step and the network as the step left it."""
        self._listeners.append(listener)

    def make(self, step: str, network: nn.Module) -> None:
        """Say that a step is done: `dense` before all others, the name of a transformation, `trained` at the end."""
        for listener in self._listeners:
            listener(step, network)


def apply_transformations(
    network: nn.Module,
    transformations: Iterable[Transformation],
    records: dict[str, Record],
    before_adapter: bool,
    announcements: Announcements | None = None,
) -> None:
    """Make the changes on one side of the adapter, in the order of their kinds; those of one kind as they came.

    Args:
        network: The network, changed in place.
        transformations: Of both sides.
        records: By name, of an earlier build; those of this one are added.
        before_adapter: Which side.
        announcements: Told of what is done before the adapter, for the first time; the rest is a matter of schedules.
    """
    for one in sorted(transformations, key=lambda one: one.kind):
        if one.kind.before_adapter == before_adapter:
            earlier = records.get(one.name)
            record = one.apply(network, earlier)
            if record is not None:
                records[one.name] = record
            if announcements is not None and before_adapter and earlier is None:
                announcements.make(one.name, network)
