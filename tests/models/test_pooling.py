from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_architectures import tiny_architecture
from tiny_encoders import tiny_encoder, token_documents
from tiny_networks import tiny_llama
from torch import nn

from lightllm.batch import TextBatch, pack_documents, pad_documents
from lightllm.models.anatomy import decoder
from lightllm.models.pooling import (
    embedding_width,
    embeddings,
    pool,
    prepare_to_embed,
    remember_pooling,
    remembered_pooling,
)

PLAIN: dict[str, Any] = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
}


def batches() -> list[TextBatch]:
    made = token_documents()
    shuffled = [made[index] for index in (3, 0, 5, 1, 4, 2)]
    return [pad_documents(made), pad_documents(shuffled), pack_documents([shuffled[:4], shuffled[4:]], 50)]


@pytest.mark.parametrize("pooling", list(PLAIN))
@pytest.mark.parametrize("batch", batches())
def test_each_document_becomes_a_vector(pooling: Any, batch: TextBatch) -> None:
    states = torch.randn(*batch["input_ids"].shape, 5)
    vectors, ids = pool(states, batch, pooling)
    assert ids.tolist() == list(range(6))
    for document in range(6):
        own = states[batch["document_ids"] == document]
        torch.testing.assert_close(vectors[document], PLAIN[pooling](own))


@pytest.mark.parametrize("pooling", list(PLAIN))
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_embeddings_are_those_of_texts_alone(pooling: Any, kind: str) -> None:
    network: nn.Module = tiny_encoder(task="encoder") if kind == "encoder" else tiny_llama(97).model
    made = token_documents()
    for batch in (pad_documents(made), pack_documents([made[:3], made[3:]])):
        with torch.no_grad():
            vectors, _ = embeddings(network, batch, pooling, bidirectional=kind == "encoder")
            for document in made:
                ids = torch.as_tensor(document.input_ids)[None, :-1]
                alone = decoder(network)(input_ids=ids).last_hidden_state[0]
                torch.testing.assert_close(vectors[document.document_id], PLAIN[pooling](alone), rtol=1e-4, atol=1e-4)


def test_sums_of_half_precision_are_wide() -> None:
    batch = pad_documents(token_documents())
    states = torch.randn(*batch["input_ids"].shape, 4).bfloat16()
    assert pool(states, batch, "mean").vectors.dtype == torch.float32
    assert pool(states, batch, "cls").vectors.dtype == torch.bfloat16


def test_how_a_network_pools_is_in_its_configuration(tmp_path: Any) -> None:
    network = tiny_encoder(task="encoder")
    assert remembered_pooling(network) is None
    remember_pooling(network, "cls", 128)
    network.save_pretrained(tmp_path)
    assert remembered_pooling(type(network).from_pretrained(tmp_path)) == ("cls", 128)


def test_networks_are_prepared_to_embed() -> None:
    bert = tiny_encoder(task="encoder")
    assert prepare_to_embed(bert, packed=True)
    assert not any(parameter.requires_grad for parameter in bert.pooler.parameters())
    assert all(parameter.requires_grad for parameter in bert.encoder.parameters())
    assert not prepare_to_embed(tiny_llama(97).model, packed=True)
    assert embedding_width(bert) == 32
    with pytest.raises(ValueError, match=r"set data\.batches\.mode to sorted"):
        prepare_to_embed(tiny_architecture("bloom").transformer, packed=True)
