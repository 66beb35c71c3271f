from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import saved
from tiny_networks import tiny_llama, tiny_tokenizer
from tiny_run import tiny_batches

from lightllm.evaluate import evaluate_text
from lightllm.export import export, write_gguf
from lightllm.measure import GenerationTest, count_weights, measure_file, measure_network, weight_files

# Two layers: queries and outputs 32 x 32, keys and values 32 x 16, three matrices 32 x 48, two norms; one norm after.
LAYERS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
TEST = GenerationTest([5, 6, 7], new_tokens=4, repeats=2)


def test_weights_are_counted_once_with_their_bytes() -> None:
    assert count_weights(tiny_llama()) == (LAYERS + 320 * 32, LAYERS + 320 * 32, 4 * (LAYERS + 320 * 32))
    untied = tiny_llama(tied=False).to(torch.bfloat16)
    assert count_weights(untied)[::2] == (LAYERS + 2 * 320 * 32, 2 * (LAYERS + 2 * 320 * 32))
    with torch.no_grad():
        untied.model.layers[0].mlp.up_proj.weight[:, :5] = 0
    assert count_weights(untied).nonzero_parameters == LAYERS + 2 * 320 * 32 - 48 * 5


def test_a_folder_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    network, batches = tiny_llama(), tiny_batches(3)
    folder = Path(saved(tmp_path / "network", network))
    found = measure_file(folder, TEST, batches)
    expected = evaluate_text(network, None, batches)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.target_tokens == expected.num_tokens == 3 * 2 * 6
    assert (found.parameters, found.nonzero_parameters) == (LAYERS + 320 * 32,) * 2
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.tokens_per_second is not None
    assert 1 < found.tokens_per_second < 1e5
    # It holds the weights, and nothing like an interpreter with its libraries.
    assert found.peak_memory is not None
    assert 4 * (LAYERS + 320 * 32) < found.peak_memory < 2e8
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_generation_alone_leaves_nothing_behind(tmp_path: Path) -> None:
    network, numbers = tiny_llama(), torch.get_rng_state()
    (tmp_path / ".measured").mkdir()
    (tmp_path / ".measured" / "model.safetensors").write_text("half of a file, by a process that was killed")
    found = measure_network(network, TEST, tmp_path)
    assert found.loss is None
    assert found.tokens_per_second is not None
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_gguf_file_is_measured_too(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    network, batches = tiny_llama(len(tiny_tokenizer())), tiny_batches(2)
    write_gguf(network, tiny_tokenizer(), tmp_path / "small.gguf", "F32")
    found = measure_file(tmp_path / "small.gguf", None, batches)
    assert found.loss == pytest.approx(evaluate_text(network, None, batches).loss, rel=1e-5)
    assert (found.tokens_per_second, found.peak_memory) == (None, None)
    assert weight_files(tmp_path / "small.gguf") == [tmp_path / "small.gguf"]


def test_weights_of_an_export_are_told_from_its_other_files(tmp_path: Path) -> None:
    export(tiny_llama(len(tiny_tokenizer())), tiny_tokenizer(), tmp_path / "export")
    (file,) = weight_files(tmp_path / "export")
    assert file.name == "model.safetensors"
    assert weight_files(tmp_path) == []


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="could not be measured: "):
        measure_file(tmp_path)


MEMORY = """
import torch
from lightllm.measure import PeakMemory
held = [torch.ones(4 * 2**20)]  # 16 MiB that were there before
memory = PeakMemory(torch.device("cpu"))
before = memory.read()
held.append(torch.ones(16 * 2**20))  # 64 MiB
held.pop()
print(before, memory.read())
"""


def test_memory_is_what_came_on_top() -> None:
    # In a process of its own, as it is used: another's heap may hold what earlier tests gave back to it.
    answer = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout
    before, after = map(int, answer.split())
    assert before < 2**24
    assert 2**26 - 2**22 < after - before < 2**26 + 2**24
