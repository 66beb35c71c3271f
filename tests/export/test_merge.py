import copy
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_networks import tiny_gpt2, tiny_llama, tiny_qwen2, token_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lightllm.export.compare import outputs
from lightllm.export.merge import merged_network, merged_weights, prevailing_dtype
from lightllm.models.adapters import DoRA, LoRA, RsLoRA
from lightllm.models.low_bit import dequantized_weight, keep_differentiable

NETWORKS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2}


def lora(**fields: object) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, **fields})  # type: ignore[arg-type]


def adapted(network: PreTrainedModel, configuration: PeftConfig) -> nn.Module:
    """A peft model whose trained parameters are not what they began as."""
    return shaken(get_peft_model(network, configuration))


def shaken(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return network.eval()


def run(network: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    """Logits of a plain network of the same architecture with these weights."""
    plain = copy.deepcopy(network)
    plain.load_state_dict(weights)
    return outputs(plain, token_rows())


def biased_llama() -> PreTrainedModel:
    config = tiny_llama().config
    config.attention_bias = True
    return type(tiny_llama())(config).eval()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the rounding of float32 in sums of another order."""
    assert (ours - theirs).abs().max() <= 5e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_merging_equals_pefts_own_on_a_copy(name: str, fields: dict[str, object]) -> None:
    if "lora_bias" in fields:  # which needs layers that have one
        fields = {**fields, "target_modules": {"llama": ["q_proj"], "gpt2": ["c_attn"], "qwen2": ["q_proj"]}[name]}
    plain = biased_llama() if name == "llama" and "lora_bias" in fields else NETWORKS[name]()
    network = adapted(copy.deepcopy(plain), lora(fan_in_fan_out=name == "gpt2", **fields))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    merged = merged_network(network)
    expected = copy.deepcopy(network).merge_and_unload().state_dict()
    weights = merged.state_dict()
    assert set(weights) == set(expected) == set(plain.state_dict())
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, atol=1e-6, rtol=1e-6)
    assert_same(run(plain, weights), outputs(network, token_rows()))
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("adapter", [LoRA(rank=4), RsLoRA(rank=4), DoRA(rank=4)])
def test_our_adapters_merge(adapter: LoRA) -> None:
    plain = tiny_llama()
    network = shaken(adapter.attach(copy.deepcopy(plain)))
    logits = outputs(network, token_rows())
    assert not torch.allclose(logits, outputs(plain, token_rows()), atol=0.1)
    assert_same(run(plain, merged_network(network).state_dict()), logits)


def test_what_needs_no_merging_is_shared_and_not_copied() -> None:
    network = adapted(tiny_llama(), lora(target_modules=["q_proj"]))
    base = network.get_base_model()
    merged = merged_network(network)
    assert merged.model.embed_tokens.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    full = tiny_llama()
    weights = dict(merged_weights(full))
    assert not any(tensor.requires_grad for tensor in weights.values())
    assert {key: tensor.data_ptr() for key, tensor in weights.items()} == {
        key: tensor.data_ptr() for key, tensor in full.state_dict().items()
    }


@pytest.mark.parametrize("fields", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapted_half_of_tied_weights_is_untied(fields: dict[str, object]) -> None:
    network = adapted(tiny_llama(), lora(**fields))
    merged = merged_network(network)
    assert merged.config.tie_word_embeddings is False
    assert network.get_base_model().config.tie_word_embeddings is True
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    logits = run(tiny_llama(tied=False), merged.state_dict())
    assert_same(logits, outputs(network, token_rows()))


def test_half_precision_is_rounded_once() -> None:
    network = adapted(tiny_llama().bfloat16(), lora())
    layer = network.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    merged = merged_network(network).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, exact.bfloat16())
    wide = merged_network(network, torch.float32).model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(wide, exact, atol=1e-7, rtol=1e-6)


def test_active_adapters_are_merged_and_no_others() -> None:
    plain = tiny_llama()
    network = get_peft_model(copy.deepcopy(plain), lora())
    network.add_adapter("second", lora())
    network = shaken(network)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    shaken_all = shaken(network)
    plain.load_state_dict(dict(merged_weights(_disabled(shaken_all))))
    for names in (["default"], ["second"], ["default", "second"]):
        network.base_model.set_adapter(names)
        logits = run(plain, merged_network(network).state_dict())
        assert_same(logits, outputs(network, token_rows()))


def _disabled(network: nn.Module) -> nn.Module:
    copied = copy.deepcopy(network)
    copied.base_model.disable_adapter_layers()
    return copied


def test_other_peft_methods_that_merge_are_merged() -> None:
    configuration = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    plain = tiny_llama()
    network = adapted(copy.deepcopy(plain), configuration)
    logits = outputs(network, token_rows())
    assert_same(run(plain, merged_network(network).state_dict()), logits)


@pytest.mark.parametrize("configuration", [PrefixTuningConfig, PromptTuningConfig])
def test_learned_prompts_are_refused(configuration: type[PeftConfig]) -> None:
    network = get_peft_model(tiny_llama(), configuration(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"PR\w+_TUNING changes no weight.*layout='adapter'"):
        merged_network(network)


def test_a_users_own_module_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a transformers network"):
        merged_network(nn.Linear(2, 2))


@pytest.fixture
def four_bit(tmp_path: Path) -> PreTrainedModel:
    return _quantized(tmp_path, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def _quantized(folder: Path, configuration: BitsAndBytesConfig) -> PreTrainedModel:
    tiny_llama().save_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, quantization_config=configuration)
    return keep_differentiable(network)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}])
def test_an_adapter_over_four_bits_is_merged_at_full_width(
    four_bit: PreTrainedModel, fields: dict[str, object]
) -> None:
    network = adapted(four_bit, lora(**fields))
    layer = network.get_base_model().model.layers[1].mlp.up_proj
    plain = dequantized_weight(layer.get_base_layer())
    delta = layer.get_delta_weight("default")
    expected = plain + delta
    if fields:
        expected *= (layer.lora_magnitude_vector["default"].weight / expected.norm(dim=1))[:, None]
    assert prevailing_dtype(network) == torch.bfloat16
    merged = merged_network(network, torch.float32)
    assert "quantization_config" not in merged.config.to_dict()
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, expected, atol=1e-6, rtol=1e-6)
    logits = run(tiny_llama(), merged.state_dict())
    torch.testing.assert_close(logits, outputs(network, token_rows()), atol=1e-3, rtol=1e-3)


def test_four_bits_without_an_adapter_are_read_back(four_bit: PreTrainedModel) -> None:
    logits = run(tiny_llama(), merged_network(four_bit, torch.float32).state_dict())
    torch.testing.assert_close(logits, outputs(four_bit, token_rows()), atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_eight_bits_are_merged_too(tmp_path: Path) -> None:
    network = adapted(_quantized(tmp_path, BitsAndBytesConfig(load_in_8bit=True)), lora())
    logits, ours = (
        outputs(network, token_rows()),
        run(tiny_llama(), merged_network(network, torch.float32).state_dict()),
    )
    # Its products round the activations to eight bits, so that they only look alike.
    assert (logits - ours).norm() < 0.1 * logits.norm()
