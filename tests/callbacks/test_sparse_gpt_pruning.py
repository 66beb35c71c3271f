from __future__ import annotations

import sys
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import lightllm, save_chats, save_small_network, settle_in
from data_run import in_two_processes, ready, text_data
from pruning_run import ADAPTERS, AtTheFirstBatch, by_full_passes, dense, pruned
from transformers import AutoModelForCausalLM

from lightllm.callbacks import MagnitudePruning, SparseGPTPruning
from lightllm.cli.rebuild import load
from lightllm.compression.layers import prunable_layers
from lightllm.compression.masks import Pattern, follows, sparsity_of
from lightllm.compression.sparse_gpt import sparse_gpt
from lightllm.models.hidden_states import hidden_states

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("fields", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_is_sparse_gpt_in_full_passes(tmp_path: Path, adapter: str, fields: dict[str, Any]) -> None:
    watch = AtTheFirstBatch()
    pruning = SparseGPTPruning(num_documents=20, block_size=16, damping=0.05, **fields)
    pruned(tmp_path, [pruning, watch], ADAPTERS[adapter])
    amount = Pattern(2, 4) if "pattern" in fields else 0.5
    expected = by_full_passes(
        tmp_path,
        20,
        lambda weight, inputs: sparse_gpt(weight, inputs.T @ inputs, amount, block_size=16, damping=0.05).weight,
    )
    for name, weight in expected.items():
        ours = watch.weights[name]
        assert sparsity_of(ours) == 0.5
        assert ((ours != 0) == (weight != 0)).float().mean() > 0.98, f"{name}: roundings may swap a few weights"
        assert (ours - weight).norm() / weight.norm() < 0.1, name
        assert "pattern" not in fields or follows(ours, Pattern(2, 4))


def test_hidden_states_change_less_than_by_magnitude(tmp_path: Path) -> None:
    batch = ready(text_data(tmp_path)).calibration_batches(30, seed=9)[0]
    errors = []
    for pruning in (MagnitudePruning(0.5), SparseGPTPruning(0.5, num_documents=40)):
        watch = AtTheFirstBatch()
        pruned(tmp_path, [pruning, watch])
        network = dense().built_network.eval()
        with torch.no_grad():
            before = hidden_states(network, batch)
            for name, layer in prunable_layers(network).items():
                layer.get_parameter("weight").copy_(watch.weights[name])
            errors.append(float((hidden_states(network, batch) - before).square().sum()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_pruned_stays_pruned(tmp_path: Path, adapter: str) -> None:
    watch = AtTheFirstBatch()
    pruning = SparseGPTPruning(0.6, num_documents=20, schedule="cubic", begin=0, end=4, every_n_steps=2)
    pruned(tmp_path, [pruning, watch], ADAPTERS[adapter], steps=5)
    for before, after in zip(watch.keeps, watch.keeps[1:], strict=False):
        assert all(not (after[name] & ~before[name]).any() for name in after)
    assert all(sparsity_of(keep) == pytest.approx(0.6, abs=1e-3) for keep in watch.keeps[-1].values())


def test_lora_run_is_resumed_measured_and_exported_with_its_changed_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle_in(tmp_path, monkeypatch)
    config: dict[str, Any] = {
        "run": "run",
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "callbacks": [
                {"class_path": "SparseGPTPruning", "init_args": {"pattern": "2:4", "num_documents": 20}},
            ],
        },
        "model": {
            "class_path": "FineTuning",
            "init_args": {
                "network": {
                    "class_path": "Pretrained",
                    "init_args": {"name": str(save_small_network(tmp_path / "network"))},
                },
                "adapter": {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.0}},
            },
        },
        "data": {
            "class_path": "ChatData",
            "init_args": {"train": str(save_chats(tmp_path / "chats.jsonl", 40)), "max_length": 128},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    lightllm("fit", "--config", "config.yaml")
    lightllm("fit", "--resume", "run", "--trainer.max_steps", "4")
    lightllm("export", "run")
    trained = load("run").network.eval()
    exported = AutoModelForCausalLM.from_pretrained("run/export").eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = trained(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(exported(input_ids=tokens).logits, ours, rtol=1e-5, atol=1e-5)
    for layer in prunable_layers(exported).values():
        assert follows(layer.get_parameter("weight"), Pattern(2, 4))
        assert sparsity_of(layer.get_parameter("weight")) == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "2:4", "block_size": 6}, "give a positive multiple of 4"),
        ({"sparsity": 0.5, "block_size": 0}, "block_size is 0"),
        ({"sparsity": 0.5, "damping": -1.0}, "damping is -1.0"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseGPTPruning(**fields)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_two_ranks_prune_as_one_does(tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # ranks begin with the seed of an earlier run, if there is one
    data = text_data(tmp_path)  # once: a rank would read files that the other one is writing
    ready(text_data(tmp_path))  # into the cache
    fields: dict[str, Any] = {"pattern": "2:4", "num_documents": 20}

    def work(rank: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        watch = AtTheFirstBatch()
        ranks = {} if rank is None else {"strategy": "ddp", "devices": 2}
        pruned(tmp_path, [SparseGPTPruning(**fields), watch], ADAPTERS[adapter], steps=2, data=copy(data), **ranks)
        weights = {name: weight.numpy() for name, weight in watch.weights.items()}
        return weights, [{name: keep.numpy() for name, keep in keeps.items()} for keeps in watch.keeps]

    alone, ranks = work(None), in_two_processes(work)
    for weights, keeps in ranks:
        for name, weight in alone[0].items():
            assert (weights[name] == weight).all(), name
        for ours, theirs in zip(keeps, alone[1], strict=True):
            assert all((ours[name] == theirs[name]).all() for name in theirs)
