from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import saved
from tiny_networks import tiny_llama
from tiny_objective import VOCABULARY, adamw, cut, documents, objective, scratch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lightllm.batch import TextBatch
from lightllm.models import DoRA, Frozen, LoRA, Prefix, Pretrained, PromptTuning, QLoRA
from lightllm.modules import CausalPretraining, FineTuning, LanguageModule


def reference(network: PreTrainedModel, batch: TextBatch, smoothing: float, z_loss: float) -> tuple[Tensor, int]:
    """From the full logits: the loss over all positions, and the number of targets."""
    logits = network(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)
    labels = batch["labels"].flatten()
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    total = total + z_loss * logits.logsumexp(1)[labels >= 0].square().sum()
    return total, int((labels >= 0).sum())


def built(module: LanguageModule) -> LanguageModule:
    module.configure_model()
    return module.eval()


NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.01)])
def test_loss_and_gradients_are_those_of_the_full_logits(name: str, smoothing: float, z_loss: float) -> None:
    network = scratch(name, **NETWORKS[name])
    module = built(
        CausalPretraining(network, z_loss=z_loss) if z_loss else FineTuning(network, label_smoothing=smoothing)
    )
    plain = copy.deepcopy(module.built_network)
    assert isinstance(plain, PreTrainedModel)
    (batch,) = cut(documents(), [12])
    loss = module.criterion(module(batch), batch)
    total, count = reference(plain, batch, smoothing, z_loss)
    torch.testing.assert_close(loss.sum, total, rtol=1e-5, atol=1e-5)
    assert int(loss.weight) == count
    loss.sum.backward()
    total.backward()  # type: ignore[no-untyped-call]
    for ours, expected in zip(module.built_network.parameters(), plain.parameters(), strict=True):
        assert expected.grad is not None
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(ours.grad, expected.grad, rtol=0, atol=1e-5 * scale + 1e-7)


def test_pretraining_trains_everything_and_has_no_adapter() -> None:
    module = built(CausalPretraining(scratch()))
    assert all(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(TypeError, match="positional arguments"):
        CausalPretraining(scratch(), LoRA())  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning")
@pytest.mark.parametrize(
    "adapter",
    [
        None,
        LoRA(rank=4),
        LoRA(rank=4, dropout=0.1),
        DoRA(rank=4),
        QLoRA(rank=4),
        Prefix(3),
        PromptTuning(3),
        Frozen(num_blocks=1),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_every_adapter_lowers_the_loss_and_leaves_the_rest(tmp_path: Path, adapter: Any) -> None:
    source = saved(tmp_path, tiny_llama(VOCABULARY))
    module = objective(Pretrained(source), adapter).train()
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (adapter is not None)
    optimizer = adamw(3e-2, 0.0)([p for p in module.parameters() if p.requires_grad])
    (batch,) = cut(documents(), [12])
    losses = []
    for _ in range(10):
        loss = module.criterion(module(batch), batch)
        (loss.sum / loss.weight).backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.sum.detach()))
    assert losses[-1] < 0.9 * losses[0]
    state = dict(module.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in frozen.items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_copy_of_the_head_is_the_one_in_the_loss(tmp_path: Path, tied: bool) -> None:
    network = tiny_llama(VOCABULARY, tied=tied)
    adapter = LoRA(rank=2, modules_to_save=None if tied else ["lm_head"])
    module = objective(Pretrained(saved(tmp_path, network)), adapter)
    (batch,) = cut(documents(), [12])
    module.criterion(module(batch), batch).sum.backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None and "lora_" not in name}
    assert trained == (set() if tied else {"network.base_model.model.lm_head.modules_to_save.default.weight"})
