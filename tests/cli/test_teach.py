from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import lightllm, refused

RECIPE = """
trainer: {max_steps: 4, val_check_interval: 2, check_val_every_n_epoch: null, log_every_n_steps: 1, accelerator: cpu}
model:
  class_path: lightllm.modules.Distillation
  init_args:
    network: {class_path: lightllm.models.EveryNthLayer, init_args: {name: NETWORK, step: 2, dtype: float32}}
    teacher: {class_path: lightllm.models.Pretrained, init_args: {name: NETWORK, dtype: float32}}
    cached: {k: 32, folder: answers}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
    schedule: {shape: constant}
data:
  class_path: lightllm.datamodules.ChatData
  init_args: {train: CHATS, max_length: 128, batches: {mode: MODE, documents: 4}, reading: {val_fraction: 0.2}}
"""


def recipe(material: Any, mode: str = "packed") -> str:
    text = RECIPE.replace("NETWORK", str(material.network)).replace("CHATS", str(material.chats))
    Path("cached.yaml").write_text(text.replace("MODE", mode))
    return "cached.yaml"


@pytest.mark.parametrize("mode", ["packed", "sorted"])
def test_a_teacher_is_asked_once_and_then_not_needed(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    config = recipe(material, mode)
    message = refused(capsys, "fit", "--config", config, "--data.seed", 3)
    assert "the teacher was not asked yet about the train data" in message
    command = message.splitlines()[-1]
    assert command == "  lightllm teach --config cached.yaml --data.seed 3"
    assert not Path("runs/cached").exists()
    lightllm(*command.split()[1:])
    told = capsys.readouterr().out
    assert told.count("written: ") == 2
    assert "the 32 likeliest of 320 tokens at each" in told
    assert "138 bytes each" in told
    assert "the student's divergence when it was asked: " in told
    lightllm("teach", "--config", config)
    assert capsys.readouterr().out.count("was there already: ") == 2
    lightllm("fit", "--config", config)
    lightllm("validate", "runs/cached")
    assert "val/divergence" in capsys.readouterr().out
    Path("answers").rename("elsewhere")
    assert refused(capsys, "validate", "runs/cached").endswith("lightllm teach --config runs/cached/config.yaml")
    lightllm("teach", "runs/cached")
    lightllm("validate", "runs/cached")


def test_nothing_to_ask(material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "FineTuning has no teacher: `lightllm teach` is for a Distillation" in refused(
        capsys, "teach", "--config", material.recipe
    )
    message = refused(capsys, "teach", "--config", recipe(material), "--model.cached", "null")
    assert "the teacher is not cached, so it is not asked beforehand: set model.init_args.cached" in message
    assert "'nowhere' is not a run folder" in refused(capsys, "teach", "nowhere")


def test_help_is_quick() -> None:
    begin = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "lightllm", "teach", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert result.returncode == 0
    assert result.stdout.startswith("usage: lightllm teach --config FILE")
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert not {"torch", "jsonargparse", "lightning"} & imported
    assert seconds < 5
