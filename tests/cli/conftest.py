from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from command_line import lightllm, save_chats, save_small_network, settle_in

RECIPE = """
trainer: {max_steps: 4, val_check_interval: 2, check_val_every_n_epoch: null, log_every_n_steps: 1, accelerator: cpu}
model:
  class_path: lightllm.modules.FineTuning
  init_args:
    network: {class_path: lightllm.models.Pretrained, init_args: {name: NETWORK}}
    adapter: {class_path: lightllm.models.LoRA, init_args: {rank: 4, dropout: 0.1}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
    schedule: {shape: constant}
data:
  class_path: lightllm.datamodules.ChatData
  init_args: {train: CHATS, max_length: 128, batches: {mode: sorted, documents: 4}, reading: {val_fraction: 0.2}}
"""


class Material(NamedTuple):
    """What the commands of these tests work on."""

    network: Path
    chats: Path
    recipe: Path
    run: Path
    """A run of the recipe that has ended; not to be changed."""


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    network, chats = save_small_network(folder / "network"), save_chats(folder / "chats.jsonl", 20)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("NETWORK", str(network)).replace("CHATS", str(chats)))
    with pytest.MonkeyPatch.context() as patch:
        settle_in(folder, patch)
        lightllm("fit", "--config", recipe, "--run", folder / "run")
    return Material(network, chats, recipe, folder / "run")


@pytest.fixture
def workplace(tmp_path: Path, material: Material) -> Iterator[Path]:
    """An empty current folder."""
    with pytest.MonkeyPatch.context() as patch:
        settle_in(tmp_path, patch)
        patch.setenv("LIGHTLLM_CACHE", str(material.recipe.parent / "cache"))
        yield tmp_path
