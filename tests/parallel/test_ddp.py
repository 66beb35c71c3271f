"""Lightning's own `ddp` under our objectives: the same parameters as one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import OBJECTIVES, MakeModule, assert_parity, pretraining

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("make", OBJECTIVES)
def test_two_ranks_are_one_process(tmp_path: Path, make: MakeModule) -> None:
    assert_parity(tmp_path, make, lambda: "ddp", 2)


def test_four_ranks_are_one_process(tmp_path: Path) -> None:
    assert_parity(tmp_path, pretraining, lambda: "ddp", 4)
