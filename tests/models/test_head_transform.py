from __future__ import annotations

import pytest
import torch
from tiny_encoders import ENCODERS, tiny_encoder
from tiny_networks import token_rows
from torch import nn

from lightllm.models.anatomy import apply_head, check_head, decoder, output_head
from lightllm.models.head_transform import states_for_head


@pytest.mark.parametrize("architecture", ENCODERS)
def test_head_on_transformed_states_gives_the_networks_logits(architecture: str) -> None:
    network = tiny_encoder(architecture)
    check_head(network, states_for_head)
    rows = token_rows(97, rows=2, length=9)
    with torch.no_grad():
        expected = network(input_ids=rows).logits
        hidden = decoder(network)(input_ids=rows).last_hidden_state
        whole = apply_head(states_for_head(network, hidden), output_head(network))
        some = apply_head(states_for_head(network, hidden[:, 3]), output_head(network))
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some, expected[:, 3], rtol=1e-5, atol=1e-5)


def test_the_networks_encoder_is_in_its_place_afterwards_and_gradients_flow() -> None:
    network = tiny_encoder()
    encoder, names = decoder(network), list(network.state_dict())
    hidden = torch.randn(4, 32, requires_grad=True)
    states_for_head(network, hidden).sum().backward()
    assert decoder(network) is encoder
    assert list(network.state_dict()) == names
    assert hidden.grad is not None
    assert network.cls.predictions.transform.dense.weight.grad is not None
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_no_positions_give_no_states() -> None:
    network = tiny_encoder()
    assert states_for_head(network, torch.zeros(0, 32)).shape == (0, 32)


def test_a_network_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="BertModel has no head"):
        states_for_head(tiny_encoder(task="encoder"), torch.zeros(2, 32))


def test_a_head_that_does_something_else_is_noticed() -> None:
    network = tiny_encoder()
    network.cls.register_forward_hook(lambda _, __, logits: logits * 1.1)
    with pytest.raises(ValueError, match="BertForMaskedLM makes its logits in a way"):
        check_head(network, states_for_head)


def test_an_encoder_stays_though_the_head_fails() -> None:
    network = tiny_encoder()
    encoder = decoder(network)

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    network.cls.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        states_for_head(network, torch.zeros(2, 32))
    assert decoder(network) is encoder
    assert isinstance(network.get_output_embeddings(), nn.Linear)
    assert not network.get_output_embeddings()._forward_pre_hooks
