from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftConfig, PeftModel
from tiny_networks import tiny_llama, tiny_tokenizer, token_rows
from tiny_run import TinyModule, tiny_batches, tiny_loader, tiny_trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightllm.callbacks import ExportBest
from lightllm.models.adapters import LoRA
from lightllm.models.inference import inference

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Scored(TinyModule):
    """A tiny module whose validations have the scores that it is told, and that keeps its logits at each."""

    def __init__(self, scores: list[float], network: Any = None) -> None:
        torch.manual_seed(0)
        super().__init__(network or tiny_llama().train())
        self.tokenizer = tiny_tokenizer()
        self.scores = list(scores)
        self.logits: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.scores.pop(0), batch_size=1)
        self.logits.append(logits(self.network))


def logits(network: Any) -> Tensor:
    with inference(network):
        return network(input_ids=token_rows()).logits


def fit(folder: Path, module: Scored, *callbacks: ExportBest, steps: int = 3, **fields: Any) -> Scored:
    trainer = tiny_trainer(folder, list(callbacks), max_steps=steps, val_check_interval=1, **fields)
    trainer.fit(module, tiny_loader(tiny_batches(3)), tiny_loader(tiny_batches(1)))
    return module


@pytest.mark.parametrize(
    ("scores", "mode", "best"),
    [
        ([3.0, 2.0, 2.5], "min", 1),
        ([3.0, 2.0, 2.5], "max", 0),
        ([3.0, 2.0, 1.0], "min", 2),
        ([3.0, float("nan"), 3.0], "min", 0),
    ],
)
def test_the_export_is_the_network_at_its_best(tmp_path: Path, scores: list[float], mode: Any, best: int) -> None:
    module = fit(tmp_path, Scored(scores), ExportBest(mode=mode))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(exported), module.logits[best])
    assert not torch.equal(module.logits[best], module.logits[best - 1])
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("whale").input_ids == module.tokenizer("whale").input_ids


def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    without = fit(tmp_path / "a", Scored([3.0, 2.0, 1.0]))
    drawn = torch.rand(1)
    exported = fit(tmp_path / "b", Scored([3.0, 2.0, 1.0]), ExportBest())
    assert torch.equal(drawn, torch.rand(1))  # a module seeds itself
    assert all(map(torch.equal, without.parameters(), exported.parameters()))


def test_an_adapter_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    module = fit(tmp_path, Scored([1.0, 2.0, 3.0], LoRA(rank=2).attach(base).train()), ExportBest(layout="adapter"))
    assert PeftConfig.from_pretrained(str(tmp_path / "export")).base_model_name_or_path == str(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "export"))
    torch.testing.assert_close(logits(loaded), module.logits[0])


def test_the_best_is_remembered(tmp_path: Path) -> None:
    first, second = ExportBest(), ExportBest()
    fit(tmp_path, Scored([1.0, 2.0, 3.0]), first)
    second.load_state_dict(first.state_dict())
    before = (tmp_path / "export" / "model.safetensors").stat().st_mtime_ns
    fit(tmp_path, Scored([1.5, 1.0, 1.1]), second)
    assert (tmp_path / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_the_sanity_check_exports_nothing(tmp_path: Path) -> None:
    module = Scored([0.5, 3.0])
    fit(tmp_path, module, ExportBest(), steps=1, num_sanity_val_steps=1)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(exported), module.logits[1])
    assert not torch.equal(module.logits[0], module.logits[1])


def test_a_metric_that_is_not_logged_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitors 'val/los', which is not logged; there are: .*val/loss"):
        fit(tmp_path, Scored([1.0, 1.0, 1.0]), ExportBest(monitor="val/los"))


def test_a_sharded_network_is_refused() -> None:
    trainer: Any = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"ModelParallelStrategy shards it: .* lightllm export"):
        ExportBest().setup(trainer, TinyModule(), "fit")
