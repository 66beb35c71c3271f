"""The verb plan, from a configuration to an overlay that fit takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_line import lightllm, refused, save_small_network, settle_in

from lightllm.cli import main

SMALL = [
    "--config=pretrain/tiny_llama.yaml",
    "--model.network.fields={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2}",
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settle_in(tmp_path, monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_the_best_is_shown_first_and_written_as_an_overlay(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    lightllm("plan", *SMALL, "--hardware", "h100-8", "--target_batch_tokens", 32768, "--write", "best.yaml")
    said = capsys.readouterr().out
    assert "32,768 tokens a step over 8 h100, 80 GiB each" in said
    written = yaml.safe_load(Path("best.yaml").read_text())
    assert written["trainer"]["devices"] == 8
    assert sorted(one.name for one in workplace.iterdir()) == ["best.yaml"], "no run is begun"
    with pytest.raises(SystemExit) as ended:
        main(["fit", *SMALL, "--config", "best.yaml", "--trainer.strategy", "auto", "--print_config"])
    assert not ended.value.code
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["trainer"]["devices"] == 8
    assert resolved["data"]["init_args"]["batches"]["tokens"] == written["data"]["init_args"]["batches"]["tokens"]
    assert resolved["model"]["init_args"]["network"]["class_path"] == "lightllm.models.FromConfig"


def test_what_does_not_fit_says_why_and_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text("like: h100\ndevices: 2\nmemory: 0.001\n")
    assert main(["plan", *SMALL, "--hardware", "small.yaml", "--write", "best.yaml"]) == 2
    said = capsys.readouterr()
    assert "does not fit: " in said.out
    assert "nothing is written to 'best.yaml': no way fits" in said.err
    assert not Path("best.yaml").exists()


def test_a_pretrained_network_is_planned_by_its_configuration_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = save_small_network(tmp_path / "network")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    lightllm("plan", "--config=finetune/lora.yaml", f"--model.network.name={folder}", "--hardware", "a100-2")
    assert "replicate 2" in capsys.readouterr().out


def test_a_batch_that_does_not_divide_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "plan", *SMALL, "--hardware", "h100-8", "--target_batch_tokens", 256)
    assert "set --target_batch_tokens to a multiple of 2048" in said


def test_four_bits_are_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = save_small_network(tmp_path / "network")
    lightllm("plan", "--config=finetune/qlora.yaml", f"--model.network.name={folder}", "--hardware", "rtx4090-1")
    assert "one device" in capsys.readouterr().out
