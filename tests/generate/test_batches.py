import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_networks import POSITIONS, tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from lightllm.generate import Decoding, generate, generate_ids
from lightllm.models.adapters import LoRA
from lightllm.models.document_attention import BY_DOCUMENT

PROMPTS = ["Call me", "The whale, like all things that are mighty", "x", "wears a false", "return x", "all that"]


def networks() -> dict[str, PreTrainedModel]:
    return {"llama": tiny_llama(), "gpt2": tiny_gpt2()}


def adapters(name: str) -> dict[str, PeftConfig | None]:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    return {"full": None, "lora": lora, "prefix": prefix, "prompt": prompt}


def in_training(name: str, adapter: str) -> nn.Module:
    """A network as an objective leaves it: training, without a cache, a part of it in evaluation mode."""
    network: nn.Module = networks()[name]
    network.config.use_cache = False
    configuration = adapters(name)[adapter]
    if configuration is not None:
        network = get_peft_model(network, configuration)
        for parameter in network.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.5)
    network.train()
    next(network.children()).eval()
    return network


def greedy_by_hand(network: nn.Module, text: str, count: int) -> str:
    """One prompt, no cache, no padding: the likeliest token of the whole row, again and again."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text).input_ids
    modes = [module.training for module in network.modules()]
    network.eval()
    for _ in range(count):
        row = torch.tensor([ids])
        with torch.no_grad():
            token = int(network(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    for module, mode in zip(network.modules(), modes, strict=True):
        module.training = mode
    return tokenizer.decode(ids, skip_special_tokens=True)[len(text) :]


@pytest.mark.parametrize("adapter", ["full", "lora", "prefix", "prompt"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_batch_is_what_each_prompt_gives_alone_without_a_cache(name: str, adapter: str) -> None:
    network = in_training(name, adapter)
    answers = generate(network, tiny_tokenizer(), PROMPTS, Decoding(max_new_tokens=14), batch_size=3)
    assert answers == [greedy_by_hand(network, prompt, 14) for prompt in PROMPTS]
    assert len(set(answers)) > 2


def test_attention_by_document_generates_the_same() -> None:
    network = in_training("llama", "full")
    expected = generate(network, tiny_tokenizer(), PROMPTS, Decoding(max_new_tokens=14))
    network.set_attn_implementation(BY_DOCUMENT)
    assert generate(network, tiny_tokenizer(), PROMPTS, Decoding(max_new_tokens=14)) == expected


def test_our_lora_generates_what_its_merged_weights_do() -> None:
    network = LoRA(rank=4).attach(tiny_llama())
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    answers = generate(network.train(), tiny_tokenizer(), PROMPTS, Decoding(max_new_tokens=14))
    assert answers == generate(network.merge_and_unload(), tiny_tokenizer(), PROMPTS, Decoding(max_new_tokens=14))


def test_the_network_and_the_random_numbers_are_left_as_they_were() -> None:
    network = in_training("llama", "prefix")
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    sampled = Decoding(max_new_tokens=8, temperature=1.5, seed=3)
    first = generate(network, tiny_tokenizer(), PROMPTS, sampled)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in network.modules()] == modes
    assert set(modes) == {True, False}
    assert network.config.use_cache is False
    assert all(parameter.grad is None for parameter in network.parameters())
    assert generate(network, tiny_tokenizer(), PROMPTS, sampled) == first
    assert generate(network, tiny_tokenizer(), PROMPTS, Decoding(max_new_tokens=8, temperature=1.5, seed=4)) != first


def test_sampling_obeys_its_settings() -> None:
    network, tokenizer = tiny_llama(), tiny_tokenizer()
    plain = tiny_llama()
    plain.load_state_dict(network.state_dict())
    network.generation_config.do_sample = True  # the model's own defaults don't count
    network.generation_config.top_k = 1
    greedy = generate(network, tokenizer, PROMPTS, Decoding(max_new_tokens=8))
    for narrow in [{"top_k": 1}, {"top_p": 1e-6}]:
        settings = Decoding(max_new_tokens=8, temperature=2.0, **narrow)
        assert generate(network, tokenizer, PROMPTS, settings) == greedy
    assert generate(network, tokenizer, PROMPTS, Decoding(max_new_tokens=8, temperature=2.0)) != greedy
    row = torch.tensor([tokenizer(PROMPTS[1]).input_ids])
    expected = plain.generate(row, repetition_penalty=3.0, max_new_tokens=20, pad_token_id=1)
    penalized = generate(network, tokenizer, PROMPTS, Decoding(max_new_tokens=20, repetition_penalty=3.0))
    assert penalized[1] == tokenizer.decode(expected[0, row.shape[1] :], skip_special_tokens=True)


def test_token_ids_end_with_the_stop_token_and_are_the_text() -> None:
    network, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = [[5, 6, 7], [40], list(range(30, 38))]
    (greedy, *_), *_ = generate_ids(network, tokenizer, prompts[1:2], Decoding(max_new_tokens=8))
    network.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(greedy)
    answers = generate_ids(network, tokenizer, prompts, Decoding(max_new_tokens=8), batch_size=2)
    assert answers[1] == [greedy]
    assert all(greedy not in answer[:-1] and len(answer) <= 8 for answer in answers)
    texts = generate(network, tokenizer, prompts, Decoding(max_new_tokens=8))
    ended = [answer[:-1] if answer[-1] == greedy else answer for answer in answers]
    for prompt, answer, text in zip(prompts, ended, texts, strict=True):
        assert tokenizer.decode([*prompt, *answer], skip_special_tokens=True).endswith(text)


def test_generation_ends_at_the_stop_token() -> None:
    network, tokenizer = tiny_llama(), tiny_tokenizer()
    with torch.no_grad():
        network.model.embed_tokens.weight[tokenizer.eos_token_id] = 40 * network.model.norm.weight
    network.lm_head.weight = network.model.embed_tokens.weight
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    generate(network, tokenizer, ["Call me"], Decoding(max_new_tokens=50))
    assert len(calls) < 50


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_end_each_answer_for_itself(name: str) -> None:
    network, tokenizer = networks()[name], tiny_tokenizer()
    long, short = "x" * (POSITIONS - 3), "x"
    settings = Decoding(max_new_tokens=20)
    both = generate(network, tokenizer, [[5] * (POSITIONS - 3), short], settings)
    assert both == [generate(network, tokenizer, [prompt], settings)[0] for prompt in ([5] * (POSITIONS - 3), short)]
    with pytest.raises(ValueError, match=f"a prompt of {POSITIONS} tokens leaves no room"):
        generate(network, tokenizer, [long, [5] * POSITIONS], settings)


def test_networks_that_make_no_text_are_refused() -> None:
    bert = BertModel(BertConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="BertModel makes no text"):
        generate(bert, tiny_tokenizer(), ["x"])
    with pytest.raises(ValueError, match="needs a transformers network"):
        generate(nn.Linear(1, 1), tiny_tokenizer(), ["x"])


def test_one_text_is_not_a_list_of_prompts() -> None:
    with pytest.raises(ValueError, match=r"give \[prompt\]"):
        generate(tiny_llama(), tiny_tokenizer(), "Call me")


def test_no_prompts_no_answers() -> None:
    assert generate(tiny_llama(), tiny_tokenizer(), []) == []
