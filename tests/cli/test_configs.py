from __future__ import annotations

from pathlib import Path

import pytest

from lightllm.cli.configs import CONFIGS, config_names, copy_config, found_configs, summary


def test_shipped_configurations_are_listed_with_what_they_do() -> None:
    names = config_names()
    assert {"finetune/lora.yaml", "pretrain/tiny_llama.yaml", "trainer/gpu.yaml"} <= set(names)
    assert summary("finetune/qlora.yaml") == "QLoRA: LoRA over weights kept in 4 bits (NF4)."


@pytest.mark.parametrize("name", ["finetune/lora.yaml", "configs/finetune/lora.yaml"])
def test_a_copy_goes_to_a_file_or_a_folder_and_over_nothing(name: str, tmp_path: Path) -> None:
    copy = copy_config(name, tmp_path)
    assert copy == tmp_path / "lora.yaml"
    assert copy.read_text() == (CONFIGS / "finetune/lora.yaml").read_text()
    assert copy_config(name, tmp_path / "mine.yaml").name == "mine.yaml"
    with pytest.raises(ValueError, match="exists already"):
        copy_config(name, tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        copy_config(name, tmp_path / "nowhere" / "mine.yaml")
    with pytest.raises(ValueError, match=r"did you mean 'finetune/lora\.yaml'"):
        copy_config("finetune/lorra.yaml", tmp_path)


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = str(CONFIGS / "finetune/lora.yaml")
    assert found_configs(["--config", "finetune/lora.yaml", "--run", "x"]) == ["--config", shipped, "--run", "x"]
    assert found_configs(["-c", "configs/finetune/lora.yaml"]) == ["-c", shipped]
    assert found_configs(["--config=finetune/lora.yaml"]) == ["--config", shipped]
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune/lora.yaml").write_text("run: mine")
    assert found_configs(["--config", "finetune/lora.yaml"]) == ["--config", "finetune/lora.yaml"]


def test_a_value_that_only_looks_like_a_configuration_stays() -> None:
    assert found_configs(["--data.train", "nothing.yaml", "--config"]) == ["--data.train", "nothing.yaml", "--config"]


def test_files_that_are_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"no configuration file 'mina\.yaml' \(did you mean 'mine\.yaml'\?\)"):
        found_configs(["--config", "mina.yaml"])
    with pytest.raises(ValueError, match=r"'quickstart\.yml' \(did you mean 'finetune/quickstart\.yaml'\?\)"):
        found_configs(["--config", "quickstart.yml"])
    with pytest.raises(ValueError, match=r"(?s)mine\.yaml is no YAML: .*line 2"):
        found_configs(["--config", "mine.yaml"])
    with pytest.raises(ValueError, match=r"list\.yaml is no configuration"):
        found_configs(["-c", "list.yaml"])
