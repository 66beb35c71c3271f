"""The chat template of a tokenizer that has none.

Both sides of a chat model read it: the data that trains it and the prompt that asks it. It lives apart from both, so
that they can't disagree, and needs no special token but the end of sequence, so that it fits any vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = (
    "{%- if bos_token %}{{ bos_token }}{% endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ 'Assistant:\\n' }}"
    "{%- generation -%}{{ message['content'] | trim }}{{ eos_token }}{%- endgeneration -%}"
    "{{ '\\n' }}"
    "{%- else -%}"
    "{{ message['role'] | capitalize }}:{{ '\\n' }}{{ message['content'] | trim }}{{ '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:\\n' }}{%- endif -%}"
)
"""`Role:`, a line break, the text; an assistant's turn ends with the end-of-sequence token.

The line break before an answer keeps tokenization prefix-stable: `Assistant: ` would leave a lone space at the end of
a prompt, where training saw the space as part of the answer's first token. `{% generation %}` marks what the assistant
says for `apply_chat_template(return_assistant_tokens_mask=True)`.
"""


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give `tokenizer` the default chat template, in place, if it has none.

    Args:
        tokenizer: any transformers tokenizer.

    Returns:
        The same tokenizer, so that what saves it saves the template that it was used with.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer
