"""NetworkSize: how large the network is and how much of it trains, in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

if TYPE_CHECKING:
    from lightllm.modules.base import LanguageModule


class NetworkSize(Callback):
    """Says before training how many parameters the network has, how many of them train, and their types."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModule) -> None:  # type: ignore[override]
        rank_zero_info(f"network: {describe(pl_module.built_network)}")


def describe(network: nn.Module) -> str:
    """The number of parameters, of those that train, and their types: `139.4M parameters, 4.9M of them train, …`."""
    parameters = list(network.parameters())
    total = sum(map(num_weights, parameters))
    trained = sum(num_weights(parameter) for parameter in parameters if parameter.requires_grad)
    how_many = "all of them train" if trained == total else f"{shortened(trained)} of them train"
    frozen_types = _types([parameter for parameter in parameters if not parameter.requires_grad])
    types = _types([parameter for parameter in parameters if parameter.requires_grad])
    if not types:
        return f"{shortened(total)} parameters, none of them trains, {frozen_types}"
    if frozen_types and frozen_types != types:
        types = f"{types} on frozen {frozen_types}"
    return f"{shortened(total)} parameters, {how_many}, {types}"


def num_weights(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for: those of 4 bits are packed, two to a byte."""
    return parameter.numel() * (2 * parameter.element_size() if _is_packed(parameter) else 1)


def shortened(number: int) -> str:
    """Three or four digits and a unit: 139.4M."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _types(parameters: list[nn.Parameter]) -> str:
    names = {"4-bit" if _is_packed(one) else str(one.dtype).removeprefix("torch.") for one in parameters}
    return "/".join(sorted(names))


def _is_packed(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "Params4bit"  # bitsandbytes', by name: it takes a second to import
