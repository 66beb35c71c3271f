from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from data_run import Print, print_of, ready, targets, text_data

from lightllm.datamodules.streaming_loader import StreamingLoader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def loader_of(folder: Path, workers: int, **fields: Any) -> StreamingLoader:
    reading = {"streaming": True} | fields.pop("reading", {})
    loader = ready(text_data(folder, reading=reading, num_workers=workers, **fields)).train_dataloader()
    assert isinstance(loader, StreamingLoader)
    return loader


def saved(place: dict[str, Any]) -> dict[str, Any]:
    """A place as a checkpoint brings it back."""
    file = io.BytesIO()
    torch.save(place, file)
    file.seek(0)
    again: dict[str, Any] = torch.load(file, weights_only=True)
    return again


def take(loader: StreamingLoader, count: int) -> list[Print]:
    """The next batches, over as many epochs as they take."""
    seen: list[Print] = []
    while len(seen) < count:
        for batch in loader:
            seen.append(print_of(batch))
            if len(seen) == count:
                break
    return seen


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_each_pass_is_an_epoch_with_all_documents(tmp_path: Path, workers: int) -> None:
    loader = loader_of(tmp_path, workers)
    first, second = list(loader), list(loader)
    assert targets(first) == targets(second)
    assert len({document for document, _ in targets(first)}) == 46
    assert [print_of(batch) for batch in first] != [print_of(batch) for batch in second]
    assert str(loader.origin(int(first[0]["document_ids"][0, 0]))).startswith(str(tmp_path))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_any_place_is_found_again(tmp_path: Path, workers: int) -> None:
    loader = loader_of(tmp_path, workers)
    places, seen, begins = [loader.state_dict()], [], [0]
    for _ in range(2):
        for batch in loader:
            seen.append(print_of(batch))
            places.append(saved(loader.state_dict()))
        begins.append(len(seen))
    # With workers, around the ends, where some workers have ended before others, and here and there.
    chosen = range(len(seen)) if workers == 0 else [*range(begins[1] - 3, begins[1] + 1), 3]
    for index in chosen:
        resumed = loader_of(tmp_path, workers)
        resumed.load_state_dict(places[index])
        assert take(resumed, len(seen) - index) == seen[index:], f"resumed behind {index} batches of {begins}"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_was_only_fetched_is_not_left_out(tmp_path: Path, workers: int) -> None:
    whole = take(loader_of(tmp_path, workers), 10)
    loader = loader_of(tmp_path, workers)
    loader.confirms_itself = False
    batches = iter(loader)
    for _ in range(5):
        next(batches)
        loader.confirm()
    next(batches)  # ahead of its time, as Lightning does
    resumed = loader_of(tmp_path, workers)
    resumed.load_state_dict(saved(loader.state_dict()))
    assert loader.position == resumed.position == 5
    assert take(resumed, 5) == whole[5:]


def test_an_epoch_is_used_up_when_its_last_batch_is(tmp_path: Path) -> None:
    whole = take(loader_of(tmp_path, 0), 40)
    loader = loader_of(tmp_path, 0)
    loader.confirms_itself = False
    count = sum(1 for _ in loader)
    for _ in range(count - 1):
        loader.confirm()
    for rest in (1, 0):
        resumed = loader_of(tmp_path, 0)
        resumed.load_state_dict(loader.state_dict())
        assert take(resumed, 5) == whole[count - rest : count - rest + 5]
        if rest:
            loader.confirm()


def test_an_epoch_cut_short_is_done_where_the_trainer_ends_it(tmp_path: Path) -> None:
    loader = loader_of(tmp_path, 0)
    loader.epoch_length = 3
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    resumed = loader_of(tmp_path, 0)
    resumed.epoch_length = 3
    resumed.load_state_dict(loader.state_dict())
    assert take(resumed, 3) == take(loader, 3)
    assert resumed.epoch == loader.epoch == 1


def test_place_of_another_rank_is_left_alone(tmp_path: Path) -> None:
    loader = loader_of(tmp_path, 0)
    take(loader, 4)
    place = loader.state_dict()
    assert place["rank"] == 0
    resumed = loader_of(tmp_path, 0)
    resumed.load_state_dict({**place, "rank": 1})
    assert resumed.position == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reading": {"window": 9}}, "window was 8 and is 9"),
        ({"workers": 1}, "num_workers was 0 and is 1"),
        ({"max_length": 16}, "max_length was 32 and is 16"),
    ],
)
def test_a_place_in_another_stream_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    place = loader_of(tmp_path, 0).state_dict()
    loader = loader_of(tmp_path, fields.pop("workers", 0), **fields)
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(place)


def test_passes_draw_none_of_the_runs_random_numbers(tmp_path: Path) -> None:
    loader = loader_of(tmp_path, 1)
    before = torch.get_rng_state()
    take(loader, 3)
    assert torch.equal(torch.get_rng_state(), before)
