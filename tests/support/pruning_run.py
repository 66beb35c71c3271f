"""Runs of a step or two that prune a small network on small data, and the dense network that they begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_run import ready, text_data
from lightning.pytorch import Callback
from tiny_architectures import small_fields
from tiny_objective import adamw
from tiny_run import tiny_trainer
from torch import Tensor, nn

from lightllm.compression.effects import effective_layers
from lightllm.compression.layers import prunable_layers
from lightllm.datamodules import TextData
from lightllm.models import Adapter, FromConfig, LoRA
from lightllm.models.hidden_states import hidden_states
from lightllm.modules import FineTuning, LanguageModule, Schedule

ADAPTERS: dict[str, Adapter | None] = {"full": None, "lora": LoRA(rank=2, dropout=0.0)}


def dense(adapter: Adapter | None = None) -> LanguageModule:
    """The objective that `pruned` trains, its network built."""
    torch.manual_seed(0)
    network = FromConfig("llama", small_fields("llama", vocab_size=300))
    module = FineTuning(network, adapter, optimizer=adamw(), schedule=Schedule("constant"))
    module.configure_model()
    return module


def pruned(
    folder: Path,
    callbacks: Iterable[Callback],
    adapter: Adapter | None = None,
    steps: int = 1,
    data: TextData | None = None,
    **fields: Any,
) -> LanguageModule:
    """Train for some steps on `text_data`, whose files are written anew where it is not given."""
    torch.manual_seed(0)
    network = FromConfig("llama", small_fields("llama", vocab_size=300))
    module = FineTuning(network, adapter, optimizer=adamw(), schedule=Schedule("constant"))
    trainer = tiny_trainer(folder, list(callbacks), max_epochs=-1, max_steps=steps, **fields)
    trainer.fit(module, datamodule=data or text_data(folder))
    return module


def by_full_passes(folder: Path, num_documents: int, change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Change a dense network's weights in full passes: block by block, with the inputs behind the changed blocks.

    Args:
        folder: Of the data.
        num_documents: To calibrate on.
        change: From a layer's weight `[out, in]` and its inputs `[positions, in]` to the new weight.

    Returns:
        The weights by layer.
    """
    network = dense().built_network.eval()
    batches = ready(text_data(folder)).calibration_batches(num_documents)
    layers = prunable_layers(network)
    for index in range(2):
        inputs: dict[str, list[Tensor]] = {name: [] for name in layers if f"layers.{index}." in name}
        for name, rows in inputs.items():
            layers[name].register_forward_pre_hook(partial(_keep, rows))
        with torch.no_grad():
            for batch in batches:
                hidden_states(network, batch)
        for name, rows in inputs.items():
            weight = layers[name].get_parameter("weight").data
            weight.copy_(change(weight, torch.cat(rows)))
    return {name: layer.get_parameter("weight").detach() for name, layer in layers.items()}


def _keep(rows: list[Tensor], _: nn.Module, positional: tuple[Tensor, ...]) -> None:
    rows.append(positional[0].flatten(0, -2))


class AtTheFirstBatch(Callback):
    """Keeps the effective weights as they are when the first batch comes, and the masks after every batch."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.keeps: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Keep the weights, once."""
        if not self.weights:
            layers = effective_layers(pl_module.built_network)
            self.weights = {name: layer.effective_weight() for name, layer in layers.items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Keep the masks."""
        layers = effective_layers(pl_module.built_network)
        self.keeps.append({name: layer.fixed_mask().keep.clone() for name, layer in layers.items()})
