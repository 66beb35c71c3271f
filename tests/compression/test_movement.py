from __future__ import annotations

import pytest
import torch
from tiny_networks import tiny_llama, token_rows
from torch import nn

from lightllm.compression.effects import effective_layers, mask_layers
from lightllm.compression.movement import LearnedMask, MaskLearning, learned_masks
from lightllm.export.compare import outputs
from lightllm.models import LoRA


def test_gradients_are_those_of_the_papers_equations() -> None:
    mask, inputs = LearnedMask(torch.Size((3, 5)), torch.device("cpu")), torch.randn(4, 5)
    weight = torch.randn(3, 5, requires_grad=True)
    keep = torch.rand(3, 5) < 0.5
    mask.mask.keep.copy_(keep)
    masked = mask(weight)
    assert torch.equal(masked, weight * keep)
    (inputs @ masked.T).square().sum().backward()
    effective = (weight.detach() * keep).requires_grad_()  # W', as a parameter of its own
    (inputs @ effective.T).square().sum().backward()
    assert effective.grad is not None
    torch.testing.assert_close(weight.grad, effective.grad * keep)
    torch.testing.assert_close(mask.scores.grad, effective.grad * weight.detach())
    assert mask.scores.grad is not None
    assert mask.scores.grad[~keep].any(), "a masked weight's score is learned too"


def test_a_frozen_weight_has_scores_all_the_same() -> None:
    mask = LearnedMask(torch.Size((2, 2)), torch.device("cpu"))
    mask(torch.ones(2, 2)).sum().backward()
    assert torch.equal(mask.scores.grad, torch.ones(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_layers_get_masks_that_keep_everything(adapter: LoRA | None) -> None:
    network: nn.Module = tiny_llama()
    network = network if adapter is None else adapter.attach(network)
    before = outputs(network, token_rows())
    MaskLearning("movement", ["k_proj"]).apply(network, None)
    assert len(learned_masks(network)) == 12
    assert not any("k_proj" in name for name in effective_layers(network))
    torch.testing.assert_close(outputs(network, token_rows()), before)


def test_the_state_holds_scores_mask_and_whether_it_is_fixed() -> None:
    mask = LearnedMask(torch.Size((3, 5)), torch.device("cpu"))
    nn.init.normal_(mask.scores)
    mask.mask.keep.copy_(mask.scores > 0)
    mask.fix()
    again = LearnedMask(torch.Size((3, 5)), torch.device("cpu"))
    again.load_state_dict(mask.state_dict())
    assert again.fixed
    assert torch.equal(again.mask.keep, mask.mask.keep)
    assert torch.equal(again.scores, mask.scores)


def test_a_second_mask_is_refused() -> None:
    network = tiny_llama()
    mask_layers(network, ["mlp"])
    with pytest.raises(ValueError, match=r"q_proj is masked already, and a learned mask would be a second"):
        MaskLearning("movement", []).apply(network, None)
