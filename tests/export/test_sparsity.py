from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_networks import tiny_llama, tiny_tokenizer, token_rows
from transformers import AutoConfig, AutoModelForCausalLM

from lightllm.compression.effects import mask_layers
from lightllm.compression.masks import Amount, Pattern, layer_mask, sparsity_of
from lightllm.export import export
from lightllm.export.sparsity import sparsity_report, state_sparsity
from lightllm.models.adapters import LoRA


def masked(amount: Amount, leave_out: list[str] | None = None) -> torch.nn.Module:
    network = tiny_llama()
    network.config.use_cache = False
    for layer in mask_layers(network, leave_out or []).values():
        layer.set_keep(layer_mask(layer.merged_weight().abs(), amount))
    return network


def test_an_export_says_that_it_is_2_4_and_is_loaded_as_ever(tmp_path: Path) -> None:
    network = masked(Pattern(2, 4), ["down_proj"])
    report = export(network, tiny_tokenizer(), tmp_path / "export")
    assert report.sparsity == {"structure": "2:4", "share": 0.5, "layers": 12}
    assert json.loads((tmp_path / "export/export.json").read_text())["sparsity"] == report.sparsity
    assert "50% of 12 layers pruned, 2:4" in report.describe()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    stated = AutoConfig.from_pretrained(tmp_path / "export").sparsity_config
    weights = torch.cat([parameter.flatten() for parameter in loaded.parameters()])
    assert stated == {
        "format": "dense",
        "sparsity_structure": "2:4",
        "global_sparsity": pytest.approx(sparsity_of(weights)),
        "targets": ["Linear"],
        "ignore": ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    }
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    with torch.no_grad():
        ours, theirs = network(token_rows()).logits, loaded(token_rows()).logits
    torch.testing.assert_close(ours, theirs)
    assert loaded.generate(token_rows(rows=1), max_new_tokens=2, do_sample=False).shape[1] == 19


def test_the_statement_stays_as_long_as_it_is_true(tmp_path: Path) -> None:
    export(masked(Pattern(2, 4)), tiny_tokenizer(), tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    export(loaded, tiny_tokenizer(), tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").sparsity_config["sparsity_structure"] == "2:4"
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight += 1.0
    export(loaded, tiny_tokenizer(), tmp_path / "dense")
    assert "sparsity_config" not in json.loads((tmp_path / "dense/config.json").read_text())


@pytest.mark.parametrize("field", ["text", {"sparsity_structure": "unstructured", "ignore": None}, {}, {"a": 1}])
def test_a_field_that_says_something_else_is_dropped(field: object) -> None:
    network = tiny_llama()
    network.config.sparsity_config = field
    state_sparsity(network, network)
    assert "sparsity_config" not in vars(network.config)


def test_unstructured_zeros_are_in_the_report_only(tmp_path: Path) -> None:
    report = export(masked(0.25), tiny_tokenizer(), tmp_path / "export")
    assert report.sparsity is not None
    assert report.sparsity["structure"] == "unstructured"
    assert report.sparsity["share"] == pytest.approx(0.25, abs=1e-3)
    assert "sparsity_config" not in json.loads((tmp_path / "export/config.json").read_text())


def test_no_mask_or_none_that_prunes_says_nothing() -> None:
    assert sparsity_report(tiny_llama()) is None
    assert sparsity_report(masked(0.0)) is None


def test_an_adapter_behind_a_mask_is_not_exported_without_it(tmp_path: Path) -> None:
    network = LoRA(rank=2, dropout=0.0).attach(tiny_llama())
    for layer in mask_layers(network, []).values():
        layer.set_keep(layer_mask(layer.merged_weight().abs(), 0.5))
    with pytest.raises(ValueError, match="trained behind a mask, which it does not carry"):
        export(network, tiny_tokenizer(), tmp_path / "export", layout="adapter", base_model="somewhere")
