"""Thin matrices through a run: trained, resumed bit for bit, measured, and exported dense and factored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import lightllm, refused, save_chats, save_small_network, settle_in
from tiny_objective import Batches, adamw, cut, documents, scratch
from tiny_run import tiny_trainer
from transformers import AutoModelForCausalLM, dynamic_module_utils

from lightllm.callbacks import LowRankDecomposition
from lightllm.cli.rebuild import load
from lightllm.compression.low_rank_network import factored_layers
from lightllm.compression.rank_choice import RankChoice
from lightllm.export.compare import outputs
from lightllm.export.factored import load_with_its_code
from lightllm.modules import FineTuning

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

ROWS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def write_config(folder: Path, adapter: str, **callback: Any) -> None:
    """Four steps on a few chats, with a checkpoint after each."""
    fields = {"ranks": {"budget": 0.5}, "num_documents": 8} | callback
    config: dict[str, Any] = {
        "run": "run",
        "seed_everything": 3,
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "callbacks": [{"class_path": "lightllm.callbacks.LowRankDecomposition", "init_args": fields}],
        },
        "checkpoint": {"every_n_train_steps": 2},
        "model": {
            "class_path": "lightllm.modules.FineTuning",
            "init_args": {
                "network": {
                    "class_path": "lightllm.models.Pretrained",
                    "init_args": {"name": str(save_small_network(folder / "network"))},
                },
                "adapter": {"class_path": f"lightllm.models.{adapter}"},
                "schedule": {"shape": "constant"},
            },
        },
        "data": {
            "class_path": "lightllm.datamodules.ChatData",
            "init_args": {
                "train": str(save_chats(folder / "chats.jsonl", 40)),
                "val": str(save_chats(folder / "held_out.jsonl", 8)),
                "max_length": 128,
            },
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("adapter", ["Full", "LoRA", "Frozen"])
def test_a_run_in_thin_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, adapter: str
) -> None:
    settle_in(tmp_path, monkeypatch)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_config(tmp_path, adapter)
    lightllm("fit", "--config", "config.yaml")
    assert "low rank: 14 layers of 0.01536M weights are two thin matrices of 0.007328M" in caplog.text
    lightllm("fit", "--config", "config.yaml", "--run", "halves", "--trainer.max_steps", "2")
    lightllm("fit", "--resume", "halves", "--trainer.max_steps", "4")
    whole, halves = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("run", "halves")
    )
    assert whole["state_dict"].keys() == halves["state_dict"].keys()
    assert all(torch.equal(tensor, halves["state_dict"][name]) for name, tensor in whole["state_dict"].items())
    assert whole["transformations"]["LowRankDecomposition"]["ranks"]["model.layers.0.mlp.up_proj"] == 9
    lightllm("validate", "run")
    lightllm("generate", "run", "Who?", "--decoding.max_new_tokens", "3")

    loaded = load("run", "newest")
    assert len(factored_layers(loaded.network)) == 14
    logits = outputs(loaded.network, ROWS)
    lightllm("export", "run", "--checkpoint", "newest", "--to", "dense")
    lightllm("export", "run", "--checkpoint", "newest", "--to", "small", "--format", "factored")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    small = load_with_its_code(tmp_path / "small", torch.float32)
    for exported in (dense, small):
        assert (outputs(exported, ROWS) - logits).abs().max() <= 2e-5 * logits.abs().max()
    sizes = {folder: (tmp_path / folder / "model.safetensors").stat().st_size for folder in ("small", "dense")}
    lightllm("generate", "small", "Who?", "--decoding.max_new_tokens", "3")
    assert sizes["dense"] - sizes["small"] > 0.9 * 4 * (15_360 - 7_328)


def test_without_activations_no_data_is_drawn(tmp_path: Path) -> None:
    module = FineTuning(scratch(), optimizer=adamw())
    callback = LowRankDecomposition(RankChoice(energy=0.7), activation_aware=False, leave_out=["k_proj"])
    trainer = tiny_trainer(tmp_path, [callback], max_steps=1)
    trainer.fit(module, Batches(cut(documents(), [6, 6])))
    thin = factored_layers(module.built_network)
    assert thin
    assert not any("k_proj" in name for name in thin)
    assert module.records["LowRankDecomposition"]["ranks"] == {name: layer.rank for name, layer in thin.items()}


def test_whatever_cannot_be_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle_in(tmp_path, monkeypatch)
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"num_documents": 0}, "Full", "0 documents"),
        ({"ranks": {"budget": 2.0}}, "Full", "budget is 2.0: give a share above 0 and below 1"),
        ({"ranks": {"by_layer": {"q_proj": 30}}}, "Full", "saves no parameters: give at most 15"),
        ({"leave_out": ["query"]}, "Full", "no layer's name matches 'query'"),
    ]
    for callback, adapter, message in cases:
        write_config(tmp_path, adapter, **callback)
        assert message in refused(capsys, "fit", "--config", "config.yaml")
        assert not (tmp_path / "run").exists()


def test_documents_to_calibrate_on_are_needed(tmp_path: Path) -> None:
    module = FineTuning(scratch(), optimizer=adamw())
    trainer = tiny_trainer(tmp_path, [LowRankDecomposition(RankChoice(budget=0.5))], max_steps=1)
    with pytest.raises(ValueError, match="activation_aware: false"):
        trainer.fit(module, Batches(cut(documents(), [6, 6])))


def test_the_record_is_plain(tmp_path: Path) -> None:
    module = FineTuning(scratch(), optimizer=adamw())
    callback = LowRankDecomposition(RankChoice(budget=0.5), activation_aware=False)
    trainer = tiny_trainer(tmp_path, [callback], max_steps=1)
    trainer.fit(module, Batches(cut(documents(), [6, 6])))
    assert json.loads(json.dumps(module.records)) == module.records
