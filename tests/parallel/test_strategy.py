from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parity import OBJECTIVES, MakeModule, assert_parity, full_tuning, lora_tuning, pretraining

from lightllm.parallel import ParallelStrategy

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def strategy(**fields: Any) -> Any:
    return lambda: ParallelStrategy(**fields)


@pytest.mark.parametrize("make", OBJECTIVES)
def test_two_shards_are_one_process(tmp_path: Path, make: MakeModule) -> None:
    assert_parity(tmp_path, make, strategy(), 2)


@pytest.mark.parametrize("make", OBJECTIVES)
def test_two_tensor_ranks_are_one_process(tmp_path: Path, make: MakeModule) -> None:
    assert_parity(tmp_path, make, strategy(tensor=2), 2, 1)


@pytest.mark.parametrize("make", [pretraining, full_tuning, lora_tuning])
@pytest.mark.parametrize(("fields", "num_data_ranks"), [({"replicate": 2}, 4), ({"tensor": 2}, 2)])
def test_products_of_degrees_are_one_process(
    tmp_path: Path, make: MakeModule, fields: dict[str, int], num_data_ranks: int
) -> None:
    assert_parity(tmp_path, make, strategy(**fields), 4, num_data_ranks)
