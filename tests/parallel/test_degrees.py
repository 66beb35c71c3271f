from __future__ import annotations

import pytest
from ranks import run_on_ranks

from lightllm.parallel import Degrees
from lightllm.parallel.degrees import AXES, device_mesh


def test_shards_are_what_the_other_degrees_leave() -> None:
    degrees = Degrees(replicate=2, tensor=3).resolved(24)
    assert degrees == Degrees(replicate=2, shard=4, tensor=3, pipeline=1)
    assert degrees.sizes == (1, 2, 4, 3)
    assert degrees.num_data_ranks == 8
    assert Degrees(shard=1, pipeline=2, tensor=2).resolved(4).num_data_ranks == 1


def test_degrees_that_do_not_fit_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"shard 3 x tensor 2 does not make the 4 ranks .* \(6\)"):
        Degrees(shard=3, tensor=2).resolved(4)
    with pytest.raises(ValueError, match="shard auto x tensor 3 does not make the 4 ranks that there are: "):
        Degrees(tensor=3).resolved(4)
    with pytest.raises(ValueError, match="does not make the 2 ranks"):
        Degrees(tensor=4).resolved(2)
    with pytest.raises(ValueError, match="tensor is 0: a degree is at least 1"):
        Degrees(tensor=0)


def places() -> dict[str, list[int]]:
    mesh = device_mesh(Degrees(tensor=2).resolved(4), "cpu")
    return {axis: mesh[axis].mesh.tolist() for axis in AXES}


def test_neighbours_are_in_one_tensor_group_and_axes_of_one_are_there_too() -> None:
    found = run_on_ranks(places, 4)
    assert [place["tensor"] for place in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [place["shard"] for place in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [place["pipeline"] for place in found] == [place["replicate"] for place in found] == [[0], [1], [2], [3]]
