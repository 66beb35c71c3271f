from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightllm.cli.rebuild import load, rebuild, restore
from lightllm.runs import RunFolder


def test_a_run_comes_back_with_its_weights_and_its_tokenizer(material: Any) -> None:
    loaded = load(str(material.run))
    state = torch.load(material.run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    own = loaded.network.state_dict()
    assert len(state) == 28, "two matrices for each of seven layers in two blocks"
    assert all(torch.equal(own[name.removeprefix("network.")], tensor) for name, tensor in state.items())
    assert not loaded.network.training
    assert loaded.tokenizer.chat_template, "the run's own, and not the network's, which has none"
    assert loaded.base == str(material.network)


def test_best_newest_and_a_file_are_different_checkpoints(material: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(material.run, run.path)
    state = torch.load(run.newest_checkpoint(), weights_only=True)
    name = next(iter(state["state_dict"]))
    state["state_dict"][name] += 1
    state["global_step"] += 1
    torch.save(state, run.checkpoints / "step=5.ckpt")
    inner = name.removeprefix("network.")
    best, newest = (load(str(run.path), which).network.get_parameter(inner) for which in ("best", "newest"))
    assert torch.equal(newest, state["state_dict"][name])
    assert not torch.equal(best, newest)


def test_a_folder_that_transformers_wrote_is_loaded_as_it_is(material: Any) -> None:
    loaded = load(str(material.network))
    assert loaded.base == str(material.network)
    assert not loaded.network.training


def test_a_network_is_rebuilt_without_what_only_training_needs(material: Any, tmp_path: Path) -> None:
    config = yaml.safe_load((material.run / "config.yaml").read_text())
    config["model"]["init_args"] |= {"compile": True, "gradient_checkpointing": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    module = rebuild(RunFolder(tmp_path))
    assert not module.plan.compile
    assert not module.plan.gradient_checkpointing
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load(str(tmp_path))


def test_a_checkpoint_of_another_network_is_refused(material: Any) -> None:
    module = rebuild(RunFolder(material.run))
    state = torch.load(material.run / "checkpoints/best.ckpt", weights_only=True)
    state["state_dict"].popitem()
    broken = material.run.parent / "broken.ckpt"
    torch.save(state, broken)
    with pytest.raises(ValueError, match="not of this network and adapter: 1 weights are missing"):
        restore(module, broken)
