"""What is fed: text in, batches out."""

from lightllm.datamodules.base import DocumentData
from lightllm.datamodules.chat import ChatData
from lightllm.datamodules.classification import ClassificationData
from lightllm.datamodules.episodes import EpisodeData
from lightllm.datamodules.pairs import PairData
from lightllm.datamodules.plan import Batches
from lightllm.datamodules.preference import PreferenceData
from lightllm.datamodules.preparation import Reading
from lightllm.datamodules.pydoc import PydocData
from lightllm.datamodules.rows import BadRow, Origin, Row
from lightllm.datamodules.sentence_pairs import SentencePairData
from lightllm.datamodules.text import TextData
from lightllm.datamodules.train_tokenizer import TrainTokenizer

__all__ = [
    "BadRow",
    "Batches",
    "ChatData",
    "ClassificationData",
    "DocumentData",
    "EpisodeData",
    "Origin",
    "PairData",
    "PreferenceData",
    "PydocData",
    "Reading",
    "Row",
    "SentencePairData",
    "TextData",
    "TrainTokenizer",
]
