from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_encoders import ENCODERS, tiny_encoder, token_documents
from tiny_networks import tiny_llama
from torch import Tensor
from transformers import PreTrainedModel

from lightllm.batch import Document, TextBatch, pack_documents, pad_documents
from lightllm.models.anatomy import decoder
from lightllm.models.encoder_states import check_encoder, encoder_states, is_encoder


def alone(network: PreTrainedModel, document: Document, **named: Any) -> Tensor:
    """Hidden states of a document by itself, with the network's own positions and no mask."""
    with torch.no_grad():
        ids = torch.as_tensor(document.input_ids)[None, :-1]
        return decoder(network)(input_ids=ids, **named).last_hidden_state[0]


def of_document(states: Tensor, batch: TextBatch, document: int) -> Tensor:
    return states[batch["document_ids"] == document]


@pytest.mark.parametrize("attention", ["by_document", "eager"])
@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("packed", [False, True])
def test_documents_in_rows_are_as_they_are_alone(architecture: str, attention: Any, packed: bool) -> None:
    network = tiny_encoder(architecture, attention=attention)
    made = token_documents()
    batch = pack_documents([made[:3], made[3:]]) if packed else pad_documents(made)
    with torch.no_grad():
        states = encoder_states(network, batch)
    check_encoder(network, packed)
    for document in made:
        expected = alone(network, document)
        torch.testing.assert_close(of_document(states, batch, document.document_id), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_one_document_take_no_mask() -> None:
    network = tiny_encoder()
    given: list[Any] = []
    decoder(network).register_forward_pre_hook(lambda _, __, named: given.append(named), with_kwargs=True)
    ids = torch.full((10,), 7)
    encoder_states(network, pad_documents([Document(ids, [True] * 10, 0), Document(ids, [True] * 10, 1)]))
    assert given[0]["attention_mask"] is None


def test_pairs_of_texts_are_told_apart() -> None:
    network = tiny_encoder()
    document = token_documents(1)[0]
    batch = pad_documents([document])
    types = (torch.arange(batch["input_ids"].shape[1]) > 2).long()[None]
    with torch.no_grad():
        states = encoder_states(network, batch, types)
    torch.testing.assert_close(states[0], alone(network, document, token_type_ids=types))
    assert not torch.allclose(states[0], alone(network, document), atol=1e-3)
    one_type = tiny_encoder("roberta", type_vocab_size=1)
    with torch.no_grad():
        torch.testing.assert_close(encoder_states(one_type, batch, types)[0], alone(one_type, document))


def test_what_is_an_encoder() -> None:
    assert is_encoder(tiny_encoder())
    assert not is_encoder(tiny_llama(97))
    with pytest.raises(ValueError, match="LlamaForCausalLM do not see those behind them"):
        check_encoder(tiny_llama(97), packed=False)


def test_an_encoder_that_takes_no_such_mask_is_refused_packed_rows() -> None:
    network = tiny_encoder("bert")
    encoder = decoder(network)
    forward = encoder.forward

    def deaf(*positional: Any, attention_mask: Any = None, **named: Any) -> Any:
        return forward(*positional, **named)

    encoder.forward = deaf
    with pytest.raises(ValueError, match=r"set data\.batches\.mode to sorted"):
        check_encoder(network, packed=True)
    check_encoder(network, packed=False)


def test_adapted_encoders() -> None:
    made = token_documents()
    batch = pack_documents([made])
    network = tiny_encoder(task="encoder")
    plain = encoder_states(network, batch)
    adapted: Any = get_peft_model(network, LoraConfig(target_modules=["query"], init_lora_weights=False))
    assert not torch.allclose(encoder_states(adapted, batch), plain, atol=1e-3)
    check_encoder(adapted, packed=True)
    prompted: Any = get_peft_model(
        tiny_encoder(task="encoder"), PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
    )
    with pytest.raises(ValueError, match="not of BertModel: take LoRA or Full"):
        check_encoder(prompted, packed=False)
