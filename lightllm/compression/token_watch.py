"""Looking into a network while it reads calibration data: what goes into a layer and comes out, for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.models.hidden_states import hidden_states
from lightllm.models.inference import inference, network_device

See = Callable[[Tensor, Tensor], object]
"""Called with a module's input and output, `[tokens, width]` in float32."""


class TokenWatch:
    """Watches some modules of a network over batches; padding is not seen.

    Args:
        network: The network, which stays as it is.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._seen: list[tuple[nn.Module, See]] = []
        self._real = torch.empty(0)

    def on(self, module: nn.Module, see: See) -> None:
        """Call `see` in every call of a module of the network."""
        self._seen.append((module, see))

    def run(self, batches: Sequence[TextBatch]) -> int:
        """Have the network read the batches, without gradients.

        Returns:
            The number of tokens that were seen.
        """
        handles: list[RemovableHandle] = []
        num_tokens = 0
        try:
            handles += [module.register_forward_hook(self._hook(see)) for module, see in self._seen]
            with inference(self.network):
                for batch in batches:
                    moved = on_device_of(self.network, batch)
                    self._real = real_positions(moved)
                    num_tokens += int(self._real.sum())
                    hidden_states(self.network, moved)
        finally:
            for handle in handles:
                handle.remove()
        return num_tokens

    def _hook(self, see: See) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            see(inputs[0][self._real].float(), after[self._real].float())

        return hook


def real_positions(batch: TextBatch) -> Tensor:
    """Which positions hold a token of a document, `[batch, seq]`."""
    return batch["document_ids"] != PADDING_DOCUMENT


def on_device_of(network: nn.Module, batch: TextBatch) -> TextBatch:
    """The batch where the network's inputs belong."""
    device = network_device(network)
    return TextBatch(
        input_ids=batch["input_ids"].to(device),
        labels=batch["labels"].to(device),
        position_ids=batch["position_ids"].to(device),
        document_ids=batch["document_ids"].to(device),
    )
