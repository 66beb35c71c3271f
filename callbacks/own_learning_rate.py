"""A learning rate of their own for parameters that a callback added to the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class OwnLearningRate:
    """Has a module's optimizer hold some parameters in a group of their own, which is not decayed.

    The schedule of the run moves every group alike, from the rate that each begins with.

    Args:
        module: The objective; the field by which it makes its optimizer is changed until `undo`.
        find: The parameters, of the network once it is built.
        learning_rate: Of the group.
    """

    def __init__(
        self, module: LanguageModule, find: Callable[[nn.Module], list[nn.Parameter]], learning_rate: float
    ) -> None:
        self._module = module
        self._make = make = module.optimizer

        def make_with_group(groups: Iterable[dict[str, Any]]) -> Optimizer:
            own = find(module.built_network)
            apart = {id(parameter) for parameter in own}
            others = [{**group, "params": [one for one in group["params"] if id(one) not in apart]} for group in groups]
            filled = [group for group in others if group["params"]]
            return make([*filled, {"params": own, "lr": learning_rate, "weight_decay": 0.0}])

        module.optimizer = make_with_group

    def undo(self) -> None:
        """Give the module its own way of making an optimizer back."""
        self._module.optimizer = self._make
