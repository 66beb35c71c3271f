"""Text from a network: a batch of prompts, a stream, a chat in the terminal.

Heavy packages are imported within the functions that use them, so that a command can show its help without them.
"""

from lightllm.generate.batches import generate, generate_ids
from lightllm.generate.chat import converse
from lightllm.generate.decoding import GREEDY, Decoding
from lightllm.generate.prompt import Message, Prompt, chat_prompt
from lightllm.generate.streaming import stream

__all__ = ["GREEDY", "Decoding", "Message", "Prompt", "chat_prompt", "converse", "generate", "generate_ids", "stream"]
