from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import save_small_network
from parity import COMMON, OBJECTIVES, MakeModule, assert_parity, fit, full_tuning, global_batches, lora_tuning
from ranks import run_on_ranks
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


class Weighed(FineTuning):
    """Notes how many numbers of weights there are on this rank when its networks are built, and how many names."""

    numbers = 0

    def configure_model(self) -> None:
        super().configure_model()
        self.numbers = self.numbers or sum(one.numel() for one in self.built_network.parameters() if not one.is_meta)


def numbers_before_spreading(folder: Path, network: Path, fields: dict[str, Any]) -> int:
    def make() -> LanguageModule:
        return Weighed(Pretrained(str(network)), **COMMON)

    trainer = {"devices": 2, "strategy": ParallelStrategy(**fields), "use_distributed_sampler": False}
    module = fit(folder, make, global_batches(1, steps=4), **trainer)
    assert isinstance(module, Weighed)
    return module.numbers


@pytest.mark.parametrize(("fields", "elsewhere"), [({}, 0.0), ({"tensor": 2}, 1.0)])
def test_the_first_rank_loads_and_the_others_never_have_it_whole(
    tmp_path: Path, fields: dict[str, int], elsewhere: float
) -> None:
    network = save_small_network(tmp_path / "network")
    first, second = run_on_ranks(numbers_before_spreading, 2, tmp_path, network, fields)
    assert first > 10_000
    assert second == elsewhere * first


@dataclass
class BfloatTuning:
    network: Path

    def __call__(self) -> LanguageModule:
        return FineTuning(Pretrained(str(self.network)), LoRA(rank=4), **COMMON)


def test_the_dtype_is_that_of_the_first_ranks_weights(tmp_path: Path) -> None:
    network = save_small_network(tmp_path / "network")
    config = json.loads((network / "config.json").read_text())
    (network / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert_parity(tmp_path, BfloatTuning(network), strategy(), 2, steps=3)


@pytest.mark.parametrize("make", [full_tuning, lora_tuning])
@pytest.mark.parametrize(("fields", "num_data_ranks"), [({"replicate": 2}, 4), ({"tensor": 2}, 2)])
def test_products_of_degrees_are_one_process(
    tmp_path: Path, make: MakeModule, fields: dict[str, int], num_data_ranks: int
) -> None:
    assert_parity(tmp_path, make, strategy(**fields), 4, num_data_ranks)
