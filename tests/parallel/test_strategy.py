from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import save_small_network
from parity import COMMON, OBJECTIVES, MakeModule, assert_parity, full_tuning, lora_tuning
from tiny_objective import scratch

from lightllm.models import DoRA, LoRA, Pretrained, QLoRA
from lightllm.modules import FineTuning, LanguageModule
from lightllm.parallel import ParallelStrategy, Sharding

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def strategy(**fields: Any) -> Any:
    return lambda: ParallelStrategy(**fields)


@pytest.mark.parametrize("make", OBJECTIVES)
def test_two_shards_are_one_process(tmp_path: Path, make: MakeModule) -> None:
    assert_parity(tmp_path, make, strategy(), 2)


@pytest.mark.parametrize("make", OBJECTIVES)
def test_two_tensor_ranks_are_one_process(tmp_path: Path, make: MakeModule) -> None:
    assert_parity(tmp_path, make, strategy(tensor=2), 2, 1)


def recomputing() -> LanguageModule:
    return FineTuning(scratch(), LoRA(rank=4), gradient_checkpointing=True, **COMMON)


def dora_tuning() -> LanguageModule:
    return FineTuning(scratch(), DoRA(rank=4), **COMMON)


@dataclass
class QLoraTuning:
    network: Path

    def __call__(self) -> LanguageModule:
        return FineTuning(Pretrained(str(self.network)), QLoRA(rank=4, compute_dtype="float32"), **COMMON)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (recomputing, {}),
        (recomputing, {"shard": 1, "tensor": 2}),
        (dora_tuning, {}),
        (full_tuning, {"sharding": Sharding(cpu_offload=True)}),
        (full_tuning, {"sharding": Sharding(reshard_after_forward=False)}),
        (full_tuning, {"replicate": 2, "shard": 1}),
    ],
)
def test_what_else_is_one_process(tmp_path: Path, make: MakeModule, fields: dict[str, Any]) -> None:
    assert_parity(tmp_path, make, strategy(**fields), 2, 1 if "tensor" in fields else 2, steps=3)


def test_4_bit_weights_stay_whole_beside_sharded_ones(tmp_path: Path) -> None:
    network = save_small_network(tmp_path / "network")
    assert_parity(tmp_path, QLoraTuning(network), strategy(), 2, steps=3)


@pytest.mark.parametrize("make", [full_tuning, lora_tuning])
@pytest.mark.parametrize(("fields", "num_data_ranks"), [({"replicate": 2}, 4), ({"tensor": 2}, 2)])
def test_products_of_degrees_are_one_process(
    tmp_path: Path, make: MakeModule, fields: dict[str, int], num_data_ranks: int
) -> None:
    assert_parity(tmp_path, make, strategy(**fields), 4, num_data_ranks)
