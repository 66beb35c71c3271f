"""What is fed: text in, batches out."""

from lightllm.datamodules.base import Batches, DocumentData, Reading
from lightllm.datamodules.chat import ChatData
from lightllm.datamodules.preference import PreferenceData
from lightllm.datamodules.pydoc import PydocData
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.text import TextData
from lightllm.datamodules.train_tokenizer import TrainTokenizer

__all__ = [
    "BadRow",
    "Batches",
    "ChatData",
    "DocumentData",
    "Origin",
    "PreferenceData",
    "PydocData",
    "Reading",
    "Row",
    "TextData",
    "TrainTokenizer",
]
