from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_architectures import tiny_architecture
from tiny_networks import tiny_llama, tiny_qwen2, tiny_tokenizer, token_rows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightllm.compression.effects import mask_layers
from lightllm.compression.factored_linear import FactoredLinear
from lightllm.compression.low_rank_network import decomposable_layers, decompose
from lightllm.compression.rank_choice import RankChoice
from lightllm.export import export
from lightllm.export.compare import outputs
from lightllm.export.factored import MODULE, has_our_code, load_with_its_code, with_code
from lightllm.export.merge import merged_network, merged_weights
from lightllm.models import LoRA

NETWORKS = {"llama": tiny_llama, "qwen2": tiny_qwen2}


def thin(name: str = "llama", share: float = 0.5) -> PreTrainedModel:
    network: PreTrainedModel = NETWORKS[name]()
    decompose(network, decomposable_layers(network, [r"1\.mlp"]), RankChoice(budget=share))
    return network


def shaken(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("adapter", [None, LoRA(rank=3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_merged_it_is_an_ordinary_dense_network(name: str, adapter: LoRA | None, tmp_path: Path) -> None:
    network: nn.Module = thin(name)
    network = network if adapter is None else shaken(adapter.attach(network))
    export(network, tiny_tokenizer(), tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert type(loaded) is type(NETWORKS[name]())
    assert set(loaded.state_dict()) == set(NETWORKS[name]().state_dict())
    assert_same(outputs(loaded, token_rows()), outputs(network, token_rows()))


@pytest.mark.parametrize("adapter", [None, LoRA(rank=3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_factored_it_stays_small_and_computes_the_same(name: str, adapter: LoRA | None, tmp_path: Path) -> None:
    network: nn.Module = thin(name)
    network = network if adapter is None else shaken(adapter.attach(network))
    report = export(network, tiny_tokenizer(), tmp_path / "factored", layout="factored")
    dense = export(network, tiny_tokenizer(), tmp_path / "dense")
    assert report.layout == "factored"
    assert (tmp_path / "factored/model.safetensors").stat().st_size < (
        tmp_path / "dense/model.safetensors"
    ).stat().st_size
    assert report.num_bytes < dense.num_bytes
    loaded = load_with_its_code(tmp_path / "factored", torch.float32)
    assert_same(outputs(loaded, token_rows()), outputs(network, token_rows()))
    assert loaded.num_parameters() == thin(name).num_parameters()
    assert not any(key.startswith(MODULE) for key in sys.modules)


LOADING = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith("lightllm") for name in sys.modules)
folder, rows = sys.argv[1], json.loads(sys.argv[2])
network = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(type(network).__name__, type(network).__mro__[1].__name__)
print(json.dumps(network(input_ids=torch.tensor(rows)).logits.tolist()))
generated = network.generate(torch.tensor(rows[:1]), max_new_tokens=3, do_sample=False)
print(json.dumps(generated.tolist()))
network.save_pretrained(sys.argv[3])
again = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
assert not any(name.startswith("lightllm") for name in sys.modules)
"""


def test_plain_transformers_loads_it_with_its_own_code_and_saves_it_again(tmp_path: Path) -> None:
    network, rows = thin(), token_rows(rows=2, length=9)
    export(network, tiny_tokenizer(), tmp_path / "factored", layout="factored")
    arguments = [str(tmp_path / "factored"), json.dumps(rows.tolist()), str(tmp_path / "again")]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", LOADING, *arguments],
        env=os.environ | home,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    names, logits, generated = result.stdout.strip().splitlines()
    assert names == "FactoredLlamaForCausalLM LlamaForCausalLM"
    assert_same(torch.tensor(json.loads(logits)), outputs(network, rows))
    network.config.use_cache = True
    expected = network.generate(rows[:1], max_new_tokens=3, do_sample=False)
    assert json.loads(generated) == expected.tolist()


def test_nobody_loads_it_with_random_weights_by_mistake(tmp_path: Path) -> None:
    export(thin(), tiny_tokenizer(), tmp_path / "factored", layout="factored")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path / "factored", trust_remote_code=False)
    config = json.loads((tmp_path / "factored/config.json").read_text())
    assert config["layer_ranks"]["model.layers.0.self_attn.q_proj"] == 8
    assert not any("1.mlp" in name for name in config["layer_ranks"])


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_neox", "opt", "olmo2"])
def test_other_architectures_are_written_too(architecture: str, tmp_path: Path) -> None:
    network = tiny_architecture(architecture, dtype="float32").eval()
    assert isinstance(network, PreTrainedModel)
    decompose(network, decomposable_layers(network), RankChoice(budget=0.6))
    with_code(merged_network(network, keep_factored=True), tmp_path).save_pretrained(tmp_path)
    loaded = load_with_its_code(tmp_path, torch.float32)
    rows = token_rows(40, 2, 9)
    assert_same(outputs(loaded, rows), outputs(network, rows))


def test_a_mask_on_thin_matrices_is_in_both_exports(tmp_path: Path) -> None:
    network = thin()
    for layer in mask_layers(network, []).values():
        layer.set_keep(torch.rand(layer.base.weight.shape) < 0.5)
    export(network, tiny_tokenizer(), tmp_path / "factored", layout="factored")
    loaded = load_with_its_code(tmp_path / "factored", torch.float32)
    weight = loaded.get_parameter("model.layers.0.self_attn.q_proj.up.weight")
    assert 0.3 < (weight == 0).float().mean() < 0.7
    assert_same(outputs(loaded, token_rows()), outputs(network, token_rows()))
    merged = dict(merged_weights(network))["model.layers.0.self_attn.q_proj.weight"]
    layer = loaded.get_submodule("model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(merged, layer.up.weight @ layer.down.weight)


def test_half_precision_is_kept_or_asked_for(tmp_path: Path) -> None:
    network = thin().to(torch.bfloat16)
    assert export(network, tiny_tokenizer(), tmp_path / "a", layout="factored").dtype == "bfloat16"
    report = export(thin(), tiny_tokenizer(), tmp_path / "b", layout="factored", dtype=torch.bfloat16)
    assert report.dtype == "bfloat16"
    assert load_with_its_code(tmp_path / "b", torch.bfloat16).dtype == torch.bfloat16


def test_what_is_not_factored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this one has none: export with layout='merged'"):
        export(tiny_llama(), tiny_tokenizer(), tmp_path / "export", layout="factored")

    class Own(type(tiny_llama())):  # type: ignore[misc]
        pass

    network = thin()
    network.__class__ = Own
    with pytest.raises(ValueError, match="Own is no class of transformers"):
        export(network, tiny_tokenizer(), tmp_path / "export", layout="factored")
    assert not (tmp_path / "export").exists()


def test_an_adapter_on_thin_matrices_is_no_adapter_of_the_base(tmp_path: Path) -> None:
    network = get_peft_model(thin(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="the adapter is on thin matrices"):
        export(network, tiny_tokenizer(), tmp_path / "export", layout="adapter", base_model="somewhere")


def test_thin_matrices_are_multiplied_out_in_float32() -> None:
    layer = FactoredLinear(6, 5, 2, dtype=torch.bfloat16)
    nn.init.normal_(layer.up.weight)
    nn.init.normal_(layer.down.weight)
    plain = layer.plain_tensors_of({name: tensor.detach() for name, tensor in layer.state_dict().items()})
    assert torch.equal(plain["weight"], layer.up.weight.float() @ layer.down.weight.float())


def test_only_our_own_code_is_known_as_such(tmp_path: Path) -> None:
    folder = tmp_path / "factored"
    export(thin(), tiny_tokenizer(), folder, layout="factored")
    export(thin(), tiny_tokenizer(), tmp_path / "dense")
    assert has_our_code(folder)
    assert not has_our_code(tmp_path / "dense")
    assert not has_our_code(tmp_path / "nowhere")
    file, config = folder / f"{MODULE}.py", folder / "config.json"
    code, fields = file.read_text(), config.read_text()
    file.write_text(code + "\nimport os\n")
    assert not has_our_code(folder)
    file.write_text(code)
    config.write_text(fields.replace("FactoredLlamaConfig", "FactoredLlamaConfig; import os"))
    assert not has_our_code(folder)
    file.write_text(code.replace("LlamaConfig", "LlamaConfig; import os"))
    assert not has_our_code(folder)
