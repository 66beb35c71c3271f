"""Layers that stand for ordinary ones while they train."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class StandsForPlain(ABC):
    """A layer in the place of an ordinary one, which an export writes instead."""

    @abstractmethod
    def plain_tensors(self) -> dict[str, Tensor]:
        """What the ordinary layer's `state_dict` would hold to compute the same; weights in float32, detached."""
