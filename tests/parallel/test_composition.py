from __future__ import annotations

import pytest

from lightllm.compression.low_rank_network import LowRank
from lightllm.compression.masking import Masking
from lightllm.compression.rank_choice import RankChoice
from lightllm.models import Adapter, DoRA, Full, LoRA, Prefix, PromptTuning, QLoRA
from lightllm.parallel import Degrees
from lightllm.parallel.composition import check_composition


@pytest.mark.parametrize("adapter", [Full(), LoRA(), DoRA(), QLoRA(), Prefix(), PromptTuning()])
def test_every_adapter_can_be_sharded(adapter: Adapter) -> None:
    check_composition(Degrees(replicate=2), adapter, [])


@pytest.mark.parametrize("adapter", [Full(), LoRA()])
def test_some_can_be_split(adapter: Adapter) -> None:
    check_composition(Degrees(tensor=2), adapter, [])


@pytest.mark.parametrize("adapter", [DoRA(), QLoRA(), Prefix(), PromptTuning()])
def test_others_cannot(adapter: Adapter) -> None:
    with pytest.raises(ValueError, match=f"{type(adapter).__name__} .*: set trainer.strategy.init_args.tensor to 1"):
        check_composition(Degrees(tensor=2), adapter, [])


def test_masks_need_whole_matrices() -> None:
    with pytest.raises(ValueError, match=r"my_mask computes with whole matrices .*: train with strategy ddp"):
        check_composition(Degrees(), LoRA(), [Masking("my_mask", [])])


def test_layers_of_other_shapes_can_be_sharded_but_not_split() -> None:
    low_rank = LowRank("my_ranks", RankChoice(budget=0.5), [])
    check_composition(Degrees(), LoRA(), [low_rank])
    with pytest.raises(ValueError, match=r"my_ranks makes layers of other shapes .*: set tensor to 1"):
        check_composition(Degrees(tensor=2), LoRA(), [low_rank])
