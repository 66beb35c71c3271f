from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_objective import Batches, cut, documents, scratch
from tiny_run import tiny_trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.callbacks.own_learning_rate import OwnLearningRate
from lightllm.modules import FineTuning, Schedule

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def norms(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in network.named_parameters() if "norm" in name]


class Watch(Callback):
    """Notes the rates of every step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_parameters_are_in_a_group_of_their_own_that_follows_the_schedule(tmp_path: Path) -> None:
    module = FineTuning(
        scratch(),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
        schedule=Schedule("linear", warmup=2),
    )
    make = module.optimizer
    own = OwnLearningRate(module, norms, 0.5)
    watch = Watch()
    trainer = tiny_trainer(tmp_path, [watch], max_steps=4)
    trainer.fit(module, Batches(cut(documents(), [3] * 4)))
    groups = trainer.optimizers[0].param_groups
    found = norms(module.built_network)
    assert [len(group["params"]) for group in groups] == [len(list(module.parameters())) - len(found), len(found)]
    assert {id(one) for one in groups[-1]["params"]} == {id(one) for one in found}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(abs(two - 500 * one) < 1e-9 for one, two in watch.rates)
    assert watch.rates[1] != watch.rates[2]
    own.undo()
    assert module.optimizer is make
