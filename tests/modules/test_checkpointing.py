from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from resumable_run import SaveAt
from tiny_checkpoint import saved
from tiny_networks import tiny_llama, tiny_qwen2
from tiny_objective import Batches, MeasuredBatches, adamw, cut, documents, scratch
from tiny_run import tiny_loader, tiny_trainer

from lightllm.models import Adapter, DoRA, Frozen, Full, LoRA, Network, Prefix, Pretrained, PromptTuning, QLoRA
from lightllm.modules import FineTuning, LanguageModule, PreferenceTuning

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning"),
]


def fresh(network: Network, adapter: Adapter | None = None, kind: Any = FineTuning) -> LanguageModule:
    torch.manual_seed(0)
    module = kind(network, adapter, optimizer=adamw())
    assert isinstance(module, LanguageModule)
    return module


def run(folder: Path, module: LanguageModule, steps: int = 6, resume: str | None = None) -> dict[str, torch.Tensor]:
    """Train on batches that are the same every time; the state after each step is saved."""
    trainer = tiny_trainer(folder, [SaveAt(folder, "on_train_batch_end")], max_steps=steps, max_epochs=-1)
    trainer.fit(module, tiny_loader(cut(documents(), [3, 1, 4, 2, 2]) * 2), ckpt_path=resume, weights_only=True)
    return {name: value.clone() for name, value in module.state_dict().items()}


def in_file(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True)["state_dict"])


ADAPTERS = [LoRA(rank=2), DoRA(rank=2), QLoRA(rank=2), Prefix(2), PromptTuning(2), Frozen(num_blocks=1), Full()]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
def test_what_is_frozen_is_not_saved_and_a_run_goes_on(tmp_path: Path, adapter: Adapter) -> None:
    network = Pretrained(saved(tmp_path / "network", tiny_qwen2(384)))
    whole = fresh(network, adapter)
    expected = run(tmp_path, whole)
    trained = {name for name, p in whole.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert in_file(tmp_path / "step=3.ckpt") == trained
    resumed = run(tmp_path / "again", fresh(network, adapter), resume=str(tmp_path / "step=3.ckpt"))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


def test_a_trained_copy_is_saved(tmp_path: Path) -> None:
    network = Pretrained(saved(tmp_path / "network", tiny_llama(tied=False)))
    run(tmp_path, fresh(network, LoRA(rank=2, targets=["q_proj"], modules_to_save=["lm_head"])), steps=1)
    kept = {name.removeprefix("network.base_model.model.") for name in in_file(tmp_path / "step=1.ckpt")}
    lora = {f"model.layers.{layer}.self_attn.q_proj.lora_{part}.default.weight" for layer in "01" for part in "AB"}
    assert kept == lora | {"lm_head.modules_to_save.default.weight"}


def test_random_weights_are_saved_though_frozen(tmp_path: Path) -> None:
    """Nothing else could bring them back."""
    network = scratch()
    whole = fresh(network, LoRA(rank=2))
    expected = run(tmp_path, whole)
    assert in_file(tmp_path / "step=3.ckpt") == set(whole.state_dict())
    torch.manual_seed(5)
    other = FineTuning(network, LoRA(rank=2), optimizer=adamw())
    resumed = run(tmp_path / "again", other, resume=str(tmp_path / "step=3.ckpt"))
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


def test_a_reference_is_saved_only_if_nothing_else_has_it(tmp_path: Path) -> None:
    batches = cut(documents(), [4, 2, 6])
    for name, network in (
        ("pretrained", Pretrained(saved(tmp_path / "network", tiny_llama()))),
        ("scratch", scratch()),
    ):
        module = fresh(network, kind=PreferenceTuning)
        folder = tmp_path / name
        tiny_trainer(folder, [SaveAt(folder, "on_train_batch_end")], max_steps=2).fit(module, Batches(batches))
        kept = {key.split(".")[0] for key in in_file(folder / "step=2.ckpt")}
        assert kept == ({"network"} if name == "pretrained" else {"network", "reference"})
        again = fresh(network, kind=PreferenceTuning)
        tiny_trainer(folder, [], max_steps=3).fit(
            again, Batches(batches), ckpt_path=str(folder / "step=2.ckpt"), weights_only=True
        )
        state = module.state_dict()
        assert all(
            torch.equal(value, state[key]) for key, value in again.state_dict().items() if key.startswith("reference")
        )


Q_PROJ = r"'network.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight'"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoRA(rank=2, targets=["q_proj", "v_proj"]), r"4 weights are missing from it, such as '.*v_proj.*'$"),
        (
            LoRA(rank=2, targets=["k_proj"]),
            rf"4 weights are missing .*k_proj.*; 4 weights are unknown to the network, such as {Q_PROJ}$",
        ),
        (Full(), rf"weights are missing from it.*; 4 weights are unknown to the network, such as {Q_PROJ}"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, adapter: Adapter, message: str) -> None:
    pretrained = Pretrained(saved(tmp_path / "network", tiny_llama()))
    run(tmp_path, fresh(pretrained, LoRA(rank=2, targets=["q_proj"])), steps=1)
    with pytest.raises(ValueError, match=f"the checkpoint is not of this network and adapter: .*{message}"):
        run(tmp_path, fresh(pretrained, adapter), resume=str(tmp_path / "step=1.ckpt"))


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    run(tmp_path, fresh(scratch()), steps=1)
    with pytest.raises(ValueError, match=r"weights are missing from it, such as 'network.model.layers.2"):
        run(tmp_path, fresh(scratch(num_hidden_layers=3)), resume=str(tmp_path / "step=1.ckpt"))
    with pytest.raises((RuntimeError, ValueError), match="size"):
        run(tmp_path, fresh(scratch(hidden_size=64)), resume=str(tmp_path / "step=1.ckpt"))


def test_validation_loads_the_same_weights(tmp_path: Path) -> None:
    network = Pretrained(saved(tmp_path / "network", tiny_llama()))
    batches = cut(documents(), [12])
    data = MeasuredBatches(batches, batches)
    module = fresh(network, LoRA(rank=2))
    trainer = tiny_trainer(tmp_path, [SaveAt(tmp_path, "on_train_batch_end")], max_steps=3, max_epochs=-1)
    trainer.fit(module, data)
    expected = trainer.validate(module, data, verbose=False)
    found = tiny_trainer(tmp_path, []).validate(
        fresh(network, LoRA(rank=2)), data, ckpt_path=str(tmp_path / "step=3.ckpt"), verbose=False, weights_only=True
    )
    assert found == expected
