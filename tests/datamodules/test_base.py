from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizer import byte_tokenizer
from data_run import (
    NotingBatches,
    Print,
    SaveIn,
    fit,
    in_two_processes,
    print_of,
    ready,
    targets,
    text_data,
    write_rows,
)
from lightning.pytorch import Callback, Trainer
from tiny_networks import tiny_llama
from torch.nn.functional import cross_entropy

from lightllm.batch import Document, TextBatch, pad_documents
from lightllm.callbacks import Checkpoint, RandomState
from lightllm.datamodules import Batches, DocumentData, Origin, Reading, Row, TextData, TrainTokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0"),  # no logger
]

HOOKS = ["on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end"]

RUNS: list[dict[str, Any]] = [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 17}]


class Letters(DocumentData):
    """A user's own data: no dataclass, a pair of documents a row."""

    documents_per_row = 2

    def __init__(self, shift: int = 0, **fields: Any) -> None:
        super().__init__(**fields)
        self.shift = shift

    def encode(self, row: Row) -> list[Document]:
        ids = [100 + self.shift, *row.values["text"].encode()]
        return [Document(ids, [True] * len(ids)), Document(ids[::-1], [True] * len(ids))]


def letters(folder: Path, **fields: Any) -> Letters:
    reading = Reading(cache=str(folder / "cache"), val_fraction=0.2)
    return Letters(train=write_rows(folder), tokenizer=byte_tokenizer(), reading=reading, **fields)


def test_own_data_needs_encode_alone_and_its_attributes_count_in_the_cache(tmp_path: Path) -> None:
    data = letters(tmp_path)
    data.prepare_data()
    data.setup("fit")
    pairs = [
        documents // 2 for batch in data.train_dataloader() for documents in batch["document_ids"].unique().tolist()
    ]
    assert Counter(Counter(pair for pair in pairs if pair >= 0).values()) == {2: len(data.train_documents) // 2}
    assert len(data.train_documents) + len(data.val_documents) == 2 * 46
    shifted = letters(tmp_path, shift=1)
    shifted.prepare_data()
    shifted.setup("fit")
    assert data.train_documents[0].input_ids[0] == 100  # type: ignore[index]
    assert shifted.train_documents[0].input_ids[0] == 101  # type: ignore[index]
    assert len(list((tmp_path / "cache" / "tokens").glob("*/meta.json"))) == 2


def test_loss_is_the_same_however_documents_are_batched(tmp_path: Path) -> None:
    network = tiny_llama(300).eval()

    def loss(batches: Iterable[TextBatch]) -> float:
        total = 0.0
        for batch in batches:
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
            with torch.no_grad():
                logits = network(**inputs, use_cache=False).logits
            total += float(cross_entropy(logits.flatten(0, 1).double(), batch["labels"].flatten(), reduction="sum"))
        return total

    ways = [
        Batches("packed", 128),
        Batches("sorted", 128),
        Batches("packed", documents=3),
        Batches("sorted", documents=3),
    ]
    data = [letters(tmp_path, max_length=24, batches=batches) for batches in ways]
    for one in data:
        one.prepare_data()
        one.setup("fit")
    documents = [
        pad_documents([data[0].train_documents[i]], None) for i in data[0].train_documents.examples.ravel().tolist()
    ]
    alone = loss({name: values[:, :24] for name, values in document.items()} for document in documents)  # type: ignore[misc]
    assert data[0].statistics["train"].num_truncated > 0
    assert [loss(one.train_dataloader()) for one in data] == pytest.approx([alone] * len(ways), rel=1e-6)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("alone", [True, False])
def test_resumed_run_sees_what_the_whole_one_saw(
    tmp_path: Path, run: dict[str, Any], validate: bool, streaming: bool, alone: bool
) -> None:
    """From every hook that a checkpoint is saved in, with Lightning alone and with our callbacks."""

    def ours() -> list[Callback]:
        return [] if alone else [RandomState(), Checkpoint(every_n_train_steps=1000, dirpath=str(tmp_path / "own"))]

    def data() -> TextData:
        val = write_rows(tmp_path)[1] if validate else None
        return text_data(tmp_path, reading={"streaming": streaming}, val=val)

    whole = fit(data(), callbacks=[*ours(), SaveIn(tmp_path, HOOKS)], **run)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) > len(whole)
    for path in saved:
        done = int(path.stem.split("-")[1])
        if path.stem.startswith(HOOKS[0]) and 3 < done % 8 < 7:
            continue  # in the midst of an epoch, a few are enough
        if alone and not validate and not streaming and "max_steps" in run and path.stem.startswith(HOOKS[2]):
            continue  # Lightning trains one batch more in an epoch that has ended; our callbacks prevent it
        assert fit(data(), callbacks=ours(), resume=path, **run) == whole[done:], path.stem


@pytest.mark.parametrize("streaming", [False, True])
def test_resumed_run_with_workers_and_accumulation(tmp_path: Path, streaming: bool) -> None:
    run = {"max_epochs": 2, "accumulate_grad_batches": 2}

    def data() -> TextData:
        batches = Batches("sorted", documents=3)
        return text_data(tmp_path, batches, reading={"streaming": streaming}, num_workers=2)

    whole = fit(data(), callbacks=[SaveIn(tmp_path, ["on_train_batch_end", "on_train_epoch_end"])], **run)
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))
    half = len(whole) // 2
    near_the_end = [path for path in saved if abs(int(path.stem.split("-")[1]) - half) <= 2]
    assert len(near_the_end) >= 2
    for path in [saved[1], *near_the_end]:
        done = int(path.stem.split("-")[1])
        assert fit(data(), resume=path, **run) == whole[done:], path.stem


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("limit", [4, 0.5])
def test_resumed_run_whose_epochs_are_cut_short(tmp_path: Path, streaming: bool, limit: float) -> None:
    if streaming and isinstance(limit, float):
        pytest.skip("Lightning takes no share of a loader without length")
    run = {"max_epochs": 3, "limit_train_batches": limit}

    def data() -> TextData:
        return text_data(tmp_path, reading={"streaming": streaming})

    whole = fit(data(), callbacks=[SaveIn(tmp_path, HOOKS)], **run)
    assert len(whole) == 12
    for path in sorted(tmp_path.glob("*.ckpt")):
        assert fit(data(), resume=path, **run) == whole[int(path.stem.split("-")[1]) :], path.stem


def test_place_survives_a_module_that_asks_how_many_steps_there_are(tmp_path: Path) -> None:
    run = {"max_epochs": 2}
    whole = fit(text_data(tmp_path), callbacks=[SaveIn(tmp_path, HOOKS[:1])], **run)
    resumed = fit(text_data(tmp_path), NotingBatches(True), resume=tmp_path / "on_train_batch_end-3.ckpt", **run)
    assert resumed == whole[3:]


def test_resuming_with_other_batches_is_refused_before_training(tmp_path: Path) -> None:
    fit(text_data(tmp_path), callbacks=[SaveIn(tmp_path, HOOKS[:1])], max_steps=2, max_epochs=-1)
    module = NotingBatches()
    with pytest.raises(ValueError, match=r"can't be found again.*batches.tokens was 128 and is 64"):
        fit(
            text_data(tmp_path, Batches(tokens=64)), module, resume=tmp_path / "on_train_batch_end-1.ckpt", max_epochs=1
        )
    assert not module.seen


def test_overfitting_sees_the_same_batches_each_epoch(tmp_path: Path) -> None:
    seen = fit(text_data(tmp_path), overfit_batches=2, max_epochs=3)
    assert seen == seen[:2] * 3


def test_reloading_the_loader_goes_on_with_the_epochs(tmp_path: Path) -> None:
    whole = fit(text_data(tmp_path), max_epochs=3)
    assert fit(text_data(tmp_path), max_epochs=3, reload_dataloaders_every_n_epochs=1) == whole


def test_second_fit_begins_anew(tmp_path: Path) -> None:
    data = text_data(tmp_path)
    assert fit(data, max_epochs=1) == fit(data, max_epochs=1)


def test_validating_a_checkpoint_moves_no_place(tmp_path: Path) -> None:
    def data() -> TextData:
        return text_data(tmp_path, reading={"val_fraction": 0.2})

    whole = fit(data(), callbacks=[SaveIn(tmp_path, HOOKS[:1])], max_epochs=1)
    used, module = data(), NotingBatches()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
    trainer.validate(module, used, tmp_path / "on_train_batch_end-2.ckpt", verbose=False, weights_only=True)
    assert module.num_validated == len(used.val_dataloader())
    assert fit(used, max_epochs=1) == whole


def test_data_goes_to_a_worker_without_its_trainer(tmp_path: Path) -> None:
    data = text_data(tmp_path)
    fit(data, max_epochs=1)
    again = pickle.loads(pickle.dumps(data))
    assert again.trainer is None
    row = Row({"text": "abc"}, Origin("f", 1))
    assert again.encode(row) == data.encode(row)


def test_stages_get_their_documents(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path)
    data = ready(text_data(tmp_path, val=second, test=first))
    assert data.describe_document("val", 3) == f"{second}:4"
    assert data.describe_document("test", 3) == data.describe_document("predict", 3) == f"{first}:4"
    assert data.num_train_batches == len(data.train_dataloader())  # type: ignore[arg-type]
    assert targets(data.test_dataloader()) == targets(data.predict_dataloader())  # type: ignore[arg-type]
    assert ready(text_data(tmp_path)).val_dataloader() == []
    assert text_data(tmp_path).num_train_batches is None
    assert ready(text_data(tmp_path, reading={"streaming": True})).num_train_batches is None


def test_an_excerpt_is_the_validation_data_or_some_of_it_and_moves_no_place(tmp_path: Path) -> None:
    data = ready(text_data(tmp_path, reading={"val_fraction": 0.3}))
    place, numbers = data.state_dict(), torch.get_rng_state()
    assert targets(data.excerpt("val")) == targets(data.val_dataloader())
    few = data.excerpt("val", 5)
    documents = {number for batch in few for number in batch["document_ids"].unique().tolist() if number >= 0}
    assert documents == set(data.val_documents.spread(5).examples.flatten().tolist())
    assert len(documents) == 5
    everything = targets(data.val_dataloader())
    assert all(count <= everything[target] for target, count in targets(few).items())
    assert data.state_dict() == place
    assert torch.equal(torch.get_rng_state(), numbers)
    assert data.excerpt("test") == []


@pytest.mark.parametrize("mode", ["packed", "sorted"])
def test_calibration_draws_training_documents_without_padding_and_moves_no_place(tmp_path: Path, mode: Any) -> None:
    data = ready(text_data(tmp_path, Batches(mode, tokens=128), reading={"val_fraction": 0.3}))
    loader = iter(data.train_dataloader())
    next(loader)
    place, numbers, following = data.state_dict(), torch.get_rng_state(), [print_of(batch) for batch in loader]
    data.load_state_dict(place)
    drawn = data.calibration_batches(7)
    assert data.state_dict() == place
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [print_of(batch) for batch in data.train_dataloader()] == following
    assert sum(int((batch["position_ids"] == 0).sum()) for batch in drawn) == 7
    train = set(data.train_documents.examples.flatten().tolist())
    for batch in drawn:
        assert len(batch["input_ids"]) == 1
        assert set(batch["document_ids"].unique().tolist()) <= train, "neither padding nor validation data"
    everything = targets(ready(text_data(tmp_path, reading={"val_fraction": 0.3})).train_dataloader())
    assert all(count <= everything[target] for target, count in targets(drawn).items())
    assert [print_of(batch) for batch in data.calibration_batches(7)] == [print_of(batch) for batch in drawn]
    assert [print_of(batch) for batch in data.calibration_batches(7, seed=1)] != [print_of(batch) for batch in drawn]


def test_calibration_is_refused_where_there_is_nothing_to_draw_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"these are a stream.* set data\.reading\.streaming to false"):
        ready(text_data(tmp_path, reading={"streaming": True})).calibration_batches(4)
    with pytest.raises(ValueError, match="0 documents are none"):
        ready(text_data(tmp_path)).calibration_batches(0)


def test_tokenizer_is_the_networks_unless_it_is_named(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "network")
    (tmp_path / "network" / "config.json").write_text('{"model_type": "llama"}')
    data, module = text_data(tmp_path), NotingBatches()
    data.tokenizer, module.tokenizer_source = None, str(tmp_path / "network")
    with pytest.raises(RuntimeError, match="call them first"):
        _ = data.loaded_tokenizer
    seen = fit(data, module, max_epochs=1)
    assert seen == fit(text_data(tmp_path), max_epochs=1)
    trained = text_data(tmp_path)
    trained.tokenizer = TrainTokenizer(270)
    assert len(ready(trained).loaded_tokenizer) == 270


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "train: no documents in .*rows.jsonl: 0 rows, 0 of them bad, and 0 documents"),
        (['{"text": "good"}', "{broken"], r"train: 1 of 2 rows can't be used:\n  .*rows.jsonl:2: broken JSON"),
        (['{"body": "x"}'], r"rows.jsonl:1: no field 'text' \(it has 'body'\)"),
        (['{"text": ""}'], "rows.jsonl:1: the field 'text' is empty"),
        (['{"text": "x"}', "", '{"text": "y"}'], "rows.jsonl:2: empty line"),
        (['{"text": "\\ud800"}'], "rows.jsonl:1: invalid Unicode"),
        ([b'{"text": "\xff"}'], "rows.jsonl:1: invalid UTF-8: byte 0xff at position 11"),
    ],
)
def test_faults_of_the_data_stop_before_the_first_step(tmp_path: Path, lines: list[Any], message: str) -> None:
    path, module = tmp_path / "rows.jsonl", NotingBatches()
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    data = TextData(str(path), tokenizer=byte_tokenizer(), reading=Reading(cache=str(tmp_path / "cache")))
    with pytest.raises(ValueError, match=message):
        fit(data, module, max_epochs=1)
    assert not module.seen


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batches": Batches(tokens=31)}, "batches.tokens is 31, but a row may take 32 positions"),
        ({"reading": {"val_fraction": 2.0}}, "reading.val_fraction is 2.0"),
        ({"val": "nowhere.jsonl"}, "data.val: no such file or folder: nowhere.jsonl"),
    ],
)
def test_faults_of_the_fields_stop_before_the_first_step(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    module = NotingBatches()
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(text_data(tmp_path, **fields), module, max_epochs=1)
    assert not module.seen


def test_skipped_rows_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{broken\n{"text": "better"}\n')
    reading = Reading("skip", cache=str(tmp_path / "cache"), val_fraction=0)
    data = TextData(str(path), tokenizer=byte_tokenizer(), reading=reading)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        ready(data)
    assert data.statistics["train"].num_bad_rows == 1
    assert "1 bad row skipped" in caplog.text
    assert data.describe_document("train", 1) == f"{path}:3"


def share(folder: Path, rank: int, run: dict[str, Any], resume_at: list[int], **fields: Any) -> list[list[Print]]:
    """What one of two processes sees in a run, and in runs resumed from it."""
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", **run}
    seen = [fit(text_data(folder, **fields), callbacks=[SaveIn(folder, HOOKS[:1])], **options)]
    for done in resume_at:
        seen.append(fit(text_data(folder, **fields), resume=folder / f"on_train_batch_end-{done}.ckpt", **options))
    return seen


def test_two_processes_share_every_epoch_and_resume(tmp_path: Path) -> None:
    data = ready(text_data(tmp_path))
    half = len(data.train_dataloader()) // 2  # type: ignore[arg-type]
    places = [1, half, half + 1]
    ranks = in_two_processes(lambda rank: share(tmp_path, rank, {"max_epochs": 2}, places))
    whole = [rank[0] for rank in ranks]
    assert len(whole[0]) == len(whole[1]) == 2 * half
    documents = data.train_documents
    expected = Counter[int]()
    for document, length in zip(documents.examples.ravel(), documents.lengths.ravel(), strict=True):
        expected[int(document)] += int(length)
    for epoch in (slice(half), slice(half, None)):
        counts = Counter(document for rank in whole for _, ids in rank[epoch] for document in ids)
        del counts[-1]
        assert counts == expected
    for index, done in enumerate(places, 1):
        assert [rank[index] for rank in ranks] == [rank[done:] for rank in whole]


def test_two_processes_stream_different_windows_and_resume(tmp_path: Path) -> None:
    run = {"max_epochs": -1, "max_steps": 14}
    ranks = in_two_processes(lambda rank: share(tmp_path, rank, run, [9], reading={"streaming": True}, num_workers=1))
    first = [{document for _, documents in rank[0][:4] for document in documents} - {-1} for rank in ranks]
    assert not first[0] & first[1]
    assert all(rank[1] == rank[0][9:] for rank in ranks)
