"""What sentence-transformers reads beside a Hugging Face folder: that hidden states are pooled, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightllm.models.anatomy import max_positions
from lightllm.models.pooling import TextClassifier, embedding_width, remembered_pooling

_MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
"""The names of poolings in a pooling's configuration."""

_OTHER_MODES = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


def classifier_of(module: nn.Module) -> TextClassifier | None:
    """What an objective has learned to classify texts by; None if it is another objective, or has learned nothing yet.

    Args:
        module: A `LanguageModule`.
    """
    found = getattr(module, "text_classifier", None)
    assert found is None or isinstance(found, TextClassifier)
    return found


def write_sentence_files(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, classifier: TextClassifier | None = None
) -> None:
    """Add to an exported folder what makes it a model of sentence-transformers, if the network embeds texts.

    Embeddings there have length 1; their cosines are those that were trained. With a classifier, what a text is
    encoded as is the scores of its classes, whose names are in `classes.json`.

    Args:
        network: What was exported.
        tokenizer: Its tokenizer.
        folder: The exported folder.
        classifier: What the embeddings are classified by.
    """
    found = remembered_pooling(network)
    if found is None:
        return
    pooling, length = found
    limits = [length, tokenizer.model_max_length, max_positions(network)]
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if classifier is None or classifier.normalized:
        modules.append(("2_Normalize", "Normalize"))
    if classifier is not None:
        modules.append(("3_Dense", "Dense"))
        _write_classifier(classifier, folder)
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


def _write_classifier(classifier: TextClassifier, folder: Path) -> None:
    count, width = classifier.weight.shape
    fields = {"in_features": width, "out_features": count, "bias": True}
    _write(folder / "3_Dense" / "config.json", {**fields, "activation_function": "torch.nn.modules.linear.Identity"})
    weights = {"linear.weight": classifier.weight, "linear.bias": classifier.bias}
    tensors = {name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, folder / "3_Dense" / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "classes.json", classifier.classes)


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
