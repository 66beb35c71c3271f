"""Quantization of a run and of an export through the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import lightllm, refused
from tiny_networks import token_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightllm.cli.rebuild import load
from lightllm.compression.grids import SymmetricGrid
from lightllm.export.merge import plain_network


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(token_rows(200)).logits


@pytest.fixture
def run(material: Any, workplace: Path) -> str:
    """A copy of a run of LoRA, whose dropout no fake quantizer could sit beside."""
    shutil.copytree(material.run, workplace / "run")
    return "run"


def test_a_run_is_merged_and_rounded(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    lightllm("quantize", run, "--group_size", "16")
    said = capsys.readouterr().out
    assert "quantized: logits moved by" in said
    assert "read back: logits differ by 0 at most" in said
    loaded = AutoModelForCausalLM.from_pretrained("run/int4_weight_only-round")
    merged = plain_network(load(run).network)
    weight = merged.model.layers[0].mlp.up_proj.weight
    rounded = SymmetricGrid(4, 16).round_weight(weight.detach())
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight.dequantize(), rounded)
    assert torch.equal(loaded.model.embed_tokens.weight, merged.model.embed_tokens.weight)


@pytest.mark.parametrize("data", [[], ["--data", "chats.jsonl"], ["--data", "text.txt"]])
def test_gptq_calibrates_on_the_runs_data_or_on_other(run: str, data: list[str], material: Any) -> None:
    shutil.copy(material.chats, "chats.jsonl")
    Path("text.txt").write_text("The whale, like all things that are mighty. " * 20)
    options = ["--format", "merged", "--group_size", "16", "--documents", "8"]
    lightllm("quantize", run, "--method", "gptq", *options, *data, "--to", "gptq")
    lightllm("quantize", run, *options, "--to", "round")
    by_gptq, nearest = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("gptq", "round"))
    assert not torch.equal(by_gptq.model.layers[0].mlp.up_proj.weight, nearest.model.layers[0].mlp.up_proj.weight)
    for network in (by_gptq, nearest):
        for block in network.model.layers:
            groups = block.mlp.up_proj.weight.detach().unflatten(1, (-1, 16))
            assert max(len(group.unique()) for row in groups for group in row) <= 16


def test_an_export_becomes_a_file_for_llama_cpp(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    from gguf import GGUFReader

    lightllm("export", run)
    options = ["--format", "gguf", "--leave_out", '["down_proj"]']
    assert "say with --to where" in refused(capsys, "quantize", "run/export", *options)
    assert "name a file of chats or text with --data" in refused(
        capsys, "quantize", "run/export", *options, "--method", "gptq", "--to", "x.gguf"
    )
    lightllm("quantize", "run/export", *options, "--to", "net.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader("net.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down.weight"] == kinds["token_embd.weight"] == "F16"


def test_every_format_of_a_quantized_run(material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = {"class_path": "lightllm.callbacks.QuantizationAwareTraining", "init_args": {"group_size": 16}}
    recipe = material.recipe.read_text().replace("dropout: 0.1", "dropout: 0.0")
    Path("recipe.yaml").write_text(recipe)
    lightllm("fit", "--config", "recipe.yaml", "--run", "run", "--trainer.callbacks+", json.dumps(callback))
    trained = load("run").network
    for name, *options in (
        ("export",),
        ("export-torchao", "--format", "torchao"),
        ("export.gguf", "--format", "gguf", "--gguf_embedding", "F32"),
    ):
        capsys.readouterr()
        lightllm("export", "run", *options)
        assert f"written: run/{name}" in capsys.readouterr().out
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("run/export-torchao")), logits(trained))
    lightllm("generate", "run/export-torchao", "Who?", "--decoding.max_new_tokens", "3")
    said = refused(capsys, "quantize", "run")
    assert "lightllm export run --format torchao, or --format gguf" in said


def test_a_run_that_was_not_quantized_has_no_torchao_format(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "use lightllm quantize" in refused(capsys, "export", run, "--format", "torchao")
