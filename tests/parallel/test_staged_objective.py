from __future__ import annotations

import pytest
from lightning.pytorch import LightningModule
from tiny_objective import scratch

from lightllm.callbacks import MagnitudePruning
from lightllm.models import Full, LoRA, Prefix, PromptTuning
from lightllm.modules import CausalPretraining, Distillation, FineTuning, LanguageModule, PreferenceTuning
from lightllm.parallel.staged_objective import check_objective


def test_objectives_with_a_criterion_alone_are_taken() -> None:
    for module in (CausalPretraining(scratch()), FineTuning(scratch(), LoRA())):
        assert check_objective(module, module.plan.adapter, True) is module


@pytest.mark.parametrize(
    "module", [Distillation(scratch(), teacher=scratch()), PreferenceTuning(scratch())], ids=["distillation", "dpo"]
)
def test_objectives_that_call_the_network_are_refused(module: LanguageModule) -> None:
    with pytest.raises(ValueError, match=f"{type(module).__name__} cannot run in a pipeline: it has a .* of its own"):
        check_objective(module, Full(), False)


def test_what_changes_the_network_or_comes_before_a_row_is_refused() -> None:
    module = CausalPretraining(scratch())
    for adapter in (Prefix(), PromptTuning()):
        with pytest.raises(ValueError, match=f"{type(adapter).__name__} puts something before every row"):
            check_objective(module, adapter, False)
    module.register_transformation(MagnitudePruning(0.5).transformation())
    with pytest.raises(ValueError, match="would change a network of which each rank"):
        check_objective(module, Full(), False)
    with pytest.raises(ValueError, match="is no LanguageModule"):
        check_objective(LightningModule(), Full(), False)


@pytest.mark.parametrize("field", ["compile", "gradient_checkpointing"])
def test_a_split_backward_pass_can_be_neither_compiled_nor_recomputed(field: str) -> None:
    module = CausalPretraining(scratch(), **{field: True})
    check_objective(module, Full(), False)
    with pytest.raises(ValueError, match=f"model.{field} does not go with a schedule that cuts"):
        check_objective(module, Full(), True)
