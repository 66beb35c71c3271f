from __future__ import annotations

import pytest
from lightning.pytorch.strategies import DDPStrategy

from lightllm.parallel import ParallelStrategy
from lightllm.parallel.spreading import require_whole_network


def test_a_part_that_needs_all_of_the_network_says_so() -> None:
    require_whole_network(DDPStrategy(), "SampleGenerations", "has the network write")
    with pytest.raises(ValueError, match="SampleGenerations has the network write, and under ParallelStrategy no rank"):
        require_whole_network(ParallelStrategy(), "SampleGenerations", "has the network write")
