"""A callback that changes the network, through a run: trained, resumed, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import lightllm, save_chats, save_small_network, settle_in
from lightning.pytorch import Callback, Trainer
from tiny_objective import Batches, MeasuredBatches, adamw, cut, documents, scratch
from tiny_run import tiny_trainer
from torch import nn

from lightllm.callbacks import Transforming
from lightllm.cli.rebuild import load
from lightllm.models import Record, Transformation, TransformationKind
from lightllm.models.anatomy import blocks
from lightllm.models.layer_subset import keep_layers
from lightllm.modules import FineTuning

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

BUILDS: list[Record | None] = []


class _FirstBlocks(Transformation):
    kind = TransformationKind.STRUCTURE

    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        BUILDS.append(record)
        keep_layers(network, [0] if record is None else record["kept"])
        return {"kept": [0], "why": torch.ones(2)}


class FirstBlock(Transforming):
    """Keeps the first block only."""

    def transformation(self) -> Transformation:
        return _FirstBlocks("FirstBlock")


@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
def test_a_run_is_what_it_was_made_when_it_is_resumed_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    settle_in(tmp_path, monkeypatch)
    BUILDS.clear()
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config: dict[str, Any] = {
        "run": "run",
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "callbacks": [{"class_path": f"{__name__}.FirstBlock"}],
        },
        "model": {
            "class_path": "lightllm.modules.FineTuning",
            "init_args": {
                "network": {
                    "class_path": "lightllm.models.Pretrained",
                    "init_args": {"name": str(save_small_network(tmp_path / "network"))},
                },
                "adapter": {"class_path": f"lightllm.models.{adapter}"},
            },
        },
        "data": {
            "class_path": "lightllm.datamodules.ChatData",
            "init_args": {"train": str(save_chats(tmp_path / "chats.jsonl", 40)), "max_length": 128},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    lightllm("fit", "--config", "config.yaml")
    assert BUILDS == [None]
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["transformations"]["FirstBlock"]["kept"] == [0]
    assert all(torch.equal(record["why"], torch.ones(2)) for record in state["transformations"].values())
    lightllm("fit", "--resume", "run", "--trainer.max_steps", "3")
    loaded = load("run")
    assert len(blocks(loaded.network)) == 1
    lightllm("validate", "run")
    lightllm("export", "run")
    assert [record is None for record in BUILDS] == [True, False, False, False, False]
    assert 'num_hidden_layers": 1' in (tmp_path / "run/export/config.json").read_text()


def test_steps_are_announced_as_they_are_done_and_the_end_behind_every_callback(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    class Listening(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            pl_module.announcements.listen(
                lambda step, network: told.append((step, trainer.global_step, len(blocks(network))))
            )

    class Ending(FirstBlock):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.announce(pl_module)

    trainer = tiny_trainer(tmp_path, [Listening(), Ending()], max_steps=2)
    trainer.fit(FineTuning(scratch(), optimizer=adamw()), Batches(cut(documents(), [6, 6])))
    assert told == [("dense", 0, 2), ("FirstBlock", 0, 1), ("Ending", 2, 1), ("trained", 2, 1)]


def test_at_each_hook_they_come_in_the_order_of_their_kinds_and_others_where_they_were(tmp_path: Path) -> None:
    began: list[str] = []

    class Other(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            began.append("Other")

    class Changing(Transforming):
        def __init__(self, name: str, kind: TransformationKind) -> None:
            self.made = type("Made", (_FirstBlocks,), {"kind": kind, "apply": lambda self, network, record: None})(name)

        def transformation(self) -> Transformation:
            return self.made  # type: ignore[no-any-return]

        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            began.append(self.made.name)

    mask, rounding = TransformationKind.MASK, TransformationKind.FAKE_QUANTIZATION
    listed = [Changing("c", rounding), Other(), Changing("b", mask), Changing("a", mask)]
    tiny_trainer(tmp_path, listed, max_steps=1).fit(
        FineTuning(scratch(), optimizer=adamw()), Batches(cut(documents(), [12]))
    )
    assert began == ["a", "Other", "b", "c"]


def test_from_python_the_network_is_built_again_when_a_checkpoint_says_what_it_was(tmp_path: Path) -> None:
    BUILDS.clear()

    def fit(steps: int, checkpoint: str | None = None) -> FineTuning:
        module = FineTuning(scratch(), optimizer=adamw())
        trainer = tiny_trainer(tmp_path, [FirstBlock()], max_steps=steps)
        trainer.fit(module, Batches(cut(documents(), [6, 6])), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    fit(1)
    module = fit(2, str(tmp_path / "last.ckpt"))
    assert [record is None for record in BUILDS] == [True, True, False]
    assert len(blocks(module.built_network)) == 1
    trainer = tiny_trainer(tmp_path, [FirstBlock()])
    measured = FineTuning(scratch())
    trainer.validate(measured, MeasuredBatches([], cut(documents(), [6, 6])))
    assert len(blocks(measured.built_network)) == 2, "as it comes, nothing was done to it"
