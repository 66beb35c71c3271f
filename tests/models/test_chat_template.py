from tiny_networks import tiny_tokenizer

from lightllm.models.chat_template import DEFAULT_CHAT_TEMPLATE, with_chat_template

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Yes, the whale\n"},
]


def test_a_prompt_is_the_beginning_of_its_answered_chat() -> None:
    tokenizer = with_chat_template(tiny_tokenizer())
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "System:\nS\nUser:\nHi\nAssistant:\nYes, the whale<eos>\n"
    prompt = tokenizer.apply_chat_template(MESSAGES[:-1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    whole, beginning = tokenizer(text).input_ids, tokenizer(prompt).input_ids
    assert whole[: len(beginning)] == beginning


def test_what_the_assistant_says_is_marked_with_its_end() -> None:
    tokenizer = with_chat_template(tiny_tokenizer())
    marked = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, ours in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if ours]
    assert tokenizer.decode(said) == "Yes, the whale<eos>"


def test_a_start_token_comes_once_and_a_template_stays() -> None:
    tokenizer = with_chat_template(tiny_tokenizer())
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
    tokenizer.bos_token = "<turn>"
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith("<turn>System:")
    tokenizer.chat_template = "own"
    assert with_chat_template(tokenizer).chat_template == "own"
