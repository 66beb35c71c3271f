from __future__ import annotations

import pytest
import torch
from parity import distillation, whole_parameters
from ranks import run_on_ranks
from tiny_objective import objective
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightllm.parallel import Degrees, Sharding
from lightllm.parallel.degrees import device_mesh
from lightllm.parallel.parallelize import Spread, give_room, networks_of, parallelize, put_in

CPU = torch.device("cpu")


def mesh(degrees: Degrees) -> DeviceMesh:
    return device_mesh(degrees.resolved(torch.distributed.get_world_size()), "cpu")


def test_only_what_has_no_content_is_given_room() -> None:
    module = objective()
    module.configure_model()
    module.metrics.update(*torch.ones(4))
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.built_network.get_submodule("model.layers.0").to("meta")
    give_room(module, CPU)
    found = module.state_dict()
    assert not any(tensor.is_meta for tensor in found.values())
    others = [name for name in kept if "layers.0." not in name]
    assert 0 < len(others) < len(kept)
    assert all(torch.equal(found[name], kept[name]) for name in others)
    assert module.metrics.compute()["loss"] == 1.0
    module.metrics.reset()
    module.metrics.update(*torch.full((4,), 2.0))
    assert module.metrics.num_targets == 2.0, "metrics begin where they began"


def from_other_weights(degrees: Degrees) -> tuple[dict[str, Tensor], int]:
    module = objective()
    if torch.distributed.get_rank() > 0:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
    parallelize(module, mesh(degrees), Spread(Sharding()), CPU)
    held = sum(one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in module.parameters())
    return whole_parameters(module), held


@pytest.mark.parametrize(
    ("degrees", "parts"), [(Degrees(), 4), (Degrees(tensor=2), 4), (Degrees(replicate=2, tensor=2), 2)]
)
def test_every_rank_gets_its_part_of_the_first_ones_weights(degrees: Degrees, parts: int) -> None:
    expected = whole_parameters(objective())
    total = sum(tensor.numel() for tensor in expected.values())
    for found, held in run_on_ranks(from_other_weights, 4, degrees):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert total / parts <= held < total / parts * 1.1


def test_a_teacher_is_a_network_too() -> None:
    module = distillation()
    module.configure_model()
    assert networks_of(module) == [module.network]
    module.teacher = objective().built_network  # type: ignore[assignment]
    assert networks_of(module) == [module.network, module.teacher]


def put_in_parts() -> list[bool]:
    full = torch.arange(12.0).view(4, 3)
    found = []
    for placement in (Shard(0), Shard(1), Replicate()):
        part = distribute_tensor(torch.zeros(4, 3), mesh(Degrees(shard=1, tensor=3))["tensor"], [placement])
        put_in(part, full)
        found.append(torch.equal(part.full_tensor(), full))
    plain = torch.zeros(4, 3)
    put_in(plain, full)
    return [*found, torch.equal(plain, full)]


def test_a_whole_tensor_is_put_in_parts() -> None:
    assert run_on_ranks(put_in_parts, 3) == [[True] * 4] * 3
