import pytest
from tiny_networks import tiny_llama, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from lightllm.models.chat_template import DEFAULT_CHAT_TEMPLATE
from lightllm.models.stop_tokens import end_of_turn_id, stop_token_ids

CHATML = "{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] }}END\n{% endfor %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def test_the_end_token_and_the_templates_end_of_turn_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    network = tiny_llama()
    network.generation_config.eos_token_id = None
    assert stop_token_ids(network, tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = CHATML.replace("END", "<turn>")
    assert end_of_turn_id(tokenizer) == 2
    assert stop_token_ids(network, tokenizer) == [0, 2]


def test_an_end_of_turn_that_is_ordinary_text_does_not_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    assert end_of_turn_id(tokenizer) is None
    tokenizer.chat_template = CHATML.replace("END", " the end")
    assert end_of_turn_id(tokenizer) is None
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


def test_a_template_for_other_chats_names_no_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('a system turn is needed') }}"
    assert end_of_turn_id(tokenizer) is None


def test_only_special_tokens_of_the_generation_configuration_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    network = tiny_llama()
    network.generation_config.eos_token_id = [2, 50]
    assert stop_token_ids(network, tokenizer) == [0, 2]
    network.generation_config.eos_token_id = 51
    assert stop_token_ids(network, tokenizer) == [0]
