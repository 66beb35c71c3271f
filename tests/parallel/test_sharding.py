from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny_objective import cut, documents, objective
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor

from lightllm.models.anatomy import blocks, input_embedding
from lightllm.parallel import Degrees, Sharding
from lightllm.parallel.degrees import device_mesh
from lightllm.parallel.sharding import reshard, shard


def shapes_within_a_step(sharding: Sharding) -> dict[str, Any]:
    module = objective()
    shard(module, [module.built_network], device_mesh(Degrees(shard=2), "cpu"), sharding)
    table, stack = input_embedding(module.built_network), blocks(module.built_network)
    seen: dict[str, Any] = {"local": sum(one.to_local().numel() for one in module.parameters())}  # type: ignore[attr-defined]

    def look(where: str) -> None:
        weight = stack[0].get_parameter("self_attn.q_proj.weight")
        seen[where] = (isinstance(table.weight, DTensor), isinstance(weight, DTensor), weight.dtype)

    stack[0].get_submodule("mlp").register_forward_hook(lambda *_: look("in the first block"))
    stack[1].get_submodule("mlp").register_forward_hook(lambda *_: look("in the second block"))
    look("before")
    module.validation_step(cut(documents(), [12])[0], 0)
    look("after")
    reshard(module)
    look("resharded")
    return seen


def test_weights_are_whole_where_they_are_used_only() -> None:
    whole = sum(one.numel() for one in objective().parameters())
    for seen in run_on_ranks(shapes_within_a_step, 2, Sharding()):
        assert seen["local"] <= whole // 2 + 100
        assert seen["before"][:2] == (True, True)
        assert seen["in the first block"][:2] == (False, False)
        assert seen["in the second block"][:2] == (False, True)  # the first one's are freed
        assert seen["resharded"][:2] == (True, True)


def test_weights_can_be_gathered_in_fewer_bits() -> None:
    for seen in run_on_ranks(
        shapes_within_a_step, 2, Sharding(parameter_dtype="bfloat16", reshard_after_forward=False)
    ):
        assert seen["in the first block"][2] == torch.bfloat16
        assert seen["in the second block"] == (False, False, torch.bfloat16)  # not freed either
        assert seen["before"][2] == seen["resharded"][2] == torch.float32


def test_what_torch_is_told() -> None:
    assert type(Sharding().offload("cuda")) is OffloadPolicy
    offload = Sharding(cpu_offload=True).offload("cuda")
    assert isinstance(offload, CPUOffloadPolicy)
    assert offload.pin_memory
    precision = Sharding(parameter_dtype="bfloat16", reduce_dtype="float32").precision()
    assert (precision.param_dtype, precision.reduce_dtype) == (torch.bfloat16, torch.float32)


def integers_stay_whole() -> None:
    module = objective()
    layer = blocks(module.built_network)[0].get_submodule("mlp.up_proj")
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    shard(module, [module.built_network], device_mesh(Degrees(shard=2), "cpu"), Sharding())
    assert not isinstance(layer.weight, DTensor)
    assert isinstance(module, FSDPModule)


def test_integers_stay_whole() -> None:
    run_on_ranks(integers_stay_whole, 2)


@pytest.mark.parametrize("name", ["reduce_dtype", "parameter_dtype"])
def test_auto_is_no_dtype(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 'auto'"):
        Sharding(**{name: "auto"})
