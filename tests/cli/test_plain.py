from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import lightllm, refused
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightllm.cli.rebuild import load

SHORT = ["--decoding.max_new_tokens", "6"]


def test_generation_continues_the_prompt(material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightllm("generate", material.run, "The whale", *SHORT)
    told = capsys.readouterr().out
    assert told.startswith("The whale")
    assert len(told) > len("The whale\n")
    lightllm("generate", material.run, "The whale", *SHORT)
    assert capsys.readouterr().out == told


def test_a_prompt_is_read_from_standard_input(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lightllm("generate", material.network, "The whale", *SHORT)
    told = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("The whale"))
    lightllm("generate", material.network, "-", *SHORT)
    assert capsys.readouterr().out == told


def test_a_question_is_answered_without_being_repeated(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lightllm("generate", material.run, "What is a whale?", "--as_chat", *SHORT)
    assert "What is a whale?" not in capsys.readouterr().out


def test_a_chat_from_a_script(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a whale?\n/reset\n/quit\n"))
    lightllm("chat", material.run, "--system", "Be brief.", *SHORT)
    assert "A new chat." in capsys.readouterr().out


def test_an_export_is_read_by_transformers_and_says_the_same(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(material.run, "run")
    lightllm("export", "run")
    assert "written: run/export (merged, float32" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained("run/export")
    ids = torch.tensor([tokenizer("The whale, like all things").input_ids])
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained("run/export")(ids).logits
        trained = load("run").network(ids).logits  # type: ignore[operator]
        untrained = AutoModelForCausalLM.from_pretrained(material.network)(ids).logits
    torch.testing.assert_close(exported, trained, rtol=1e-4, atol=1e-4)
    assert (exported - untrained).abs().max() > 0.05


def test_an_adapter_is_exported_alone(material: Any, workplace: Path) -> None:
    lightllm("export", material.run, "--format", "adapter", "--to", "adapter")
    base = AutoModelForCausalLM.from_pretrained(material.network)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        exported = PeftModel.from_pretrained(base, "adapter")(ids).logits
        torch.testing.assert_close(exported, load(str(material.run)).network(ids).logits)  # type: ignore[operator]


def test_a_gguf_file_is_exported(material: Any, workplace: Path) -> None:
    pytest.importorskip("gguf")
    lightllm("export", material.run, "--format", "gguf", "--gguf_type", "F32", "--to", "small.gguf")
    assert Path("small.gguf").read_bytes()[:4] == b"GGUF"


def test_configurations_are_listed_and_copied(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightllm("configs")
    listed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("finetune/lora.yaml ") for line in listed)
    lightllm("configs", "finetune/lora.yaml", "--to", "mine.yaml")
    assert Path("mine.yaml").read_text().startswith("# LoRA")
    assert "exists already" in refused(capsys, "configs", "finetune/lora.yaml", "--to", "mine.yaml")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate"], "model and prompt are missing\nusage: lightllm generate MODEL PROMPT"),
        (["chat"], "model is missing\nusage: lightllm chat MODEL"),
        (["generate", "a/b", "hi", "--decoding.temprature", "1"], "(did you mean '--decoding.temperature'?)"),
        (["generate", "a/b", "hi", "--decoding.temperature", "-1"], "temperature is 0 (greedy) or more, not -1.0"),
        (["generate", "a/b", "hi", "--decoding.top_k", "many"], "decoding.top_k: expected a whole number, not 'many'"),
        (["generate", "./nothing", "hi"], "no such model file or folder: './nothing'"),
        (["export", "a/b"], "'a/b' is no run folder: say with --to where to write"),
        (["export", "a/b", "--format", "ggufx"], "expected merged, factored, adapter, torchao or gguf, not 'ggufx'"),
        (["configs", "finetune/lorra.yaml"], "did you mean 'finetune/lora.yaml'?"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], told: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, *arguments)


def test_a_checkpoint_is_named(material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no checkpoint 'bset'" in refused(capsys, "generate", material.run, "hi", "--checkpoint", "bset")
    lightllm("generate", material.run, "hi", "--checkpoint", material.run / "checkpoints/last.ckpt", *SHORT)
