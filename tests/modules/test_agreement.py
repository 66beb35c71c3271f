from __future__ import annotations

import pytest
import torch
from tiny_networks import POSITIONS, tiny_llama, tiny_tokenizer

from lightllm.modules.agreement import check_agreement


def test_what_does_not_belong_together_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    check_agreement(tiny_llama(len(tokenizer)), tokenizer, POSITIONS, packed=True)
    with pytest.raises(ValueError, match=rf"has {len(tokenizer)} tokens and the network embeds {len(tokenizer) - 1}"):
        check_agreement(tiny_llama(len(tokenizer) - 1), tokenizer, None, packed=False)
    with pytest.raises(ValueError, match=f"max_length is {POSITIONS + 1}, but the network has positions for"):
        check_agreement(tiny_llama(), None, POSITIONS + 1, packed=False)


def test_nothing_is_computed_without_weights() -> None:
    with torch.device("meta"):
        network = tiny_llama()
    check_agreement(network, None, None, packed=True)
