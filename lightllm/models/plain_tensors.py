"""Layers that stand for ordinary ones while they train."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class StandsForPlain(ABC):
    """A layer in the place of an ordinary one, which an export writes instead."""

    @abstractmethod
    def plain_tensors(self) -> dict[str, Tensor]:
        """What the ordinary layer's `state_dict` would hold to compute the same; weights in float32, detached."""


class MadeOfParts(ABC):
    """A module of several layers in the place of an ordinary one, which an export writes instead."""

    @abstractmethod
    def plain_tensors_of(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the ordinary layer's `state_dict` would hold to compute the same; weights in float32, detached.

        Args:
            parts: What an ordinary module of these layers would hold, by the names of its own `state_dict`: adapters,
                masks and few bits of the parts are in it already.
        """
