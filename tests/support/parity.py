"""The same training by one process and by several ranks: ten optimizer steps whose parameters are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy
from ranks import run_on_ranks
from tiny_objective import Batches, adamw, cut, documents, scratch
from tiny_run import tiny_trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightllm.batch import TextBatch
from lightllm.models import LoRA
from lightllm.modules import CausalPretraining, Distillation, FineTuning, LanguageModule, Schedule

STEPS = 10
ACCUMULATE = 2
CLIP = 0.5
TOLERANCE = 1e-5

MakeModule = Callable[[], LanguageModule]
MakeStrategy = Callable[[], Strategy | str]

COMMON: dict[str, Any] = {"optimizer": adamw(3e-3, weight_decay=0.1), "schedule": Schedule("cosine", warmup=2)}


def pretraining() -> LanguageModule:
    return CausalPretraining(scratch(), z_loss=1e-3, **COMMON)


def full_tuning() -> LanguageModule:
    """With one matrix for embedding and head."""
    return FineTuning(scratch(tie_word_embeddings=True), label_smoothing=0.1, **COMMON)


def lora_tuning() -> LanguageModule:
    return FineTuning(scratch(), LoRA(rank=4), **COMMON)


def distillation() -> LanguageModule:
    return Distillation(scratch(), teacher=scratch(num_hidden_layers=3), hard_loss=0.5, **COMMON)


OBJECTIVES: list[MakeModule] = [pretraining, full_tuning, lora_tuning, distillation]


def global_batches(num_ranks: int, steps: int = STEPS) -> list[TextBatch]:
    """Packed rows of one to four documents, which differ in length and in their share of targets."""
    count = steps * ACCUMULATE * num_ranks
    sizes = [1 + (index * 7) % 4 for index in range(count)]
    return cut(documents(sum(sizes)), sizes, packed=True)


def fit(
    folder: Path, make: MakeModule, batches: list[TextBatch], callbacks: list[Callback] | None = None, **trainer: Any
) -> LanguageModule:
    """Train on all batches, in whatever process this is."""
    torch.manual_seed(0)
    module = make()
    runner = tiny_trainer(folder, callbacks or [], gradient_clip_val=CLIP, **trainer)
    runner.fit(module, Batches(batches, mode="packed", max_length=64))
    return module


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """What trains, by name; sharded parameters put together, so every rank must call it."""
    return {name: whole(one.detach()) for name, one in module.named_parameters() if one.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def on_one(folder: Path, make: MakeModule, num_data_ranks: int, steps: int = STEPS) -> dict[str, Tensor]:
    """What one process makes of the batches of so many data ranks."""
    batches = global_batches(num_data_ranks, steps)
    return whole_parameters(fit(folder, make, batches, accumulate_grad_batches=ACCUMULATE * num_data_ranks))


def on_a_rank(
    folder: Path, make: MakeModule, strategy: MakeStrategy, num_data_ranks: int, steps: int = STEPS
) -> dict[str, Tensor]:
    """What a rank makes of its share of the batches."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mine = global_batches(num_data_ranks, steps)[rank * num_data_ranks // size :: num_data_ranks]
    spread: dict[str, Any] = {"devices": size, "strategy": strategy(), "use_distributed_sampler": False}
    module = fit(folder, make, mine, accumulate_grad_batches=ACCUMULATE, **spread)
    return whole_parameters(module)


def assert_parity(
    folder: Path,
    make: MakeModule,
    strategy: MakeStrategy,
    num_ranks: int,
    num_data_ranks: int | None = None,
    steps: int = STEPS,
) -> None:
    """Fail unless every rank ends with the parameters with which one process ends, and they are not the first ones."""
    num_data_ranks = num_data_ranks or num_ranks
    torch.manual_seed(0)
    untrained = make()
    untrained.configure_model()  # first: what is imported for it now may draw random numbers
    expected = on_one(folder, make, num_data_ranks, steps)
    for found in run_on_ranks(on_a_rank, num_ranks, folder, make, strategy, num_data_ranks, steps):
        assert_close(found, expected)
    assert all(
        (one.detach() - expected[name]).abs().max() > 100 * TOLERANCE
        for name, one in untrained.named_parameters()
        if name in expected
    )


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    worst = max((float((found[name] - expected[name]).abs().max()), name) for name in expected)
    assert worst[0] <= tolerance, worst
