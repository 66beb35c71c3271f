from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from own_networks import Transformer
from peft import PeftModel
from tiny_checkpoint import saved
from tiny_networks import tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer, token_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightllm.batch import Document, TextBatch, pad_documents
from lightllm.models import (
    Adapter,
    BuildRequest,
    DoRA,
    Frozen,
    Full,
    LoRA,
    Prefix,
    Pretrained,
    PromptTuning,
    QLoRA,
    RsLoRA,
)
from lightllm.models.anatomy import OwnNetwork, adapter_switched_off, apply_head, decoder, output_head
from lightllm.models.hidden_states import hidden_states
from lightllm.modules.build import checkpoint_gradients

HIDDEN, MIDDLE, LAYERS, KEY_VALUE = 32, 48, 2, 16
LINEAR = LAYERS * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KEY_VALUE) + 3 * (HIDDEN + MIDDLE))
"""Inputs plus outputs of every linear layer of the tiny llama but its head."""
OUTPUTS = LAYERS * (3 * HIDDEN + 2 * KEY_VALUE + 2 * MIDDLE)
WEIGHTS = LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * MIDDLE + 2 * HIDDEN)
VOCABULARY = 320


def num_trainable(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


TRAINABLE: list[tuple[Adapter, int]] = [
    (Full(), WEIGHTS + VOCABULARY * HIDDEN + HIDDEN),
    (LoRA(rank=3), 3 * LINEAR),
    (RsLoRA(rank=3), 3 * LINEAR),
    (DoRA(rank=3), 3 * LINEAR + OUTPUTS),
    (LoRA(rank=5, targets=["q_proj", "v_proj"]), 5 * LAYERS * (2 * HIDDEN + HIDDEN + KEY_VALUE)),
    (LoRA(rank=3, modules_to_save=["norm"]), 3 * LINEAR + (2 * LAYERS + 1) * HIDDEN),
    (Prefix(num_tokens=7), 7 * LAYERS * 2 * KEY_VALUE),
    (
        Prefix(num_tokens=7, projection=True),
        7 * KEY_VALUE + (KEY_VALUE + 1) * KEY_VALUE + (KEY_VALUE + 1) * LAYERS * 2 * KEY_VALUE,
    ),
    (PromptTuning(num_tokens=7), 7 * HIDDEN),
    (Frozen(num_blocks=1), WEIGHTS // 2 + HIDDEN),
    (Frozen(num_blocks=-1), WEIGHTS // 2 + HIDDEN),
    (Frozen(num_blocks=2, embedding=False), VOCABULARY * HIDDEN + HIDDEN),
    (
        Frozen(parameters=["mlp", r"layers\.1\..*_proj"]),
        LAYERS * 2 * HIDDEN + 2 * HIDDEN**2 + 2 * HIDDEN * KEY_VALUE + HIDDEN,
    ),
]


@pytest.mark.parametrize(("adapter", "expected"), TRAINABLE, ids=lambda value: type(value).__name__)
def test_number_of_weights_that_train(adapter: Adapter, expected: int) -> None:
    network = adapter.attach(tiny_llama())
    assert num_trainable(network) == expected
    assert adapter.quantization is None
    assert adapter.supports_packing == (not isinstance(adapter, (Prefix, PromptTuning)))


@pytest.mark.parametrize(("adapter", "scale"), [(LoRA(8, 4.0), 0.5), (RsLoRA(16, 4.0), 1.0), (DoRA(8, 2.0), 0.25)])
def test_scale_of_the_update(adapter: LoRA, scale: float) -> None:
    network = adapter.attach(tiny_llama())
    assert isinstance(network, PeftModel)
    assert {
        value
        for module in network.modules()
        if isinstance(scaling := getattr(module, "scaling", None), dict)
        for value in scaling.values()
    } == {scale}
    configuration = network.peft_config["default"]
    assert configuration.task_type == "CAUSAL_LM"


def test_the_adapter_stays_in_float32() -> None:
    network = LoRA(rank=2).attach(tiny_llama().bfloat16())
    assert {parameter.dtype for parameter in network.parameters() if parameter.requires_grad} == {torch.float32}


@pytest.mark.parametrize("adapter", [LoRA(rank=2), DoRA(rank=2), Prefix(3), PromptTuning(3)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_attaching_says_nothing_and_changes_nothing_yet(adapter: Adapter, make: Any) -> None:
    """Low-rank updates begin at zero."""
    base = make()
    ids = token_rows()
    with torch.no_grad():
        before = decoder(base)(input_ids=ids, use_cache=False).last_hidden_state
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = adapter.attach(base)
        if adapter.supports_packing:
            torch.testing.assert_close(decoder(network)(input_ids=ids, use_cache=False).last_hidden_state, before)


def test_frozen_refuses_what_makes_no_sense() -> None:
    for number in (3, -3):
        with pytest.raises(ValueError, match=f"cannot freeze {number} blocks of a network of 2"):
            Frozen(num_blocks=number).attach(tiny_llama())
    with pytest.raises(ValueError, match=r"no parameter's name matches 'atention', so nothing is frozen by it"):
        Frozen(parameters=["mlp", "atention"]).attach(tiny_llama())
    with pytest.raises(ValueError, match="every parameter is frozen: nothing would train"):
        Frozen(num_blocks=2, parameters=["norm"]).attach(tiny_llama())
    with pytest.raises(ValueError, match="a rank is at least 1, not 0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="nope"):
        LoRA(targets=["nope"]).attach(tiny_llama())


def test_frozen_blocks_are_the_lowest() -> None:
    network = tiny_llama(tied=False)
    Frozen(num_blocks=1).attach(network)
    assert not any(parameter.requires_grad for parameter in network.model.layers[0].parameters())
    assert all(parameter.requires_grad for parameter in network.model.layers[1].parameters())
    assert not network.model.embed_tokens.weight.requires_grad
    assert network.lm_head.weight.requires_grad


def prompts_batch() -> tuple[TextBatch, list[int]]:
    rows = [token_rows(rows=1, length=9)[0], token_rows(rows=2, length=6)[1]]
    return pad_documents([Document(row, [True] * len(row), 0) for row in rows]), [8, 5]


def learned_prompt(adapter: Adapter, base: PreTrainedModel, checkpointing: bool = False) -> PeftModel:
    """As the build pipeline makes it, with a prompt that says something."""
    base.config.use_cache = False
    network = adapter.attach(base)
    assert isinstance(network, PeftModel)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    if checkpointing:
        checkpoint_gradients(network)
    return network


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2])
@pytest.mark.parametrize("adapter", [Prefix(4), Prefix(4, projection=True), PromptTuning(4)])
def test_learned_prompts_are_pefts(adapter: Adapter, make: Any) -> None:
    network = learned_prompt(adapter, make())
    batch, lengths = prompts_batch()
    hidden = hidden_states(network, batch)
    assert hidden.shape == (2, 8, HIDDEN)
    logits = apply_head(hidden, output_head(network))
    with adapter_switched_off(network), torch.no_grad():
        assert float((hidden_states(network, batch) - hidden).abs().max()) > 0.1
    network.get_base_model().config.use_cache = True
    direction = torch.randn(VOCABULARY)
    total, expected_total = logits.new_zeros(()), logits.new_zeros(())
    for row, length in enumerate(lengths):
        ids = batch["input_ids"][row : row + 1, :length]
        expected = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -length:]
        torch.testing.assert_close(logits[row : row + 1, :length], expected, rtol=1e-4, atol=1e-4)
        total = total + (logits[row, :length] @ direction).tanh().sum()
        expected_total = expected_total + (expected[0] @ direction).tanh().sum()
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(total, weights, retain_graph=True)
    for one, other in zip(gradients, torch.autograd.grad(expected_total, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_a_prompt_of_embeddings_is_what_is_put_before_the_row() -> None:
    base = tiny_gpt2()
    network = learned_prompt(PromptTuning(4), base)
    batch, _ = prompts_batch()
    with torch.no_grad():
        prompt = network.prompt_encoder["default"].embedding.weight
        embedded = torch.cat([prompt.expand(2, -1, -1), base.transformer.wte(batch["input_ids"])], 1)
        expected = base.transformer(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, 4:]
        torch.testing.assert_close(hidden_states(network, batch), expected)


def test_a_prompt_trains_with_gradient_checkpointing() -> None:
    network = learned_prompt(PromptTuning(4), tiny_llama())
    other = copy.deepcopy(network)
    checkpoint_gradients(other)
    batch, _ = prompts_batch()
    ours, expected = hidden_states(other.train(), batch), hidden_states(network.train(), batch)
    torch.testing.assert_close(ours, expected)
    gradients = []
    for hidden, peft_model in ((ours, other), (expected, network)):
        hidden.square().sum().backward()
        gradients.append([parameter.grad for parameter in peft_model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not Prefix.supports_gradient_checkpointing
    assert PromptTuning.supports_gradient_checkpointing


@pytest.mark.parametrize("adapter", [Prefix(2), PromptTuning(2)])
def test_own_networks_take_no_prompt(adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="this needs a transformers network, and OwnNetwork is not one"):
        adapter.attach(OwnNetwork(Transformer(11), "lm_head"))


def test_own_networks_take_low_rank_updates_where_they_have_an_effect() -> None:
    base = OwnNetwork(Transformer(11), "lm_head")
    network = LoRA(rank=2).attach(base)
    trained = {name.split(".lora_")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {f"base_model.model.module.layers.0.{name}" for name in ("linear1", "linear2")}
    assert output_head(network).weight is base.module.lm_head.weight
    batch: Any = {"input_ids": torch.arange(5)[None], "position_ids": torch.arange(5)[None]}
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(network.eval(), batch), hidden_states(network.train(), batch))
    hidden_states(network, batch).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


def loss_of(network: nn.Module, ids: Tensor) -> Tensor:
    return network(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning")
@pytest.mark.parametrize("double", [True, False])
def test_weights_in_four_bits_train_an_adapter_on_a_processor(tmp_path: Path, double: bool) -> None:
    source = saved(tmp_path / "network", tiny_qwen2())
    adapter = QLoRA(rank=4, compute_dtype="float32", double_quantization=double)
    assert adapter.quantization.bnb_4bit_quant_type == "nf4"
    base = Pretrained(source).build(BuildRequest("causal", tiny_tokenizer(), adapter.quantization))
    packed = {name for name, parameter in base.named_parameters() if parameter.dtype == torch.uint8}
    assert len(packed) == 14
    assert not any("lm_head" in name or "embed" in name for name in packed)
    network = adapter.attach(base).train()
    frozen = {name: parameter.clone() for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert num_trainable(network) == 4 * LINEAR
    ids = token_rows()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = loss_of(network, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    state = dict(network.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in frozen.items())
    with torch.no_grad():  # four bits hold the weights roughly
        full = Pretrained(source).build(BuildRequest("causal", None))
        with adapter_switched_off(network):
            assert float(loss_of(network, ids)) == pytest.approx(float(loss_of(full, ids)), rel=0.1)


def test_an_adapter_is_one_of_pefts(tmp_path: Path) -> None:
    network = RsLoRA(rank=3, alpha=6.0, targets=["q_proj"]).attach(tiny_llama())
    assert isinstance(network, PeftModel)
    nn.init.normal_(network.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    network.save_pretrained(tmp_path)
    torch.manual_seed(0)  # of the test: the same weights
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    ids = token_rows()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids, use_cache=False).logits, network(input_ids=ids, use_cache=False).logits
        )
