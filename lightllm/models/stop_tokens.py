"""Which tokens end a network's answer."""

from __future__ import annotations

from jinja2 import TemplateError
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lightllm.models.anatomy import unwrapped


def stop_token_ids(network: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which generation is over, ascending.

    They are the tokenizer's end token, the one that ends an assistant's turn in its chat template, and those that the
    network's generation configuration names, as far as the tokenizer has them as special tokens: a configuration from
    scratch names its architecture's usual ids, which may be ordinary words of another vocabulary.

    Args:
        network: A transformers model or a peft model around one.
        tokenizer: The network's.
    """
    stops = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None}
    configuration = getattr(unwrapped(network), "generation_config", None)
    if isinstance(configuration, GenerationConfig) and configuration.eos_token_id is not None:
        named = configuration.eos_token_id
        stops |= set(named if isinstance(named, list) else [named]) & _special_ids(tokenizer)
    return sorted(token for token in stops if token is not None)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an assistant's turn; None without template or token."""
    if tokenizer.chat_template is None:
        return None
    answer = "lightllm-answer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except TemplateError:  # a template for chats of another kind, which this one cannot ask
        return None
    assert isinstance(text, str)
    _, found, rest = text.rpartition(answer)
    following = tokenizer(rest, add_special_tokens=False).input_ids if found else []
    return following[0] if following and following[0] in _special_ids(tokenizer) else None


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
