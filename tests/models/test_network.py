from pathlib import Path
from typing import get_args

import pytest
import torch
from command_line import save_small_network

from lightllm.models import BuildRequest, FromConfig, FromModule, Network, Pretrained
from lightllm.models.network import Dtype, torch_dtype, weights_come_later


def test_dtypes_are_torchs() -> None:
    assert {name: torch_dtype(name) for name in get_args(Dtype)} == {
        "auto": "auto",
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }


def test_a_network_is_an_interface() -> None:
    assert Network.__abstractmethods__ == {"build", "restorable", "tokenizer_source"}
    for leaf in (FromConfig, FromModule, Pretrained):
        assert not leaf.__abstractmethods__
    with pytest.raises(TypeError, match="abstract"):
        Network()  # type: ignore[abstract]


def test_networks_whose_weights_come_later_have_their_shapes_and_dtypes(tmp_path: Path) -> None:
    save_small_network(tmp_path)
    made: list[Network] = [FromConfig("llama-1m", {"vocab_size": 40}, "bfloat16"), Pretrained(str(tmp_path))]
    for network in made:
        whole = network.build(BuildRequest("causal", None))
        with weights_come_later(True):
            later = network.build(BuildRequest("causal", None))
        with weights_come_later(False):
            assert not any(one.is_meta for one in network.build(BuildRequest("causal", None)).parameters())
        assert all(one.is_meta for one in later.parameters())
        ours, theirs = ({name: (one.shape, one.dtype) for name, one in n.named_parameters()} for n in (later, whole))
        assert ours == theirs
        assert later.generation_config.to_dict() == whole.generation_config.to_dict()  # type: ignore[operator, union-attr]
