from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_run import Print, print_of, ready, targets, text_data

from lightllm.batch import pad_documents
from lightllm.datamodules import Batches
from lightllm.datamodules.loader import PlannedLoader, make_batch
from lightllm.datamodules.plan import Rules, plan_epoch

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def loader_of(folder: Path, batches: Batches | None = None, **fields: Any) -> PlannedLoader:
    loader = ready(text_data(folder, batches, **fields)).train_dataloader()
    assert isinstance(loader, PlannedLoader)
    return loader


def epochs(loader: PlannedLoader, count: int) -> list[list[Print]]:
    return [[print_of(batch) for batch in loader] for _ in range(count)]


@pytest.mark.parametrize("mode", ["packed", "sorted"])
@pytest.mark.parametrize("split", [True, False])
def test_a_batch_holds_the_planned_pieces(tmp_path: Path, mode: Any, split: bool) -> None:
    documents = ready(text_data(tmp_path)).train_documents
    lengths = documents.lengths if split else documents.lengths.clip(max=32)
    plan = plan_epoch(documents.examples, lengths, Rules(Batches(mode, 128), 32, 0, split), 0)
    whole = {int(i): pad_documents([documents[i]]) for i in documents.examples.ravel()}
    for index in range(len(plan)):
        planned = plan[index]
        batch = make_batch(documents.store, planned, 7)
        place = 0
        for row, (begin, end) in enumerate(zip(planned.rows, planned.rows[1:], strict=False)):
            column = 0
            for piece in range(begin, end):
                document, start, length = (int(a[piece]) for a in (planned.documents, planned.starts, planned.lengths))
                for name in ("input_ids", "labels", "document_ids"):
                    here = batch[name][row, column : column + length]  # type: ignore[literal-required]
                    assert torch.equal(here, whole[document][name][0, start : start + length])  # type: ignore[literal-required]
                positions = batch["position_ids"][row, column : column + length]
                assert torch.equal(positions, torch.arange(length))
                column += length
                place += 1
            assert (batch["input_ids"][row, column:] == 7).all()
        assert place == len(planned.documents)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_pass_is_an_epoch_of_its_own_and_has_every_target_once(tmp_path: Path, workers: int) -> None:
    loader = loader_of(tmp_path, num_workers=workers)
    documents = ready(text_data(tmp_path)).train_documents
    expected = targets(pad_documents([documents[int(i)]]) for i in documents.examples.ravel())
    passes = [list(loader) for _ in range(2)]
    assert [targets(batches) for batches in passes] == [expected, expected]
    assert len(passes[0]) == len(passes[1]) == len(loader)
    assert [print_of(batch) for batch in passes[0]] != [print_of(batch) for batch in passes[1]]


def test_order_is_a_matter_of_the_seed_and_not_of_the_workers(tmp_path: Path) -> None:
    whole = epochs(loader_of(tmp_path), 3)
    assert epochs(loader_of(tmp_path, num_workers=2), 3) == whole
    assert epochs(loader_of(tmp_path, seed=1), 3) != whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "batches", [Batches(tokens=128), Batches("sorted", tokens=128), Batches("sorted", documents=4)]
)
def test_any_place_is_found_again(tmp_path: Path, workers: int, batches: Batches) -> None:
    loader = loader_of(tmp_path, batches)
    places, seen = [loader.state_dict()], []
    for _ in range(2):
        for batch in loader:
            seen.append(print_of(batch))
            places.append(loader.state_dict())
    for index, place in list(enumerate(places))[:: 1 if workers == 0 else 7]:
        resumed = loader_of(tmp_path, batches, num_workers=workers)
        resumed.load_state_dict(place)
        rest = [print_of(batch) for batch in resumed]
        if len(rest) < len(seen) - index:
            rest += [print_of(batch) for batch in resumed]
        assert rest[: len(seen) - index] == seen[index:]
        assert resumed.epoch >= place["epoch"]


def test_iterators_that_give_nothing_change_nothing(tmp_path: Path) -> None:
    whole = [one for epoch in epochs(loader_of(tmp_path), 2) for one in epoch]
    loader = loader_of(tmp_path)
    iter(loader)
    first = iter(loader)
    taken = [print_of(next(first)) for _ in range(3)]
    resumed = loader_of(tmp_path)
    resumed.load_state_dict(loader.state_dict())
    iter(resumed)
    iter(resumed)
    assert taken + [print_of(batch) for batch in resumed] == whole[: len(loader)]
    # A pass that was broken off is an epoch, too.
    assert [print_of(batch) for batch in loader] == whole[len(loader) :]


def test_an_epoch_cut_short_is_done_where_the_trainer_ends_it(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    loader.epoch_length = 3
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    resumed = loader_of(tmp_path)
    resumed.epoch_length = 3
    resumed.load_state_dict(loader.state_dict())
    assert print_of(next(iter(resumed))) == print_of(next(iter(loader)))
    assert resumed.epoch == loader.epoch == 1


def test_without_reshuffling_all_epochs_are_the_first(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    loader.reshuffle = False
    first, second = epochs(loader, 2)
    assert first == second == epochs(loader_of(tmp_path), 1)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batches": Batches(tokens=64)}, "batches.tokens was 128 and is 64"),
        ({"batches": Batches("sorted", tokens=128)}, "batches.mode was 'packed' and is 'sorted'"),
        ({"reading": {"limit": 30}}, "documents was '46 documents of .*' and is '30 documents of .*'"),
    ],
)
def test_a_place_in_other_batches_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    place = loader_of(tmp_path).state_dict()
    loader = loader_of(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"can't be found again, because the batches would be others: .*{message}"):
        loader.load_state_dict(place)


def test_passes_draw_none_of_the_runs_random_numbers(tmp_path: Path) -> None:
    loader = loader_of(tmp_path, num_workers=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_is_the_same_each_time(tmp_path: Path) -> None:
    data = ready(text_data(tmp_path, reading={"val_fraction": 0.3}))
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    first, second = ([print_of(batch) for batch in loader] for _ in range(2))
    assert first == second
    assert len(first) == len(loader)
    expected = targets(pad_documents([data.val_documents[int(i)]]) for i in data.val_documents.examples.ravel())
    assert targets(loader) == expected
    document = int(data.val_documents.examples[0, 0])
    assert str(loader.origin(document)) == data.describe_document("val", document)
