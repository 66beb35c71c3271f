from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_checkpoint import saved
from tiny_networks import tiny_llama
from tiny_objective import VOCABULARY, Batches, MeasuredBatches, adamw, cut, documents, scratch
from tiny_run import tiny_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lightllm.batch import Document, TextBatch, pack_documents
from lightllm.models import Adapter, Frozen, Full, LoRA, Network, Pretrained, PromptTuning, QLoRA
from lightllm.models.anatomy import unwrapped
from lightllm.modules import PreferenceTuning
from lightllm.modules.parameter_groups import parameter_groups
from lightllm.modules.preference import PreferenceMetrics, pair_scores

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning"),
]

LN2 = math.log(2)


def tuning(network: Network | None = None, adapter: Adapter | None = None, **fields: Any) -> PreferenceTuning:
    torch.manual_seed(0)
    module = PreferenceTuning(network or scratch(), adapter, **({"optimizer": adamw(1e-2, 0.0)} | fields))
    module.configure_model()
    return module


def pretrained(folder: Path) -> Pretrained:
    torch.manual_seed(0)
    return Pretrained(saved(folder, tiny_llama(VOCABULARY)))


def plain_scores(network: PreTrainedModel, made: list[Document], mean: bool) -> Tensor:
    """Of each document, in plain PyTorch: the log probability of its targets, summed or averaged, `[documents]`."""
    scores = []
    for document in made:
        ids = torch.as_tensor(document.input_ids)
        targets = torch.as_tensor(document.targets)[1:]
        logits = network(input_ids=ids[None, :-1], use_cache=False).logits[0][targets]
        score = -F.cross_entropy(logits, ids[1:][targets], reduction="sum")
        scores.append(score / int(targets.sum()) if mean else score)
    return torch.stack(scores)


def perturb(network: nn.Module, seed: int = 3) -> None:
    """Move what trains away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def plain_losses(policy: Tensor, reference: Tensor, loss: str, beta: float, smoothing: float) -> Tensor:
    """Of each pair, as the papers have it: `[pairs]`."""
    margin = (policy[0::2] - policy[1::2]) - (reference[0::2] - reference[1::2])
    if loss == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -(1 - smoothing) * (beta * margin).sigmoid().log() - smoothing * (-beta * margin).sigmoid().log()


@pytest.mark.parametrize("adapter", [LoRA(rank=4), Full()], ids=["LoRA", "Full"])
@pytest.mark.parametrize(("loss", "beta", "smoothing"), [("dpo", 0.1, 0.0), ("dpo", 0.5, 0.2), ("ipo", 0.3, 0.0)])
@pytest.mark.parametrize("packed", [False, True])
def test_losses_and_gradients_are_those_of_the_paper(
    tmp_path: Path, adapter: Adapter, loss: Any, beta: float, smoothing: float, packed: bool
) -> None:
    source = pretrained(tmp_path)
    module = tuning(source, adapter, loss=loss, beta=beta, label_smoothing=smoothing)
    reference = Pretrained(source.name).build(module_request())
    perturb(module.built_network)
    plain = copy.deepcopy(module.built_network)
    base = plain.get_base_model() if isinstance(plain, PeftModel) else plain
    assert isinstance(base, PreTrainedModel)
    assert isinstance(reference, PreTrainedModel)
    made = documents()
    (batch,) = cut(made, [12], packed)
    ours = module.criterion(module(batch), batch)
    mean = loss == "ipo"
    with torch.no_grad():
        theirs = plain_scores(reference, made, mean)
    expected = plain_losses(plain_scores(base, made, mean), theirs, loss, beta, smoothing)
    torch.testing.assert_close(ours.sum, expected.sum(), rtol=1e-4, atol=1e-5)
    assert int(ours.weight) == 6
    ours.sum.backward()
    expected.sum().backward()  # type: ignore[no-untyped-call]
    trained = [name for name, parameter in plain.named_parameters() if parameter.requires_grad]
    for name in trained:
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(
            module.built_network.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
        )


def module_request() -> Any:
    from lightllm.models import BuildRequest

    return BuildRequest("causal", None)


@pytest.mark.parametrize(
    "adapter", [LoRA(rank=2), QLoRA(rank=2), Full(), Frozen(num_blocks=1)], ids=lambda adapter: type(adapter).__name__
)
def test_at_the_start_nothing_is_preferred(tmp_path: Path, adapter: Adapter) -> None:
    module = tuning(pretrained(tmp_path), adapter)
    (batch,) = cut(documents(), [12])
    loss = module.criterion(module(batch), batch)
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(LN2, abs=1e-5)


def test_a_prompt_is_left_out_of_the_reference(tmp_path: Path) -> None:
    module = tuning(pretrained(tmp_path), PromptTuning(3))
    made = documents()
    (batch,) = cut(made, [12])
    policy = module._scores(module.built_network, module(batch), batch)
    losses, _ = module._pairs(module(batch), batch)
    reference = unwrapped(module.built_network)
    assert isinstance(reference, PreTrainedModel)
    with torch.no_grad():
        theirs = plain_scores(reference, made, mean=False)
    ours = torch.stack([policy.chosen, policy.rejected], 1).flatten()
    torch.testing.assert_close(losses, plain_losses(ours, theirs, "dpo", 0.1, 0.0), rtol=1e-4, atol=1e-5)


def test_a_trained_copy_of_the_head_is_not_the_references(tmp_path: Path) -> None:
    source = Pretrained(saved(tmp_path, tiny_llama(VOCABULARY, tied=False)))
    module = tuning(source, LoRA(rank=2, modules_to_save=["lm_head"]))
    made = documents()
    (batch,) = cut(made, [12])
    losses, _ = module._pairs(module(batch), batch)
    torch.testing.assert_close(losses, torch.full((6,), LN2), rtol=0, atol=1e-5)
    perturb(module.built_network)
    losses, _ = module._pairs(module(batch), batch)
    reference = source.build(module_request())
    assert isinstance(reference, PreTrainedModel)
    with torch.no_grad():
        theirs = plain_scores(reference, made, mean=False)
        scores = module._scores(module.built_network, module(batch), batch)
    ours = torch.stack([scores.chosen, scores.rejected], 1).flatten()
    torch.testing.assert_close(losses, plain_losses(ours, theirs, "dpo", 0.1, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, dropout=0.5)])
def test_dropout_does_not_touch_the_reference(adapter: Adapter | None) -> None:
    dropping = scratch("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
    module = tuning(dropping, adapter)
    (batch,) = cut(documents(), [12])
    hidden = module.eval()(batch)
    module.train()
    state = torch.get_rng_state()
    losses, _ = module._pairs(hidden, batch)
    torch.testing.assert_close(losses, torch.full((6,), LN2), rtol=0, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in module.built_network.modules())
    dropped, _ = module._pairs(module(batch), batch)  # the policy's are another matter
    assert float((dropped.detach() - LN2).abs().max()) > 1e-3


def test_switching_the_adapter_off_leaves_the_policys_graph_as_it_was(tmp_path: Path) -> None:
    """With gradient checkpointing, the blocks run again when the adapter is long back on."""
    gradients = []
    for checkpointing in (False, True):
        module = tuning(pretrained(tmp_path / str(checkpointing)), LoRA(rank=4), gradient_checkpointing=checkpointing)
        perturb(module.built_network)
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        (batch,) = cut(documents(), [12])
        module.train()
        loss = module.criterion(module(batch), batch)
        assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == trained
        loss.sum.backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters() if name in trained})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_reference_is_a_frozen_copy(tmp_path: Path) -> None:
    for network in (pretrained(tmp_path / "network"), scratch()):
        module = tuning(network)
        assert module.reference is not None
        assert not any(parameter.requires_grad for parameter in module.reference.parameters())
        before = {name: value.clone() for name, value in module.reference.state_dict().items()}
        assert all(torch.equal(value, before[name]) for name, value in module.built_network.state_dict().items())
        grouped = {id(parameter) for group in parameter_groups(module) for parameter in group["params"]}
        assert grouped == {id(parameter) for parameter in module.built_network.parameters()}
        tiny_trainer(tmp_path, [], max_steps=3, max_epochs=-1).fit(module, Batches(cut(documents(), [4, 2, 6])))
        assert all(torch.equal(value, before[name]) for name, value in module.reference.state_dict().items())
        assert not all(torch.equal(value, before[name]) for name, value in module.built_network.state_dict().items())
    assert tuning(adapter=LoRA(rank=2)).reference is None


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize("adapter", [LoRA(rank=4), None])
def test_a_run_comes_to_prefer_the_chosen(tmp_path: Path, loss: Any, adapter: Adapter | None) -> None:
    module = tuning(adapter=adapter, loss=loss)
    batches = cut(documents(), [4, 2, 6])
    trainer = tiny_trainer(tmp_path, [], max_epochs=10)
    data = MeasuredBatches(batches, batches)
    (before,) = trainer.validate(module, data, verbose=False)
    assert before["val/loss"] == pytest.approx(LN2 if loss == "dpo" else 25.0, rel=1e-5)
    assert before["val/reward_margin"] == pytest.approx(0.0, abs=1e-5)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert set(after) == {"val/loss", "val/reward_accuracy", "val/reward_margin"}
    assert after["val/loss"] < 0.9 * before["val/loss"]
    assert after["val/reward_accuracy"] == 1.0
    assert after["val/reward_margin"] > 0


def test_validation_is_a_mean_over_pairs(tmp_path: Path) -> None:
    module = tuning(adapter=LoRA(rank=4))
    perturb(module.built_network)
    made = documents()
    with torch.no_grad():
        losses, margins = module.eval()._pairs(module(cut(made, [12])[0]), cut(made, [12])[0])
    (values,) = tiny_trainer(tmp_path, []).validate(module, MeasuredBatches([], cut(made, [2, 8, 2])), verbose=False)
    assert values["val/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert values["val/reward_margin"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert values["val/reward_accuracy"] == pytest.approx(float((margins > 0).float().mean()))


def test_metrics_add_up() -> None:
    metrics = PreferenceMetrics()
    metrics.update(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, -1.0, 2.0]))
    metrics.update(torch.tensor([3.0]), torch.tensor([0.5]))
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == {"loss": 3.0, "reward_accuracy": 0.75, "reward_margin": 0.5}


def ids_batch(rows: list[list[int]]) -> TextBatch:
    return pack_documents([[Document([1, 2, 3], [True] * 3, index) for index in row] for row in rows], length=8)


@pytest.mark.parametrize("rows", [[[0, 2]], [[0]], [[1, 2]], [[4], [5], [6]], [[3, 4], [0, 1]]])
def test_broken_pairs_are_refused(rows: list[list[int]]) -> None:
    batch = ids_batch(rows)
    found = sorted(index for row in rows for index in row)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (compared in full)
        pair_scores(torch.zeros(batch["labels"].shape), batch, mean=False)
    assert str(caught.value) == (
        f"preference batches hold pairs, 2p chosen and 2p + 1 rejected, and this has {found}: use PreferenceData, or a "
        "datamodule that keeps pairs together"
    )


@pytest.mark.parametrize("rows", [[[0, 1]], [[7, 2, 3], [6]], [[5], [4], [9, 8]]])
def test_pairs_are_found_wherever_they_are(rows: list[list[int]]) -> None:
    batch = ids_batch(rows)
    positions = torch.where(batch["document_ids"] >= 0, batch["document_ids"].double() + 1, 99.0)
    positions[batch["labels"] < 0] = 0.0
    scores = pair_scores(positions, batch, mean=False)
    chosen = sorted(index for row in rows for index in row if index % 2 == 0)
    assert scores.chosen.tolist() == [2 * (index + 1) for index in chosen]
    assert scores.rejected.tolist() == [2 * (index + 2) for index in chosen]
    assert pair_scores(positions, batch, mean=True).chosen.tolist() == [index + 1 for index in chosen]


def test_ipo_has_no_label_smoothing() -> None:
    with pytest.raises(ValueError, match=r"ipo has no label smoothing, and label_smoothing is 0.1: leave it out"):
        PreferenceTuning(scratch(), loss="ipo", label_smoothing=0.1)
