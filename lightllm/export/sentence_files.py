"""What sentence-transformers reads beside a Hugging Face folder: that hidden states are pooled, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightllm.models.anatomy import max_positions
from lightllm.models.pooling import embedding_width, remembered_pooling

_MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
"""The names of poolings in a pooling's configuration."""

_OTHER_MODES = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


def write_sentence_files(network: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Add to an exported folder what makes it a model of sentence-transformers, if the network embeds texts.

    Embeddings there have length 1; their cosines are those that were trained.

    Args:
        network: What was exported.
        tokenizer: Its tokenizer.
        folder: The exported folder.
    """
    found = remembered_pooling(network)
    if found is None:
        return
    pooling, length = found
    limits = [length, tokenizer.model_max_length, max_positions(network)]
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    _write(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
    )
    longest = min(limit for limit in limits if limit is not None)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}})
    modes = {f"pooling_mode_{name}": name == _MODES[pooling] for name in (*_MODES.values(), *_OTHER_MODES)}
    width = embedding_width(network)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes, "include_prompt": True})
    (folder / "2_Normalize").mkdir()


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
