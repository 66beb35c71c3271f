from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_texts import labelled_documents
from safetensors.torch import load_file
from tiny_encoders import encoder, tiny_encoder, wordpiece_tokenizer
from tiny_networks import tiny_llama, tiny_tokenizer
from transformers import AutoModel, AutoTokenizer

from lightllm.batch import Document, pad_documents
from lightllm.export import classifier_of, export
from lightllm.models.pooling import embeddings, remember_pooling
from lightllm.modules import PrototypicalNetwork, SequenceClassification

TEXTS = ["w1 w2p3", "a b c d e f", "w3"]


def as_sentence_transformers_does(folder: Path, texts: list[str]) -> torch.Tensor:
    """What the files of a folder say, followed step by step in plain transformers."""
    modules = json.loads((folder / "modules.json").read_text())
    kinds = [module["type"].rsplit(".", 1)[1] for module in modules]
    assert kinds[:2] == ["Transformer", "Pooling"]
    assert kinds[2:] in (["Normalize"], ["Dense"], ["Normalize", "Dense"])
    assert all((folder / module["path"]).is_dir() for module in modules)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    encoded.pop("token_type_ids", None)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**encoded).last_hidden_state
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == states.shape[-1]
    mask = encoded["attention_mask"]
    (mode,) = [name for name, chosen in pooling.items() if name.startswith("pooling_mode") and chosen]
    if mode == "pooling_mode_mean_tokens":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    elif mode == "pooling_mode_cls_token":
        pooled = states[:, 0]
    else:
        assert mode == "pooling_mode_lasttoken"
        pooled = states[torch.arange(len(texts)), mask.sum(1) - 1]
    if "Normalize" in kinds:
        pooled = torch.nn.functional.normalize(pooled, dim=1)
    if "Dense" in kinds:
        config = json.loads((folder / "3_Dense" / "config.json").read_text())
        assert config["activation_function"] == "torch.nn.modules.linear.Identity"
        weights = load_file(folder / "3_Dense" / "model.safetensors")
        assert list(weights["linear.weight"].shape) == [config["out_features"], config["in_features"]]
        pooled = torch.nn.functional.linear(pooled, weights["linear.weight"], weights["linear.bias"])
    return pooled


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_embeddings_from_the_folder_are_those_of_the_network(tmp_path: Path, pooling: Any, kind: str) -> None:
    if kind == "encoder":
        tokenizer: Any = wordpiece_tokenizer()
        network: Any = tiny_encoder(task="encoder", vocab_size=len(tokenizer))
    else:
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = "right"
        network = tiny_llama(len(tokenizer)).model
    remember_pooling(network, pooling, 5)
    export(network, tokenizer, tmp_path / "export")
    made = []
    for index, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=5)["input_ids"]
        made.append(Document([*ids, 0], [True] * (len(ids) + 1), index))
    with torch.no_grad():
        vectors, _ = embeddings(network, pad_documents(made), pooling, bidirectional=kind == "encoder")
    expected = torch.nn.functional.normalize(vectors, dim=1)
    found = as_sentence_transformers_does(tmp_path / "export", TEXTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of another package's imports
def test_sentence_transformers_loads_the_folder(tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    network = tiny_encoder(task="encoder", vocab_size=len(wordpiece_tokenizer()))
    remember_pooling(network, "mean", 5)
    export(network, wordpiece_tokenizer(), tmp_path / "export")
    loaded = package.SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert loaded.max_seq_length == 5
    found = loaded.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, as_sentence_transformers_does(tmp_path / "export", TEXTS))


def objective_with_classes(kind: str) -> Any:
    tokenizer = wordpiece_tokenizer()
    source = encoder(vocab_size=len(tokenizer))
    torch.manual_seed(0)
    if kind == "classification":
        module: Any = SequenceClassification(source)
    else:
        module = PrototypicalNetwork(source, distance=kind, scale=0.3)  # type: ignore[arg-type]
    module.classes = ["a", "b", "c", "d"]
    module.configure_model()
    if kind == "classification":
        torch.nn.init.normal_(module.classifier.weight)
        torch.nn.init.normal_(module.classifier.bias)
    else:
        shots = labelled_documents(9, vocabulary=len(tokenizer))
        module.adapt([pad_documents(shots)], num_classes=4)  # of the last there are none
    return module.eval()


@pytest.mark.parametrize("kind", ["classification", "euclidean", "cosine"])
def test_scores_of_classes_from_the_folder_are_those_of_the_objective(tmp_path: Path, kind: str) -> None:
    module, tokenizer = objective_with_classes(kind), wordpiece_tokenizer()
    export(module.built_network, tokenizer, tmp_path / "export", classifier=classifier_of(module))
    assert json.loads((tmp_path / "export" / "classes.json").read_text()) == ["a", "b", "c", "d"]
    made = []
    for index, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        made.append(Document([*ids, index], [*[False] * len(ids), True], index))
    with torch.no_grad():
        scores = module(pad_documents(made))
        scores = scores if kind == "classification" else module.scores(scores, module.prototypes)
    found = as_sentence_transformers_does(tmp_path / "export", TEXTS)
    torch.testing.assert_close(found.softmax(1), scores.softmax(1), rtol=1e-3, atol=1e-4)
    assert kind == "classification" or not found.softmax(1)[:, 3].any()


def test_classifiers_that_nobody_has_trained_are_left_out() -> None:
    untrained = PrototypicalNetwork(encoder())
    untrained.configure_model()
    assert classifier_of(untrained) is None
    assert classifier_of(SequenceClassification(encoder())) is None
    assert classifier_of(tiny_llama()) is None


def test_other_networks_get_no_such_files(tmp_path: Path) -> None:
    export(tiny_llama(), tiny_tokenizer(), tmp_path / "export")
    assert not (tmp_path / "export" / "modules.json").exists()
