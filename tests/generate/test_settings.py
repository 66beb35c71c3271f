from tiny_networks import tiny_llama, tiny_tokenizer

from lightllm.generate import Decoding
from lightllm.generate.settings import generation_settings


def test_greedy_and_sampled_settings_leave_nothing_to_the_model() -> None:
    network, tokenizer = tiny_llama(), tiny_tokenizer()
    greedy = generation_settings(network, tokenizer, Decoding(max_new_tokens=5))
    assert (greedy.do_sample, greedy.use_cache, greedy.max_new_tokens) == (False, True, 5)
    assert (greedy.eos_token_id, greedy.pad_token_id) == ([tokenizer.eos_token_id], tokenizer.pad_token_id)
    sampled = generation_settings(network, tokenizer, Decoding(temperature=0.7, top_p=0.9, top_k=7))
    assert (sampled.do_sample, sampled.temperature, sampled.top_p, sampled.top_k) == (True, 0.7, 0.9, 7)


def test_without_a_padding_token_the_stop_token_pads() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert generation_settings(tiny_llama(), tokenizer, Decoding()).pad_token_id == tokenizer.eos_token_id
