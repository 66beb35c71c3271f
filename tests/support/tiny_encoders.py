"""Encoders of two layers, built through `FromConfig`, and documents for them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_architectures import small_fields
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightllm.batch import Document
from lightllm.models import BuildRequest, FromConfig
from lightllm.models.network import Attention, Task

WORDS = [f"w{index}" for index in range(10)]
PIECES = [f"##p{index}" for index in range(5)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [one for letter in "abcdefghijklmnopqrstuvwxyz.,!?" for one in (letter, f"##{letter}")]

MORE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "modernbert": {
        "local_attention": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "mpnet": {"pad_token_id": 1},
    "roberta": {"pad_token_id": 1},
}
"""Fields that an architecture needs beside the small ones."""

ENCODERS = ["albert", "bert", "distilbert", "electra", "modernbert", "mpnet", "roberta"]


def encoder(architecture: str = "bert", **fields: Any) -> FromConfig:
    """Two layers of width 32 without dropout."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if architecture == "distilbert":
        no_dropout = {"dropout": 0.0, "attention_dropout": 0.0}
    elif architecture == "modernbert":
        no_dropout = {}
    attention: Attention = fields.pop("attention", "by_document")
    fields = {**no_dropout, **MORE.get(architecture, {}), **fields}
    return FromConfig(architecture, small_fields(architecture, **fields), attention=attention)


def tiny_encoder(architecture: str = "bert", task: Task = "masked", **fields: Any) -> PreTrainedModel:
    """The built network in evaluation mode, whose biases are not zero."""
    torch.manual_seed(0)
    network = encoder(architecture, **fields).build(BuildRequest(task, None))
    assert isinstance(network, PreTrainedModel)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece of ten words, five pieces that go on with one, and letters, as BERT's is: `[CLS] … [SEP]`."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS, *PIECES, *LETTERS])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": SPECIAL[index] for name, index in names.items()}
    )


def token_documents(count: int = 6, seed: int = 1, vocabulary: int = 97) -> list[Document]:
    """Of 4 to 12 ordinary tokens, the last of which is not read."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    made = [torch.randint(5, vocabulary, (length,), generator=generator) for length in lengths]
    return [Document(ids, [True] * len(ids), index) for index, ids in enumerate(made)]
