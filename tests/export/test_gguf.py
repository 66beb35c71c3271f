import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_networks import TEXT, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer, token_rows
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightllm.export import GGUF_TYPES, GGUFType, gguf, write_gguf
from lightllm.export.compare import outputs
from lightllm.generate import Decoding, generate
from lightllm.models.chat_template import with_chat_template
from lightllm.models.load import load_tokenizer, resolve_checkpoint

if importlib.util.find_spec("gguf") is None:
    pytest.skip("needs the package gguf", allow_module_level=True)

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64)).eval()


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=128, rope_theta=5e5, rms_norm_eps=1e-5)).eval()


NETWORKS = {"llama": tiny_llama, "untied": lambda: tiny_llama(tied=False), "mistral": mistral}
NETWORKS |= {"qwen2": tiny_qwen2, "qwen3": qwen3}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_in_full_precision_is_read_back_as_the_network(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    report = write_gguf(network, tiny_tokenizer(), tmp_path / "net.gguf", "F32")
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-4
    assert report.num_bytes == (tmp_path / "net.gguf").stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="net.gguf", dtype=torch.float32)
    torch.testing.assert_close(outputs(loaded, token_rows()), outputs(network, token_rows()), atol=1e-4, rtol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["net.gguf"]


def test_a_network_in_bfloat16_is_compared_in_bfloat16(tmp_path: Path) -> None:
    """Its own weights in float32 give other logits, which say nothing of the file."""
    network = tiny_llama().bfloat16()
    rows = token_rows(320, rows=2, length=8)
    assert not torch.equal(outputs(network, rows), outputs(copy.deepcopy(network).float(), rows))
    report = write_gguf(network, tiny_tokenizer(), tmp_path / "network.gguf", "BF16")
    assert report.max_logit_difference == 0


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"
    write_gguf(tiny_llama(vocab=330), tokenizer, tmp_path / "net.gguf", "F16")
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file="net.gguf")
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    chat = [{"role": "user", "content": "Who?"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    fields = GGUFReader(tmp_path / "net.gguf").fields
    values = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "add_bos_token", "eot_token_id")}
    assert values == {"pre": "gpt-2", "add_bos_token": False, "eot_token_id": 2}
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 330


@pytest.mark.parametrize("dtype", GGUF_TYPES)
def test_each_type_has_its_size(dtype: GGUFType, tmp_path: Path) -> None:
    network = mistral()
    report = write_gguf(network, tiny_tokenizer(), tmp_path / "net.gguf", dtype, embedding_dtype="F16")
    bits = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5}[dtype]
    inside = sum(p.numel() for name, p in network.named_parameters() if p.dim() == 2 and "layers" in name)
    ends = 2 * 320 * 64 * 16
    norms = sum(p.numel() for p in network.parameters() if p.dim() == 1) * 32
    header = report.num_bytes - (inside * bits + ends + norms) / 8
    assert 0 < header < 16_000
    assert report.relative_logit_difference is not None
    assert report.relative_logit_difference < {"F32": 0.02, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.15}.get(dtype, 2.0)


def test_a_file_of_four_bits_keeps_its_embedding_in_eight(tmp_path: Path) -> None:
    from gguf import GGUFReader

    write_gguf(tiny_qwen2(), tiny_tokenizer(), tmp_path / "net.gguf", "Q4_1")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "net.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_1"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 48 are no whole blocks of 32
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"


def test_a_template_gets_no_start_token_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokenizer = with_chat_template(tiny_tokenizer())
    for bos, start in ((None, ""), ("<turn>", "<turn>")):
        tokenizer.bos_token = bos
        write_gguf(tiny_llama(), tokenizer, tmp_path / "net.gguf")
        template = GGUFReader(tmp_path / "net.gguf").fields["tokenizer.chat_template"].contents()
        chat = [{"role": "user", "content": "Who?"}]
        other = tiny_tokenizer()
        other.bos_token = "<turn>"  # what a program that reads the file takes for one
        rendered = other.apply_chat_template(chat, tokenize=False, chat_template=template)
        assert rendered == f"{start}User:\nWho?\n"


def test_an_adapter_is_merged_into_the_file(tmp_path: Path) -> None:
    network = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    write_gguf(network, tiny_tokenizer(), tmp_path / "net.gguf", "F32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="net.gguf", dtype=torch.float32)
    torch.testing.assert_close(outputs(loaded, token_rows()), outputs(network, token_rows()), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "net.gguf", tiny_tokenizer()
    with pytest.raises(ValueError, match=r"a gpt2 network .* known are llama, mistral, qwen2, qwen3"):
        write_gguf(tiny_gpt2(), tokenizer, path)
    for field, value in {"hidden_act": "gelu", "mlp_bias": True, "attention_bias": True}.items():
        network = tiny_llama()
        setattr(network.config, field, value)
        with pytest.raises(ValueError, match=f"{field}={value!r}"):
            write_gguf(network, tokenizer, path)
    network = tiny_llama()
    network.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type='linear'"):
        write_gguf(network, tokenizer, path)
    with pytest.raises(ValueError, match="head_dim=24 cannot be written as GGUF, only with 128"):
        write_gguf(Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=24)), tokenizer, path)
    network = tiny_llama()
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="beyond those of F16"):
        write_gguf(network, tokenizer, path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_read_back_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "interleaved", lambda array, _: array)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight is not the network's"):
        write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "net.gguf")
    monkeypatch.undo()
    other = tiny_llama().config
    other.rope_parameters = {"rope_type": "default", "rope_theta": 123.0}
    describe = gguf._describe
    monkeypatch.setattr(gguf, "_describe", lambda writer, _, *rest: describe(writer, other, *rest))
    with pytest.raises(ValueError, match="another rope_theta than 10000"):
        write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "net.gguf")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="needs the package gguf: pip install"):
        write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "net.gguf")


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_llama_cpp_gives_the_same_answer(tmp_path: Path) -> None:
    from llama_cpp import Llama

    name = "smollm2-135m-instruct"
    network = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(name), dtype=torch.float32)
    tokenizer = load_tokenizer(name)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    expected = generate(network, tokenizer, [copy.deepcopy(chat)], Decoding(max_new_tokens=24))[0]
    write_gguf(network, tokenizer, tmp_path / "net.gguf", "F32")
    llama = Llama(str(tmp_path / "net.gguf"), n_ctx=256, verbose=False)
    answer = llama.create_chat_completion(messages=chat, temperature=0.0, max_tokens=24)
    assert answer["choices"][0]["message"]["content"] == expected
