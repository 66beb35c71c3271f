"""Runs of a few steps that compress a small network in several ways at once, and checks of what they export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from command_line import lightllm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightllm.cli.rebuild import load
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.effects import effective_layers, inputs_as_they_are
from lightllm.compression.fake_quantizer import GridFakeQuantizer
from lightllm.export import export

WANDA = {"class_path": "lightllm.callbacks.WandaPruning", "init_args": {"num_documents": 8}}
MASKS: dict[str, dict[str, Any] | None] = {"dense": None, "half": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
QAT = {"class_path": "lightllm.callbacks.QuantizationAwareTraining", "init_args": {"group_size": 16}}
LEDGER = {"class_path": "lightllm.callbacks.CompressionLedger", "init_args": {"limit": 4, "generation": False}}
LORA = {"class_path": "lightllm.models.LoRA", "init_args": {"rank": 4, "dropout": 0.0}}
FULL = {"class_path": "lightllm.models.Full"}


def part(one: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """A part of a configuration with other arguments."""
    return {"class_path": one["class_path"], "init_args": {**one.get("init_args", {}), **arguments}}


class Material(NamedTuple):
    """Folder of a network, and file of chats."""

    network: Path
    chats: Path


def recipe(
    material: Material,
    callbacks: list[dict[str, Any]],
    adapter: dict[str, Any] = FULL,
    distilled: bool = False,
    **trainer: Any,
) -> dict[str, Any]:
    """The configuration of a run of a few steps."""
    network = {"class_path": "lightllm.models.Pretrained", "init_args": {"name": str(material.network)}}
    model: dict[str, Any] = {
        "class_path": "lightllm.modules.FineTuning",
        "init_args": {
            "network": network,
            "adapter": adapter,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
            "schedule": {"shape": "constant"},
        },
    }
    if distilled:
        model["class_path"] = "lightllm.modules.Distillation"
        model["init_args"] |= {"teacher": network, "hard_loss": 0.5}
    limits = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    return {
        "trainer": {**limits, "accelerator": "cpu", "callbacks": callbacks, **trainer},
        "checkpoint": {"every_n_train_steps": 1},
        "model": model,
        "data": {
            "class_path": "lightllm.datamodules.ChatData",
            "init_args": {
                "train": str(material.chats),
                "max_length": 128,
                "batches": {"mode": "packed", "documents": 4},
                "reading": {"val_fraction": 0.2},
            },
        },
    }


def fit(config: dict[str, Any], run: str = "run") -> dict[str, Tensor]:
    """Run a configuration by the command; the last checkpoint's weights."""
    Path(f"{run}.yaml").write_text(yaml.safe_dump(config))
    lightllm("fit", "--config", f"{run}.yaml", "--run", run)
    return weights(run)


def weights(run: str) -> dict[str, Tensor]:
    state = torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert isinstance(state, dict)
    return state


def logits(network: nn.Module) -> Tensor:
    rows = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = network(input_ids=rows).logits
    return found


def assert_exported_as_trained(run: str, sparsity: float | None, quantized: bool) -> None:
    """Export the newest checkpoint, and check every weight and the logits."""
    loaded = load(run, "newest")
    layers = effective_layers(loaded.network)
    assert bool(layers) == bool(sparsity or quantized)
    for layer in layers.values():
        assert layer.effect.rounds == quantized
    with inputs_as_they_are(loaded.network):  # which is how plain transformers computes, with weights rounded or not
        trained = logits(loaded.network)
    export(loaded.network, loaded.tokenizer, f"{run}/export", dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(f"{run}/export", dtype=torch.float32)
    assert (logits(exported) - trained).abs().max() <= 1e-5 * trained.abs().max()
    for name, layer in layers.items():
        weight = exported.get_parameter(f"{name}.weight").detach()
        assert weight.any()
        if sparsity:
            assert_masked(weight, layer, sparsity)
        if quantized:
            assert_on_grid(weight, layer)


def assert_masked(weight: Tensor, layer: EffectiveLayer, sparsity: float) -> None:
    keep = layer.fixed_mask().keep
    assert (weight[~keep] == 0).all()
    assert keep.sum() == keep.numel() * (1 - sparsity)


def assert_on_grid(weight: Tensor, layer: EffectiveLayer) -> None:
    """Every weight is a whole number from -8 to 7 times the scale of its group of 16."""
    quantizer = layer.effect.fake_quantizer
    assert isinstance(quantizer, GridFakeQuantizer)
    scales = quantizer.low_bits(layer.masked_weight()).scales.float()
    groups = weight.unflatten(-1, (-1, 16))
    integers = (groups / scales[..., None]).round()
    assert integers.min() >= -8
    assert integers.max() <= 7
    assert torch.equal(integers * scales[..., None], groups)


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
