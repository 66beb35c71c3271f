"""Every way to compress with every other, in one run: what was trained is what is exported."""

from __future__ import annotations

import itertools
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from command_line import forked_lightllm, lightllm, save_chats, save_small_network, settle_in
from killable_run import equal, kill, wait_until_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightllm.cli.rebuild import load
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.effects import effective_layers, inputs_as_they_are
from lightllm.compression.fake_quantizer import GridFakeQuantizer
from lightllm.compression.ledger import Ledger
from lightllm.export import export

WANDA = {"class_path": "lightllm.callbacks.WandaPruning", "init_args": {"num_documents": 8}}
MASKS: dict[str, dict[str, Any] | None] = {"dense": None, "half": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
QAT = {"class_path": "lightllm.callbacks.QuantizationAwareTraining", "init_args": {"group_size": 16}}
ROUNDED = "QuantizationAwareTraining:int8_dynamic_int4"
LEDGER = {"class_path": "lightllm.callbacks.CompressionLedger", "init_args": {"limit": 4, "generation": False}}
LORA = {"class_path": "lightllm.models.LoRA", "init_args": {"rank": 4, "dropout": 0.0}}
FULL = {"class_path": "lightllm.models.Full"}


def part(one: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return {"class_path": one["class_path"], "init_args": {**one.get("init_args", {}), **arguments}}


class Material(NamedTuple):
    network: Path
    chats: Path


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    return Material(save_small_network(folder / "network"), save_chats(folder / "chats.jsonl", 40))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, material: Material) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        settle_in(tmp_path, patch)
        patch.setenv("LIGHTLLM_CACHE", str(material.network.parent / "cache"))
        yield tmp_path


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


COMBINATIONS = [
    pytest.param(lora, mask, quantized, distilled, id="-".join(names))
    for lora, mask, quantized, distilled in itertools.product((False, True), MASKS, (False, True), (False, True))
    for names in [
        ("lora" if lora else "full", mask, "qat" if quantized else "float", "distilled" if distilled else "tuned")
    ]
]


@pytest.mark.parametrize(("lora", "mask", "quantized", "distilled"), COMBINATIONS)
def test_every_combination_is_exported_as_it_was_trained(
    material: Material, lora: bool, mask: str, quantized: bool, distilled: bool
) -> None:
    masking = MASKS[mask]
    callbacks = [LEDGER]
    callbacks += [part(QAT, start=1)] if quantized else []
    callbacks += [] if masking is None else [part(WANDA, begin=1, **masking)]
    config = recipe(material, callbacks, LORA if lora else FULL, distilled)
    state = fit(config)
    assert_exported_as_trained("run", None if masking is None else 0.5, quantized)
    if mask == "2:4":
        exported = AutoModelForCausalLM.from_pretrained("run/export")
        for name in effective_layers(load("run").network):
            assert ((exported.get_parameter(f"{name}.weight").unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all()
    rows = [row.key for row in Ledger("run/ledger.jsonl").rows]
    steps = [("WandaPruning", 1)] * (masking is not None)
    steps += [(ROUNDED, 1)] * quantized
    assert rows == [("dense", 0), *[("teacher", 0)] * distilled, *steps, ("trained", 4)]
    if len(callbacks) > 2:
        assert_same_weights(
            state, fit(recipe(material, callbacks[::-1], LORA if lora else FULL, distilled), "reversed")
        )
        assert [row.key for row in Ledger("reversed/ledger.jsonl").rows] == rows


STRUCTURED = {
    "class_path": "lightllm.callbacks.StructuredPruning",
    "init_args": {"heads": 1, "neurons": 16, "num_documents": 8},
}
LOW_RANK = {
    "class_path": "lightllm.callbacks.LowRankDecomposition",
    "init_args": {"ranks": {"by_layer": {"mlp": 16}}, "num_documents": 8},
}


@pytest.mark.parametrize("distilled", [False, True])
def test_a_smaller_network_is_adapted_and_masked(material: Material, distilled: bool) -> None:
    callbacks = [part(WANDA, begin=2, pattern="2:4"), LEDGER, STRUCTURED]
    state = fit(recipe(material, callbacks, LORA, distilled))
    assert_exported_as_trained("run", 0.5, quantized=False)
    rows = Ledger("run/ledger.jsonl").rows
    keys = [("dense", 0), ("StructuredPruning", 0), *[("teacher", 0)] * distilled, ("WandaPruning", 2), ("trained", 4)]
    assert [row.key for row in rows] == keys
    assert rows[1].parameters < rows[0].parameters
    assert rows[-1].parameters == rows[1].parameters
    assert_same_weights(state, fit(recipe(material, callbacks[::-1], LORA, distilled), "reversed"))


def test_thin_matrices_are_adapted_and_rounded(material: Material) -> None:
    callbacks = [part(QAT, start=2), LOW_RANK, LEDGER]
    state = fit(recipe(material, callbacks, LORA))
    rows = Ledger("run/ledger.jsonl").rows
    assert [row.key for row in rows] == [("dense", 0), ("LowRankDecomposition", 0), (ROUNDED, 2), ("trained", 4)]
    assert rows[1].parameters == rows[3].parameters == rows[0].parameters - 2 * 3 * (32 * 48 - 16 * (32 + 48))
    assert_same_weights(state, fit(recipe(material, callbacks[::-1], LORA), "reversed"))

    loaded = load("run", "newest")
    with inputs_as_they_are(loaded.network):
        trained = logits(loaded.network)
    for layout in ("merged", "factored"):
        export(loaded.network, loaded.tokenizer, f"run/{layout}", layout=layout, dtype=torch.float32)  # type: ignore[arg-type]
        exported = load(f"run/{layout}").network
        assert (logits(exported) - trained).abs().max() <= 1e-5 * trained.abs().max()
    layers = effective_layers(loaded.network)
    assert len(layers) == 2 * (4 + 3 * 2)
    for name, layer in layers.items():
        assert_on_grid(exported.get_parameter(f"{name}.weight").detach(), layer)


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
def test_killed_at_any_moment_all_of_it_together_ends_as_if_it_had_not_been(material: Material) -> None:
    callbacks = [part(QAT, start=3, freeze_scales=9), LEDGER, part(WANDA, begin=2, pattern="2:4")]
    config = recipe(material, callbacks, LORA, True, max_steps=16, val_check_interval=4)
    fit(config, "whole")
    Path("killed.yaml").write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", "killed.yaml", "--run", "killed", "--resume", "auto"]
    chance, killed = random.Random(3), 0
    for step in sorted(chance.sample(range(14), 6)):
        process = forked_lightllm(*arguments)
        wait_until_training(process, Path("killed"), step)
        time.sleep(chance.uniform(0, 0.05))
        kill(process)
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 4
    process = forked_lightllm(*arguments)
    process.join()
    assert process.exitcode == 0
    ours, theirs = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("killed", "whole"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_numbers", "transformations"):
        assert equal(ours[key], theirs[key]), key
    assert Ledger("killed/ledger.jsonl").rows == Ledger("whole/ledger.jsonl").rows
    assert_exported_as_trained("killed", 0.5, quantized=True)


def test_files_of_few_bits_are_rows_of_the_ledger(material: Material, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    fit(recipe(material, [part(QAT, start=1), part(WANDA, pattern="2:4"), LEDGER], LORA))
    lightllm("export", "run", "--format", "torchao", "--checkpoint", "newest")
    assert "export-torchao" in capsys.readouterr().out
    *_, trained, stored = Ledger("run/ledger.jsonl").rows
    assert (trained.step, stored.step) == ("trained", "export-torchao")
    assert stored.loss == pytest.approx(trained.loss, rel=1e-5), "torchao rounds activations as they were in training"
    assert (stored.parameters, stored.nonzero_parameters) == (trained.parameters, trained.nonzero_parameters)
    assert stored.weight_bytes < 0.75 * trained.weight_bytes, "a byte a weight; the embedding stays in float32"
