from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_architectures import small_fields, tiny_architecture
from tiny_networks import tiny_tokenizer
from transformers import BertForMaskedLM, BertModel, GPT2LMHeadModel, PreTrainedModel

from lightllm.models import BuildRequest, FromConfig, QLoRA
from lightllm.models.from_config import NAMED_SIZES
from lightllm.models.network import Task


def num_weights(architecture: str, task: Task = "causal", **fields: Any) -> int:
    with torch.device("meta"):
        network = FromConfig(architecture, fields).build(BuildRequest(task, None))
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "millions"), [("llama-1m", 1), ("llama-10m", 10), ("llama-30m", 30), ("llama-124m", 124)]
)
def test_named_llamas_have_the_weights_of_their_name(name: str, millions: int) -> None:
    fields = NAMED_SIZES[name]
    width, middle = fields["hidden_size"], fields["intermediate_size"]
    blocks = fields["num_hidden_layers"] * (4 * width**2 + 3 * width * middle + 2 * width) + width
    assert num_weights(name, vocab_size=1000) == blocks + 1000 * width  # the head is the embedding
    assert blocks == pytest.approx(millions * 1e6, rel=0.06)
    assert width % fields["num_attention_heads"] == 0


def test_known_networks_have_their_known_size() -> None:
    assert num_weights("gpt2", vocab_size=50257) == 124_439_808
    assert num_weights("bert", "encoder", vocab_size=30522) == 109_482_240


def test_vocabulary_and_special_tokens_are_the_tokenizers() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<turn>"})
    network = FromConfig("llama-1m")
    assert network.tokenizer_source is None
    assert not network.restorable
    built = network.build(BuildRequest("causal", tokenizer))
    assert isinstance(built, PreTrainedModel)
    assert built.get_input_embeddings().weight.shape == (len(tokenizer), 128)
    config = built.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 0, 1)
    assert (built.dtype, config._attn_implementation) == (torch.float32, "by_document")
    plain = network.configuration(tiny_tokenizer())
    assert plain.bos_token_id is None  # not the architecture's, which would be another token here


def test_fields_are_over_those_of_a_named_size_and_of_the_tokenizer() -> None:
    fields = {"num_hidden_layers": 1, "vocab_size": 384, "rope_theta": 5e5, "tie_word_embeddings": False}
    network = FromConfig("llama-1m", fields, dtype="bfloat16", attention="eager")
    built = network.build(BuildRequest("causal", tiny_tokenizer()))
    assert isinstance(built, PreTrainedModel)
    assert built.get_input_embeddings().weight.shape == (384, 128)
    assert len(built.base_model.layers) == 1
    assert built.dtype == torch.bfloat16
    assert built.config._attn_implementation == "eager"
    assert built.config.rope_parameters["rope_theta"] == 5e5
    assert built.get_output_embeddings().weight is not built.get_input_embeddings().weight


def test_named_sizes_are_not_changed_by_use() -> None:
    before = {name: dict(fields) for name, fields in NAMED_SIZES.items()}
    FromConfig("llama-1m", {"num_hidden_layers": 1}).configuration(tiny_tokenizer())
    assert before == NAMED_SIZES


def test_tasks_end_in_their_heads() -> None:
    fields = small_fields("bert")
    assert isinstance(FromConfig("bert", fields).build(BuildRequest("masked", None)), BertForMaskedLM)
    assert isinstance(FromConfig("bert", fields).build(BuildRequest("encoder", None)), BertModel)
    assert isinstance(tiny_architecture("gpt2"), GPT2LMHeadModel)


def test_mistakes_name_the_nearest_spelling() -> None:
    for architecture, fields, message in [
        ("lama", {}, r"no architecture 'lama': give a named size \(llama-1m, .*did you mean 'llama'\?\)"),
        ("llama-124M", {}, r"did you mean 'llama-124m'\?"),
        ("qwen-3", {}, r"did you mean 'qwen3'\?"),
        ("zzzzzzz", {}, r"no architecture 'zzzzzzz': give a named size \(.*\) or a transformers model type$"),
        ("llama", {"num_layers": 2}, r"'llama' has no field 'num_layers' \(did you mean 'num_hidden_layers'\?\)"),
        ("llama-1m", {"hiden_size": 2}, r"'llama-1m' has no field 'hiden_size' \(did you mean 'hidden_size'\?\)"),
        ("gpt2", {"zzzzzzz": 2}, r"'gpt2' has no field 'zzzzzzz'$"),
        ("llama", {"num_hidden_layers": "two"}, r"(?s)the fields of 'llama' make no network: .*expected int, got str"),
        ("llama", {"hidden_size": 30, "num_attention_heads": 4}, r"(?s)make no network: .*not a multiple of the num"),
    ]:
        with pytest.raises(ValueError, match=message):
            FromConfig(architecture, fields)


@pytest.mark.parametrize("fields", [{"n_layer": 1}, {"num_hidden_layers": 1}])
def test_a_field_may_be_called_by_its_common_name(fields: dict[str, int]) -> None:
    assert FromConfig("gpt2", fields).configuration(tiny_tokenizer()).num_hidden_layers == 1


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match=r"'llama-1m' takes its vocabulary from the data's tokenizer, and there is no"):
        FromConfig("llama-1m").build(BuildRequest("causal", None))


def test_random_weights_are_not_quantized() -> None:
    with pytest.raises(ValueError, match="a network from scratch has nothing to quantize yet: take QLoRA with Pretr"):
        FromConfig("llama-1m").build(BuildRequest("causal", tiny_tokenizer(), QLoRA().quantization))
