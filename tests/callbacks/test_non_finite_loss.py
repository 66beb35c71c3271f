from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule
from tiny_run import TinyModule, tiny_batches, tiny_loader, tiny_trainer
from torch import Tensor
from typing_extensions import override

from lightllm.batch import PADDING_DOCUMENT, TextBatch
from lightllm.callbacks import Checkpoint, NonFiniteLoss, NonFiniteLossError


class Rows(LightningDataModule):
    """Batches whose documents come from lines of a file."""

    def __init__(self, count: int = 6, rows: int = 2) -> None:
        super().__init__()
        self.count, self.rows = count, rows

    @override
    def train_dataloader(self) -> Any:
        return tiny_loader(tiny_batches(self.count, rows=self.rows))

    def describe_document(self, split: str, document_id: int) -> str:
        return f"{split}.jsonl:{document_id + 1}"


class Poisoned(TinyModule):
    """The loss of one document is not a number; or the gradient of one step is not, though the loss is."""

    def __init__(self, document: int | None = None, value: float = float("nan"), gradient_step: int = -1) -> None:
        super().__init__()
        self.document, self.value, self.gradient_step = document, value, gradient_step

    @override
    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        if self.document is not None and bool((batch["document_ids"] == self.document).any()):
            output["loss"] = output["loss"] * self.value
        return output

    @override
    def on_after_backward(self) -> None:
        if self.global_step == self.gradient_step:
            next(p for p in self.parameters() if p.grad is not None).grad.fill_(float("inf"))  # type: ignore[union-attr]


def fit(folder: Path, module: TinyModule, data: Any, **fields: Any) -> Checkpoint:
    checkpoint = Checkpoint(every_n_train_steps=1)
    trainer = tiny_trainer(folder, [NonFiniteLoss(), checkpoint], enable_checkpointing=True, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        trainer.fit(module, data)
    return checkpoint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_before_the_weights_and_names_documents_and_checkpoint(tmp_path: Path, value: float) -> None:
    module = Poisoned(document=7, value=value)
    with pytest.raises(NonFiniteLossError) as caught:
        fit(tmp_path, module, Rows())
    path = tmp_path / "checkpoints" / "step=3.ckpt"
    message = str(caught.value)
    assert "the loss of step 4 is not finite; its batch holds train.jsonl:7, train.jsonl:8;" in message
    assert f"the last good checkpoint is {path}." in message
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "step=3.ckpt"]


def test_names_only_the_micro_batch_at_fault(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step 1 is .* holds train.jsonl:3, train.jsonl:4; there is no check"):
        fit(tmp_path, Poisoned(document=2), Rows(), accumulate_grad_batches=3)


def test_names_some_of_many_documents(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"train.jsonl:1, .*train.jsonl:8 and 12 more;"):
        fit(tmp_path, Poisoned(document=2), Rows(count=1, rows=20))


def test_gives_numbers_where_the_datamodule_knows_no_names(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"holds document 2, document 3;"):
        fit(tmp_path, Poisoned(document=2), tiny_loader(tiny_batches(3)))


def test_weights_that_a_gradient_poisoned_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"after step 3, 1 weights are not finite.*step=2.ckpt"):
        fit(tmp_path, Poisoned(gradient_step=2), Rows())
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "step=2.ckpt"]


def test_good_run_is_left_alone(tmp_path: Path) -> None:
    checkpoint = fit(tmp_path, Poisoned(), Rows(), accumulate_grad_batches=4)
    assert checkpoint.last_model_path.endswith("last.ckpt")


def test_padding_is_no_document() -> None:
    """What the names above rely on."""
    assert bool((tiny_batches(1)[0]["document_ids"] == PADDING_DOCUMENT).any())


class RankRows(Rows):
    """Each rank has its own rows."""

    @override
    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        batches = tiny_batches(6)
        return tiny_loader(batches[self.trainer.global_rank :: self.trainer.world_size])


def rank(index: int, folder: Path) -> None:
    import os

    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": (folder / "port").read_text()}
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    try:
        fit(
            folder,
            Poisoned(document=6),
            RankRows(),
            devices=2,
            strategy="ddp",
            plugins=[TorchElasticEnvironment()],
            use_distributed_sampler=False,
        )
    except NonFiniteLossError as error:
        (folder / f"rank{index}").write_text(str(error))


def test_all_ranks_stop_when_one_has_it(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.start_processes(rank, (tmp_path,), nprocs=2, start_method="fork")
    for index in range(2):
        message = (tmp_path / f"rank{index}").read_text()
        assert "the loss of step 2 is not finite; its batch holds train.jsonl:7, train.jsonl:8;" in message
        assert "step=1.ckpt" in message
