from typing import get_args

import pytest
import torch

from lightllm.models import FromConfig, FromModule, Network, Pretrained
from lightllm.models.network import Dtype, torch_dtype


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
