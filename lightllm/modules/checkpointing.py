"""What of a module is in its checkpoint: everything that `configure_model` does not bring back by itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def without_restorable_weights(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the frozen parameters, which are those of the pretrained network and are loaded from there.

    What a quantized parameter keeps beside it in the state (`weight.absmax`, …) goes with it.
    """
    frozen = {name for name, parameter in _parameters(module) if not parameter.requires_grad}
    return {key: value for key, value in state.items() if not any(part in frozen for part in _prefixes(key))}


def check_restored(module: nn.Module, state: Mapping[str, Tensor], frozen_may_miss: bool) -> None:
    """Refuse a checkpoint that does not fit the module.

    Raises:
        ValueError: Weights that the module has are missing, or the checkpoint has others; both are named.
    """
    known = module.state_dict()
    required = set(known)
    if frozen_may_miss:
        required = set(without_restorable_weights(module, known))
    missing = sorted(required - set(state))
    unexpected = sorted(set(state) - set(known))
    if missing or unexpected:
        raise ValueError(
            "the checkpoint is not of this network and adapter: "
            + "; ".join(
                f"{len(names)} weights {what}, such as {names[0]!r}"
                for what, names in (("are missing from it", missing), ("are unknown to the network", unexpected))
                if names
            )
        )


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(remove_duplicate=False))


def _prefixes(key: str) -> list[str]:
    """The key and every dotted name that it begins with: `a.weight.absmax`, `a.weight`, `a`."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
