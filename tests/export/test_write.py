import copy
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from fake_quantized import rounded_llama, switch_on, wide_llama
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_networks import TEXT, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer, token_rows
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GenerationConfig,
)

from lightllm.compression.effects import effective_layers
from lightllm.compression.schemes import Scheme, SchemeName, make_scheme
from lightllm.export import export, write
from lightllm.export.compare import Difference, outputs
from lightllm.models import document_attention  # noqa: F401  (registers an attention)
from lightllm.models.adapters import DoRA, Full, LoRA
from lightllm.models.chat_template import with_chat_template
from lightllm.models.low_bit import keep_differentiable

NETWORKS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2}
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    "dora": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, use_dora=True),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projected": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def shaken(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return network


def assert_loads(folder: Path, network: nn.Module) -> None:
    """Plain transformers computes from the folder what the network does."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ours, theirs = outputs(network, token_rows()), outputs(loaded, token_rows())
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_merged_folder_is_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]().train()
    network.config.use_cache = False
    tokenizer = with_chat_template(tiny_tokenizer())
    folder = tmp_path / "export"
    report = export(network, tokenizer, folder)
    assert network.training
    assert network.config.use_cache is False
    assert_loads(folder, network)
    assert (report.path, report.layout, report.dtype) == (folder, "merged", "float32")
    assert report.max_logit_difference == 0.0
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert loaded.chat_template == tokenizer.chat_template
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"
    assert config["architectures"] == [type(network).__name__]
    assert not {"_name_or_path", "quantization_config", "_attn_implementation"} & set(config)
    files = list(folder.iterdir())
    assert all(str(tmp_path) not in file.read_text(encoding="latin-1") for file in files)
    assert report.num_bytes == sum(file.stat().st_size for file in files if file.name != "export.json")


@pytest.mark.parametrize("adapter", [LoRA(rank=4), DoRA(rank=4)])
def test_an_adapter_is_merged_and_the_network_goes_on(adapter: LoRA, tmp_path: Path) -> None:
    base = tiny_llama()
    base.config._attn_implementation = "by_document"
    network = shaken(adapter.attach(base)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in network.parameters()]
    report = export(network, tiny_tokenizer(), tmp_path / "export")
    assert report.relative_logit_difference is not None
    assert 0 < report.relative_logit_difference < 1e-5
    assert_loads(tmp_path / "export", network)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert [parameter.requires_grad for parameter in network.parameters()] == trainable
    assert network.training


def test_the_exports_special_tokens_are_the_tokenizers(tmp_path: Path) -> None:
    network = tiny_gpt2()
    network.config.bos_token_id = network.config.eos_token_id = 50256  # what gpt2's configuration says by itself
    network.generation_config = GenerationConfig(
        bos_token_id=50256, eos_token_id=50256, temperature=0.3, do_sample=True
    )
    tokenizer = tiny_tokenizer()
    export(network, tokenizer, tmp_path / "plain")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    export(network, tokenizer, tmp_path / "chat")
    for folder, stops in (("plain", 0), ("chat", [0, 2])):
        config = AutoModelForCausalLM.from_pretrained(tmp_path / folder).config
        generation = GenerationConfig.from_pretrained(tmp_path / folder)
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (None, 1, stops)
        assert (generation.bos_token_id, generation.pad_token_id, generation.eos_token_id) == (None, 1, stops)
        assert (generation.temperature, generation.use_cache) == (0.3, True)
    assert network.config.eos_token_id == 50256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_written_in_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    report = export(tiny_llama(), tiny_tokenizer(), tmp_path / "export", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.max_logit_difference is not None
    assert report.max_logit_difference > 0


def test_a_network_in_four_bits_is_exported_in_bfloat16(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    configuration = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=configuration)
    network = shaken(LoRA(rank=4).attach(keep_differentiable(base)))
    report = export(network, tiny_tokenizer(), tmp_path / "export")
    assert report.dtype == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "export" / "config.json").read_text())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_alone_loads_with_peft_on_its_base(adapter: str, tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    network = shaken(get_peft_model(base, copy.deepcopy(ADAPTERS[adapter])))
    report = export(network, tiny_tokenizer(), tmp_path / "adapter", layout="adapter", base_model="someone/base")
    assert report.max_logit_difference is None
    assert report.num_bytes < 150_000
    configuration = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert configuration.base_model_name_or_path == "someone/base"
    assert configuration.inference_mode is True
    assert network.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert network.peft_config["default"].inference_mode is False
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded, token_rows()), outputs(network, token_rows()), atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    assert all(str(tmp_path) not in file.read_text(encoding="latin-1") for file in (tmp_path / "adapter").iterdir())


def test_our_lora_alone_loads_with_peft(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    network = shaken(LoRA(rank=4).attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    export(network, tiny_tokenizer(), tmp_path / "adapter", layout="adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded, token_rows()), outputs(network, token_rows()), atol=1e-4, rtol=1e-4)


def test_layouts_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with pytest.raises(ValueError, match="was trained without one: export with layout='merged'"):
        export(tiny_llama(), tiny_tokenizer(), folder, layout="adapter")
    with pytest.raises(ValueError, match="made from scratch"):
        export(
            get_peft_model(tiny_llama(), copy.deepcopy(ADAPTERS["lora"])), tiny_tokenizer(), folder, layout="adapter"
        )
    with pytest.raises(ValueError, match="layout='adapter'"):
        export(get_peft_model(tiny_llama(), copy.deepcopy(ADAPTERS["prefix"])), tiny_tokenizer(), folder)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_does_not_take_an_earlier_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, folder = tiny_llama(), tmp_path / "export"
    export(good, tiny_tokenizer(), folder)

    def wrong(*_: object) -> Difference:
        raise ValueError("the export's logits differ")

    monkeypatch.setattr(write, "verify", wrong)
    with pytest.raises(ValueError, match="logits differ"):
        export(tiny_llama(), tiny_tokenizer(), folder)
    assert_loads(folder, good)
    assert list(tmp_path.iterdir()) == [folder]


def test_masked_language_models_are_exported_too(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    network = BertForMaskedLM(config).eval()
    export(network, tiny_tokenizer(), tmp_path / "export")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "export")
    assert torch.equal(outputs(loaded, token_rows()), outputs(network, token_rows()))
    assert not (tmp_path / "export" / "generation_config.json").exists()


def test_the_same_network_gives_the_same_files(tmp_path: Path) -> None:
    network = get_peft_model(tiny_llama(), copy.deepcopy(ADAPTERS["lora"]))
    for name in ("first", "second"):
        export(network, tiny_tokenizer(), tmp_path / name, layout="adapter", base_model="someone/base")
    for file in (tmp_path / "first").iterdir():
        other = (tmp_path / "second" / file.name).read_bytes()
        assert file.read_bytes().replace(b"first", b"second") == other
    targets = json.loads((tmp_path / "first" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


def test_an_adapter_whose_base_was_trained_too_is_not_exported_alone(tmp_path: Path) -> None:
    network = get_peft_model(tiny_llama(), ADAPTERS["lora"])
    network.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight").requires_grad_(True)
    with pytest.raises(ValueError, match="base weights were trained beside the adapter"):
        export(network, tiny_tokenizer(), tmp_path / "export", layout="adapter", base_model="x")
    export(network, tiny_tokenizer(), tmp_path / "export")


SCHEMES = [make_scheme(name) for name in get_args(SchemeName)] + [make_scheme("int4_weight_only", 16)]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.grid.group_size}")
def test_a_torchao_folder_computes_what_was_trained(scheme: Scheme, freeze: bool, tmp_path: Path) -> None:
    network = rounded_llama(scheme, freeze)
    report = export(network, tiny_tokenizer(), tmp_path / "export", layout="torchao")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    for name, layer in effective_layers(network).items():
        stored = loaded.get_submodule(name).weight
        assert stored.element_size() == 4, "float32 to whoever asks"
        assert stored.qdata.dtype == torch.int8
        assert torch.equal(stored.dequantize(), layer.effective_weight())
    ours, theirs = outputs(network, token_rows()), outputs(loaded, token_rows())
    # Torchao scales sums of integers here: rounding differs, and what is rounded again behind it may be another step.
    tolerance = {"int8_dynamic_int8": 5e-2, "int8_weight_only": 1e-5}.get(scheme.name, 0.0)
    assert (ours - theirs).abs().max() <= tolerance * ours.abs().max()
    assert report.layout == "torchao"
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= tolerance * ours.abs().max()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("adapter", [LoRA(rank=2), Full()])
def test_a_torchao_folder_of_bfloat16_has_scales_of_bfloat16(adapter: LoRA | Full, tmp_path: Path) -> None:
    """Which is what moving it to a device would make of others; a merged weight is rounded by such scales."""
    torch.manual_seed(0)
    base = wide_llama()
    for parameter in base.parameters():
        parameter.data = parameter.data.bfloat16()
    network = adapter.attach(base)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    switch_on(network, make_scheme("int8_dynamic_int4"))
    network.eval()
    report = export(network, tiny_tokenizer(), tmp_path / "export", layout="torchao", base_model="x")
    assert (report.dtype, report.max_logit_difference) == ("bfloat16", 0.0)
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(outputs(loaded.to("cpu"), token_rows()), outputs(network, token_rows()))
    for name, layer in effective_layers(network).items():
        stored = loaded.get_parameter(f"{name}.weight")
        assert torch.equal(stored.scale.float(), stored.scale.bfloat16().float())
        assert torch.equal(stored.dequantize(), layer.effective_weight().bfloat16())


def test_a_torchao_folder_can_be_merged_again(tmp_path: Path) -> None:
    network = rounded_llama(make_scheme("int4_weight_only"))
    export(network, tiny_tokenizer(), tmp_path / "few", layout="torchao")
    export(AutoModelForCausalLM.from_pretrained(tmp_path / "few"), tiny_tokenizer(), tmp_path / "many")
    assert_loads(tmp_path / "many", network)
    assert "quantization_config" not in json.loads((tmp_path / "many/config.json").read_text())


def test_a_torchao_folder_needs_one_scheme_of_torchaos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing in this network is quantized: train with QuantizationAwareTraining"):
        export(wide_llama(), tiny_tokenizer(), tmp_path / "export", layout="torchao")
    with pytest.raises(ValueError, match=r"GGUF's numbers"):
        export(
            rounded_llama(make_scheme("int4_weight_only", target="gguf")),
            tiny_tokenizer(),
            tmp_path / "export",
            layout="torchao",
        )
    network = wide_llama()
    switch_on(network, make_scheme("int4_weight_only"), ["mlp"])
    switch_on(network, make_scheme("int8_weight_only"), ["self_attn"])
    with pytest.raises(ValueError, match=r"layers are of int4_weight_only and of int8_weight_only"):
        export(network, tiny_tokenizer(), tmp_path / "export", layout="torchao")
    assert not (tmp_path / "export").exists()
