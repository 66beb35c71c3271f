from __future__ import annotations

import pytest
from own_networks import Gru, Transformer
from tiny_networks import tiny_tokenizer

from lightllm.models import BuildRequest, FromModule, QLoRA
from lightllm.models.anatomy import OwnNetwork, vocabulary_size


def test_a_module_is_made_for_the_vocabulary() -> None:
    network = FromModule(Gru, head="out", tokenizer="gpt2")
    assert network.tokenizer_source == "gpt2"
    assert not network.restorable
    tokenizer = tiny_tokenizer()
    built = network.build(BuildRequest("causal", tokenizer))
    assert isinstance(built, OwnNetwork)
    assert isinstance(built.module, Gru)
    assert vocabulary_size(built) == len(tokenizer) == built.module.out.out_features
    other = FromModule(lambda vocab: Transformer(vocab, width=8)).build(BuildRequest("causal", tokenizer))
    assert isinstance(other, OwnNetwork)
    assert other.head == "lm_head"
    assert FromModule(Gru).tokenizer_source is None


def test_what_a_module_cannot_do_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"Gru has no module 'lm_head' for its head; its linear layers are \['out'\]"):
        FromModule(Gru).build(BuildRequest("causal", tokenizer))
    with pytest.raises(ValueError, match=r"takes its vocabulary size from the data's tokenizer: there is none"):
        FromModule(Gru, head="out").build(BuildRequest("causal", None))
    with pytest.raises(ValueError, match=r"cannot be loaded in 4 bits: take LoRA or Full instead of QLoRA"):
        FromModule(Gru, head="out").build(BuildRequest("causal", tokenizer, QLoRA().quantization))
