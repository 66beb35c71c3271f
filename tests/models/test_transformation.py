from __future__ import annotations

import pytest
from torch import nn

from lightllm.models import Record, Transformation, TransformationKind
from lightllm.models.transformation import Announcements, apply_transformations


class Noting(Transformation):
    """Writes its name on the network, and says how often it was there before."""

    kind = TransformationKind.MASK

    def __init__(self, name: str, of_kind: TransformationKind) -> None:
        super().__init__(name)
        self.kind = of_kind  # type: ignore[misc]

    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        network.register_module(f"{len(list(network.children()))}_{self.name}", nn.Identity())
        return None if self.kind == TransformationKind.MASK else {"times": 0 if record is None else record["times"] + 1}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_each_side_of_the_adapter_in_the_order_of_kinds(order: tuple[int, ...]) -> None:
    kinds = list(TransformationKind)
    registered = [Noting(kinds[index].name, kinds[index]) for index in order]
    network, records = nn.Sequential(), {"LOW_RANK": {"times": 4}}
    apply_transformations(network, registered, records, before_adapter=True)
    assert [name for name, _ in network.named_children()] == ["0_STRUCTURE", "1_LOW_RANK"]
    apply_transformations(network, registered, records, before_adapter=False)
    assert [name for name, _ in network.named_children()][2:] == ["2_MASK", "3_FAKE_QUANTIZATION"]
    assert records == {"STRUCTURE": {"times": 0}, "LOW_RANK": {"times": 5}, "FAKE_QUANTIZATION": {"times": 0}}


def test_those_of_one_kind_come_as_they_were_registered() -> None:
    network = nn.Sequential()
    registered = [Noting(name, TransformationKind.MASK) for name in ("b", "a")]
    apply_transformations(network, registered, {}, before_adapter=False)
    assert [name for name, _ in network.named_children()] == ["0_b", "1_a"]


def test_what_is_done_before_the_adapter_is_announced_when_it_is_done_for_the_first_time() -> None:
    announcements, told = Announcements(), []
    announcements.listen(lambda step, network: told.append((step, [name for name, _ in network.named_children()])))
    kinds = [TransformationKind.MASK, TransformationKind.LOW_RANK, TransformationKind.STRUCTURE]
    registered = [Noting(kind.name, kind) for kind in kinds]
    network = nn.Sequential()
    apply_transformations(network, registered, {}, before_adapter=True, announcements=announcements)
    apply_transformations(network, registered, {}, before_adapter=False, announcements=announcements)
    assert told == [("STRUCTURE", ["0_STRUCTURE"]), ("LOW_RANK", ["0_STRUCTURE", "1_LOW_RANK"])]
    records: dict[str, Record] = {"LOW_RANK": {"times": 0}}
    told.clear()
    apply_transformations(nn.Sequential(), registered, records, before_adapter=True, announcements=announcements)
    assert [step for step, _ in told] == ["STRUCTURE"]
