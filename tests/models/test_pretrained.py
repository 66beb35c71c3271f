from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from bitsandbytes.nn import Linear4bit
from tiny_architectures import tiny_architecture
from tiny_checkpoint import saved
from tiny_networks import tiny_llama, tiny_qwen2, tiny_tokenizer, token_rows
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightllm.models import BuildRequest, Pretrained, QLoRA
from lightllm.models.pretrained import architecture_for

CAUSAL = BuildRequest("causal", None)
SMALL_BERT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def test_weights_are_the_folders_every_time(tmp_path: Path) -> None:
    source = tiny_llama()
    network = Pretrained(saved(tmp_path, source))
    assert network.tokenizer_source == str(tmp_path)
    assert network.restorable
    for _ in range(2):
        built = network.build(CAUSAL)
        assert isinstance(built, LlamaForCausalLM)
        assert all(torch.equal(value, built.state_dict()[name]) for name, value in source.state_dict().items())
        assert all(parameter.requires_grad for parameter in built.parameters())


def test_fields_reach_transformers(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_llama().bfloat16())
    built = Pretrained(source).build(CAUSAL)
    assert isinstance(built, PreTrainedModel)
    assert built.dtype == torch.bfloat16
    assert built.config._attn_implementation == "by_document"
    built = Pretrained(source, dtype="float32", attention="eager").build(CAUSAL)
    assert isinstance(built, PreTrainedModel)
    assert built.dtype == torch.float32
    assert built.config._attn_implementation == "eager"


def test_an_architecture_that_by_document_does_not_serve_keeps_its_own_attention(tmp_path: Path) -> None:
    source = tiny_architecture("gpt_oss", "eager")
    built = Pretrained(saved(tmp_path, source)).build(CAUSAL)
    assert isinstance(built, PreTrainedModel)
    assert built.config._attn_implementation == "eager"
    ids = token_rows(97)
    with torch.no_grad():
        torch.testing.assert_close(built(ids, use_cache=False).logits, source(ids).logits)


@pytest.mark.parametrize("model_class", [BertModel, BertForMaskedLM])
def test_an_encoder_is_refused_by_name(tmp_path: Path, model_class: type[PreTrainedModel]) -> None:
    name = saved(tmp_path, model_class(BertConfig(**SMALL_BERT)))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (compared in full)
        Pretrained(name).build(CAUSAL)
    assert str(caught.value) == (
        f"'{name}' is {model_class.__name__}, which does not predict the next token: this objective needs a causal "
        "language model"
    )
    assert isinstance(Pretrained(name).build(BuildRequest("masked", None)), BertForMaskedLM)
    assert isinstance(Pretrained(name).build(BuildRequest("encoder", None)), BertModel)


def test_a_translator_is_refused_and_a_decoder_is_not(tmp_path: Path) -> None:
    t5 = T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="is T5ForConditionalGeneration, which does not predict the next token"):
        Pretrained(saved(tmp_path / "t5", T5ForConditionalGeneration(t5))).build(CAUSAL)
    bert = saved(tmp_path / "bert", BertLMHeadModel(BertConfig(**SMALL_BERT, is_decoder=True)))
    assert isinstance(Pretrained(bert).build(CAUSAL), BertLMHeadModel)


def test_architectures_by_task() -> None:
    assert architecture_for(tiny_llama().config, "causal") is LlamaForCausalLM
    assert architecture_for(tiny_llama().config, "encoder") is LlamaModel
    assert architecture_for(BertConfig(), "masked") is BertForMaskedLM
    assert architecture_for(tiny_llama().config, "masked") is None


@pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning")
def test_weights_in_four_bits_stay_differentiable(tmp_path: Path) -> None:
    request = BuildRequest("causal", tiny_tokenizer(), QLoRA().quantization)
    built = Pretrained(saved(tmp_path, tiny_qwen2())).build(request)
    layers = [module for module in built.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=rf"cannot load '{tmp_path}': .*no file named model.safetensors"):
        Pretrained(str(tmp_path)).build(CAUSAL)
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ValueError, match=rf"cannot load '{tmp_path}': .*not a valid JSON file"):
        Pretrained(str(tmp_path)).build(CAUSAL)
    with pytest.raises(ValueError, match="cannot load 'no-such/hub-id': "):
        Pretrained("no-such/hub-id").build(CAUSAL)


def test_code_of_a_checkpoint_runs_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    saved(folder)
    marker = tmp_path / "ran"
    (folder / "own_code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(marker)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        Pretrained(str(folder)).build(CAUSAL)
    assert not marker.exists()
    built = Pretrained(str(folder), trust_remote_code=True).build(CAUSAL)
    assert marker.exists()
    assert type(built).__name__ == "OwnForCausalLM"
