from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from own_networks import Transformer
from peft import PromptTuningConfig, get_peft_model
from tiny_checkpoint import saved
from tiny_networks import tiny_gpt2, tiny_llama, tiny_tokenizer
from tiny_run import tiny_batches

from lightllm.batch import IGNORE_INDEX
from lightllm.compression.low_rank_network import decomposable_layers, decompose
from lightllm.compression.rank_choice import RankChoice
from lightllm.evaluate import evaluate_text
from lightllm.export import export
from lightllm.ledger_rows import Generation, generation_test, has_targets, row_of_file, row_of_network
from lightllm.models import LoRA
from lightllm.models.anatomy import OwnNetwork

BATCHES = tiny_batches(3)


def test_an_adapter_counts_as_merged() -> None:
    network = tiny_llama()
    size = sum(one.numel() for one in network.parameters())
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight.zero_()
    adapted = LoRA(rank=2, targets=["q_proj"]).attach(network)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    row = row_of_network("trained", 5, adapted, BATCHES)
    assert (row.step, row.training_step) == ("trained", 5)
    assert (row.parameters, row.nonzero_parameters, row.weight_bytes) == (size, size - 32 * 48, 4 * size)
    assert row.loss == pytest.approx(evaluate_text(adapted.merge_and_unload(), None, BATCHES).loss, rel=1e-5)  # type: ignore[operator]
    assert row.target_tokens == 3 * 2 * 6


def test_what_cannot_be_exported_whole_is_counted_as_it_is(tmp_path: Path) -> None:
    test = generation_test(BATCHES, 4)
    assert test is not None
    own = OwnNetwork(Transformer(40), "lm_head")
    row = row_of_network("dense", 0, own, BATCHES, Generation(test, tmp_path))
    assert row.parameters == sum(one.numel() for one in own.parameters())
    assert row.loss == pytest.approx(evaluate_text(own, None, BATCHES).loss)
    assert row.tokens_per_second is None
    prompted = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    row = row_of_network("dense", 0, prompted, BATCHES)
    assert row.parameters == sum(one.numel() for one in prompted.parameters())


def test_generation_of_a_known_network_is_not_measured_again(tmp_path: Path) -> None:
    network, test = tiny_llama(), generation_test(BATCHES, 4)
    assert test is not None
    row = row_of_network("dense", 0, network, BATCHES, Generation(test, tmp_path))
    assert row.tokens_per_second is not None
    known = replace(row, tokens_per_second=-1.0, peak_memory=-2, device="that")
    again = row_of_network("dense", 0, network, BATCHES, Generation(test, tmp_path, [known]))
    assert again == known
    other = row_of_network("dense", 0, network, BATCHES, Generation(test, tmp_path, [replace(known, loss=1.0)]))
    assert other.tokens_per_second is not None
    assert other.tokens_per_second > 0


def test_a_file_is_named_weighed_and_measured(tmp_path: Path) -> None:
    network = tiny_gpt2()
    folder = Path(saved(tmp_path / "export", network))
    row = row_of_file(folder, BATCHES, generation_test(BATCHES, 4))
    assert row.key == ("export", None)
    assert row.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert row.parameters == sum(one.numel() for one in network.parameters())
    assert row.loss == pytest.approx(evaluate_text(network, None, BATCHES).loss, rel=1e-6)
    assert row.tokens_per_second is not None


def test_generation_goes_on_from_the_first_document() -> None:
    test = generation_test(BATCHES, 7)
    assert test is not None
    assert test.new_tokens == 7
    assert list(test.prompt) == BATCHES[0]["input_ids"][0, :6].tolist()  # two positions are padding
    assert generation_test([], 7) is None


def test_targets_are_what_is_not_ignored() -> None:
    (batch,) = tiny_batches(1)
    assert has_targets([batch])
    batch["labels"].fill_(IGNORE_INDEX)
    assert not has_targets([batch])
    assert not has_targets([])


def test_thin_matrices_count_as_such_in_training_and_on_the_disk(tmp_path: Path) -> None:
    network, test = tiny_llama(), generation_test(BATCHES, 4)
    assert test is not None
    decompose(network, decomposable_layers(network), RankChoice(budget=0.5))
    size = network.num_parameters()
    assert size < tiny_llama().num_parameters() - 7_000
    row = row_of_network("low rank", 0, network, BATCHES, Generation(test, tmp_path))
    assert row.parameters == size
    assert row.tokens_per_second is not None
    assert list(tmp_path.iterdir()) == []
    export(network, tiny_tokenizer(), tmp_path / "small", layout="factored")
    file = row_of_file(tmp_path / "small", BATCHES, test)
    assert file.parameters == size
    assert file.loss == pytest.approx(row.loss, rel=1e-5)
    assert file.tokens_per_second is not None
