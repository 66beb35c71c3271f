from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import save_chats, save_small_network
from lightning.pytorch import Trainer

from lightllm.callbacks import BeforeAndAfter, Checkpoint, RandomState
from lightllm.checkpoint_io import newest_checkpoint
from lightllm.datamodules import Batches, ChatData, Reading
from lightllm.generate import Decoding, Message, generate
from lightllm.models import LoRA, Pretrained
from lightllm.modules import FineTuning, Schedule

QUESTION: list[Message] = [{"role": "user", "content": "What is a [whale]?"}]
PROMPTS: list[str | list[Message]] = ["Call me", QUESTION]


class Run:
    """A run of a few steps with dropout in a folder."""

    def __init__(self, folder: Path, *callbacks: Any, val_fraction: float = 0.25, **fields: Any) -> None:
        network = str(folder / "network")
        self.module = FineTuning(
            Pretrained(network),
            LoRA(rank=4, dropout=0.2),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            schedule=Schedule("constant"),
        )
        self.data = ChatData(
            train=str(folder / "chats.jsonl"),
            max_length=128,
            batches=Batches(documents=4),
            reading=Reading(val_fraction=val_fraction, cache=str(folder / "cache")),
        )
        self.trainer = Trainer(
            default_root_dir=folder,
            callbacks=[*callbacks, RandomState(), Checkpoint(every_n_train_steps=2)],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_steps": 3, **fields},
        )

    def fit(self, resume: Path | None = None) -> None:
        torch.manual_seed(1)
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=resume, weights_only=True)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: one.detach().clone() for name, one in self.module.named_parameters() if one.requires_grad}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_small_network(tmp_path / "network")
    save_chats(tmp_path / "chats.jsonl", 16)
    return tmp_path


def report(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "before_and_after.json").read_text())
    assert isinstance(found, dict)
    return found


def comparing() -> BeforeAndAfter:
    return BeforeAndAfter(PROMPTS, Decoding(max_new_tokens=4))


def test_numbers_and_answers_before_and_after(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(folder, comparing())
    run.fit()
    found = report(folder)
    assert found["prompts"] == ["Call me", "What is a [whale]?"]
    assert found["after"]["metrics"]["loss"] < found["before"]["metrics"]["loss"]
    assert run.module.tokenizer is not None
    answers = generate(run.module.built_network, run.module.tokenizer, PROMPTS, Decoding(max_new_tokens=4))
    assert found["after"]["answers"] == answers
    (validated,) = Run(folder).trainer.validate(run.module, datamodule=Run(folder).data, verbose=False)
    assert found["after"]["metrics"]["loss"] == pytest.approx(validated["val/loss"])
    told = capsys.readouterr().out
    assert "What is a [whale]?" in told
    assert f"{found['before']['metrics']['loss']:.3f}" in told


def test_training_goes_on_as_if_nothing_had_been_measured(folder: Path) -> None:
    watched, plain = Run(folder, comparing()), Run(folder)
    watched.fit()
    plain.fit()
    assert all(torch.equal(one, plain.weights[name]) for name, one in watched.weights.items())


def test_a_resumed_run_knows_how_it_was_before(folder: Path) -> None:
    Run(folder, comparing(), max_steps=2).fit()
    begun = report(folder)
    Run(folder, comparing(), max_steps=4).fit(resume=newest_checkpoint(folder / "checkpoints"))
    assert report(folder)["before"] == begun["before"]
    assert report(folder)["after"] != begun["after"]


def test_without_validation_data_there_are_answers_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(folder, comparing(), val_fraction=0.0, max_steps=1).fit()
    assert report(folder)["before"]["metrics"] == {}
    told = capsys.readouterr().out
    assert "perplexity" not in told
    assert "Call me" in told


def test_without_prompts_there_are_numbers_alone(folder: Path) -> None:
    Run(folder, BeforeAndAfter(), max_steps=1).fit()
    assert report(folder)["after"]["answers"] == []
    assert report(folder)["after"]["metrics"]["perplexity"] > 1
